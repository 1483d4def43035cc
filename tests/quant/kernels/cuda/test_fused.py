"""The small kernels of a decode step equal their references; bad shapes are refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quant.errors import SchemeError
from quant.kernels.attention import AttentionShape
from quant.kernels.cuda import fused
from quant.kernels.cuda.attention import KvRows
from quant.kernels.cuda.fused import HeadNorms, TokenPlace

ROOT = Path(__file__).resolve().parents[4]
ROWS = KvRows(torch.zeros(2, 16, 32), torch.zeros(2, 16, 32))
AT = TokenPlace(torch.zeros(1, dtype=torch.int32), torch.zeros(0), torch.zeros(0), torch.ones(1))


def test_kernels_equal_their_references_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.quant.kernels.cuda.fused_cases"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("equal"), done.stderr


@pytest.mark.parametrize(
    ("shape", "rows", "norms", "message"),
    [
        (AttentionShape(4, 1, 32), ROWS, None, "expected one token of 4 and 1 heads"),
        (AttentionShape(4, 2, 32), KvRows(torch.zeros(1, 16, 32), torch.zeros(1, 16, 32)), None, "KV buffers"),
        (AttentionShape(4, 2, 32), KvRows(ROWS.keys.to(torch.int8), ROWS.values.to(torch.int8)), None, "scales"),
        (AttentionShape(4, 2, 32), ROWS, HeadNorms(torch.ones(32), torch.ones(32)), "norms to match"),
        (AttentionShape(4, 2, 32, rope="halves"), ROWS, None, "cosines and sines to match"),
    ],
)
def test_what_does_not_fit_is_refused(
    shape: AttentionShape, rows: KvRows, norms: HeadNorms | None, message: str
) -> None:
    q, k, v = torch.zeros(1, 128), torch.zeros(1, 64), torch.zeros(1, 64)
    with pytest.raises(SchemeError, match=message):
        fused.append(q, k, v, shape, rows, AT, norms)


def test_a_norm_of_something_else_is_refused() -> None:
    with pytest.raises(SchemeError, match="expected f32"):
        fused.rms_norm(torch.zeros(1, 8, dtype=torch.bfloat16), torch.ones(8), 1e-5, torch.bfloat16)
