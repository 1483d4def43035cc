"""What is kept of prompts changes no text, whatever becomes of the folder.

Legend: a block is 128 tokens; chunks of 256 and more are what a chunked layer attends within.
"""

import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offload.generate.batch import Batch
from offload.prompts.block_keys import BlockKeys
from offload.records import Reused, RunOptions, Sampling
from offload.run.session import Session
from quant.convert.convert import convert
from quant.errors import UsageError
from quant.model.families import Role
from quant.scheme import Scheme
from tests import sessions
from tests.family_checkpoints import FAMILIES as OTHERS
from tests.family_checkpoints import make_family

SCHEMES: dict[Role, Scheme] = {"experts": Scheme("int4", 32), "attention": Scheme("int8", 32)}
CONTEXT = 1024
# Chunks of whole blocks, of blocks and a part, and shorter than one.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "chunks of 256": ("llama4_text", {"attention_chunk_size": 256}),
    "chunks of 320": ("llama4_text", {"attention_chunk_size": 320}),
    "chunks of 32": ("llama4_text", {}),
    "no chunks": ("qwen3_moe", {}),
    "windows": ("gpt_oss", {"sliding_window": 160}),
    "compressed": ("deepseek_v3", {}),
    "transformers' modules": ("flex_olmo", {}),
}
GREEDY = Sampling(max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def models(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            family, options = MODELS[name]
            made[name] = tmp_path_factory.mktemp("kept") / "model"
            options = {**options, "max_position_embeddings": CONTEXT}
            others = family in OTHERS
            source = (
                make_family(family, tmp_path_factory.mktemp("source"), **options) if others else tiny(family, **options)
            )
            convert(source, made[name], SCHEMES)
        return made[name]

    return get


def opened(model: Path, cache: Path | None, **asked: Any) -> Session:
    placed = {name: asked.pop(name) for name in ("prompt_chunk",) if name in asked}
    options = RunOptions(context=CONTEXT, prompt_cache=cache, **asked)
    session = sessions.session(model, options, ram_slots=64, **placed)
    session.finish_filling()
    return session


def said(session: Session, prompt: list[int], sampling: Sampling = GREEDY) -> tuple[list[int], Reused]:
    records = list(session.generate(prompt, sampling))
    return [record.token_id for record in records], records[0].reused


def text_of(length: int, seed: int = 0) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(256) for _ in range(length)]


def in_use(session: Session) -> int:
    assert isinstance(session.runner, Batch) and session.prompts is not None
    session.reset()
    session.prompts.flush()
    return session.kv_pool.counts.count - session.kv_pool.counts.free


def files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_text_goes_on_from_disk_as_if_it_had_been_computed(
    name: str, kv: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    model, prompt = models(name), text_of(700)
    with opened(model, None, kv=kv) as session:
        whole = {length: said(session, prompt[:length])[0] for length in (130, 256, 257, 400, 513, 700)}
        other = said(session, [*prompt[:400], *text_of(150, seed=1)])[0]
    with opened(model, tmp_path, kv=kv, prompt_chunk=96) as session:
        assert said(session, prompt[:650])[1] == Reused()
        assert in_use(session) == 0
    for length, expected in whole.items():
        with opened(model, tmp_path, kv=kv) as session:
            found, reused = said(session, prompt[:length])
            assert found == expected
            # Up to the last whole block before the last token; longer prompts end where the first did.
            blocks = min(length - 1, 650) // 128 * 128
            assert blocks <= reused.disk <= length - 1 and not reused.memory and reused.disk_bytes
            assert in_use(session) == 0
    with opened(model, tmp_path, kv=kv) as session:
        assert said(session, [*prompt[:400], *text_of(150, seed=1)])[0] == other


def test_only_what_follows_a_conversation_is_computed(models: Callable[[str], Path], tmp_path: Path) -> None:
    model, prompt = models("chunks of 256"), text_of(650)
    with opened(model, tmp_path) as session:
        answer = said(session, prompt)[0]
    with opened(model, tmp_path) as session:
        more = [*prompt, *answer, 7, 8]
        found, reused = said(session, more)
        assert reused.disk == len(more) - 3  # the last token of an answer is never run
    with opened(model, None) as session:
        assert said(session, more)[0] == found


def test_memory_and_disk_are_joined(models: Callable[[str], Path], tmp_path: Path) -> None:
    for name in MODELS:
        model, prompt, cache = models(name), text_of(700), tmp_path / name
        with opened(model, None) as session:
            expected = said(session, prompt)[0]
        with opened(model, cache) as session:
            said(session, prompt)
        for held in (50, 128, 200, 300, 520):
            with opened(model, cache) as session:
                said(session, prompt[:held], Sampling(max_tokens=1))
                found, reused = said(session, prompt)
                assert found == expected
                assert reused.tokens == 640 and reused.memory <= held  # whole blocks before the last token
                assert in_use(session) == 0


def test_pages_of_another_model_or_form_are_not_found(models: Callable[[str], Path], tmp_path: Path) -> None:
    prompt = text_of(300)
    with opened(models("no chunks"), tmp_path) as session:
        said(session, prompt)
    for model, asked in ((models("chunks of 32"), {}), (models("no chunks"), {"kv": "int8"})):
        with opened(model, tmp_path, **asked) as session:
            assert said(session, prompt)[1] == Reused()
    with opened(models("no chunks"), tmp_path) as session:
        assert said(session, prompt)[1].disk == 256


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def swap(file: Path) -> None:
    other = next(path for path in files(file.parents[1]) if path != file and path.suffix == file.suffix)
    file.write_bytes(other.read_bytes())


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("spoil", [cut, flip, swap, pipe, folder, os.unlink])
def test_what_was_spoiled_is_computed(
    spoil: Callable[[Path], object], models: Callable[[str], Path], tmp_path: Path
) -> None:
    model, prompt = models("chunks of 256"), text_of(700)
    with opened(model, None) as session:
        expected = said(session, prompt)[0]
    with opened(model, tmp_path) as session:
        said(session, prompt)
    by_age = sorted(files(tmp_path), key=lambda path: -path.stat().st_mtime_ns)
    for file in (by_age[0], by_age[len(by_age) // 2]):
        spoil(file)
    with opened(model, tmp_path) as session:
        assert said(session, prompt)[0] == expected
        gone = spoil is os.unlink
        assert len([note for note in session.notes if "prompt cache" in note]) == (0 if gone else 1), session.notes
        assert in_use(session) == 0
    if spoil is not folder:  # that is somebody's
        with opened(model, tmp_path) as session:
            assert said(session, prompt)[1].disk == 640 and not session.notes


def test_a_place_that_cannot_be_used_is_said_and_the_run_goes_on(models: Callable[[str], Path], tmp_path: Path) -> None:
    model, prompt = models("no chunks"), text_of(300)
    taken = tmp_path / "file"
    taken.write_text("mine")
    with opened(model, None) as session:
        expected = said(session, prompt)[0]
    for place in (taken, taken / "below", Path("/proc/no/such")):
        with opened(model, place) as session:
            assert said(session, prompt)[0] == expected
            (note,) = [note for note in session.notes if "prompt cache is not used" in note]
            assert str(place) in note
    with opened(model, tmp_path, prompt_cache_size="4KiB") as session:
        assert said(session, prompt)[0] == expected
        assert any("not kept" in note for note in session.notes)
    assert taken.read_text() == "mine"
    with pytest.raises(UsageError, match="--prompt-cache"):
        RunOptions(prompt_cache_size="1GiB")


def test_what_cannot_be_written_is_said_once(models: Callable[[str], Path], tmp_path: Path) -> None:
    model, prompt = models("no chunks"), text_of(300)
    with opened(model, tmp_path) as session:
        expected = said(session, prompt)[0]
    kept = files(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(model, tmp_path) as session:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # writing more fails, as on a full disk
        try:
            found, reused = said(session, prompt)
            assert found == expected and reused.disk == 256
            said(session, text_of(600, seed=2))
            assert in_use(session) == 0
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        (note,) = [note for note in session.notes if "not kept" in note]
        assert "File too large" in note
    assert files(tmp_path) == kept


def _replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("somebody's")


def _replace_by_link(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder.with_name("nowhere") / "at all")


@pytest.mark.parametrize(
    ("change", "note"),
    [(shutil.rmtree, ""), (_replace_by_file, "Not a directory"), (_replace_by_link, "File exists")],
    ids=["removed", "a file", "a link to nowhere"],
)
def test_a_folder_that_goes_away_in_the_midst_of_a_run_costs_it_a_note(
    models: Callable[[str], Path], tmp_path: Path, change: Callable[[Path], object], note: str
) -> None:
    model, folder = models("no chunks"), tmp_path / "cache"
    with opened(model, None) as session:
        expected = said(session, text_of(300, seed=2))[0]
    with opened(model, folder) as session:
        said(session, text_of(300))
        assert session.prompts is not None
        session.prompts.flush()
        change(folder)
        assert said(session, text_of(300, seed=2))[0] == expected
        assert in_use(session) == 0
        notes = [said for said in session.notes if "not kept" in said]
    assert [note in said for said in notes] == [True] * bool(note)
    assert note or files(folder), "where it was removed, it is made again"


def test_a_family_whose_state_is_not_in_pages_says_so(tmp_path: Path) -> None:
    model = make_family("qwen3_next", tmp_path / "source")
    with opened(model, tmp_path / "cache") as session:
        assert said(session, text_of(40))[1] == Reused()
        assert any("does not lie in pages" in note for note in session.notes)
    assert not (tmp_path / "cache").exists()


def test_images_are_told_apart_by_what_they_show() -> None:
    def keys(first: int, image: bytes) -> list[str]:
        tokens = [*range(60), *range(first, first + 100), *range(60)]
        return BlockKeys("origin", 1000, lambda token: (image, token - first)).follow(tokens)

    cat, dog = keys(1000, b"cat" * 8), keys(1000, b"dog" * 8)
    assert cat == keys(5000, b"cat" * 8) and len(cat) == 1 and cat != dog


def test_others_go_on_while_a_prompt_is_read_and_one_that_leaves_meanwhile_leaves_nothing(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    model, first, second = models("chunks of 256"), text_of(700), text_of(500, seed=4)
    longer = Sampling(max_tokens=40, ignore_eos=True)
    with opened(model, None) as session:
        expected = [said(session, prompt, longer)[0] for prompt in (second, first)]
    with opened(model, tmp_path) as session:
        said(session, first)
    for _ in range(4):
        with opened(model, tmp_path) as session:
            streams = [session.submit(prompt, longer) for prompt in (second, first, first)]
            streams[2].cancel()
            assert [[record.token_id for record in stream] for stream in streams[:2]] == expected
            assert streams[1].cached_tokens == 640  # as a server counts them
            assert in_use(session) == 0
