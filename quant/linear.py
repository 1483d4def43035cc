"""One Linear's weight as it is stored, and y = x · Wᵀ on it.

``LinearWeight`` is a set of views, wherever their bytes live: a checkpoint's tensors, a slot of an arena,
device memory. ``matmul`` is the one place that picks a kernel. ``QuantLinear`` is the module that holds such
a weight as parameters; ``KeptEmbedding`` is its sibling for rows.

Legend: T tokens, N out features, K in features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from quant.kernels import native
from quant.kernels.cuda.linear import cuda_linear
from quant.kernels.weight import NativeKind
from quant.pack import Packed, dequantize, dequantize_nf4, matmul_nf4, nf4_state
from quant.scheme import BF16, Scheme

_PLAIN: Mapping[torch.dtype, NativeKind] = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


@dataclass(frozen=True)
class Compute:
    """How matrix products are done: on CPU tensors by the ``native`` C++ kernels, on CUDA tensors by the
    ``triton`` kernels (bitsandbytes' for nf4), else by torch on the dequantized weight; a weight stored
    transposed always.

    ``exact`` keeps activations in floating point; the native kernels otherwise quantize them to int8 per
    group. The Triton kernels take bf16 activations, so an exact product is torch's there.
    """

    native: bool = False
    exact: bool = False
    triton: bool = False

    @property
    def name(self) -> str:
        """What a report calls it."""
        if self.triton and not self.exact:
            return "Triton, bf16 activations"
        if not self.native:
            return "torch, dequantized weights"
        return f"native {native.isa()}, {'float' if self.exact else 'int8'} activations"


@dataclass(frozen=True)
class LinearWeight:
    """A weight ``[N, K]`` in ``scheme``'s stored form, its tensors by checkpoint suffix.

    ``transposed`` marks a dense weight stored ``[K, N]``.
    """

    scheme: Scheme
    tensors: Mapping[str, Tensor]
    out_features: int
    in_features: int
    transposed: bool = False

    @classmethod
    def plain(cls, weight: Tensor) -> "LinearWeight":
        """A dense weight ``[N, K]``."""
        return cls(BF16, {"weight": weight}, *weight.shape)

    @property
    def packed(self) -> Packed:
        """A packed weight."""
        return Packed(self.scheme, self.tensors["weight_packed"], self.tensors["weight_scale"])

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight ``[N, K]`` in ``dtype``."""
        if self.scheme.is_packed:
            return dequantize(self.packed, dtype)
        if self.scheme.kind == "nf4":
            return dequantize_nf4(self.tensors).to(dtype)
        weight = self.tensors["weight"]
        return (weight.t() if self.transposed else weight).to(dtype)

    @cached_property
    def nf4_state(self) -> Any:
        """bitsandbytes' description of an nf4 weight, read once: reading it waits for the device."""
        return nf4_state(self.tensors)

    @cached_property
    def descriptor(self) -> native.Weight | None:
        """The native kernels' descriptor, or None where they do not know the form."""
        if self.scheme.is_packed:
            packed = self.packed
            return native.Weight.from_tensors(self.scheme.kind, packed.packed, packed.scale)
        weight = self.tensors["weight"]
        if self.scheme.kind != "bf16" or self.transposed or not weight.is_contiguous():
            return None
        kind = _PLAIN.get(weight.dtype)
        return None if kind is None else native.Weight.from_tensors(kind, weight)


def matmul(x: Tensor, weight: LinearWeight, compute: Compute) -> Tensor:
    """x ``[..., K]`` · Wᵀ → ``[..., N]`` in x's dtype.

    Raises SchemeError for activations that the Triton kernels do not take, MachineError without Triton.
    """
    if compute.triton and not compute.exact and x.is_cuda and weight.scheme.kind != "bf16":
        return _matmul_cuda(x, weight)
    if compute.native and x.dtype == torch.float32:
        descriptor = weight.descriptor
        if descriptor is not None:
            y = native.linear(x.reshape(-1, weight.in_features), descriptor, exact=compute.exact)
            return y.view(*x.shape[:-1], weight.out_features)
    return torch.nn.functional.linear(x, weight.dense(x.dtype))


def _matmul_cuda(x: Tensor, weight: LinearWeight) -> Tensor:
    if weight.scheme.kind == "nf4":
        return matmul_nf4(x, weight.tensors["weight"], weight.nf4_state)
    y = cuda_linear(x.reshape(-1, weight.in_features), weight.packed)
    return y.view(*x.shape[:-1], weight.out_features)


class QuantLinear(nn.Module):
    """A Linear whose weight stays in its stored form; parameters bear the checkpoint's names.

    A dense weight keeps its stored dtype whatever the activations' is.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        scheme: Scheme,
        compute: Compute,
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features, self.scheme, self.compute = (out_features, in_features, scheme, compute)
        if scheme.is_packed:
            words, groups = in_features * scheme.bits // 32, in_features // scheme.group_size
            self._register("weight_packed", torch.empty(out_features, words, dtype=torch.int32))
            self._register("weight_scale", torch.empty(out_features, groups, dtype=torch.bfloat16))
        else:
            self._register("weight", torch.empty(out_features, in_features, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self._stored: tuple[tuple[int, ...], LinearWeight] | None = None

    @classmethod
    def holding(cls, weight: LinearWeight, compute: Compute, bias: nn.Parameter | None = None) -> "QuantLinear":
        """The module of a packed ``weight``, whose tensors become its parameters."""
        made, tensors = cls(weight.out_features, weight.in_features, weight.scheme, compute), weight.tensors
        made.weight_packed.data, made.weight_scale.data = tensors["weight_packed"], tensors["weight_scale"]
        made.bias = bias
        return made

    def _register(self, name: str, value: Tensor) -> None:
        self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    @property
    def stored(self) -> LinearWeight:
        """The weight as views of the parameters, wherever they have been moved to."""
        names = ("weight_packed", "weight_scale") if self.scheme.is_packed else ("weight",)
        place = tuple(getattr(self, name).data_ptr() for name in names)
        if self._stored is None or self._stored[0] != place:
            tensors = {name: getattr(self, name).data for name in names}
            self._stored = place, LinearWeight(self.scheme, tensors, self.out_features, self.in_features)
        return self._stored[1]

    def forward(self, x: Tensor) -> Tensor:
        """x ``[..., K]`` → ``[..., N]``."""
        y = matmul(x, self.stored, self.compute)
        return y if self.bias is None else y + self.bias


class KeptEmbedding(nn.Module):
    """An embedding that keeps its stored dtype and gives rows in the activations' dtype."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, activations: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, dtype=dtype), requires_grad=False)
        self.activations = activations

    def forward(self, ids: Tensor) -> Tensor:
        """ids ``[...]`` → ``[..., width]``, on the device of ``ids``."""
        rows = torch.nn.functional.embedding(ids.to(self.weight.device), self.weight)
        return rows.to(device=ids.device, dtype=self.activations)
