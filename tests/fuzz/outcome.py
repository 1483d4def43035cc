"""One fuzzed case run in this process, and what is wrong with what came of it."""

import json
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path
from types import FrameType

from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import ColdstreamError
from tests.commands import Finished, invoke
from tests.fuzz.cases import BASES, Case, spoil
from tests.fuzz.ground import keep_machine, place_machine
from tests.fuzz.stock import (
    Answer,
    StockRefusesError,
    conversion_differs,
    greedy_text,
    logits_differ,
    planned_differs,
    prompt_ids,
    recorded,
    stock_model,
)

SECONDS = 20.0
GROWTH = 2 * 2**30
_LARGEST_FILE = 2**30
_MODELS = ("{source}", "{stored}", "{vision}", "{qwen}", "{mixtral}")
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """``kind``: ran, refused, or a fault (traceback, slow, memory, wrong, different); ``sign`` is the same for the same
    fault. ``judged`` is what an answer was held against: stock, clean (transformers does not take the input, and the
    answer is the one of the input without what it does not take), or nothing."""

    kind: str
    sign: str = ""
    said: str = ""
    judged: str = ""

    @property
    def is_fault(self) -> bool:
        return self.kind not in ("ran", "refused")


class _Stopped(BaseException):
    """Out of every handler of errors."""


def outcome(case: Case, ground: Path, folder: Path) -> Outcome:
    """Run ``case`` on a copy of ``ground``, made at ``folder`` and removed again, and judge what comes of it."""
    return _outcome(case, ground, folder)[0]


def _outcome(case: Case, ground: Path, folder: Path, *, judged: bool = True) -> tuple[Outcome, Answer]:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ground, folder)
    (folder / "here").mkdir()
    keep_machine(folder)
    for edit in case.edits:
        spoil(folder, edit)
    place_machine(folder)
    words = [_found(word, folder) for word in case.words]
    try:
        with chdir(folder / "here"), _environment(folder), recorded() as answer, _limits() as stopped:
            done = invoke(case.command, *words, "-q", "--json", stdin=case.stdin.encode("latin-1", "replace"))
        if wrong := _wrong(case, done, folder):
            return Outcome("wrong", wrong, done.stderr + done.stdout[-400:]), answer
        if done.returncode or not judged:
            return Outcome("refused" if done.returncode else "ran", said=done.stderr), answer
        return _judged(case, done, answer, ground, folder), answer
    except _Stopped:
        return Outcome(stopped[0], f"{case.command} {_where()}", traceback.format_exc()), Answer()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  what a user would see as a traceback; a library's panic, too
        return Outcome("traceback", f"{type(error).__name__} {_where()}", traceback.format_exc()), Answer()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _found(word: str, folder: Path) -> str:
    return str(folder / word[1:-1]) if word.startswith("{") and word.endswith("}") else word


def _wrong(case: Case, done: Finished, folder: Path) -> str:
    """What is not as it must be about the end of a command; empty if nothing is."""
    if done.returncode not in (0, 1, 2):
        return f"exit code {done.returncode}"
    errors = [line for line in done.stderr.splitlines() if line.startswith("coldstream: error: ")]
    if done.returncode and len(errors) != 1 and case.command != "chat":  # which has one for every message
        return f"{len(errors)} error lines"
    if done.returncode == 0 and errors and case.command != "chat":
        return "an error, and exit code 0"
    if "Traceback (most" in done.stderr:
        return "a traceback among what is said"
    try:
        json.loads(done.stdout.splitlines()[-1] if done.stdout else "null", parse_constant=_refuse)
    except ValueError as error:
        return f"document: {error}"
    made = folder / "out"
    if case.command in ("quantize", "synth") and done.returncode == 0 and made.exists():
        try:
            Checkpoint.open(made)
        except ColdstreamError as error:
            return f"made what cannot be opened: {error}"
    return ""


def _judged(case: Case, done: Finished, answer: Answer, ground: Path, folder: Path) -> Outcome:
    """The answer of ``case`` beside that of stock transformers, or of the case without its edits."""
    try:
        with _environment(folder), _limits():
            different = _differs_from_stock(case, done, answer, folder)
    except (StockRefusesError, _Stopped) as refused:
        if not case.edits:
            return Outcome("ran", judged="nothing", said=f"stock: {refused}")
        cleaner = _with_less(case, ground, folder)
        if not cleaner or not any(one.steps for one in (answer, *cleaner)):
            return Outcome("ran", judged="nothing", said=f"stock: {refused}")
        if any(answer.equals(clean) for clean in cleaner):
            return Outcome("ran", judged="clean")
        reason = f"transformers does not take it: {refused}"
        return Outcome("different", f"{case.command} from the clean answer, {_numberless(reason)[:99]}", reason)
    if different is None:
        return Outcome("ran", judged="nothing")
    if not different:
        return Outcome("ran", judged="stock")
    return Outcome("different", f"{case.command} {_numberless(different)}", different)


