"""y = x · Wᵀ on a packed weight in VRAM: attention, shared experts and the head.

One token is a matrix-vector product, bound by memory; more go to the tensor cores.

Legend: T tokens, K in features, N out features, G groups along K.
"""

import torch
from torch import Tensor

from quant.errors import SchemeError
from quant.kernels.cuda import runtime
from quant.pack import Packed, dequantize
from quant.scheme import Scheme

_ROWS, _WORDS, _WARPS = 16, 128, 8  # as the experts' kernels
_BLOCK = 128  # features: a step of the tensor-core kernels takes 16 words, 128 features at 4 bit, 64 at 8
# (most tokens, rows, tokens, warps, stages) of a tensor-core tile; few tokens want many small programs.
_TILES = ((16, 32, 16, 2, 5), (1 << 40, 128, 64, 8, 3))


def linear(x: Tensor, packed: Tensor, scale: Tensor, bits: int, group: int, out: Tensor | None = None) -> Tensor:
    """x ``[T, K]`` times packed int32 ``[N, K·bits/32]`` with scales bf16 ``[N, G]`` → ``[T, N]``.

    The result has x's dtype; or it is added to ``out``, f32 ``[T, N]``, which is returned. x is bf16 (the
    reference takes any float). Raises SchemeError for shapes that do not fit.
    """
    check(x, packed, scale, bits, group, out)
    if runtime.on_device(x):
        return launch(x, packed, scale, bits, group, out)
    return reference(x, packed, scale, bits, group, out)


def reference(x: Tensor, packed: Tensor, scale: Tensor, bits: int, group: int, out: Tensor | None = None) -> Tensor:
    """``linear`` in torch, in f32 on the dequantized weight."""
    weight = dequantize(Packed(_scheme(bits, group), packed, scale), torch.float32)
    y = torch.nn.functional.linear(x.float(), weight)
    return y.to(x.dtype) if out is None else out.add_(y)


def launch(x: Tensor, packed: Tensor, scale: Tensor, bits: int, group: int, out: Tensor | None = None) -> Tensor:
    """``linear`` by Triton kernels."""
    if x.dtype != torch.bfloat16:
        raise SchemeError(f"activations are {x.dtype}: the CUDA kernels take bf16 (--exact runs on the CPU)")
    tokens, features = x.shape
    rows, row_words = packed.shape
    groups, x = scale.shape[1], x.contiguous()
    adds = out is not None
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device) if out is None else out
    if tokens == 1:
        from quant.kernels.cuda.device import gemv

        gemv.linear_kernel[(-(-rows // _ROWS),)](
            x,
            packed,
            scale,
            y,
            rows,
            row_words,
            groups,
            BITS=bits,
            GROUP=group,
            ADD=adds,
            ROWS=_ROWS,
            WORDS=_WORDS,
            num_warps=_WARPS,
            num_stages=1,
            enable_fp_fusion=True,
        )
        return y
    from quant.kernels.cuda.device import gemm

    tile_rows, tile_tokens, warps, stages = tile(tokens)
    arranged = torch.empty(tokens, arranged_width(features), dtype=x.dtype, device=x.device)
    arrange(x, None, None, arranged, bits, 1)
    gemm.linear_kernel[(-(-tokens // tile_tokens), -(-rows // tile_rows))](
        arranged,
        packed,
        scale,
        y,
        tokens,
        rows,
        row_words,
        groups,
        arranged.shape[1],
        BITS=bits,
        GROUP=group,
        ADD=adds,
        ROWS=tile_rows,
        TOKENS=tile_tokens,
        STAGES=stages,
        OPERAND=runtime.operand(),
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )
    return y


def tile(tokens: int) -> tuple[int, int, int, int]:
    """(rows, tokens, warps, stages) of a tensor-core tile for ``tokens`` tokens on one weight."""
    return next(rest for most, *rest in _TILES if tokens <= most)  # type: ignore[return-value]


def arranged_width(features: int) -> int:
    """Features of an arranged row: ``features`` up to a whole number of blocks, at either width."""
    return -(-features // _BLOCK) * _BLOCK


def arrange(x: Tensor, order: Tensor | None, scores: Tensor | None, out: Tensor, bits: int, top_k: int) -> None:
    """Write x ``[T, K]``, or its rows of the pairs ``order``, times ``scores``, arranged to ``out``."""
    from quant.kernels.cuda.device import gemm

    columns = 1024
    gemm.arrange_kernel[(out.shape[0], -(-out.shape[1] // columns))](
        x,
        order,
        scores,
        out,
        x.shape[1],
        out.shape[1],
        TOP_K=top_k,
        GATHERS=order is not None,
        SCALES=scores is not None,
        BITS=bits,
        COLUMNS=columns,
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=True,
    )


def check(x: Tensor, packed: Tensor, scale: Tensor, bits: int, group: int, out: Tensor | None = None) -> None:
    """Raise SchemeError unless the tensors fit each other."""
    scheme = _scheme(bits, group)
    features = packed.shape[-1] * 32 // bits
    fits = packed.dim() == 2 and packed.dtype == torch.int32 and packed.is_contiguous()
    fits &= features % group == 0 and scale.shape == (packed.shape[0], features // group)
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


def _scheme(bits: int, group: int) -> Scheme:
    if bits not in (4, 8):
        raise SchemeError(f"{bits}-bit weights: expected 4 or 8")
    return Scheme("int4" if bits == 4 else "int8", group)
