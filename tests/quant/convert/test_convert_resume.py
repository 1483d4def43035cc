"""A conversion that is killed, and continued, ends as if nothing had happened; until then there is no DST."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from quant.convert.convert import convert
from quant.destination.staging import Staging
from quant.errors import OutputError
from quant.model.families import Role
from quant.scheme import Scheme
from tests.checkpoints import make

Tiny = Callable[..., Path]
SCHEMES: Mapping[Role, Scheme] = {"experts": Scheme("int4"), "lm_head": Scheme("int8"), "attention": Scheme("int8")}
# Every part is made safe at once, and takes a while, so that a kill meets a journal of any length.
_RUN = """
import sys, time
from pathlib import Path
from quant.convert.convert import convert
from quant.scheme import Scheme
schemes = {"experts": Scheme("int4"), "lm_head": Scheme("int8"), "attention": Scheme("int8")}
print("ready", flush=True)
convert(Path(sys.argv[1]), Path(sys.argv[2]), schemes, resume="--resume" in sys.argv, sync_bytes=1,
        progress=lambda *call: time.sleep(float(sys.argv[3])))
"""


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def start(source: Path, destination: Path, *options: str, pause: float = 0.002) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", _RUN, str(source), str(destination), str(pause), *options]
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.stdout.close()
    return process


def kill(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def parts_done(destination: Path) -> int:
    journal = destination.with_name(destination.name + ".partial") / "journal.jsonl"
    return journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0


@pytest.mark.parametrize("family", ["llama4", "mixtral"])
def test_a_run_killed_at_random_moments_ends_byte_identical(tiny: Tiny, tmp_path: Path, family: str) -> None:
    source = tiny(family)
    convert(source, tmp_path / "undisturbed", SCHEMES)
    expected = contents(tmp_path / "undisturbed")
    destination = tmp_path / "out"
    moments = random.Random(family)
    progress = [0]
    for _ in range(6):
        process = start(source, destination, "--resume")
        time.sleep(moments.uniform(0, 0.25))
        kill(process)
        if destination.exists():  # it was quick enough to finish
            break
        progress.append(parts_done(destination))
    assert progress == sorted(progress)  # what is done is never done again
    convert(source, destination, SCHEMES, resume=True)
    assert contents(destination) == expected
    assert not destination.with_name("out.partial").exists()


def test_a_resumed_run_reads_only_what_is_left(tiny: Tiny, tmp_path: Path) -> None:
    process = start(tiny("llama4_text"), tmp_path / "out", pause=0.02)
    while parts_done(tmp_path / "out") < 20:
        time.sleep(0.005)
    kill(process)
    report = convert(tiny("llama4_text"), tmp_path / "out", SCHEMES, resume=True)
    assert 0 < report.bytes_read < report.source_bytes


def test_the_destination_is_absent_until_it_is_whole(tiny: Tiny, tmp_path: Path) -> None:
    seen: list[bool] = []
    convert(tiny("olmoe"), tmp_path / "out", SCHEMES, progress=lambda *call: seen.append((tmp_path / "out").exists()))
    assert seen and not any(seen)
    assert (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out.partial").exists()


def interrupted(source: Path, destination: Path, parts: int = 5) -> None:
    """Leave a run that stopped after ``parts`` parts."""

    def stop(done: int, total: int, what: str) -> None:
        nonlocal parts
        parts -= 1
        if not parts:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, destination, SCHEMES, progress=stop, sync_bytes=1)


def test_an_unfinished_run_is_not_overwritten_without_resume(tiny: Tiny, tmp_path: Path) -> None:
    interrupted(tiny("olmoe"), tmp_path / "out")
    with pytest.raises(OutputError, match=r"out\.partial is left from a run .* --resume"):
        convert(tiny("olmoe"), tmp_path / "out", SCHEMES)


def test_resume_with_another_recipe_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    interrupted(tiny("olmoe"), tmp_path / "out")
    with pytest.raises(OutputError, match="another recipe"):
        convert(tiny("olmoe"), tmp_path / "out", {"experts": Scheme("int8")}, resume=True)


def test_resume_with_another_source_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    source = make("olmoe", tmp_path / "source")
    interrupted(source, tmp_path / "out")
    os.utime(source / "model.safetensors", (1, 1))  # same headers, but written at another time
    with pytest.raises(OutputError, match="another state of the source"):
        convert(source, tmp_path / "out", SCHEMES, resume=True)
    with pytest.raises(OutputError, match="another source"):
        convert(tiny("mixtral"), tmp_path / "out", SCHEMES, resume=True)


def test_resume_with_nothing_to_resume_starts_from_the_beginning(tiny: Tiny, tmp_path: Path) -> None:
    report = convert(tiny("olmoe"), tmp_path / "out", SCHEMES, resume=True)
    assert report.bytes_read == report.source_bytes


def test_resume_of_a_finished_run_says_so_and_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    convert(tiny("olmoe"), tmp_path / "out", SCHEMES)
    before = contents(tmp_path / "out")
    (tmp_path / "out.partial").mkdir()  # a kill between the last rename and the clean-up leaves it
    report = convert(tiny("olmoe"), tmp_path / "out", SCHEMES, resume=True)
    assert report.bytes_read == 0 and "already complete" in report.notes[-1]
    assert contents(tmp_path / "out") == before and not (tmp_path / "out.partial").exists()
    with pytest.raises(OutputError, match="not empty"):
        convert(tiny("olmoe"), tmp_path / "out", {"experts": Scheme("int8")}, resume=True)


def test_a_torn_last_line_of_the_journal_is_forgotten(tiny: Tiny, tmp_path: Path) -> None:
    convert(tiny("olmoe"), tmp_path / "undisturbed", SCHEMES)
    interrupted(tiny("olmoe"), tmp_path / "out")
    journal = tmp_path / "out.partial" / "journal.jsonl"
    with journal.open("ab") as stream:
        stream.write(b"[[1.5,0.")
    convert(tiny("olmoe"), tmp_path / "out", SCHEMES, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"no journal\n",
        lambda data: b"[" * 10**5 + b"\n",
        lambda data: b"\xff\n" + data,
        lambda data: data + b"[[1.5,null]]\n",
        lambda data: data + b"[[1.5,NaN]]\n",
        lambda data: data + b"[[1.5,2.5,3.5]]\n",
        lambda data: data + b"7\n",
        lambda data: data + b"[]\n",
        lambda data: data + data.splitlines(True)[-1] * 10_000,
        lambda data: data + b'"complete"\n',
        lambda data: data.replace(b"}", b'}\n"complete"', 1),
    ],
)
def test_a_journal_that_cannot_be_read_is_refused(tiny: Tiny, tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    interrupted(tiny("olmoe"), tmp_path / "out")
    journal = tmp_path / "out.partial" / "journal.jsonl"
    journal.write_bytes(spoil(journal.read_bytes()))
    with pytest.raises(OutputError, match="no journal that can be continued"):
        convert(tiny("olmoe"), tmp_path / "out", SCHEMES, resume=True)


def test_a_folder_of_strangers_is_never_taken_for_a_partial_run(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match="has no journal"):
        convert(tiny("olmoe"), tmp_path / "out", SCHEMES, resume=True)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "precious"


def test_two_runs_never_write_the_same_destination(tiny: Tiny, tmp_path: Path) -> None:
    interrupted(tiny("olmoe"), tmp_path / "out")
    with Staging(tmp_path / "out") as other:
        other.claim()
        with pytest.raises(OutputError, match="another run"):
            convert(tiny("olmoe"), tmp_path / "out", SCHEMES, resume=True)
    convert(tiny("olmoe"), tmp_path / "out", SCHEMES, resume=True)


def test_an_empty_destination_is_used(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(tiny("olmoe"), tmp_path / "out", SCHEMES)
    assert (tmp_path / "out" / "config.json").exists()