def _numberless(text: str) -> str:
    return re.sub(r"[0-9][0-9.e+-]*", "#", text)


def _differs_from_stock(case: Case, done: Finished, answer: Answer, folder: Path) -> str | None:
    """How; empty if it does not, None if there is nothing to compare. Raises StockRefusesError."""
    name = case.words[0] if case.words else ""
    model = folder / name[1:-1]
    usual = case.words in BASES[case.command]
    if name not in _MODELS:
        return None
    if case.command == "quantize" and (folder / "out" / "config.json").is_file():
        return conversion_differs(model, folder / "out")
    if case.command == "plan" and usual:
        tiers = json.loads(done.stdout.splitlines()[-1])["bytes"].values()
        return planned_differs(model, dict(sum(map(Counter, tiers), Counter())))
    if not answer.steps or "--exact" not in case.words or {"--kv", "--recipe"} & set(case.words):
        return None
    if not all(bool(logits.isfinite().all()) for _, logits in answer.steps):
        return "logits that are no numbers"
    stock = stock_model(model)
    if different := logits_differ(answer, stock):
        return different
    if case.command != "generate" or not usual:
        return ""
    document = json.loads(done.stdout.splitlines()[-1])
    text = case.stdin if case.words[1] == "-" else case.words[1]
    expected = prompt_ids(model, text, "--chat" in case.words)
    ids = list(answer.sequences[0][: document["prompt_tokens"]])
    if ids != expected:
        return f"prompt {ids[:20]} for transformers' {expected[:20]}"
    if "--temperature" not in case.words:
        return ""
    continued = greedy_text(model, stock, ids, int(case.words[case.words.index("-n") + 1]))
    return "" if document["text"] == continued else f"text {document['text']!r} for transformers' {continued!r}"


def _with_less(case: Case, ground: Path, folder: Path) -> list[Answer]:
    """What ``case`` computes without some of its edits, as few as leave an answer that is known to be right."""
    for count in reversed(range(len(case.edits))):
        found: list[Answer] = []
        for edits in combinations(case.edits, count):
            less = replace(case, edits=edits)
            if not edits and (clean := _clean_answer(less, ground, folder.with_name("clean"))):
                return [clean]
            if edits:
                ended, answer = _outcome(less, ground, folder.with_name(f"less-{count}"))
                found += [answer] * (ended.judged in ("stock", "clean"))
        if found:
            return found
    return []


@cache
def _clean_answer(case: Case, ground: Path, folder: Path) -> Answer | None:
    """What ``case`` computes on the ground as it is; None if it is refused."""
    found, answer = _outcome(case, ground, folder, judged=False)
    return answer if found.kind == "ran" else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _where() -> str:
    """The innermost places in this repository of the exception at hand."""
    ours = [frame for frame in traceback.extract_tb(sys.exc_info()[2]) if _ours(frame.filename)]
    return " < ".join(f"{Path(frame.filename).relative_to(_ROOT)}:{frame.name}" for frame in reversed(ours[-2:]))


def _ours(file: str) -> bool:
    return any(file.startswith(f"{_ROOT / room}/") for room in ("cli", "offload", "quant"))


@contextmanager
def _environment(folder: Path) -> Iterator[None]:
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    try:
        yield
    finally:
        os.environ.pop("XDG_CACHE_HOME")
        if before is not None:
            os.environ["XDG_CACHE_HOME"] = before


@contextmanager
def _limits() -> Iterator[list[str]]:
    """Stop what takes too long or too much memory, and say which in the list; no file becomes huge, and warnings are
    nobody's business."""
    stopped: list[str] = []
    start, done = _resident(), threading.Event()
    began, worked_before = time.monotonic(), time.process_time()

    def stop(number: int, frame: FrameType | None) -> None:
        waited, worked = time.monotonic() - began, time.process_time() - worked_before
        if number == signal.SIGALRM and worked < SECONDS / 2 and waited < 30 * SECONDS:
            signal.setitimer(signal.ITIMER_REAL, SECONDS / 2)  # the machine is busy with something else
        elif not done.is_set():
            stopped.append("memory" if number == signal.SIGUSR1 else "slow")
            raise _Stopped

    def watch() -> None:
        while not done.wait(0.02):
            if _resident() > start + GROWTH:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                return

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGUSR1)}
    handlers[signal.SIGINT] = signal.getsignal(signal.SIGINT)
    sizes = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, sizes[1]))
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield stopped
    finally:
        done.set()
        signal.setitimer(signal.ITIMER_REAL, 0)
        watcher.join()
        resource.setrlimit(resource.RLIMIT_FSIZE, sizes)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
