"""Whatever a GGUF file says of itself, each weight is what it was, or the file is refused in one line: every value of
its metadata in other types and sizes, every part of its tensors' headers changed, parts of a split model mixed up."""

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

from quant.errors import CheckpointError, ColdstreamError
from quant.sources.open import open_source
from tests.commands import invoke
from tests.quant.sources.foreign import Tensors
from tests.quant.sources.gguf_bytes import ARRAY, BOOL, F32, I32, TEXT, U32, U64, GgufBytes, Info
from tests.quant.sources.gguf_files import write_gguf

Tiny = Callable[..., Path]
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"mlp_only_layers": []},
    "olmoe": {},
}
VALUES: tuple[tuple[int, Any], ...] = (
    *((U32, value) for value in (0, 1, 3, 7, 2**31, 2**32 - 1)),
    *((U64, 2**63), (I32, -1), (BOOL, True), (BOOL, False)),
    *((F32, value) for value in (0.0, -1.0, 1.5, 2.0**100, float("nan"), float("inf"))),
    *((TEXT, value) for value in ("", "8", "text", "\x1b[2J\x00\n", "\udcff", "é" * 300)),
    *((ARRAY, (kind, items)) for kind, items in ((U32, []), (U32, [2, 2]), (TEXT, ["a"]), (BOOL, [True]))),
)


@pytest.fixture(scope="module", params=FAMILIES)
def whole(
    request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Tensors]:
    """A file, and what each of its weights is."""
    source = tiny(request.param, num_hidden_layers=2, **FAMILIES[request.param])
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return request.param, path, write_gguf(source, path, request.param, GGMLQuantizationType.Q8_0)


def is_right_or_refused(path: Path, meant: Tensors, config: dict[str, Any] | None = None) -> str:
    """What was said, where the file is refused. What is read must be ``meant``, of a model that is ``config``."""
    try:
        found = open_source(path)
    except ColdstreamError as error:
        return str(error)
    for key, expected in meant.items():
        assert torch.equal(found.read(key), expected), key
    assert config is None or found.config == config
    return ""


def test_every_value_is_read_as_what_it_says_or_refused(whole: tuple[str, Path, Tensors], tmp_path: Path) -> None:
    path = whole[1]
    parts = GgufBytes.read(path)
    parts.values |= {f"tokenizer.ggml.{name}_token_id": (U32, 5) for name in ("bos", "eos")}
    config = open_source(parts.write(tmp_path / "model.gguf")).config
    refused = 0
    for name, was in parts.values.items():
        for value in VALUES:
            if value == was:
                continue
            edited = copy.copy(parts)
            edited.values = parts.values | {name: value}
            try:
                found = open_source(edited.write(tmp_path / "model.gguf")).config
            except ColdstreamError:
                refused += 1
                continue
            changed = {key for key in config.keys() | found.keys() if found.get(key) != config.get(key)}
            assert len(changed) <= 1, (name, value, changed)
            for key in changed:  # what it says, and of the kind that it is of
                kinds = (int, float) if isinstance(config[key], float) else (int,)
                assert found[key] == value[1] and type(found[key]) in kinds, (name, value)
    assert refused > 100


