"""Router weights that choose experts uniformly, or as unevenly as Zipf's law says, on hidden states without a
pattern.

Rows of one length and at right angles give every expert the same chance when the normed hidden state x [H]
points anywhere: the scores are then independent and of variance 1. Unevenness needs a bias, which routers do
not have; so one coordinate of the hidden state is kept constant (embeddings hold it, no layer writes to it)
and the router's weight on it is the bias. The biases are found by simulation: raise what is chosen too seldom
until shares agree.

Legend: E experts, H hidden size, S the Zipf exponent: the share of the r-th expert is proportional to 1 /
r^S.
"""

import math

import torch
from torch import Tensor

from quant.errors import UsageError

_SAMPLES = 8192
_TURNS = 80
_RATE = 0.5


def zipf_shares(num_experts: int, exponent: float) -> Tensor:
    """Shares ``[E]`` of the experts from the most to the least used, summing to 1."""
    weights = torch.arange(1, num_experts + 1, dtype=torch.float64).pow(-exponent)
    return weights / weights.sum()


def zipf_biases(num_experts: int, top_k: int, exponent: float) -> Tensor:
    """Biases ``[E]`` on scores of variance 1 that put each expert among the ``top_k`` as often as is due.

    Raises UsageError where one expert's share would exceed 1 / ``top_k``, which no router can do.
    """
    shares = zipf_shares(num_experts, exponent)
    if float(shares[0]) * top_k > 0.98:
        raise UsageError(
            f"--zipf {exponent} gives the first of {num_experts} experts {float(shares[0]):.0%} of the "
            "choices, but one "
            f"of {top_k} choices per token is at most {1 / top_k:.0%}: use a smaller exponent"
        )
    scores = torch.randn(_SAMPLES, num_experts, generator=torch.Generator().manual_seed(1))
    biases = torch.zeros(num_experts)
    wanted = shares.float().log()
    floor = 0.5 / (_SAMPLES * top_k)
    for turn in range(_TURNS):
        raised = scores + biases
        chosen = raised.argmax(1) if top_k == 1 else raised.topk(top_k, dim=1).indices.flatten()
        found = torch.bincount(chosen, minlength=num_experts) / (_SAMPLES * top_k)
        biases += _RATE / (1 + turn / 20) * (wanted - found.clamp(min=floor).log())
        biases -= biases.mean()
    return biases


def router_rows(num_experts: int, hidden: int, generator: torch.Generator) -> Tensor:
    """Router weights ``[E, H]`` f32 whose scores on a normed hidden state have variance 1, column 0 zero."""
    rows = torch.randn(num_experts, hidden, generator=generator)
    rows[:, 0] = 0
    if num_experts < hidden:
        rows[:, 1:] = torch.linalg.qr(rows[:, 1:].t()).Q.t()
    lengths: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / lengths


def constant_for(hidden: int) -> float:
    """The size of the constant coordinate: 1/64 of the hidden state's energy at its start.

    More of it would shift what every layer computes for all tokens alike, and so where they are routed.
    """
    return math.sqrt(hidden) / 8
