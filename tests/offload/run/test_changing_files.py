"""Files that change under a run: what comes out is the old model's text, the new one's, or one line that names a
file. Never a text of both, never a signal.

``COLDSTREAM_MOMENTS=200`` tries that many random moments.
"""

import fcntl
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from offload.experts.storage.mapped_files import MappedFiles
from offload.experts.storage.reader import Reader
from offload.records import RunOptions, Sampling
from offload.run import session as session_module
from offload.run.session import Session
from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import CheckpointError
from tests import sessions
from tests.checkpoints import make

PROMPT = list(range(5, 60))
TOKENS = 6
MOMENTS = int(os.environ.get("COLDSTREAM_MOMENTS", "8"))
PLACES = {"all in ram": {"ram_slots": 64}, "three slots": {"ram_slots": 3, "fills": False}}
LEASE = getattr(fcntl, "F_SETLEASE", None)
Change = Callable[[Path, Path], None]


def _replace(model: Path, other: Path) -> None:
    """Every shard, one by one, as a download puts it there."""
    for file in _shards(model):
        shutil.copy(other / file.name, file.with_suffix(".new"))
        file.with_suffix(".new").rename(file)


def _replace_one(model: Path, other: Path) -> None:
    file = _shards(model)[-1]
    shutil.copy(other / file.name, file.with_suffix(".new"))
    file.with_suffix(".new").rename(file)


def _overwrite(model: Path, other: Path) -> None:
    for file in _shards(model):
        _in_place(file, lambda descriptor, file=file: os.pwrite(descriptor, (other / file.name).read_bytes(), 0))


def _truncate(model: Path, other: Path) -> None:
    for file in _shards(model):
        _in_place(file, lambda descriptor: os.ftruncate(descriptor, 4096))


def _in_place(file: Path, change: Callable[[int], object]) -> None:
    """Change ``file`` unless it is leased: then whoever writes waits, as this process cannot for itself."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_NONBLOCK)
    except BlockingIOError:
        return
    change(descriptor)
    os.close(descriptor)


CHANGES: dict[str, Change] = {
    "replaced": _replace,
    "one replaced": _replace_one,
    "overwritten": _overwrite,
    "truncated": _truncate,
}


@pytest.fixture
def expired(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases are granted and hold nobody: as the system leaves them once a writer has waited long enough."""
    _expire(monkeypatch)


