"""What a Linear's inputs are like in the two streams of a calibration: their second moments.

Legend: T tokens, K in features; X inputs in the original model, X̂ in the one quantized so far.
"""

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
        return cls(quantized.t() @ quantized, plain.t() @ quantized, len(plain))

    def add(self, other: "InputHessian") -> None:
        self.hessian += other.hessian
        self.cross += other.cross
        self.tokens += other.tokens

    def blended(self, everyone: "InputHessian") -> "InputHessian":
        """With ``everyone`` weighing as ``BLEND * K`` tokens, at this one's scale of inputs."""
        if not everyone.tokens:
            return self
        weight = BLEND * len(self.hessian) / everyone.tokens
        own, all_ = torch.diagonal(self.hessian).sum(), torch.diagonal(everyone.hessian).sum()
        if self.tokens and own > 0 and all_ > 0:
            weight *= float(own / self.tokens / (all_ / everyone.tokens))
        return InputHessian(self.hessian + weight * everyone.hessian, self.cross + weight * everyone.cross, self.tokens)
