"""Compiles every kernel that a decode step launches, in the forms in which it does, for a card not here.

Run as a script, in a process of its own (Triton's interpreter must be off), with an architecture and a
quantized model's folder: prints one JSON line per form. Nothing is computed: results mean nothing.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from offload.records import RunOptions
from quant.kernels.cuda import runtime
from tests.quant.kernels.cuda.compiling import compile_launch, record
from tests.sessions import session


def launches(model: Path, kv: Any) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """What one token of ``model`` launches where activations are bf16, as on a card."""
    with session(model, RunOptions(context=600, kv=kv), ram_slots=64, vram_slots=12, gpu_rows=128) as opened:
        step: Any = opened.decoder.step  # type: ignore[attr-defined]
        step.dtype = torch.bfloat16
        on_device, runtime.on_device = runtime.on_device, lambda tensor: True
        try:
            return record(lambda: torch.inference_mode()(step)())
        finally:
            runtime.on_device = on_device


def form(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What decides whether a launch needs code of its own."""

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        if isinstance(value, int) and not isinstance(value, bool):
            return value == 1, value % 16 == 0, -(2**31) <= value < 2**31
        return type(value)

    return (kernel.__name__, *map(one, args), *sorted((name, str(value)) for name, value in kwargs.items()))


if __name__ == "__main__":
    arch, seen = int(sys.argv[1]), set()
    for kv in ("bf16", "int8"):
        for launch in launches(Path(sys.argv[2]), kv):
            if (made := form(*launch)) not in seen:
                seen.add(made)
                compiled = compile_launch(*launch, arch)
                shared = compiled.metadata.shared
                print(json.dumps({"kernel": launch[0].__name__, "shared": shared}), flush=True)
