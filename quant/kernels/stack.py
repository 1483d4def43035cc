"""A run of decoder layers for one token in one native call: what is left of Python between layers is nothing.

Legend: H hidden, E experts, k experts per token, r rotated channels of a head.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from quant.errors import SchemeError
from quant.kernels.attention import Attention, KvBuffers, _CBlock, _CCache
from quant.kernels.library import check, library
from quant.kernels.moe import GatedMlp, MoeBlock, MoeResult, _CRouting
from quant.kernels.moe import _CBlock as _CMoeBlock
from quant.kernels.rows import address


class DenseBlock:
    """x + mlp(norm(x)): a layer without experts, in the form of a MoE block with a shared expert only."""

    def __init__(self, mlp: GatedMlp, norm: Tensor, eps: float) -> None:
        self.mlp, self.norm, self.top_k = mlp, norm.float().contiguous(), 0
        block = _CMoeBlock(eps=eps, router_kind=0, experts=0, top_k=0, shared=1)
        block.norm = self.norm.data_ptr()
        block.router.k = mlp.gate_proj.in_features
        block.shared_gate, block.shared_up = mlp.gate_proj.native, mlp.up_proj.native
        block.shared_down = mlp.down_proj.native
        self._block = block


class _CLayer(ctypes.Structure):
    _fields_ = [
        ("attention", ctypes.POINTER(_CBlock)),
        ("moe", ctypes.POINTER(_CMoeBlock)),
        ("cache", _CCache),
        ("routing", _CRouting),
    ]


class Stack:
    """All layers of a decoder. ``rotary`` is r, 0 if no layer uses RoPE.

    ``chosen`` int32 ``[layers, k]``, ``weights`` f32 ``[layers, k]`` and ``logits`` f32 ``[layers, E]`` hold
    what the routers found in the last call; rows of dense layers mean nothing.
    """

    def __init__(
        self, attentions: Sequence[Attention], blocks: Sequence[MoeBlock | DenseBlock], rotary: int
    ) -> None:
        if not attentions or len(attentions) != len(blocks):
            raise SchemeError(
                f"{len(attentions)} attentions and {len(blocks)} blocks: expected as many of each"
            )
        self.attentions, self.blocks, self.rotary = list(attentions), list(blocks), rotary
        count, hidden = len(blocks), attentions[0].hidden
        top_k = max(block.top_k for block in blocks)
        experts = max(
            (block.router.out_features for block in blocks if isinstance(block, MoeBlock)), default=0
        )
        self.normed = torch.empty(count, hidden)
        self.logits, self.weights = torch.empty(count, max(experts, 1)), torch.empty(count, max(top_k, 1))
        self.chosen = torch.zeros(count, max(top_k, 1), dtype=torch.int32)
        self._layers = (_CLayer * count)()
        for index, (attention, block) in enumerate(zip(attentions, blocks, strict=True)):
            layer = self._layers[index]
            if attention.shape.rope != "none":
                attention._block.rope_dim = rotary
            layer.attention, layer.moe = ctypes.pointer(attention._block), ctypes.pointer(block._block)
            found = (self.normed[index], self.logits[index], self.chosen[index], self.weights[index])
            layer.routing = _CRouting(*(tensor.data_ptr() for tensor in found))
        self._kept: list[KvBuffers] = []

    def attach(self, caches: Sequence[KvBuffers], position: int) -> None:
        """Use these KV buffers, one per layer, for the token at ``position``. Raises SchemeError if one is
        full."""
        self._kept = list(caches)
        for layer, attention, cache in zip(self._layers, self.attentions, caches, strict=True):
            layer.cache = attention._cache(cache, position, 1)

    def move(self, layer: int, first_position: int) -> None:
        """Row 0 of ``layer``'s buffers now holds the token at ``first_position``."""
        self._layers[layer].cache.first_position = first_position

    def run(self, x: Tensor, position: int, cosine: Tensor, sine: Tensor, first: int, exact: bool) -> int:
        """x f32 ``[H]`` (contiguous) through the layers from ``first`` on, in place; cosine and sine f32
        ``[r/2]``.

        Returns the number of layers, or the layer at whose MoE block a chosen expert was missing: x is then
        the input of that block.
        """
        stopped = ctypes.c_int64(0)
        status = library().cs_stack(
            self._layers, ctypes.c_int64(first), ctypes.c_int64(len(self.blocks)), address(x),
            ctypes.c_int64(position), address(cosine), address(sine), int(exact), ctypes.byref(stopped),
        )  # fmt: skip
        check(status, "stack")
        return stopped.value

    def result(self, layer: int) -> MoeResult:
        """What the router of ``layer`` found, as ``MoeBlock.run`` returns it for an incomplete block."""
        block = self.blocks[layer]
        assert isinstance(block, MoeBlock)
        rows = slice(layer, layer + 1)
        experts, top_k = block.router.out_features, block.top_k
        chosen, weights = self.chosen[rows, :top_k], self.weights[rows, :top_k]
        return MoeResult(None, self.logits[rows, :experts], chosen, weights, self.normed[rows])
