"""The Hessian of a Linear's rounding error: products of its inputs, summed over the tokens of a text.

A calibration runs two streams of hidden states, the original model's and the quantized one's, so there are two
products: of the quantized stream's inputs with themselves, and of the original's with those.

Legend: T tokens, K in features; X inputs in the original model, X̂ in the one quantized so far.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

BLEND = 0.25  # all tokens count as this many times K tokens of an expert's own


@dataclass
class InputHessian:
    """X̂ᵀX̂ and XᵀX̂ ``[K, K]``, summed over tokens."""

    hessian: Tensor
    cross: Tensor
    tokens: int = 0

    @classmethod
    def of(cls, plain: Tensor, quantized: Tensor) -> "InputHessian":
        """Of inputs ``[T, K]`` in both streams."""
        return cls(quantized.t() @ quantized, plain.t() @ quantized, len(plain))

    @classmethod
    def summed(cls, batches: Iterable[tuple[Tensor, Tensor]]) -> "InputHessian":
        """Over one or more ``batches`` of inputs ``[T, K]`` in both streams."""
        parts = (cls.of(*batch) for batch in batches)
        total = next(parts)
        for part in parts:
            total.hessian += part.hessian
            total.cross += part.cross
            total.tokens += part.tokens
        return total

    def blended(self, everyone: "InputHessian") -> "InputHessian":
        """With ``everyone`` weighing as ``BLEND * K`` tokens, at this one's scale of inputs."""
        if not everyone.tokens:
            return self
        weight = BLEND * len(self.hessian) / everyone.tokens
        own, all_ = torch.diagonal(self.hessian).sum(), torch.diagonal(everyone.hessian).sum()
        if self.tokens and own > 0 and all_ > 0:
            weight *= float(own / self.tokens / (all_ / everyone.tokens))
        return InputHessian(self.hessian + weight * everyone.hessian, self.cross + weight * everyone.cross, self.tokens)
