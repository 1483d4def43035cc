"""y = x · Wᵀ on a packed weight in VRAM: attention, shared experts and the head.

One token is a matrix-vector product, bound by memory; more go to the tensor cores.

Legend: T tokens, K in features, N out features, G groups along K.
"""

import torch
from torch import Tensor

from quant.errors import SchemeError
from quant.kernels.cuda import runtime
from quant.kernels.cuda.experts import OPTIONS, ROWS, words_at_once
from quant.pack import Packed, dequantize

_BLOCK = 512  # features: a step of the tensor-core kernels takes at most so many, 16 units of 32 at 3 bits
# (most tokens, rows, tokens, warps, stages) of a tensor-core tile; few tokens want many small programs.
_TILES = ((16, 32, 16, 2, 5), (1 << 40, 128, 64, 8, 3))


def cuda_linear(x: Tensor, weight: Packed, out: Tensor | None = None) -> Tensor:
    """x ``[T, K]`` times ``weight`` ``[N, K]`` → ``[T, N]``.

    The result has x's dtype; or it is added to ``out``, f32 ``[T, N]``, which is returned. x is bf16 (the
    reference takes any float). Raises SchemeError for shapes that do not fit.
    """
    _check(x, weight, out)
    return launch_linear(x, weight, out) if runtime.on_device(x) else linear_reference(x, weight, out)


def linear_reference(x: Tensor, weight: Packed, out: Tensor | None = None) -> Tensor:
    """``cuda_linear`` in torch, in f32 on the dequantized weight."""
    y = torch.nn.functional.linear(x.float(), dequantize(weight, torch.float32))
    return y.to(x.dtype) if out is None else out.add_(y)


def launch_linear(x: Tensor, weight: Packed, out: Tensor | None = None) -> Tensor:
    """``cuda_linear`` by Triton kernels."""
    if x.dtype != torch.bfloat16:
        raise SchemeError(f"activations are {x.dtype}: the CUDA kernels take bf16 (--exact runs on the CPU)")
    tokens, features = x.shape
    packed, scale, bits, group = weight.packed, weight.scale, weight.scheme.bits, weight.scheme.group_size
    rows, row_words = packed.shape
    groups, x = scale.shape[1], x.contiguous()
    adds = out is not None
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device) if out is None else out
    if tokens == 1:
        from quant.kernels.cuda.device import gemv

        form = gemv.Rows(bits, group, ROWS, words_at_once(bits))
        grid = (-(-rows // ROWS),)
        gemv.gemv_kernel[grid](x, packed, scale, y, rows, row_words, groups, ADD=adds, FORM=form, **OPTIONS)
        return y
    from quant.kernels.cuda.device import gemm

    tile_rows, tile_tokens, warps, stages = tile_sizes(tokens, bits)
    width = arranged_width(features)
    arranged = torch.empty(tokens, width, dtype=x.dtype, device=x.device)
    arrange(x, None, None, arranged, bits, 1)
    tile = gemm.Tile(bits, group, tile_rows, tile_tokens, stages, runtime.operand())
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    gemm.gemm_kernel[(-(-tokens // tile_tokens), -(-rows // tile_rows))](
        arranged, packed, scale, y, tokens, rows, row_words, groups, width, ADD=adds, TILE=tile, **options
    )
    return y


def tile_sizes(tokens: int, bits: int) -> tuple[int, int, int, int]:
    """(rows, tokens, warps, stages) of a tensor-core tile for ``tokens`` tokens on one weight."""
    rows, least, warps, stages = next(rest for most, *rest in _TILES if tokens <= most)
    # At 3 bits a step's activations are four times those of 4 bits: shared memory and registers hold less of them.
    return (min(rows, 64), min(least, 32), warps, 1) if bits == 3 else (rows, least, warps, stages)


def arranged_width(features: int) -> int:
    """Features of an arranged row: ``features`` up to a whole number of blocks, of any width."""
    return -(-features // _BLOCK) * _BLOCK


def arrange(x: Tensor, order: Tensor | None, scores: Tensor | None, out: Tensor, bits: int, top_k: int) -> None:
    """Write x ``[T, K]``, or its rows of the pairs ``order``, times ``scores``, arranged to ``out``."""
    from quant.kernels.cuda.device import gemm

    (rows, width), columns = out.shape, 1024
    constants = {"TOP_K": top_k, "BITS": bits, "COLUMNS": columns}
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    gemm.arrange_kernel[(rows, -(-width // columns))](x, order, scores, out, x.shape[1], width, **constants, **options)


def _check(x: Tensor, weight: Packed, out: Tensor | None) -> None:
    packed, scale, scheme = weight.packed, weight.scale, weight.scheme
    if not scheme.is_packed:
        raise SchemeError(f"a weight in {scheme}: expected int2 to int8")
    features = packed.shape[-1] * 32 // scheme.bits
    fits = packed.dim() == 2 and packed.dtype == torch.int32 and packed.is_contiguous()
    fits &= features % scheme.group_size == 0 and scale.shape == (packed.shape[0], features // scheme.group_size)
    fits &= scale.dtype == torch.bfloat16 and scale.is_contiguous()
    if not fits:
        raise SchemeError(
            f"packed {packed.dtype} {tuple(packed.shape)} with scales {scale.dtype} {tuple(scale.shape)}: "
            f"expected {scheme} weights, contiguous"
        )
    if x.dim() != 2 or x.shape[1] != features:
        raise SchemeError(f"x is {tuple(x.shape)}: expected [T, {features}]")
    shape = (x.shape[0], packed.shape[0])
    if out is not None and (out.shape != shape or out.dtype != torch.float32 or not out.is_contiguous()):
        raise SchemeError(f"out is {out.dtype} {tuple(out.shape)}: expected f32 {shape}, contiguous")
