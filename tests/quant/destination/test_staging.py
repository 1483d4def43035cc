"""Any destination that can be written works, also to resume; any other is refused before a byte is read."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from quant.convert.convert import convert
from quant.destination.staging import Staging
from quant.errors import OutputError
from quant.model.families import Role
from quant.scheme import Scheme
from quant.synth.config import llama4_config
from quant.synth.synth import synthesize

Tiny = Callable[..., Path]
INT4: dict[Role, Scheme] = {"experts": Scheme("int4")}
NUMBERS = {
    "hidden": 128,
    "layers": 2,
    "experts_per_layer": 2,
    "top_k": 1,
    "intermediate": 128,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 64,
    "vocab": 256,
    "dense_every": 1,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole") / "out"
    convert(tiny("mixtral"), folder, INT4)
    return contents(folder)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[Path, str], Path]]:
    """Makes a folder a mount point: of a file system of its own, or bound to another of the same."""
    done: list[Path] = []

    def mount(folder: Path, options: str) -> Path:
        folder.mkdir()
        command = ["mount", *options.split(), str(folder)]
        if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("cannot mount here: needs root")
        done.append(folder)
        return folder

    yield mount
    for folder in done:
        subprocess.run(["umount", str(folder)], check=True)


def stopped(source: Path, destination: Path) -> None:
    """Leave a run that stopped after two parts."""
    left = [2]

    def stop(done: int, total: int, what: str) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, destination, INT4, progress=stop, sync_bytes=1)


KINDS = ["new", "empty", "link", "link to nothing", "mount", "bind mount", "new file system", "here", "deep"]


@pytest.fixture(params=KINDS)
def destination(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mounted: Callable[[Path, str], Path],
) -> Path:
    out = tmp_path / "out"
    match request.param:
        case "empty":
            out.mkdir()
        case "link" | "link to nothing":
            (tmp_path / "elsewhere").mkdir()
            out.symlink_to(tmp_path / "elsewhere" / ("" if request.param == "link" else "new"))
        case "mount" | "new file system":
            mounted(out, "-t tmpfs none")
            if request.param == "new file system":
                (out / "lost+found").mkdir()
        case "bind mount":
            (tmp_path / "elsewhere").mkdir()
            mounted(out, f"--bind {tmp_path / 'elsewhere'}")
        case "here":
            out.mkdir()
            monkeypatch.chdir(out)
            return Path(".")
        case "deep":
            return tmp_path / "a" / "b" / "out"
    return out


def test_a_destination_that_can_be_written_works_and_resumes(
    tiny: Tiny, whole: dict[str, bytes], destination: Path
) -> None:
    was_link = destination.is_symlink()
    stopped(tiny("mixtral"), destination)
    assert not (destination / "config.json").exists()
    with pytest.raises(OutputError, match="--resume"):
        convert(tiny("mixtral"), destination, INT4)
    convert(tiny("mixtral"), destination, INT4, resume=True)
    assert contents(destination) == whole
    assert destination.is_symlink() == was_link
    assert not list(destination.resolve().parent.rglob("*.partial"))
    again = convert(tiny("mixtral"), destination, INT4, resume=True)
    assert again.bytes_read == 0 and "already complete" in again.notes[-1]
    with pytest.raises(OutputError, match="is not empty"):
        convert(tiny("mixtral"), destination, INT4)


def test_synth_takes_the_same_destinations(destination: Path) -> None:
    synthesize(llama4_config(**NUMBERS), destination, {"experts": Scheme("int4", 32)})
    assert (destination / "config.json").is_file()
    assert not list(destination.resolve().parent.rglob("*.partial"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/", "is not empty"),
        ("file", "is a file"),
        ("file/out", "Not a directory"),
        ("taken", "is not empty"),
        ("x" * 300, "File name too long; choose a shorter one"),
        ("x" * 250, "File name too long; choose a shorter one"),
        ("/".join(["y" * 200] * 19), "too long a path"),
        ("loop", "leads in a circle"),
        ("pipe", "is a file"),
        ("/proc/out", "cannot be written|has 0 B free"),
    ],
)
def test_one_that_cannot_is_refused_before_a_byte_is_read(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("quant.checkpoint.checkpoint.Checkpoint.read", unread)
    with pytest.raises(OutputError, match=words):
        convert(tiny("mixtral"), name, INT4)
    with pytest.raises(OutputError, match=words):
        synthesize(llama4_config(**NUMBERS), name, {"experts": Scheme("int4", 32)})
    assert sorted(tmp_path.rglob("*")) == before


def unread(*arguments: object) -> None:
    raise AssertionError("a weight was read")


def test_a_file_system_that_is_full_or_read_only_is_refused_before_a_byte_is_read(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounted: Callable[[Path, str], Path]
) -> None:
    full = mounted(tmp_path / "full", "-t tmpfs -o size=256k none")
    fixed = mounted(tmp_path / "fixed", "-t tmpfs -o ro none")
    monkeypatch.setattr("quant.checkpoint.checkpoint.Checkpoint.read", unread)
    for destination, words in (
        (full, "has 2.* KiB free, but the output needs"),
        (full / "out", "free, but the output needs"),
        (fixed, "Read-only file system; choose"),
        (fixed / "out", "Read-only file system; choose"),
    ):
        with pytest.raises(OutputError, match=words):
            convert(tiny("mixtral"), destination, INT4)
    assert not list(full.iterdir())


def test_a_run_begun_before_the_destination_was_mounted_is_not_taken_for_one_there(
    tiny: Tiny, tmp_path: Path, mounted: Callable[[Path, str], Path]
) -> None:
    stopped(tiny("mixtral"), tmp_path / "out")
    mounted(tmp_path / "out", "-t tmpfs none")
    with pytest.raises(OutputError, match=r"is a mount point, but .* was begun when it was none"):
        convert(tiny("mixtral"), tmp_path / "out", INT4, resume=True)


def test_what_others_put_there_meanwhile_is_never_overwritten(tiny: Tiny, tmp_path: Path) -> None:
    for there in (True, False):
        out = tmp_path / f"out {there}"
        if there:
            out.mkdir()

        def put(done: int, total: int, what: str, out: Path = out) -> None:
            if done == total:
                out.mkdir(exist_ok=True)
                (out / "tokenizer.json").write_text("mine")

        with pytest.raises(OutputError, match=r"of somebody else|not empty"):
            convert(tiny("mixtral"), out, INT4, progress=put)
        assert (out / "tokenizer.json").read_text() == "mine"
        (out / "tokenizer.json").unlink()
        convert(tiny("mixtral"), out, INT4, resume=True)
        assert (out / "config.json").exists()


def test_a_model_taken_away_before_its_partial_folder_was_removed_is_not_made_up(tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with suppress(InterruptedError), pytest.MonkeyPatch.context() as patched:
        patched.setattr(Staging, "discard", interrupted)  # as a kill right after the rename would
        convert(tiny("mixtral"), out, INT4)
    out.rename(tmp_path / "moved")
    with pytest.raises(OutputError, match="was complete and has been taken away since"):
        convert(tiny("mixtral"), out, INT4, resume=True)
    assert not out.exists()


def interrupted(staging: Staging) -> None:
    raise InterruptedError


def test_a_run_that_comes_to_nothing_leaves_nothing(tiny: Tiny, tmp_path: Path) -> None:
    with Staging(tmp_path / "a" / "b") as staging:
        staging.claim()
        assert (tmp_path / "a").is_dir()
    assert not list(tmp_path.iterdir())
