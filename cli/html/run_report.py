"""The memory-profile report: one self-contained HTML file that needs no network, made from a RunReport.

Text and drawings are complete without scripts; the script adds readouts under pointer and arrow keys.
A content security policy in the page itself forbids every request.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from cli.html import svg_plots
from cli.terminal import words
from cli.terminal.words import TIER_NAMES, number, percent, size
from offload.records import TokenRecord
from offload.run.report import RunReport
from offload.tiers import TIERS
from quant.errors import OutputError

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_page(report: RunReport, path: Path) -> None:
    """Write the page to ``path``. Raises OutputError if that cannot be."""
    save(render_page(report), path)


def save(page: str, path: Path) -> None:
    """Write a page's text to ``path``. Raises OutputError if that cannot be."""
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; name another --report file") from None


def render_page(report: RunReport) -> str:
    """The whole page as HTML text."""
    readouts: dict[str, list[str]] = {}
    body = "".join(
        (
            _header(report),
            _figures(report),
            f'<div class="pair">{_memory(report)}{_speed(report)}</div>',
            _timeline(report, readouts),
            _experts(report),
            f'<div class="pair">{_notes(report)}{_environment(report)}</div>',
        )
    )
    experts = {"moe_layers": report.expert_map.moe_layers, "counts": report.expert_map.counts}
    return document(
        f"{report.subject.model}: Coldstream run report",
        body,
        {"readouts": readouts, "experts": {**experts, "tiers": report.expert_map.tiers}, "report": report.to_json()},
    )


def document(title: str, body: str, data: Mapping[str, object]) -> str:
    """A self-contained page around ``body`` (HTML); ``data`` is what its script reads, by element id."""
    style, script = (files("cli").joinpath("html", "assets", name).read_text() for name in ("page.css", "page.js"))
    blocks = "".join(_data(name, value) for name, value in data.items())
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<style>\n{style}</style></head><body><main>{body}</main>"
        f"{blocks}<script>\n{script}</script></body></html>\n"
    )