SETTINGS: dict[str, tuple[tuple[int, Any], str]] = {
    "rope.scaling.factor": ((F32, 4.0), "scaled rotary embedding"),
    "rope.scale_linear": ((F32, 4.0), "scaled rotary embedding"),
    "rope.scaling.type": ((ARRAY, (TEXT, ["none"])), "scaled rotary embedding"),
    "rope.dimension_count": ((U32, 16), "rope.dimension_count = 16, which is not read"),
    "attention.value_length": ((U32, 16), "attention.value_length = 16, which"),
    "attention.sliding_window": ((U32, 64), "attention.sliding_window = 64, which"),
    "attention.clamp_kqv": ((F32, 8.0), "attention.clamp_kqv = 8.0, which"),
    "attention.scale": ((F32, 0.5), "attention.scale = 0.5, which"),
    "logit_scale": ((F32, 0.5), "logit_scale = 0.5, which"),
    "expert_gating_func": ((U32, 2), "expert_gating_func = 2, which"),
    "expert_weights_scale": ((F32, 2.5), "expert_weights_scale = 2.5, which"),
    "leading_dense_block_count": ((U32, 1), "leading_dense_block_count = 1, which"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_would_change_the_answer_is_not_passed_over(
    whole: tuple[str, Path, Tensors], tmp_path: Path, name: str
) -> None:
    family, path, _ = whole
    value, said = SETTINGS[name]
    parts = GgufBytes.read(path)
    kind = parts.values["general.architecture"][1]
    parts.values[f"{kind}.{name}"] = value
    with pytest.raises(CheckpointError, match=said):
        open_source(parts.write(tmp_path / "model.gguf"))
    assert family


@pytest.mark.parametrize("more", [1, 31, 4096, 2**20 + 5])
def test_zeros_after_the_last_tensor_are_padding(whole: tuple[str, Path, Tensors], tmp_path: Path, more: int) -> None:
    (tmp_path / "model.gguf").write_bytes(whole[1].read_bytes() + bytes(more))
    assert not is_right_or_refused(tmp_path / "model.gguf", whole[2])


def test_a_setting_of_its_usual_value_changes_nothing(whole: tuple[str, Path, Tensors], tmp_path: Path) -> None:
    family, path, meant = whole
    parts, config = GgufBytes.read(path), open_source(path).config
    kind = parts.values["general.architecture"][1]
    size = parts.values[f"{kind}.attention.key_length"][1]
    usual = {"rope.scaling.type": (TEXT, "none"), "rope.scaling.factor": (F32, 1.0), "expert_gating_func": (U32, 1)}
    usual |= {"rope.dimension_count": (U32, size), "attention.value_length": (U32, size)}
    usual |= {"expert_weights_norm": (BOOL, family != "olmoe"), "vocab_size": (U32, 256)}
    parts.values |= {f"{kind}.{name}": value for name, value in usual.items()}
    assert is_right_or_refused(parts.write(tmp_path / "model.gguf"), meant, config) == ""


def headers(info: Info) -> Iterator[Info]:
    """``info`` with something else in it."""
    dims = info.dims
    for other in (
        *(dims[::-1], dims[:-1], [*dims, 1], [1, *dims], [*dims, 2], [], [0, *dims[1:]], [2**63, *dims[1:]]),
        *([dims[0] * 2, *dims[1:]], [dims[0] // 2, *dims[1:]], [*dims[:-1], dims[-1] + 1], [*dims[:-1], dims[-1] - 1]),
        *([dims[0], -(-dims[-1] // 2)], [2**32, 2**32, 2**32, 2**32], [*dims, 1, 1, 1, 1]),
    ):
        yield Info(info.name, list(other), info.kind, info.offset)
    for kind in (0, 1, 2, 3, 8, 12, 24, 28, 30, 39, 99, 2**32 - 1):
        yield Info(info.name, dims, kind, info.offset)
    for offset in (0, info.offset + 1, info.offset + 32, max(0, info.offset - 32), 2**40, 2**64 - 32):
        yield Info(info.name, dims, info.kind, offset)
    for name in ("", "blk.0.attn_q.weight", "blk.9.attn_q.weight", "model.norm.weight", "\x1b[2J\n\x00", "é" * 99):
        yield Info(name, dims, info.kind, info.offset)


def test_every_part_of_a_tensors_header_is_true_or_refused(whole: tuple[str, Path, Tensors], tmp_path: Path) -> None:
    _, path, meant = whole
    parts = GgufBytes.read(path)
    names = ["token_embd.weight", "blk.1.ffn_gate_exps.weight", "blk.1.attn_q.weight", "blk.0.ffn_gate_inp.weight"]
    places = [i for i, info in enumerate(parts.infos) if info.name in (*names, "output_norm.weight")]
    for place in [*places, len(parts.infos) - 1]:
        info = parts.infos[place]
        for other in headers(info):
            edited = copy.copy(parts)
            edited.infos = [*parts.infos[:place], other, *parts.infos[place + 1 :]]
            said = is_right_or_refused(edited.write(tmp_path / "model.gguf"), meant)
            assert said or (other.dims, other.kind, other.offset) == (info.dims, info.kind, info.offset), other
        for infos in ([*parts.infos[:place], *parts.infos[place + 1 :]], [*parts.infos, info], parts.infos[::-1]):
            edited = copy.copy(parts)
            edited.infos = infos
            assert is_right_or_refused(edited.write(tmp_path / "model.gguf"), meant)


WHOLE: dict[str, tuple[Callable[[GgufBytes], object], str]] = {
    "too many tensors": (lambda g: setattr(g, "counts", (2**63, 3)), "corrupt"),
    "a tensor more than there are": (lambda g: setattr(g, "counts", (len(g.infos) + 1, len(g.values))), "corrupt"),
    "a tensor less than there are": (lambda g: setattr(g, "counts", (len(g.infos) - 1, len(g.values))), "corrupt"),
    "too many values": (lambda g: setattr(g, "counts", (1, 2**40)), "corrupt"),
    "a value twice": (lambda g: g.twice.append("general.architecture"), "twice"),
    "version 1": (lambda g: setattr(g, "version", 1), "version 1: expected 2 or 3"),
    "the other byte order": (lambda g: setattr(g, "version", 3 << 24), "expected 2 or 3, little-endian"),
    "an alignment of 24": (lambda g: g.values.update({"general.alignment": (U32, 24)}), "expected a power of two"),
    "an alignment of none": (lambda g: g.values.update({"general.alignment": (U32, 0)}), "expected a power of two"),
    "an alignment of true": (lambda g: g.values.update({"general.alignment": (BOOL, True)}), "expected a power of two"),
    "another alignment": (lambda g: g.values.update({"general.alignment": (U32, 4096)}), "is truncated or corrupt"),
    "more bytes": (lambda g: setattr(g, "body", g.body + bytes(4095) + b"x"), "4,096 bytes: expected none"),
    "fewer bytes": (lambda g: setattr(g, "body", g.body[:-64]), "beyond the file's end"),
    "split in none": (lambda g: g.values.update({"split.count": (U32, 0)}), "split.count is 0"),
    "split in a text": (lambda g: g.values.update({"split.count": (TEXT, "2")}), "split.count is '2'"),
    "split in two": (lambda g: g.values.update({"split.count": (U32, 2)}), "split over 2 files"),
    "of more tensors": (lambda g: g.values.update({"split.tensors.count": (I32, 999)}), "expected 999"),
    "of no architecture": (lambda g: g.values.pop("general.architecture"), "no general.architecture"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_what_a_file_says_of_itself_is_checked(whole: tuple[str, Path, Tensors], tmp_path: Path, case: str) -> None:
    edit, said = WHOLE[case]
    parts = copy.deepcopy(GgufBytes.read(whole[1]))
    edit(parts)
    with pytest.raises(CheckpointError, match=said):
        open_source(parts.write(tmp_path / "model.gguf"))


@pytest.mark.parametrize("model", ["tokens", "merges", "token_type", "scores", "model", "pre", "eos_token_id"])
def test_a_tokenizer_is_one_or_refused(whole: tuple[str, Path, Tensors], tmp_path: Path, model: str) -> None:
    if whole[0] != "olmoe":
        pytest.skip("the same for all")
    parts = GgufBytes.read(whole[1])
    for value in VALUES[::3]:
        parts.values[f"tokenizer.ggml.{model}"] = value
        with suppress(ColdstreamError):
            found = open_source(parts.write(tmp_path / "model.gguf"))
            assert (found.sidecar_folder / "tokenizer.json").is_file()


def test_parts_of_a_split_model_are_in_order_and_of_one_model(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("olmoe", num_hidden_layers=2)
    meant = write_gguf(source, tmp_path / "model.gguf", "olmoe", GGMLQuantizationType.Q4_0, split=10)
    files = sorted(tmp_path.glob("*.gguf"))
    kept = [file.read_bytes() for file in files]
    assert is_right_or_refused(files[0], meant) == ""

    def said(edit: Callable[[], object]) -> str:
        edit()
        found = is_right_or_refused(files[0], meant)
        for file, data in zip(files, kept, strict=True):
            file.unlink(missing_ok=True)
            file.write_bytes(data)
        return found

    def swap() -> None:
        files[1].write_bytes(kept[2])
        files[2].write_bytes(kept[1])

    assert "says that it is part 2 of" in said(swap)
    assert "says that it is part 1 of" in said(lambda: files[2].write_bytes(kept[1]))
    assert "says that it is part 0 of" in said(lambda: files[1].write_bytes(kept[0]))
    assert "is missing" in said(files[1].unlink)
    for count in (0, 3, 100, len(kept[1]) // 2, len(kept[1]) - 64):
        assert "truncated" in said(lambda count=count: files[1].write_bytes(kept[1][:count]))
    parts = GgufBytes.read(files[1])
    for value in VALUES:
        for key in ("split.no", "split.count", "general.alignment"):
            edited = copy.copy(parts)
            edited.values = parts.values | {key: value}
            found = said(lambda edited=edited: edited.write(files[1]))
            assert found or value[1] == parts.values.get(key, (0, 32))[1], (key, value)


@pytest.mark.parametrize("command", ["plan", "generate", "check", "quantize"])
@pytest.mark.parametrize("file", ["model.gguf", "\x1b[2J\nmo\tdel.gguf"])
def test_no_command_ends_in_more_than_a_line(
    whole: tuple[str, Path, Tensors], tmp_path: Path, command: str, file: str
) -> None:
    path = tmp_path / file
    shutil.copy(whole[1], path)
    parts = GgufBytes.read(path)
    parts.infos[3].name = "\x1b]0;x\x07\n"
    parts.write(path)
    more = {"generate": ["hi"], "check": ["--for", "vllm"], "quantize": [tmp_path / "out", "--experts", "int4"]}
    done = invoke(command, path, *more.get(command, []))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "\x1b" not in done.stderr and "\x07" not in done.stderr
