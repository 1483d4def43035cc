"""The report on the terminal."""

import re
from dataclasses import replace

from cli.html.run_report import render_page
from cli.terminal.run_summary import summary_rows
from cli.terminal.words import deviation, number, percent, verdict
from offload.run.report import RunReport
from tests.reports import report


def summary(of: RunReport) -> str:
    return "\n".join(f"  {label:<10}{text}" for label, text in summary_rows(of))


def test_the_summary_names_both_speeds_the_floor_and_the_bytes() -> None:
    text = summary(report(tokens=100, vram=0.3))
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert {
        "prefill",
        "decode",
        "floor",
        "predicted",
        "bandwidth",
        "experts",
        "VRAM",
        "RAM",
        "files",
        "resident",
        "kernel",
        "note",
    } <= lines.keys()
    assert "tokens/s" in lines["prefill"]
    assert "more than listed in RAM" in lines["resident"]


def test_what_was_not_measured_is_not_mentioned() -> None:
    text = summary(report(tokens=0))
    assert "decode " not in text.replace("decode 17.2", "")
    assert "VRAM" not in text


def test_the_verdict_says_what_limits_and_how_far_from_it() -> None:
    assert "of what the RAM bandwidth of this machine allows" in verdict(report(tokens=100))
    assert "Only the prompt was run" in verdict(report(tokens=0))


def test_numbers_keep_three_digits_and_signs_are_typographic() -> None:
    assert [number(value) for value in (1234.5, 123.4, 12.34, 1.234, 0.1234, 0, None)] == [
        "1,234",
        "123",
        "12.3",
        "1.23",
        "0.12",
        "0",
        "–",
    ]
    assert deviation(-0.214) == "−21 %"
    assert deviation(0.04) == "+4 %"
    assert [deviation(part) for part in (1.9, 2.0, 8.96, 10.0, 1234.0)] == ["+190 %", "3×", "10×", "11×", "1,235×"]
    assert [percent(part) for part in (0.956, 0.004, 0.0001, 0, None)] == ["96 %", "0.4 %", "< 0.1 %", "0 %", "–"]


def test_a_part_and_what_is_missing_of_it_add_up_to_a_hundred() -> None:
    assert [percent(part) for part in (1, 0.99999, 0.998, 0.991, 0.99)] == [
        "100 %",
        "> 99.9 %",
        "99.8 %",
        "99.1 %",
        "99 %",
    ]
    for missing in (0.002, 0.0044, 0.009, 0.02, 0.3):
        there, gone = (float(percent(part).removesuffix(" %")) for part in (1 - missing, missing))
        assert round(there + gone, 1) == 100


def test_hits_are_those_of_decode_and_said_to_be() -> None:
    line = next(text for label, text in summary_rows(report(tokens=100)) if label == "experts")
    run = report(tokens=100)
    assert line.startswith(f"{percent(run.decode_experts.hit_rate)} hits in decode (")
    assert line.endswith(f"{percent(run.experts.hit_rate)} with the prompt's requests")


def test_tokens_that_were_made_and_not_timed_are_counted_too() -> None:
    line = next(text for label, text in summary_rows(report(tokens=60)) if label == "decode")
    assert re.search(r"\(\d+ of 61 tokens timed; ", line)


def test_a_note_that_was_said_before_is_not_repeated() -> None:
    run = report(tokens=10, notes=("said before", "new"))
    assert [text for label, text in summary_rows(run, said={"said before"}) if label == "note"] == ["new"]


def test_only_a_verbose_summary_lists_every_role() -> None:
    run = report(tokens=10)
    short, whole = (dict(summary_rows(run, every_role=every))["files"] for every in (False, True))
    assert "other" in short and "other" not in whole and whole.count(",") > short.count(",")


def test_a_floor_that_was_exceeded_is_called_unreliable_and_never_a_share() -> None:
    run = report(tokens=100)
    fast = replace(
        run,
        decode=replace(run.decode, fraction_of_floor=1.35),
        achieved={"ram": 81.0},
        bandwidth=replace(run.bandwidth, ram_gb_s=60.0),
        doubts=("RAM gave 50 GB/s before the run and 60 after it",),
    )
    said = [summary(fast), verdict(fast)]
    page = re.sub("<style.*?</style>|<script.*?</script>", "", render_page(fast), flags=re.S)
    for text in (*said, page):
        assert "135 %" not in text
        assert "unreliable" in text or "exceeded" in text
    assert "81.0 of 60.0 GB/s (more than was measured)" in said[0] and "doubt     RAM gave 50" in said[0]
    assert '<div class="doubt"><dt>Of the floor’s speed' in page and "RAM gave 50 GB/s before" in page
