"""SwiGlu: what joins gate_proj(x) and up_proj(x) in an expert. The reference of what ``mlp.cpp`` computes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu


@dataclass(frozen=True)
class SwiGlu:
    """g · sigmoid(alpha · g) · (u + offset); before that g is clamped to ``limit`` from above, u from both sides."""

    alpha: float = 1.0
    limit: float = math.inf
    offset: float = 0.0

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate and up ``[T, I]`` → ``[T, I]``; gate may be overwritten."""
        if self == SILU:
            return silu(gate).mul_(up)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(gate * self.alpha) * (up + self.offset)


SILU = SwiGlu()