def figures(cards: Sequence[tuple[str, str, str, str]]) -> str:
    """A row of cards: (name, value, unit, detail)."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt>"
        f'<dd><div class="value">{escape(value)} <span class="unit">{escape(unit)}</span></div>'
        f'<div class="detail">{escape(detail)}</div></dd></div>'
        for name, value, unit, detail in cards
    )
    return f'<dl class="figures">{items}</dl>'


def _data(name: str, value: object) -> str:
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _header(report: RunReport) -> str:
    subject = report.subject
    return (
        f'<header><div class="eyebrow">Coldstream {escape(subject.command)}, {escape(subject.started)}</div>'
        f"<h1>{escape(subject.model)}</h1>"
        f'<p class="verdict">{escape(words.verdict(report))}</p></header>'
    )


def _figures(report: RunReport) -> str:
    decode, prefill, memory = report.decode, report.prefill, report.memory
    floor = "not measured"
    if decode.floor_ms_per_token:
        floor = f"floor {number(decode.floor_ms_per_token)} ms per token"
    vram = f"; {size(memory.peak_vram_bytes)} of VRAM" if memory.peak_vram_bytes else ""
    requests = report.experts.hits + report.experts.misses
    cards = [
        (
            "Decode",
            number(decode.tokens_per_s),
            "tokens/s",
            f"{number(decode.ms_per_token_p50)} ms per token, 9 of 10 under {number(decode.ms_per_token_p90)}",
        ),
        ("Prefill", number(prefill.tokens_per_s), "tokens/s", f"{prefill.tokens:,} prompt tokens"),
        ("Of the floor’s speed", percent(decode.fraction_of_floor), "", floor),
        (
            "Expert hits at decode",
            percent(report.decode_experts.hit_rate),
            "",
            f"{percent(report.experts.hit_rate)} of all {requests:,} requests, prompts included",
        ),
        ("Peak memory", size(memory.peak_rss_bytes), "", f"resident{vram}"),
    ]
    return figures(cards)


def _memory(report: RunReport) -> str:
    memory = report.memory
    scale = max((sum(memory.of(tier).values()) for tier in TIERS), default=0)
    return (
        "<section><h2>Where the bytes are</h2>"
        + "".join(_tier(report, tier, scale) for tier in TIERS if memory.of(tier))
        + f'<p class="quiet">The operating system counts {size(memory.rss_bytes)} resident at the end, '
        f"{size(memory.peak_rss_bytes)} at the peak; {_unaccounted(memory.unaccounted_bytes)}.</p></section>"
    )


def _unaccounted(count: int) -> str:
    side = "more than the roles explain" if count >= 0 else "less than the roles add up to"
    return f"{size(abs(count))} {side}"


def _tier(report: RunReport, tier: str, scale: int) -> str:
    name = next(t for t in TIERS if t == tier)
    parts = sorted(report.memory.of(name).items(), key=lambda part: -part[1])
    total = sum(count for _, count in parts)
    rows = "".join(
        f'<tr><th scope="row"><span class="swatch {tier}" style="--part:{svg_plots.shade(index)}%"></span>'
        f'{escape(words.sentence(words.role_name(role)))}</th><td class="number">{size(count)}</td>'
        f'<td class="number">{percent(count / total)}</td></tr>'
        for index, (role, count) in enumerate(parts)
        if count
    )
    return (
        f'<div class="tier"><div class="head"><b>{TIER_NAMES[name]}</b><span>{size(total)}</span></div>'
        f"{svg_plots.segments(parts, name, scale)}<table><thead hidden><tr><th>Role</th><th>Bytes</th>"
        f"<th>Share</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _speed(report: RunReport) -> str:
    decode, plan = report.decode, report.plan
    bandwidths = ""
    for tier in TIERS:
        limit, got = report.bandwidth.of(tier), report.achieved.get(tier)
        if limit:
            part = (got or 0.0) / limit
            said = f"{number(got)} of {number(limit)} GB/s ({percent(part)})"
            if not got:
                said = f"not read; {number(limit)} GB/s measured"
            bandwidths += _measure(TIER_NAMES[tier], said, svg_plots.track(part, tier))
    if report.bandwidth.pcie_gb_s:
        bandwidths += _measure("PCIe", f"{number(report.bandwidth.pcie_gb_s)} GB/s measured", "")
    floors = "".join(
        _measure(
            f"{TIER_NAMES[tier]} floor",
            f"{number(ms)} ms for {size(decode.bytes_per_token[tier])}",
            svg_plots.track(ms / (decode.ms_per_token_p50 or ms), tier),
        )
        for tier, ms in decode.floor_ms_by_tier.items()
    )
    if decode.ms_per_token_p50:
        took = f"{number(decode.ms_per_token_p50)} ms median"
        floors = _measure("Measured", took, svg_plots.track(1, "other")) + floors
    return (
        "<section><h2>What sets the speed</h2>"
        '<p class="quiet">Decode reads its weights anew for every token: none can take less time than '
        "reading its bytes. RAM and VRAM are read one after the other, the disk beside them.</p>"
        f"<h3>Time of a token</h3>{floors or _none('no decode step was measured')}"
        f"<h3>Bandwidth reached while decoding</h3>{bandwidths or _none('no bandwidth was measured')}"
        f"<h3>Predicted and measured</h3>"
        f"{_predicted('Decode', plan.predicted_tokens_per_s, decode.tokens_per_s)}"
        f"{_predicted('Prefill', plan.predicted_prefill_tokens_per_s, report.prefill.tokens_per_s)}</section>"
    )


def _measure(name: str, said: str, tracks: str) -> str:
    head = f'<div class="head"><span>{name}</span><span>{escape(said)}</span></div>'
    return f'<div class="measure">{head}{tracks}</div>'


def _none(text: str) -> str:
    return f'<p class="quiet">{words.sentence(text)}.</p>'


def _predicted(name: str, predicted: float | None, measured: float | None) -> str:
    if not predicted or not measured:
        return _measure(name, f"{number(measured)} tokens/s; nothing was predicted", "")
    top = max(predicted, measured)
    off = words.deviation(measured / predicted - 1)
    tracks = svg_plots.track(measured / top, "plain") + svg_plots.track(predicted / top, "other", thin=True)
    return _measure(name, f"{number(measured)} measured, {number(predicted)} predicted ({off})", tracks)


def _timeline(report: RunReport, readouts: dict[str, list[str]]) -> str:
    from cli.html.step_plots import memory_plot, requests_plot, time_plot

    records: Sequence[TokenRecord] = report.records
    parts = [time_plot(report, readouts), memory_plot(records, readouts), requests_plot(records, readouts)]
    drawn = "".join(part for part in parts if part)
    hint = '<p class="quiet">Point at a plot, or focus it and use the arrow keys, to read its values.</p>'
    return f"<section><h2>Over the run</h2>{hint + drawn if drawn else _none('no step was recorded')}</section>"


def _experts(report: RunReport) -> str:
    experts = report.expert_map
    if not experts.counts:
        return ""
    totals = [sum(row) for row in experts.counts]
    shares = [
        sum(sorted(row, reverse=True)[: max(1, len(row) // 4)]) / total
        for row, total in zip(experts.counts, totals, strict=True)
        if total
    ]
    unused = sum(count == 0 for row in experts.counts for count in row)
    skew = "Nothing was asked for"
    if shares:
        mean = percent(statistics.mean(shares))
        skew = f"The most used quarter of a layer’s experts takes {mean} of its requests"
    present = [tier for tier in TIERS if any(tier in row for row in experts.tiers)]
    places = {"vram": "in VRAM", "ram": "in RAM", "disk": "on disk only"}
    ramps = "".join(
        f'<li><span class="ramp {tier}{" small" if tier == "disk" else ""}">'
        + "".join(f'<i class="p{step}"></i>' for step in range(svg_plots.STEPS))
        + f"</span>{places[tier]}: {sum(row.count(tier) for row in experts.tiers):,}</li>"
        for tier in present
    )
    return (
        "<section><h2>Experts: use and residency</h2>"
        f'<p class="quiet">{skew}; {unused:,} of {sum(map(len, experts.counts)):,} experts were never asked '
        "for. "
        "A stronger shade is more use; colour is where the expert was at the end, and those on disk only are "
        f"drawn small.</p>{svg_plots.heat_map(experts)}"
        f'<ul class="legend">{ramps}</ul></section>'
    )


def _notes(report: RunReport) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    listed = f'<ul class="notes">{notes}</ul>' if notes else _none("nothing out of the ordinary")
    return f"<section><h2>Notes</h2>{listed}</section>"


def _environment(report: RunReport) -> str:
    subject, machine = report.subject, report.environment
    rows = {
        "Model": f"{subject.family}, {len(report.expert_map.moe_layers)} MoE layers of "
        f"{subject.num_experts} experts, {subject.top_k} per token",
        "Context": f"{subject.context:,} tokens",
        "Loaded in": f"{number(subject.load_seconds)} s",
        "CPU": f"{machine.cpu}, {machine.threads} threads",
        "GPU": machine.gpu or "none",
        "Kernel": machine.kernel,
        "System": machine.platform,
        "Versions": ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
        "Model id": subject.model_id,
    }
    cells = "".join(
        f'<tr><th scope="row">{name}</th><td class="break">{escape(value)}</td></tr>' for name, value in rows.items()
    )
    return f'<section><h2>The run</h2><table class="facts"><tbody>{cells}</tbody></table></section>'