def _expire(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.fcntl
    monkeypatch.setattr(fcntl, "fcntl", lambda file, what, *more: None if what == LEASE else real(file, what, *more))


def _shards(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of one shape, whose files have the same names and sizes."""
    folder = tmp_path_factory.mktemp("two")
    made = [make("llama4_text", folder / str(seed), shards=2, seed=seed, num_hidden_layers=2) for seed in (1, 2)]
    assert [file.stat().st_size for file in _shards(made[0])] == [file.stat().st_size for file in _shards(made[1])]
    return made[0], made[1]


@pytest.fixture
def model(models: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the first, to be changed."""
    return Path(shutil.copytree(models[0], tmp_path / "model"))


def _text(model: Path, place: str, between: Callable[[], None] = lambda: None) -> list[int]:
    with sessions.session(model, RunOptions(context=100, exact=True), **PLACES[place]) as session:
        records = session.generate(PROMPT, Sampling(max_tokens=TOKENS, ignore_eos=True))
        ids = [next(records).token_id]
        between()
        return ids + [record.token_id for record in records]


def _text_or_line(model: Path, place: str, between: Callable[[], None] = lambda: None) -> list[int] | str:
    try:
        return _text(model, place, between)
    except CheckpointError as error:
        return str(error)


@pytest.fixture(scope="module")
def texts(models: tuple[Path, Path]) -> list[list[int]]:
    """What each of them says."""
    made = [_text(model, "all in ram") for model in models]
    assert made[0] != made[1]
    return made


def _before(owner: object, name: str, monkeypatch: pytest.MonkeyPatch, change: Callable[[], None], call: int) -> None:
    """Let ``change`` happen before the ``call``th call of ``owner.name``."""
    real, calls = getattr(owner, name), iter(range(10**9))

    def changed(*args: object, **named: object) -> object:
        if next(calls) == call:
            change()
        return real(*args, **named)

    monkeypatch.setattr(owner, name, changed)


HOOKS: dict[str, tuple[object, str, int]] = {
    "before files are opened": (Reader, "_open", 0),
    "between two files": (Reader, "_open", 1),
    "before dense weights": (session_module, "load_model", 0),
    "amid dense weights": (Session, "_read_dense", 7),
    "before the decoder": (session_module, "select_decoder", 0),
    "before the tokenizer": (session_module, "load_tokenizer", 0),
    "before the first token": (Session, "generate", 0),
    "as an expert is read": (Reader, "_read", 2),
    "as weights move": (Session, "_finish_load", 0),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("moment", [*HOOKS, "after the first token"])
@pytest.mark.parametrize("kind", CHANGES)
def test_a_text_is_of_one_model_or_there_is_one_line(
    kind: str,
    moment: str,
    place: str,
    model: Path,
    models: tuple[Path, Path],
    texts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def change() -> None:
        CHANGES[kind](model, models[1])

    if moment in HOOKS:
        owner, name, call = HOOKS[moment]
        _before(owner, name, monkeypatch, change, call)
    said = _text_or_line(model, place, (lambda: None) if moment in HOOKS else change)
    assert said in texts or (str(said).startswith(str(model)) and "\n" not in str(said))


@pytest.mark.usefixtures("expired")
@pytest.mark.parametrize("moment", ["before the first token", "amid its experts", "as weights move"])
@pytest.mark.parametrize("kind", ["overwritten", "truncated"])
def test_who_writes_to_mapped_files_costs_a_run_one_line_each_time_it_is_asked(
    kind: str, moment: str, model: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, call = (MappedFiles, "map", 2) if moment == "amid its experts" else HOOKS[moment]
    _before(owner, name, monkeypatch, lambda: CHANGES[kind](model, models[1]), call)
    with sessions.session(model, RunOptions(context=100, exact=True), **PLACES["all in ram"]) as session:
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"was changed while the model ran|shrank while it was read"):
                list(session.generate(PROMPT, Sampling(max_tokens=TOKENS, ignore_eos=True)))


def test_a_run_goes_on_with_the_model_it_began_with_where_files_are_replaced(
    model: Path, models: tuple[Path, Path], texts: list[list[int]]
) -> None:
    assert _text(model, "three slots", lambda: _replace(model, models[1])) == texts[0]


@pytest.mark.parametrize("kind", CHANGES)
def test_a_tensor_is_not_read_from_another_file_than_its_header(
    kind: str, model: Path, models: tuple[Path, Path]
) -> None:
    checkpoint = Checkpoint.open(model)
    CHANGES[kind](model, models[1])
    entry = max(checkpoint.entries.values(), key=lambda entry: (entry.file, entry.offset))
    with pytest.raises(CheckpointError, match="while it was read"):
        checkpoint.read(entry.key)


def _serve(leases: str) -> None:
    """Say, for every model named on stdin, its text, or the one line that there is instead."""
    if leases == "expired":
        _expire(pytest.MonkeyPatch())
    for line in sys.stdin:
        print("loading", flush=True)
        print(_text_or_line(Path(line.strip()), "all in ram"), flush=True)


@pytest.mark.parametrize("leases", ["granted", "expired"])
def test_random_moments(leases: str, models: tuple[Path, Path], texts: list[list[int]], tmp_path: Path) -> None:
    rng = random.Random(0)
    command = [sys.executable, "-c", f"from tests.offload.run import test_changing_files as t; t._serve({leases!r})"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None

        def ask(model: Path, after: float = 0, change: Change | None = None) -> tuple[str, float]:
            print(model, file=child.stdin, flush=True)
            assert child.stdout.readline() == "loading\n"
            began = time.monotonic()
            if change is not None:
                time.sleep(after)
                change(model, models[1])
            return child.stdout.readline().rstrip("\n"), time.monotonic() - began

        ask(models[0])  # what is slow only once
        text, seconds = ask(models[0])
        assert text == repr(texts[0])
        for attempt in range(MOMENTS):
            model = Path(shutil.copytree(models[0], tmp_path / str(attempt)))
            kind = rng.choice(list(CHANGES))
            said, _ = ask(model, rng.uniform(0, seconds), CHANGES[kind])
            assert said in map(repr, texts) or said.startswith(str(model)), (kind, said)
            shutil.rmtree(model)
        child.stdin.close()
    assert child.returncode == 0
