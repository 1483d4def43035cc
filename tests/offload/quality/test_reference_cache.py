"""A reference is made once, and what is not as it was written is made anew."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from offload.quality import reference, reference_cache
from offload.quality.reference import Reference
from offload.quality.reference_cache import reference_of
from offload.quality.windows import Windows
from offload.text.tokenizer import load_tokenizer
from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import OutputError

TEXT = "It rained on the fourth day, and nobody had brought a tent. " * 20
FILES = ["about.json", "codes.bin", "span.bin", "true.bin", "ids.bin", "routes.npy"]


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Checkpoint:
    return Checkpoint.open(tiny("llama4_text"))


@pytest.fixture(scope="module")
def windows(model: Checkpoint) -> Windows:
    return Windows.cut(TEXT, load_tokenizer(model.path), 32, 2)


@pytest.fixture(scope="module")
def made(model: Checkpoint, windows: Windows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with one reference, which keeps a part of the vocabulary, so that it has all files there are."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reference, "MAX_STORED", 100)
        reference_of(model, windows, cache)
    return cache


def content(found: Reference) -> list[torch.Tensor]:
    forecasts = [found.window(index) for index in range(2)]
    return [found.routes, *(part for f in forecasts for part in (f.values, f.true))]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that references were made in."""
    folders: list[Path] = []
    make = reference_cache.make_reference

    def counted(walk: object, windows: Windows, folder: Path, *rest: object) -> None:
        folders.append(folder)
        make(walk, windows, folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(reference_cache, "make_reference", counted)
    return folders


def test_a_reference_is_made_once_for_a_text(
    model: Checkpoint, windows: Windows, tmp_path: Path, calls: list[Path]
) -> None:
    first, again = (reference_of(model, windows, tmp_path) for _ in range(2))
    assert len(calls) == 1 and not again.notes
    assert all(torch.equal(a, b) for a, b in zip(content(first), content(again), strict=True))
    reference_of(model, Windows.cut("x" + TEXT, load_tokenizer(model.path), 32, 2), tmp_path)
    assert len(calls) == 2, "another text is another reference"
    assert not list(tmp_path.glob("*.partial"))


def test_two_at_once_make_one(model: Checkpoint, windows: Windows, tmp_path: Path, calls: list[Path]) -> None:
    said: list[str] = []
    with ThreadPoolExecutor(2) as threads:
        asked = [
            threads.submit(reference_of, model, windows, tmp_path, progress=lambda done, of, what: said.append(what))
            for _ in range(2)
        ]
        first, second = (one.result() for one in asked)
    assert len(calls) == 1 and "waiting for another evaluation, which makes the same reference" in said
    assert all(torch.equal(a, b) for a, b in zip(content(first), content(second), strict=True))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def _flip(file: Path) -> None:
    data, source = bytearray(file.read_bytes()), Random(file.name)
    data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    file.write_bytes(data)


def _zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def _nan(file: Path) -> None:
    size = file.stat().st_size
    file.write_bytes(np.full(size // 4 + 1, np.nan, np.float32).tobytes()[:size])


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("spoil", [_cut, _flip, _zero, _nan, Path.unlink, _pipe])
def test_what_was_spoiled_is_noticed(
    spoil: Callable[[Path], None], file: str, made: Path, model: Checkpoint, windows: Windows, tmp_path: Path
) -> None:
    shutil.copytree(made, tmp_path / "cache")
    [about] = (tmp_path / "cache").glob("*/about.json")
    identity = reference_cache._identity(model, windows)
    Reference.open(about.parent, identity)
    spoil(about.parent / file)
    with pytest.raises(OutputError):
        Reference.open(about.parent, identity)


def test_what_was_spoiled_is_made_anew_and_a_note_says_so(
    model: Checkpoint, windows: Windows, tmp_path: Path, calls: list[Path]
) -> None:
    whole = content(reference_of(model, windows, tmp_path))
    [about] = tmp_path.glob("*/about.json")
    _flip(about.parent / "codes.bin")
    (tmp_path / f"{about.parent.name}.partial").mkdir()  # of a run that was killed
    mended = reference_of(model, windows, tmp_path)
    assert len(calls) == 2
    assert "computed anew" in mended.notes[0] and "codes.bin" in mended.notes[0]
    assert all(torch.equal(a, b) for a, b in zip(whole, content(mended), strict=True))
    assert not list(tmp_path.glob("*.partial"))


def test_a_reference_of_another_text_under_the_name_of_this_is_not_used(
    made: Path, model: Checkpoint, windows: Windows
) -> None:
    [about] = made.glob("*/about.json")
    with pytest.raises(OutputError, match="of another model or text"):
        Reference.open(about.parent, "another")


def test_a_cache_that_cannot_be_written_is_said_before_anything_is_run(
    model: Checkpoint, windows: Windows, tmp_path: Path, calls: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        reference_of(model, windows, tmp_path / "file")
    monkeypatch.setattr(reference_cache, "reference_nbytes", lambda shape, tokens: 2**60)
    with pytest.raises(OutputError, match="free"):
        reference_of(model, windows, tmp_path / "cache")
    assert not calls and not list(tmp_path.glob("cache/*.partial"))
