"""Progress: what a bar says, and where none is drawn."""

import io
import re
import time

import pytest

from cli.terminal import progress
from cli.terminal.console import Console
from cli.terminal.progress import Clock, duration, progress_bar


class Time:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_is_the_mean_pace_of_what_this_run_did_and_runs_down() -> None:
    at = Time()
    clock = Clock("layers", at)
    assert clock.said() == ""
    clock.tell(30, 48)  # resumed: 30 were done before
    assert clock.said() == "30 of 48 layers"
    at.now += 60
    clock.tell(33, 48)  # 20 s each
    assert clock.said() == "33 of 48 layers, 5 min 0 s left"
    at.now += 10
    assert clock.said() == "33 of 48 layers, 4 min 50 s left"
    at.now += 500
    assert clock.said() == "33 of 48 layers, 4 min 0 s left"  # for the 12 after this one, however long it takes
    clock.tell(47, 48)
    at.now += 500
    assert clock.said().endswith("nearly done")
    clock.tell(48, 48)
    assert clock.said() == "48 of 48 layers"
    clock.restart()
    clock.tell(0, 8)
    assert clock.said() == "0 of 8 layers"


def quarter_of_bytes() -> Clock:
    """1 GiB of 4 is done after 4 s."""
    at = Time()
    clock = Clock("bytes", at)
    clock.tell(0, 2**32)
    at.now += 4
    clock.tell(2**30, 2**32)
    return clock


def test_bytes_have_sizes_and_a_rate() -> None:
    clock = quarter_of_bytes()
    assert clock.said() == "1.00 GiB of 4.00 GiB, 268 MB/s, 12 s left"


def test_where_columns_are_few_the_time_left_is_what_stays() -> None:
    clock = quarter_of_bytes()
    full, sizes = "1.00 GiB of 4.00 GiB, 268 MB/s, 12 s left", "1.00 GiB of 4.00 GiB, 12 s left"
    said = [clock.said(room) for room in (len(full), 40, len(sizes), 30, 15, 9, 2)]
    assert said == [full, sizes, sizes, "25 %, 12 s left", "25 %, 12 s left", "12 s left", "25 %"]


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (754, "12 min"), (7500, "2 h 5 min")]
)
def test_durations_are_said_as_people_do(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def drawn(console: Console, seconds: float = 0.0, title: str = "copying", width: int = 80) -> str:
    """What a terminal gets of three steps and a line beside them."""
    from rich.console import Console as RichConsole

    screen = io.StringIO()
    console._rich = RichConsole(file=screen, force_terminal=True, width=width, quiet=console.json)
    with progress_bar(console, title, "layers") as show:
        for layer in range(3):
            show(layer, 3, "stage one" if layer < 2 else "stage two")
            time.sleep(seconds)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())


def test_a_bar_appears_on_a_terminal_and_is_gone_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_QUICK", 0.01)
    for width in (40, 80, 200):
        plain = drawn(Console(), 0.3, width=width)
        assert "copying" in plain and "of 3 layers" in plain
    staged = drawn(Console(), 0.3, title="")
    assert "stage one" in staged and "stage two" in staged


@pytest.mark.parametrize("width", [24, 36, 50, 80, 120])
def test_a_bar_never_takes_two_lines(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_QUICK", 0.01)
    monkeypatch.setattr(progress, "_SETTLE", 0.01)
    plain = drawn(Console(), 0.3, title="comparing, line by line", width=width)
    assert "comparing" in plain and plain.count("\n") == 1  # when it ends


def test_nothing_is_drawn_that_would_be_gone_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert drawn(Console()).strip() == ""


@pytest.mark.parametrize("console", [Console(json=True), Console(quiet=True)], ids=["--json", "--quiet"])
def test_nothing_is_drawn_where_nobody_is_to_be_told(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert drawn(console, 0.3) == ""


def test_nothing_is_drawn_without_a_terminal_or_on_a_dumb_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress_bar(Console(), "copying", "bytes") as show:
        show(1, 2, "")
        time.sleep(0.6)
        show(2, 2, "")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TERM", "dumb")
    assert drawn(Console(), 0.3) == ""
