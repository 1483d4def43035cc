"""Attention of one decoded token over the KV buffers, for a step that does not know its position beforehand.

The position is read on the device, so one CUDA graph serves every token and reads no more than the tokens
that exist.

Legend: h query heads, g KV heads, d head_dim. Buffers ``[g, capacity, d]``, bf16 or int8 with f32
scales ``[g, capacity, 1]`` (the reference also takes f32).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quant.errors import SchemeError
from quant.kernels.cuda import runtime

_TOKENS, _WARPS = 64, 4  # a step of a part: 64 tokens
_MAX_SPLITS = 64
_STORED = (torch.bfloat16, torch.int8)


@dataclass(frozen=True)
class AttentionScratch:
    """The parts of the kept tokens before they are joined: ``sums`` f32 ``[h, parts, d]``, ``bounds`` f32
    ``[h, parts, 2]``. One serves all layers of a capacity."""

    sums: Tensor
    bounds: Tensor

    @classmethod
    def allocate(cls, heads: int, head_dim: int, capacity: int, device: torch.device) -> "AttentionScratch":
        """Scratch for buffers of ``capacity`` tokens: a part per 128 of them, up to 64, a power of two."""
        parts = 1
        while parts < _MAX_SPLITS and parts * 2 * _TOKENS < capacity:
            parts *= 2
        return cls(torch.zeros(heads, parts, head_dim, device=device), torch.zeros(heads, parts, 2, device=device))

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.sums.nbytes + self.bounds.nbytes


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    position: Tensor,
    chunk: int,
    scaling: float,
    scratch: AttentionScratch,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(scaling · q·Kᵀ)·V of ``query`` (h·d numbers) over the tokens up to ``position`` → ``[h, d]`` in
    query's dtype.

    ``position`` int64 or int32 ``[1]`` is the token's own, whose key and value are in the buffers already: in
    row ``position``, or ``position`` modulo ``chunk`` where a layer keeps the current chunk only (else 0).
    """
    heads, width = scratch.sums.shape[0], scratch.sums.shape[2]
    _check(query, keys, values, key_scale, value_scale, heads, width)
    asked = query.reshape(heads, width)
    result = torch.empty_like(asked) if out is None else out
    if runtime.on_device(query):
        launch(asked, keys, values, key_scale, value_scale, position, chunk, scaling, scratch, result)
    else:
        reference(asked, keys, values, key_scale, value_scale, position, chunk, scaling, result)
    return result


def reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    position: Tensor,
    chunk: int,
    scaling: float,
    out: Tensor,
) -> None:
    """``decode_attention`` in torch, in f32."""
    row = int(position) % chunk if chunk else int(position)
    kept = [buffer[:, : row + 1].float() for buffer in (keys, values)]
    for index, scale in enumerate((key_scale, value_scale)):
        if scale is not None:
            kept[index] = kept[index] * scale[:, : row + 1]
    repeats = query.shape[0] // keys.shape[0]
    key, value = (states.repeat_interleave(repeats, 0) for states in kept)  # [h, row + 1, d]
    scores = torch.einsum("hd,htd->ht", query.float(), key) * scaling
    out.copy_(torch.einsum("ht,htd->hd", scores.softmax(-1), value))


def launch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    position: Tensor,
    chunk: int,
    scaling: float,
    scratch: AttentionScratch,
    out: Tensor,
) -> None:
    """``decode_attention`` by two Triton kernels."""
    import triton

    from quant.kernels.cuda.device import attention

    if keys.dtype not in _STORED:
        raise SchemeError(f"keys are {keys.dtype}: the CUDA kernels read bf16 and int8 KV caches")
    heads, parts, width = scratch.sums.shape
    kv_heads, capacity, _ = keys.shape
    group, padded = heads // kv_heads, max(16, triton.next_power_of_2(width))
    attention.part_kernel[(kv_heads, parts)](
        query,
        keys,
        values,
        key_scale,
        value_scale,
        position,
        scratch.sums,
        scratch.bounds,
        capacity,
        scaling,
        CHUNK=chunk,
        GROUP=group,
        QUERIES=max(16, triton.next_power_of_2(group)),
        WIDTH=width,
        PADDED=padded,
        TOKENS=_TOKENS,
        SPLITS=parts,
        SCALED=key_scale is not None,
        OPERAND=runtime.operand(),
        num_warps=_WARPS,
        num_stages=2,
        enable_fp_fusion=True,
    )
    attention.join_kernel[(heads,)](
        scratch.sums,
        scratch.bounds,
        out,
        WIDTH=width,
        PADDED=padded,
        SPLITS=parts,
        num_warps=_WARPS,
        num_stages=1,
        enable_fp_fusion=True,
    )


def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    heads: int,
    width: int,
) -> None:
    buffers = [buffer for buffer in (keys, values, key_scale, value_scale) if buffer is not None]
    fits = keys.dim() == 3 and keys.shape[2] == width and values.shape == keys.shape
    fits = fits and heads % keys.shape[0] == 0 and query.numel() == heads * width
    fits = fits and (keys.dtype == torch.int8) == (key_scale is not None) == (value_scale is not None)
    if not fits or any(not buffer.is_contiguous() for buffer in buffers):
        raise SchemeError(
            f"query {tuple(query.shape)}, keys {keys.dtype} {tuple(keys.shape)}, values "
            f"{tuple(values.shape)}: expected {heads} heads of {width} over contiguous buffers "
            f"[g, capacity, {width}], int8 with scales"
        )
