"""Every kernel compiles for every card that is meant to run it, and into what its design counts on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[4]
# Bytes of shared memory that a program may have: A100, 3090, 4090, H100, 5090.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}


def compiled(arch: int) -> list[dict[str, Any]]:
    """What tests/quant/kernels/cuda/compiling.py prints, in a process where the interpreter is off."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "error", "-m", "tests.quant.kernels.cuda.compiling", str(arch)]
    command += ["more"] if arch == 89 else []
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert found
    return found


@pytest.mark.parametrize("arch", SHARED)
def test_what_is_compiled_is_what_the_design_counts_on(arch: int) -> None:
    """One test per card, because compiling takes the time."""
    kernels = compiled(arch)
    for kernel in kernels:  # nothing spills (of 32 operands in a row four words), and shared memory suffices
        assert kernel["spilled"] <= (16 if kernel["kernel"].startswith("prefill int3") else 0), kernel
        assert kernel["shared"] <= SHARED[arch], kernel
        assert kernel["registers"] <= 192, kernel
    if arch == 89:
        for check in (reads_are_wide, tensor_cores_are_used, the_decode_loop_leaves_room, the_bell_orders_host_memory):
            check(kernels)


def reads_are_wide(kernels: list[dict[str, Any]]) -> None:
    """Packed weights are read 16 bytes at a time; of 2 and 3 bits, whose rows need not begin there, less."""
    for kernel in kernels:
        label, name = kernel["kernel"].rsplit("/", 1)
        if not label.startswith(("experts int2", "experts int3")) and name in (
            "gate_up_kernel",
            "down_kernel",
            "linear_kernel",
        ):
            assert kernel["wide_loads"] >= (4 if name == "gate_up_kernel" else 2), kernel


def tensor_cores_are_used(kernels: list[dict[str, Any]]) -> None:
    """Many tokens go to the tensor cores."""
    for kernel in kernels:
        if kernel["kernel"].startswith(("prefill", "linear int4-g128 T=8", "linear int8-g128 T=2048")):
            assert "arrange" in kernel["kernel"] or kernel["mma"] >= 8, kernel


def the_decode_loop_leaves_room(kernels: list[dict[str, Any]]) -> None:
    """A 4090 receives 6 weights of int4 per SM and clock, and issues 128 operations: 21 per weight, half of
    them on integers. A thread's step is 2 rows of 16 bytes: 64 weights, twice that for gate and up."""
    for kernel in kernels:
        if kernel["kernel"].startswith("experts int4-g128/"):
            weights = 128 if "gate_up" in kernel["kernel"] else 64
            counts = kernel["instructions"]
            integer = sum(counts.get(op, 0) for op in ("LOP3", "SHF", "IADD3", "ISETP", "PRMT", "SEL", "LEA"))
            assert sum(counts.values()) / weights < 10, counts  # the whole kernel, not only its loop
            assert integer / weights < 5, counts


def the_bell_orders_host_memory(kernels: list[dict[str, Any]]) -> None:
    """At system scope."""
    orders = {kernel["kernel"]: kernel["orders"] for kernel in kernels if "bell" in kernel["kernel"]}
    assert orders["bell/ring_kernel"] == ["st.release.sys"]
    assert set(orders["bell/answer_kernel"]) == {"ld.acquire.sys", "st.release.sys"}
