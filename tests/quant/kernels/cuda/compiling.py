"""Compiles what a launcher would launch, for cards that are not here; arguments are taken from the real call.

Run as a script, in a process of its own (the interpreter must be off), with ARCHS and maybe ``more``: prints
one JSON line per kernel and card.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}


def record(call: Callable[[], object]) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(kernel, arguments, keywords) of each launch in ``call``."""
    launches = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    original, JITFunction.run = JITFunction.run, run
    try:
        call()
    finally:
        JITFunction.run = original
    return launches


def compile_launch(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], arch: int) -> Any:
    """The compiled kernel as the just-in-time compiler would make it: sizes and addresses divisible by 16 are
    known to be, a 1 is a constant."""
    options = {name: value for name, value in kwargs.items() if name in OPTIONS}
    values = dict(zip(kernel.arg_names, args, strict=False))
    values.update({name: value for name, value in kwargs.items() if name not in OPTIONS})
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or value is True or value is False:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[index,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif parameter.do_not_specialize:
            signature[parameter.name] = "i32"
        elif value == 1:
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def describe(compiled: Any, name: str, arch: int) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory and the memory instructions of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [NVIDIA / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        code = subprocess.run([NVIDIA / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    ptx = compiled.asm["ptx"]
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", code, re.MULTILINE)
    found = {kind: int(re.search(rf"{kind}:(\d+)", usage)[1]) for kind in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
    return {
        "kernel": name,
        "arch": arch,
        "registers": found["REG"],
        "spilled": found["STACK"] + found["LOCAL"],
        "shared": compiled.metadata.shared,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.shared\.global.*0x10", ptx)),
        "mma": len(re.findall(r"mma\.sync|wgmma", ptx)),
        "orders": re.findall(r"\w+\.(?:acquire|release)\.\w+", ptx),
        "instructions": {op: opcodes.count(op) for op in sorted(set(opcodes))},
    }


def report(calls: dict[str, Callable[[], object]], archs: list[int]) -> Iterator[dict[str, Any]]:
    """Every kernel that ``calls`` launch, compiled for every card."""
    for label, call in calls.items():
        for kernel, args, kwargs in record(call):
            for arch in archs:
                compiled = compile_launch(kernel, args, kwargs, arch)
                yield describe(compiled, f"{label}/{kernel.__name__}", arch)


def _layout(bits: int, group: int) -> Any:
    from quant.kernels.cuda.layout import ExpertLayout
    from quant.scheme import PACKED, Scheme

    scheme = Scheme(PACKED[bits], group)
    return ExpertLayout(5120, 8192, scheme, scheme, tuple(16 * i for i in range(6)))


def _asked(top_k: int, count: int) -> Any:
    from quant.kernels.cuda.experts import ChosenExperts

    chosen, scores = torch.zeros(1, top_k, dtype=torch.int32), torch.zeros(1, top_k)
    addresses, places = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.uint8)
    return ChosenExperts(chosen, scores, addresses, places, torch.zeros(1, dtype=torch.int32), scales_input=True)


def _experts(bits: int, group: int, top_k: int = 1) -> Callable[[], object]:
    from quant.kernels.cuda import experts

    layout = _layout(bits, group)

    def call() -> None:
        x, out = torch.zeros(1, 5120, dtype=torch.bfloat16), torch.zeros(1, 5120)
        asked = _asked(top_k, 16)
        scratch = experts.DecodeScratch.allocate(layout, 1, top_k, torch.device("cpu"))
        experts.launch_experts(x, asked, layout, scratch, out)

    return call


def _linear(bits: int, group: int, tokens: int, adds: bool = False) -> Callable[[], object]:
    from quant.kernels.cuda import linear
    from quant.pack import Packed
    from quant.scheme import PACKED, Scheme

    def call() -> None:
        x = torch.zeros(tokens, 5120, dtype=torch.bfloat16)
        packed = torch.zeros(8192, 5120 * bits // 32, dtype=torch.int32)
        scale = torch.zeros(8192, 5120 // group, dtype=torch.bfloat16)
        out = torch.zeros(tokens, 8192) if adds else None
        linear.launch_linear(x, Packed(Scheme(PACKED[bits], group), packed, scale), out)

    return call


def _prefill(bits: int, group: int, scales_input: bool) -> Callable[[], object]:
    from quant.kernels.cuda import prefill

    layout = _layout(bits, group)

    def call() -> None:
        chosen, scores = torch.zeros(2048, 1, dtype=torch.int32), torch.zeros(2048, 1)
        groups = prefill.group_tokens(chosen, scores, 16, scales_input=scales_input)
        scratch = prefill.PrefillScratch.allocate(layout, 2048, torch.device("cpu"))
        x, out = torch.zeros(2, 2048, 5120, dtype=torch.bfloat16)
        prefill.launch_arrange(x, groups, layout, scratch)
        experts, addresses = torch.zeros(3, dtype=torch.int32), torch.zeros(16, dtype=torch.int64)
        prefill.launch_prefill(groups, experts, addresses, layout, scratch, out)

    return call


def _attention(storage: torch.dtype, chunk: int) -> Callable[[], object]:
    from quant.kernels.cuda import attention

    def call() -> None:
        keys, values = torch.zeros(2, 8, 32768, 128, dtype=storage)
        scales = torch.zeros(2, 8, 32768, 1)
        key_scale, value_scale = scales if storage == torch.int8 else (None, None)
        query, out = torch.zeros(2, 40, 128, dtype=torch.bfloat16)
        scratch = attention.AttentionScratch.allocate(40, 128, 32768, torch.device("cpu"))
        position = torch.zeros(1, dtype=torch.int64)
        rows = attention.KvRows(keys, values, key_scale, value_scale)
        attention.launch_attention(query, rows, position, chunk, 0.1, scratch, out)

    return call


def _bell() -> None:
    from quant.kernels.cuda import bell
    from quant.kernels.cuda.doorbell import BellBuffers

    buffers = BellBuffers.allocate(1, 1, 5120, torch.device("cpu"))
    x, out = torch.zeros(1, 5120, dtype=torch.bfloat16), torch.zeros(1, 5120)
    asked = _asked(1, 16)
    coming = bell.Coming(4, torch.zeros(1, 32)[:, 16:], asked.places)
    bell.launch_ring(x, asked, 3, 8192, buffers, coming)
    bell.launch_answer(asked, 8192, buffers, out, bell.PATIENCE)


def _hints() -> None:
    from quant.kernels.cuda import bell
    from quant.kernels.cuda.doorbell import BellBuffers

    buffers = BellBuffers.allocate(1, 4, 5120, torch.device("cpu"))
    x, asked = torch.zeros(1, 5120, dtype=torch.bfloat16), _asked(4, 128)
    for outlook in (None, bell.Nothing(), bell.Coming(4, torch.zeros(1, 128), asked.places)):
        bell.launch_ring(x, asked, 3, 8192, buffers, outlook)


# What every card gets compiled, and what one card more gets: the other widths, groups and forms.
CORE = {
    "experts int4-g128": _experts(4, 128),
    "linear int8-g128 T=1": _linear(8, 128, 1, adds=True),
    "attention int8": _attention(torch.int8, 8192),
    "bell": _bell,
    "prefill int4-g128": _prefill(4, 128, scales_input=True),
}
MORE = {
    "experts int8-g32 top-4": _experts(8, 32, 4),
    "linear int4-g128 T=8": _linear(4, 128, 8),
    "linear int8-g128 T=2048": _linear(8, 128, 2048, adds=True),
    "attention bf16": _attention(torch.bfloat16, 0),
    "hints top-4": _hints,
    "prefill int4-g32": _prefill(4, 32, scales_input=False),
    "experts int2-g64": _experts(2, 64),
    "experts int3-g128": _experts(3, 128),
    "prefill int2-g64": _prefill(2, 64, scales_input=True),
    "prefill int3-g128": _prefill(3, 128, scales_input=True),
}


if __name__ == "__main__":
    archs = [int(arch) for arch in sys.argv[1].split(",")]
    for line in report({**CORE, **MORE} if "more" in sys.argv else CORE, archs):
        print(json.dumps(line), flush=True)
