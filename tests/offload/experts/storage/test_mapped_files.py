"""A first token from the page cache: right, safe from a file that is cut, and over once all is copied."""

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from offload.experts.cache.mapped_cache import MappedCache
from offload.records import RunOptions, Sampling
from offload.run.session import Session
from quant.convert.convert import convert
from quant.scheme import Scheme
from tests import sessions

PROMPT = list(range(5, 60))
ROLES = ("experts", "shared_expert", "attention", "lm_head")


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("mapped") / "model"
    convert(tiny("llama4_maverick"), destination, dict.fromkeys(ROLES, Scheme("int4")))  # type: ignore[arg-type]
    return destination


@pytest.fixture
def files(model: Path) -> list[Path]:
    """The model's files, all in the page cache."""
    found = sorted(model.glob("*.safetensors"))
    for file in found:
        file.read_bytes()
    return found


def _open(model: Path, **options: object) -> Session:
    run = RunOptions(context=200, exact=True, **options)  # type: ignore[arg-type]
    return sessions.session(model, run, ram_slots=64)


def _cache(session: Session) -> MappedCache:
    assert isinstance(session.experts, MappedCache)
    return session.experts


def _writable(file: Path) -> bool:
    try:
        os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK))
    except BlockingIOError:
        return False
    return True


@pytest.fixture
def tokens(model: Path) -> Iterator[list[int]]:
    """What the model says when nothing is mapped."""
    with _open(model, page_cache=True) as session:
        assert not isinstance(session.experts, MappedCache)
        yield [r.token_id for r in session.generate(PROMPT, Sampling(max_tokens=12, ignore_eos=True))]


def test_the_first_token_takes_experts_where_they_lie_and_the_rest_of_them_moves(
    model: Path, files: list[Path], tokens: list[int]
) -> None:
    with _open(model) as session:
        cache = _cache(session)
        records = session.generate(PROMPT, Sampling(max_tokens=12, ignore_eos=True))
        first = next(records)
        mapped = set(cache.mapped)
        assert mapped
        assert not cache.host.slot_of  # nothing was copied for it
        assert first.by_tier == {"vram": 0, "ram": len(mapped), "disk": 0}
        assert not any(_writable(file) for file in files)
        found = [first.token_id, *(record.token_id for record in records)]
        session.finish_filling()
        assert found == tokens
        assert not cache.mapped
        assert cache.files is None
        assert len(cache.host.slot_of) == session.store.count
        assert all(_writable(file) for file in files)
        again = session.generate([*PROMPT, *found], Sampling(max_tokens=4, ignore_eos=True))
        moved = [record.token_id for record in again]
    with _open(model, page_cache=True) as session:
        again = session.generate([*PROMPT, *found], Sampling(max_tokens=4, ignore_eos=True))
        assert moved == [record.token_id for record in again]


def test_a_file_that_somebody_writes_to_is_not_mapped(model: Path, files: list[Path], tokens: list[int]) -> None:
    with files[1].open("r+b"), _open(model) as session:
        records = list(session.generate(PROMPT, Sampling(max_tokens=12, ignore_eos=True)))
        assert all(run.file != files[1] for key in _cache(session).mapped for run in session.store.record(*key).runs)
        assert [record.token_id for record in records] == tokens


def test_closing_a_session_gives_the_files_free(model: Path, files: list[Path]) -> None:
    with _open(model) as session:
        next(session.generate(PROMPT, Sampling(max_tokens=2, ignore_eos=True)))
        assert _cache(session).mapped
    assert all(_writable(file) for file in files)


def test_a_lease_that_the_system_took_need_not_be_given_back(model: Path, tokens: list[int]) -> None:
    with _open(model) as session:
        records = session.generate(PROMPT, Sampling(max_tokens=12, ignore_eos=True))
        found = [next(records).token_id]
        mapped = _cache(session).files
        assert mapped is not None and any(mapped._files.values())
        for lease in filter(None, mapped._files.values()):
            fcntl.fcntl(lease._descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        found += [record.token_id for record in records]
        session.finish_filling()
    assert found == tokens


def test_a_budget_that_does_not_hold_every_expert_maps_nothing(model: Path, files: list[Path]) -> None:
    run = RunOptions(context=200, exact=True)
    with sessions.session(model, run, ram_slots=4, fills=False) as session:
        next(session.generate(PROMPT, Sampling(max_tokens=2, ignore_eos=True)))
        assert not isinstance(session.experts, MappedCache)
        assert all(_writable(file) for file in files)
