"""How a router's logits choose experts and weigh them: one form for all families, told apart by a few numbers.

Legend: T tokens, E experts, k experts per token.
"""

import ctypes
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from quant.errors import SchemeError
from quant.kernels.library import F32, I32, fields

RouterKind = Literal["sigmoid_input", "softmax", "softmax_normalized", "sigmoid", "sigmoid_normalized"]
ROUTERS: dict[RouterKind, int] = {
    "sigmoid_input": 0,
    "softmax": 1,
    "softmax_normalized": 2,
    "sigmoid": 3,
    "sigmoid_normalized": 4,
}


class CSelection(ctypes.Structure):
    """``coldstream::Selection`` of router.h."""

    _fields_ = fields((I32, "kind groups groups_kept group_best"), (F32, "scale floor"))


@dataclass(frozen=True)
class Selection:
    """``kind``: ``sigmoid_input`` (Llama 4: the sigmoid of a logit multiplies the expert's input), else what weighs its
    output: a softmax over all experts or the sigmoid of each logit, divided by the sum of the chosen where
    ``normalized``, or by ``floor`` if that is larger (ERNIE), and multiplied by ``scale``.

    Where E experts lie in ``groups`` of neighbours, only those of the best ``groups_kept`` are chosen; a group is as
    good as the sum of its ``group_best`` best (DeepSeek). A correction f32 ``[E]``, where there is one, is added to the
    scores for the choice alone. Raises SchemeError for numbers that contradict each other.
    """

    kind: RouterKind
    groups: int = 1
    groups_kept: int = 1
    group_best: int = 1
    scale: float = 1.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.groups_kept <= self.groups or self.group_best < 1:
            raise SchemeError(
                f"{self.groups_kept} of {self.groups} groups of experts, by their {self.group_best} best: expected 1 "
                "to all of them, by one or more"
            )

    @property
    def scales_input(self) -> bool:
        """Whether a weight multiplies what an expert takes in, not what it gives."""
        return self.kind == "sigmoid_input"

    @property
    def native(self) -> CSelection:
        """The structure for native calls."""
        return CSelection(**asdict(self) | {"kind": ROUTERS[self.kind]})

    def scores(self, logits: Tensor) -> Tensor:
        """What an expert's weight is made of, from logits f32 ``[T, E]``."""
        return logits.softmax(-1) if self.kind.startswith("softmax") else logits.sigmoid()

    def choice_scores(self, logits: Tensor, correction: Tensor | None = None) -> Tensor:
        """What experts are chosen by, f32 ``[T, E]``: the largest; -inf in groups that are not kept."""
        found = self.scores(logits) if correction is None else self.scores(logits) + correction
        if self.groups_kept == self.groups:
            return found
        grouped = found.unflatten(-1, (self.groups, -1))
        best = grouped.topk(min(self.group_best, grouped.shape[-1])).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(self.groups_kept).indices, True)
        masked: Tensor = grouped.masked_fill(~kept[..., None], -torch.inf)
        return masked.flatten(-2)

    def choose(self, logits: Tensor, top_k: int, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The reference of the native choice: experts int64 ``[T, k]`` and their weights f32 ``[T, k]``."""
        chosen = self.choice_scores(logits, correction).topk(top_k).indices
        weights = self.scores(logits).gather(-1, chosen)
        if self.kind.endswith("normalized"):
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(self.floor)
        return chosen, weights * self.scale
