"""Whatever a decode step launches compiles for a card, in every form that a model of ours asks for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quant.convert.convert import convert
from quant.model.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[3]


def test_every_form_of_every_kernel_in_a_step_compiles(demo_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    convert(demo_model, tmp_path / "demo", load_recipe("demo").schemes)
    run = subprocess.run(
        [sys.executable, "-m", "tests.offload.decode.step_kernels", "89", str(tmp_path / "demo")],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert {one["kernel"] for one in found} == {
        "rms_norm_kernel",
        "append_kernel",
        "part_kernel",
        "join_kernel",
        "select_kernel",
        "ring_kernel",
        "gate_up_kernel",
        "down_kernel",
        "answer_kernel",
    }
    assert len(found) > 20  # alignments, layers with and without RoPE, both KV caches
    assert all(one["shared"] <= 99 * 1024 for one in found)
