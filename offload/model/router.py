"""What a MoE block of transformers routes by, for those who compute it by other means.

Which formula a router has is not told by names: the stock module is tried on a few random tokens beside each form that
the kernels have, with the numbers that its attributes hold.

Legend: T tokens, H hidden, E experts, k experts per token.
"""

import copy
import inspect
from dataclasses import dataclass
from itertools import product
from typing import Any, get_args

import torch
from torch import Tensor, nn

from quant.errors import CheckpointError
from quant.kernels.routing import RouterKind, Selection

_TOKENS = 64
_CORRECTION = "e_score_correction_bias"


@dataclass(frozen=True)
class Router:
    """``weight`` ``[E, H]``; ``bias`` ``[E]`` of the logits and ``correction`` ``[E]`` of what is chosen by, where
    there are any."""

    weight: Tensor
    selection: Selection
    top_k: int
    bias: Tensor | None = None
    correction: Tensor | None = None


def router_of(block: Any, known: Selection | None = None) -> Router:
    """The router of MoE block ``block``, which chooses by ``known`` if the caller has found that before.

    Raises CheckpointError for a router that none of our forms is.
    """
    stock = block.router if hasattr(block, "router") else block.gate
    linear = stock if hasattr(stock, "weight") else next(one for one in stock.modules() if type(one) is nn.Linear)
    bias, correction = getattr(linear, "bias", None), _correction(block)
    top_k = int(block.top_k if hasattr(block, "shared_expert") and hasattr(block, "router") else stock.top_k)
    return Router(
        linear.weight.data,
        known or selection_of(block),
        top_k,
        None if bias is None else bias.data,
        None if correction is None else correction.data.reshape(-1),
    )


def selection_of(block: Any) -> Selection:
    """What the router of MoE block ``block`` chooses by. Raises CheckpointError if none of our forms is it."""
    if hasattr(block, "router") and hasattr(block, "shared_expert"):  # Llama 4, whose router gives scores of all
        return Selection("sigmoid_input")
    stock = copy.deepcopy(block.router if hasattr(block, "router") else block.gate).cpu().float()
    generator = torch.Generator().manual_seed(0)
    correction = _correction(stock)
    outside = None if correction is not None else _correction(block)
    if outside is not None:
        correction = outside.detach().cpu().float().clone()
    with torch.no_grad():
        for values in (*stock.parameters(), *stock.buffers(), *([] if outside is None else [correction])):
            values.copy_(torch.randn(values.shape, generator=generator) * (0.1 if values is correction else 1.0))
        weight = max(stock.parameters(), key=Tensor.numel)
        x = torch.randn(_TOKENS, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        takes_correction = len(inspect.signature(stock.forward).parameters) > 1
        logits, weights, chosen = stock(x, correction) if takes_correction else stock(x)
    expected = torch.zeros(_TOKENS, weight.shape[0]).scatter(1, chosen, weights)
    for form in _forms(stock):
        mine, its = form.choose(logits, chosen.shape[1], None if correction is None else correction.reshape(-1))
        if torch.allclose(torch.zeros_like(expected).scatter(1, mine, its), expected, rtol=1e-4, atol=1e-6):
            return form
    raise CheckpointError(
        f"transformers' {type(stock).__name__} routes by none of the forms that are computed here: expected a softmax "
        "or a sigmoid, with groups, a correction and a factor at most"
    )


def _forms(stock: Any) -> list[Selection]:
    """Every form with the numbers that the attributes of router ``stock`` hold."""
    numbers = {key: value for key, value in vars(stock).items() if isinstance(value, int | float)}
    scales = {1.0, float(numbers.get("routed_scaling_factor", 1.0))}
    groups = {(1, 1, 1)}
    if numbers.get("num_group", 1) > 1:
        groups |= {(int(numbers["num_group"]), int(numbers["topk_group"]), best) for best in (1, 2)}
    kinds = [kind for kind in get_args(RouterKind) if kind != "sigmoid_input"]
    floor = float(numbers.get("norm_min", 0.0))
    return [Selection(kind, *of, scale, floor) for kind, of, scale in product(kinds, sorted(groups), sorted(scales))]


def _correction(module: Any) -> Tensor | None:
    """What is added to the scores of ``module``'s router for the choice alone."""
    for name, values in (*module.named_parameters(), *module.named_buffers()):
        if name.rpartition(".")[2] == _CORRECTION:
            found: Tensor = values
            return found
    return None
