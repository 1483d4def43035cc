"""Native code makes of others' codes what the libraries that define them do, to the bit, on every instruction set."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from quant.errors import SchemeError
from quant.kernels.quantize import widen_codes

SIZES = {"Q8_0": (34, [0]), "Q4_K": (144, [0, 2]), "Q5_K": (176, [0, 2]), "Q6_K": (210, [208])}


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("blocks", [1, 3])
def test_gguf_codes_are_what_the_package_makes_of_them(isa: str, kind: str, blocks: int) -> None:
    size, halves = SIZES[kind]
    generator = np.random.default_rng(blocks)
    codes = generator.integers(0, 256, (700, blocks, size), dtype=np.uint8)
    for place in halves:  # subnormal ones and zeros, too
        scale = generator.choice([1.0, -3e-3, 0.0, 4e-7, 6e4], (700, blocks, 1)) * generator.random((700, blocks, 1))
        codes[..., place : place + 2] = scale.astype(np.float16).view(np.uint8)
    rows = codes.reshape(700, -1)
    found = widen_codes(torch.from_numpy(rows), kind)
    assert torch.equal(found, torch.from_numpy(dequantize(rows, GGMLQuantizationType[kind])))


@pytest.mark.parametrize("width", [1, 24, 128, 300])
def test_fp8_codes_are_what_torch_makes_of_them(isa: str, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    codes = torch.randint(0, 256, (300, 300), dtype=torch.uint8, generator=generator)
    factors = torch.randn(300, -(-300 // width), generator=generator)
    found = widen_codes(codes, "F8_E4M3", factors, width)
    right = codes.view(torch.float8_e4m3fn).float() * factors.repeat_interleave(width, 1)[:, :300]
    assert right.isnan().any()
    torch.testing.assert_close(found, right, rtol=0, atol=0, equal_nan=True)


def test_what_does_not_fit_together_is_refused() -> None:
    codes = torch.zeros(4, 288, dtype=torch.uint8)
    assert widen_codes(codes, "Q4_K").shape == (4, 512)
    for wrong in (codes[:, :287], codes.char(), codes[:, :0]):
        with pytest.raises(SchemeError, match="whole blocks of 144 bytes"):
            widen_codes(wrong, "Q4_K")
    with pytest.raises(SchemeError, match=r"factors \(4, 3\)"):
        widen_codes(codes, "F8_E4M3", torch.ones(4, 2), 128)
