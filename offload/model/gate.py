"""What stands between the halves of an expert: gate_proj and up_proj of x in, what down_proj takes out.

Nearly every family has one formula with three numbers. Which numbers is not told by names: the stock module's own
function is tried on a few values beside it. A function that the formula is not is called as it is.

Legend: T tokens, I expert intermediate size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from quant.kernels.swiglu import SwiGlu

Gate = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class StockGate:
    """transformers' experts module's own function."""

    module: Any
    interleaved: bool

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate and up ``[T, I]`` → ``[T, I]``."""
        joined = torch.stack((gate, up), -1).flatten(-2) if self.interleaved else torch.cat((gate, up), -1)
        made: Tensor = self.module._apply_gate(joined)
        return made


def gate_of(experts: Any) -> Gate:
    """What transformers' experts module ``experts`` does between the halves of an expert."""
    stock = StockGate(experts, not experts.is_concatenated)
    gate = torch.linspace(-30, 30, 241).repeat(3, 1)
    up = torch.stack((gate[0].flip(0), gate[0], torch.linspace(-1, 1, 241)))
    expected = stock(gate.clone(), up.clone())
    alphas, limits = _numbers(experts, "alpha", 1.0), _numbers(experts, "limit", math.inf)
    for alpha, limit, offset in product(alphas, limits, (0.0, 1.0)):
        made = SwiGlu(alpha, limit, offset)
        if torch.allclose(made(gate.clone(), up.clone()), expected, rtol=1e-5, atol=1e-6):
            return made
    return stock


def _numbers(experts: Any, name: str, default: float) -> list[float]:
    """``default``, and what attributes of ``experts`` that are called so say."""
    found = [value for key, value in vars(experts).items() if name in key and isinstance(value, float | int)]
    return [default, *map(float, found)]
