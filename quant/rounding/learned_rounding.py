"""A packed weight as gradient descent may move it: real numbers behind the integers, and scales.

The product is that of the rounded integers; the gradient passes through rounding as if it were not there
(straight-through estimation, Bengio et al., 2013). A value starts at its stored integer, as far towards
what the dense weight is at the stored scale as rounding allows: what was close to being rounded otherwise
changes first.

Legend: N out features, K in features, G groups along K.
"""

import torch
from torch import Tensor, nn

from quant.pack import Packed, pack, unpack
from quant.rounding.scales import value_range

_REACH = 0.49  # of a step from the stored integer, at most: further, it would be another integer


class TrainableWeight(nn.Module):
    """Stands in for the Linear of ``stored``, which was rounded from ``weight`` ``[N, K]``; all in f32."""

    def __init__(self, stored: Packed, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.scheme, self.bias = stored.scheme, bias
        self._first = stored.scale.float()
        integers = unpack(stored.packed, self.scheme.bits).float()
        wanted = weight.float() / self._spread(self._first)
        self.values = nn.Parameter(integers + (wanted - integers).clamp(-_REACH, _REACH))  # [N, K]
        self.factors = nn.Parameter(torch.ones_like(self._first))  # [N, G], on the scales as stored

    def _spread(self, scale: Tensor) -> Tensor:
        return scale.repeat_interleave(self.scheme.group_size, 1)

    def _rounded(self) -> tuple[Tensor, Tensor]:
        scale = self._first * self.factors
        return self.values.round().clamp(*value_range(self.scheme)), scale.to(torch.bfloat16)

    def dense(self) -> Tensor:
        """The weight ``[N, K]`` as it would be stored now, with gradients to values and scales."""
        integers, stored = self._rounded()
        scale = self._first * self.factors
        values = self.values + (integers - self.values).detach()
        return values * self._spread(scale + (stored.float() - scale).detach())

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., K]`` → ``[..., N]``."""
        return torch.nn.functional.linear(x, self.dense(), self.bias)

    @torch.no_grad()
    def packed(self) -> Packed:
        """What to store."""
        integers, scale = self._rounded()
        return Packed(self.scheme, pack(integers.to(torch.int8), self.scheme.bits), scale)
