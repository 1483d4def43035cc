"""Results of a calibration that cannot be read are one line that says how to go on."""

from pathlib import Path

import pytest
import torch

from quant.checkpoint.tensor_file import save_tensors
from quant.errors import OutputError
from quant.rounding.encode import Encoded
from quant.rounding.prepared import Prepared
from quant.rounding.rounding import Nearest
from quant.scheme import Scheme


@pytest.mark.parametrize("left", [0, 100, -10])
def test_a_layer_that_is_cut_is_named(tmp_path: Path, left: int) -> None:
    file = tmp_path / "layer-00000.safetensors"
    stored = {"weight_packed": torch.zeros(2, 4, dtype=torch.int32), "weight_scale": torch.ones(2, 1)}
    save_tensors(file, {f"m.{name}": value for name, value in {**stored, "sums": torch.ones(2)}.items()})
    whole = Prepared(tmp_path, "kept", Nearest())

    def encode() -> Encoded:
        return whole.encode(torch.zeros(2, 32), Scheme("int4", 32), "m", False, "m", 0)

    assert encode().tensors.keys() == stored.keys()
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(OutputError, match=r"layer-00000.safetensors cannot be read .* run again with --resume"):
        encode()
    with pytest.raises(OutputError, match=r"layer-00000.safetensors cannot be read"):
        Prepared(tmp_path, "kept", Nearest())
