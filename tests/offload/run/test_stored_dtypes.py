"""Whatever dtype a source is stored in: what quantize makes of it is run, and gives the stock model's logits."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offload.records import RunOptions
from offload.run.session import Session
from quant.convert.convert import convert
from quant.model.families import Role
from quant.scheme import Scheme
from tests import oracle, sessions
from tests.checkpoints import make
from tests.quant.dequantized import tensors_of

IDS = torch.randint(0, 250, (24,), generator=torch.Generator().manual_seed(3))
EXPERTS: dict[Role, Scheme] = {"experts": Scheme("int4")}
DENSE: dict[Role, Scheme] = {"attention": Scheme("int8"), "lm_head": Scheme("int4")}
DTYPES = {"bf16": [torch.bfloat16], "f16": [torch.float16], "f32": [torch.float32], "f64": [torch.float64]}
DTYPES["mixed"] = [torch.float16, torch.float32, torch.bfloat16, torch.float64, torch.float16]
Make = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A tiny model of a family whose tensors are stored in the dtypes of that name, one after the other."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, dtypes: str) -> Path:
        if (family, dtypes) not in made:
            folder = tmp_path_factory.mktemp("stored") / "model"
            make(family, folder, dtype=torch.float32, num_hidden_layers=2)  # type: ignore[arg-type]
            kinds = DTYPES[dtypes]
            for file in folder.glob("*.safetensors"):
                tensors = {
                    key: tensor.to(kinds[index % len(kinds)]) if tensor.is_floating_point() else tensor
                    for index, (key, tensor) in enumerate(sorted(load_file(file).items()))
                }
                save_file(tensors, file, {"format": "pt"})
            made[family, dtypes] = folder
        return made[family, dtypes]

    return get


def logits(folder: Path) -> torch.Tensor:
    """After a prompt, all of IDS but the last, and after a step of decode, the last."""
    with Session.open(folder, RunOptions(device="cpu", exact=True)) as session:
        prompt, last = IDS[:-1].tolist(), IDS[-1:].tolist()
        return torch.stack((sessions.prompt_logits(session, prompt), sessions.prompt_logits(session, prompt, last)))


@pytest.mark.parametrize("schemes", [EXPERTS, DENSE, EXPERTS | DENSE], ids=["experts", "dense", "both"])
@pytest.mark.parametrize("dtypes", list(DTYPES))
@pytest.mark.parametrize("family", ["llama4_text", "mixtral", "qwen3_moe_fused"])
def test_what_is_quantized_runs(
    stored: Make, tmp_path: Path, family: str, dtypes: str, schemes: Mapping[Role, Scheme]
) -> None:
    source = stored(family, dtypes)
    report = convert(source, tmp_path / "out", schemes)
    said = [note for note in report.notes if "f64" in note]
    assert len(said) == (dtypes in ("f64", "mixed"))
    assert torch.float64 not in {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()}
    with torch.inference_mode():
        expected = oracle.stock(source, tmp_path / "out")(input_ids=IDS[None]).logits[0, -2:]
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtypes", list(DTYPES))
def test_what_is_kept_is_kept_to_the_bit(stored: Make, tmp_path: Path, dtypes: str) -> None:
    source = stored("llama4_text", dtypes)
    convert(source, tmp_path / "out", EXPERTS)
    made = tensors_of(tmp_path / "out")
    for key, tensor in tensors_of(source).items():
        if ".experts." not in key:
            expected = tensor.float() if tensor.dtype is torch.float64 else tensor
            assert made[key].dtype == expected.dtype and torch.equal(made[key], expected), key


@pytest.mark.parametrize("dtypes", list(DTYPES))
@pytest.mark.parametrize("family", ["llama4_text", "mixtral"])
def test_a_source_runs_as_it_is(stored: Make, tmp_path: Path, family: str, dtypes: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(stored(family, dtypes), source)
    with torch.inference_mode():
        expected = oracle.stock(source, source)(input_ids=IDS[None]).logits[0, -2:]
    torch.testing.assert_close(logits(source), expected, rtol=1e-3, atol=1e-3)
