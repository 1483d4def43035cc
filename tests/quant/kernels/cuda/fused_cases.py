"""The kernels of ``fused.py`` against their references, in Triton's interpreter.

Run as a script in a process of its own (the interpreter is chosen before Triton is imported): exits with an
error that names the case.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from quant.kernels.attention import AttentionShape
from quant.kernels.cuda import fused
from quant.kernels.cuda.attention import KvRows
from quant.kernels.cuda.fused import HeadNorms, TokenPlace

SHAPES = {
    "llama4": AttentionShape(4, 2, 32, rope="interleaved", l2_norm=True, chunk=8),
    "llama4 nope": AttentionShape(4, 2, 32, temperature_floor=8, temperature_scale=0.1),
    "mixtral": AttentionShape(6, 2, 48, rope="halves"),
    "qwen3": AttentionShape(4, 1, 32, rope="halves", qk_norm="per_head"),
    "olmoe": AttentionShape(3, 3, 32, rope="halves", qk_norm="full_width"),
    "part of a head rotated": AttentionShape(2, 1, 64, rope="halves", qk_norm="per_head"),
}


def norms(generator: torch.Generator) -> None:
    for tokens, features, dtype in ((1, 128, torch.float32), (3, 5120, torch.bfloat16), (2, 100, torch.float32)):
        x = torch.randn(tokens, features, generator=generator) * 3
        weight = torch.randn(features, generator=generator)
        whole = torch.zeros(2, tokens, features)
        ours = fused.launch_rms_norm(x, weight, 1e-5, dtype, whole[0])
        theirs = fused.rms_norm_reference(x, weight, 1e-5, dtype, whole[1])
        torch.testing.assert_close(ours, theirs, msg=f"rms_norm {tokens}x{features}")
        torch.testing.assert_close(*whole, msg=f"rms_norm {tokens}x{features}, unrounded")
        assert torch.equal(fused.launch_rms_norm(x, weight, 1e-5, dtype), ours)


def buffers(shape: AttentionShape, storage: torch.dtype) -> KvRows:
    size = (shape.kv_heads, 16, shape.head_dim)
    scale = [torch.zeros(*size[:2], 1) if storage == torch.int8 else None for _ in range(2)]
    return KvRows(torch.zeros(size, dtype=storage), torch.zeros(size, dtype=storage), *scale)


def appends(generator: torch.Generator) -> None:
    for name, shape in SHAPES.items():
        for storage, dtype in (
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.bfloat16),
            (torch.int8, torch.float32),
        ):
            d, h, g = shape.head_dim, shape.heads, shape.kv_heads
            q, k, v = (torch.randn(1, n * d, generator=generator).to(dtype) for n in (h, g, g))
            rotated = d // 2 if name.startswith("part") else d
            angles = torch.rand(rotated // 2, generator=generator) * 6
            width = (h * d, g * d) if shape.qk_norm == "full_width" else (d, d)
            weights = [torch.randn(w, generator=generator) for w in width]
            norms = HeadNorms(*weights) if shape.qk_norm != "none" else None
            ours, theirs = buffers(shape, storage), buffers(shape, storage)
            for position in (0, 9, 13):
                place = torch.tensor([position], dtype=torch.int32)
                at = TokenPlace(place, angles.cos(), angles.sin(), torch.tensor([1.7]))
                query = fused.launch_append(q, k, v, shape, ours, at, norms)
                wanted = fused.append_reference(q, k, v, shape, theirs, at, norms)
                torch.testing.assert_close(query, wanted, msg=f"{name} {storage}: q")
            for field in ("keys", "values", "key_scale", "value_scale"):
                found, expected = getattr(ours, field), getattr(theirs, field)
                if found is not None:
                    close = {"atol": 1, "rtol": 0} if found.dtype == torch.int8 else {}
                    torch.testing.assert_close(found, expected, **close, msg=f"{name} {storage}: {field}")


def selections(generator: torch.Generator) -> None:
    for kind in ("sigmoid_input", "softmax", "softmax_normalized"):
        for tokens, experts, k in ((1, 16, 1), (2, 128, 1), (3, 60, 6), (1, 8, 2)):
            logits = torch.randn(tokens, experts, generator=generator) * 2
            logits[0, 3:6] = logits[0].max() + 1  # equals
            found = [torch.zeros(tokens, k, dtype=torch.int32) for _ in range(2)]
            scores = [torch.zeros(tokens, k) for _ in range(2)]
            fused.launch_select(logits, kind, found[0], scores[0])
            fused.select_reference(logits, kind, found[1], scores[1])
            assert torch.equal(*found), (kind, tokens, experts, k, *found)
            torch.testing.assert_close(*scores, msg=f"select {kind} {experts} {k}")


if __name__ == "__main__":
    seeded = torch.Generator().manual_seed(11)
    norms(seeded)
    appends(seeded)
    selections(seeded)
    print("equal")
