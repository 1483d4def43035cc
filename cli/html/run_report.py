"""The page of one run, made from its RunReport: first what was run and said, then how fast that was and why, where
the bytes are, and how it went step by step."""

from pathlib import Path

from cli.html.byte_roles import memory_section
from cli.html.document import Compared, banners, document, facts, figures, none, notes_section, save_page, section, text
from cli.html.heat_map import experts_section
from cli.html.request import request_section
from cli.html.step_plots import memory_plot, requests_plot, time_plot
from cli.html.token_time import speed_section, time_section
from cli.terminal import words
from cli.terminal.words import how_many, number, percent, size
from offload.run.report import RunReport

_COMPARED: tuple[Compared, ...] = (
    ("Decode", "decode.tokens_per_s", "tokens/s", "more"),
    ("Time per token, median", "decode.ms_per_token_p50", "ms", "less"),
    ("Time per token, 9 of 10", "decode.ms_per_token_p90", "ms", "less"),
    ("Prefill", "prefill.tokens_per_s", "tokens/s", "more"),
    ("Of the floor’s speed", "decode.fraction_of_floor", "%", ""),
    ("Expert hits at decode", "experts.decode.hit_rate", "%", "more"),
    ("Peak resident memory", "memory.peak_rss_bytes", "bytes", "less"),
    ("Peak VRAM", "memory.peak_vram_bytes", "bytes", "less"),
    ("Read from RAM per token", "decode.bytes_per_token.ram", "bytes", "less"),
    ("Read from VRAM per token", "decode.bytes_per_token.vram", "bytes", ""),
    ("Read from disk per token", "decode.bytes_per_token.disk", "bytes", "less"),
    ("RAM bandwidth", "bandwidth.ram_gb_s", "GB/s", ""),
    ("Disk bandwidth", "bandwidth.disk_gb_s", "GB/s", ""),
    ("Loaded in", "load_seconds", "s", "less"),
    ("Command", "request.command_line", "", ""),
    ("Model", "model", "", ""),
    ("Started", "started", "", ""),
    ("Kernel", "environment.kernel", "", ""),
    ("CPU", "environment.cpu", "", ""),
    ("GPU", "environment.gpu", "", ""),
    ("Threads", "environment.threads", "", ""),
    ("Budget of RAM", "request.ram_bytes", "bytes", ""),
    ("Budget of VRAM", "request.vram_bytes", "bytes", ""),
)


def write_page(report: RunReport, path: Path) -> None:
    """Write the page to ``path``. Raises OutputError if that cannot be."""
    save_page(render_page(report), path)


def render_page(report: RunReport) -> str:
    """The whole page as HTML text."""
    readouts: dict[str, list[str]] = {}
    body = "".join(
        (
            request_section(report),
            _figures(report),
            time_section(report),
            f'<div class="pair">{memory_section(report)}{speed_section(report)}</div>',
            _steps(report, readouts),
            experts_section(report.expert_map),
            f'<div class="pair">{notes_section(report.notes)}{_environment(report)}</div>',
        )
    )
    title = f"{report.subject.model}: Coldstream run report"
    return document(title, _head(report), body, report=report.to_json(), readouts=readouts, compared=_COMPARED)


def _head(report: RunReport) -> str:
    subject = report.subject
    return (
        f'<div class="eyebrow">Coldstream {text(subject.command)}, {text(subject.started)}</div>'
        f'<h1>{text(subject.model)}</h1><p class="verdict">{text(words.verdict(report))}</p>{banners(report.doubts)}'
    )


def _figures(report: RunReport) -> str:
    decode, prefill, memory = report.decode, report.prefill, report.memory
    floor = "not measured"
    if decode.floor_ms_per_token:
        floor = f"floor {number(decode.floor_ms_per_token)} ms per token"
    vram = f"; {size(memory.peak_vram_bytes)} of VRAM" if memory.peak_vram_bytes else ""
    requests = report.experts.hits + report.experts.misses
    of_floor = "Of the floor’s speed"
    hits = (
        "Expert hits at decode",
        percent(report.decode_experts.hit_rate),
        "",
        f"{percent(report.experts.hit_rate)} of all {requests:,} requests, prompts included",
    )
    cards = [
        (
            "Decode",
            number(decode.tokens_per_s),
            "tokens/s",
            f"{number(decode.ms_per_token_p50)} ms per token, 9 of 10 under {number(decode.ms_per_token_p90)}",
        ),
        ("Prefill", number(prefill.tokens_per_s), "tokens/s", how_many(prefill.tokens, "prompt token")),
        (of_floor, words.floor_share(report), "", floor),
        *([hits] if requests else []),
        ("Peak memory", size(memory.peak_rss_bytes), "", f"resident{vram}"),
    ]
    return figures(cards, [of_floor] if report.doubts else [])


def _steps(report: RunReport, readouts: dict[str, list[str]]) -> str:
    request = report.request
    parts = [
        time_plot(report, readouts),
        memory_plot(report.records, readouts, request.ram_bytes, request.vram_bytes),
        requests_plot(report.records, readouts),
    ]
    drawn = "".join(part for part in parts if part)
    hint = "Point at a plot, or focus it and use the arrow keys, to read its values." if drawn else ""
    return section("Over the run", drawn or none("no step was recorded"), note=hint)


def _environment(report: RunReport) -> str:
    machine = report.environment
    rows = {
        "CPU": f"{machine.cpu}, {machine.threads} threads",
        "GPU": machine.gpu or "none",
        "Kernel": machine.kernel,
        "System": machine.platform,
        "Versions": ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
        "Model id": report.subject.model_id,
    }
    return section("Ran on", facts(rows))
