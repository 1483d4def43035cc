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


@dataclass(frozen=True)
class KvRows:
    """One layer's keys and values on the device, ``[g, capacity, d]`` f32, bf16 or int8 (then with f32
    scales ``[g, capacity, 1]``). A token at position p has row p, or p modulo the layer's chunk."""

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None


def decode_attention(
    query: Tensor, rows: KvRows, position: Tensor, chunk: int, scaling: float, scratch: AttentionScratch
) -> Tensor:
    """softmax(scaling · q·Kᵀ)·V of ``query`` (h·d numbers) over the tokens up to ``position`` → ``[h, d]`` in
    query's dtype.

    ``position`` int64 or int32 ``[1]`` is the token's own, whose key and value are in the buffers already: in
    row ``position``, or ``position`` modulo ``chunk`` where a layer keeps the current chunk only (else 0).
    """
    heads, width = scratch.sums.shape[0], scratch.sums.shape[2]
    _check(query, rows, heads, width)
    asked = query.reshape(heads, width)
    out = torch.empty_like(asked)
    run = launch_attention if runtime.on_device(query) else attention_reference
    run(asked, rows, position, chunk, scaling, scratch, out)
    return out


def attention_reference(
    query: Tensor, rows: KvRows, position: Tensor, chunk: int, scaling: float, scratch: AttentionScratch, out: Tensor
) -> None:
    """``decode_attention`` of ``query`` ``[h, d]`` to ``out`` in torch, in f32; needs no scratch."""
    row = int(position) % chunk if chunk else int(position)
    kept = [buffer[:, : row + 1].float() for buffer in (rows.keys, rows.values)]
    for index, scale in enumerate((rows.key_scale, rows.value_scale)):
        if scale is not None:
            kept[index] = kept[index] * scale[:, : row + 1]
    repeats = query.shape[0] // rows.keys.shape[0]
    key, value = (states.repeat_interleave(repeats, 0) for states in kept)  # [h, row + 1, d]
    scores = torch.einsum("hd,htd->ht", query.float(), key) * scaling
    out.copy_(torch.einsum("ht,htd->hd", scores.softmax(-1), value))


def launch_attention(
    query: Tensor, rows: KvRows, position: Tensor, chunk: int, scaling: float, scratch: AttentionScratch, out: Tensor
) -> None:
    """``decode_attention`` of ``query`` ``[h, d]`` to ``out`` by two Triton kernels."""
    import triton

    from quant.kernels.cuda.device import attention

    if rows.keys.dtype not in _STORED:
        raise SchemeError(f"keys are {rows.keys.dtype}: the CUDA kernels read bf16 and int8 KV caches")
    heads, parts, width = scratch.sums.shape
    kv_heads, capacity, _ = rows.keys.shape
    group, padded = heads // kv_heads, max(16, triton.next_power_of_2(width))
    queries = max(16, triton.next_power_of_2(group))
    form = attention.AttentionForm(chunk, group, queries, width, padded, _TOKENS, parts, runtime.operand())
    options = {"num_warps": _WARPS, "enable_fp_fusion": True}
    sums, bounds = scratch.sums, scratch.bounds
    buffers = (rows.keys, rows.values, rows.key_scale, rows.value_scale)
    attention.part_kernel[(kv_heads, parts)](
        query, *buffers, position, sums, bounds, capacity, scaling, FORM=form, num_stages=2, **options
    )
    attention.join_kernel[(heads,)](sums, bounds, out, FORM=form, num_stages=1, **options)


def _check(query: Tensor, rows: KvRows, heads: int, width: int) -> None:
    keys, values = rows.keys, rows.values
    fits = keys.dim() == 3 and keys.shape[2] == width and values.shape == keys.shape
    fits = fits and heads % keys.shape[0] == 0 and query.numel() == heads * width
    fits = fits and (keys.dtype == torch.int8) == (rows.key_scale is not None) == (rows.value_scale is not None)
    buffers = (keys, values, rows.key_scale, rows.value_scale)
    if not fits or any(buffer is not None and not buffer.is_contiguous() for buffer in buffers):
        raise SchemeError(
            f"query {tuple(query.shape)}, keys {keys.dtype} {tuple(keys.shape)}, values "
            f"{tuple(values.shape)}: expected {heads} heads of {width} over contiguous buffers "
            f"[g, capacity, {width}], int8 with scales"
        )
