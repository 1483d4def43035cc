"""Where a token's time went: one stacked bar, and what sets the speed in figures below it."""

from cli.html import svg_plots
from cli.html.document import facts, none, section, text
from cli.terminal import words
from cli.terminal.words import TIER_NAMES, number, percent, size
from offload.run.report import RunReport
from offload.tiers import TIERS

_PARTS = {
    "vram": ("vram", "reading VRAM"),
    "ram": ("ram", "reading RAM"),
    "disk": ("disk", "waiting for the disk"),
    "rest": ("rest", "everything else: arithmetic, attention, waits, Python"),
}


def time_section(report: RunReport) -> str:
    """The bar over the whole width."""
    title = "Where a token’s time went"
    parts, decode = report.decode.time_ms(), report.decode
    total = sum(parts.values())
    if not total:
        return section(title, none("no decode step was measured"))
    if not decode.floor_ms_by_tier:
        return section(title, none("no bandwidth was measured, so nothing can be told apart"))
    shown = [
        (css, said, ms / total, f"{number(ms)} ms, {percent(ms / total)}")
        for name, (css, said) in _PARTS.items()
        if (ms := parts.get(name, 0.0))
    ]
    note = (
        f"{number(total)} ms per decoded token, on average. Reading is counted at the bandwidths that were measured; "
        "the disk is read beside the memories, and only what it takes beyond them is shown."
    )
    label = ", ".join(f"{said} {value}" for _, said, _, value in shown)
    return section(title, svg_plots.stacked(shown, label), note=note)


def speed_section(report: RunReport) -> str:
    """Floor, bandwidths and predictions beside what was measured."""
    decode, plan = report.decode, report.plan
    floors = "".join(
        _measure(
            f"{TIER_NAMES[tier]} floor",
            f"{number(ms)} ms for {size(decode.bytes_per_token[tier])}",
            svg_plots.track(ms / (decode.ms_per_token_p50 or ms), tier),
            doubt=bool(decode.ms_per_token_p50 and ms > decode.ms_per_token_p50),
        )
        for tier, ms in decode.floor_ms_by_tier.items()
    )
    if decode.ms_per_token_p50:
        took = f"{number(decode.ms_per_token_p50)} ms median"
        floors = _measure("Measured", took, svg_plots.track(1, "other")) + floors
    return section(
        "What sets the speed",
        f"<h3>Time of a token</h3>{floors or none('no decode step was measured')}"
        f"<h3>Bandwidth reached while decoding</h3>{_bandwidths(report) or none('no bandwidth was measured')}"
        f"{_together(report)}<h3>Predicted and measured</h3>"
        f"{_predicted('Decode', plan.predicted_tokens_per_s, decode.tokens_per_s)}"
        f"{_predicted('Prefill', plan.predicted_prefill_tokens_per_s, report.prefill.tokens_per_s)}",
        note="Decode reads its weights anew for every token: reading them is the least time a token can take. RAM and "
        "VRAM are read one after the other, the disk beside them.",
    )


def _together(report: RunReport) -> str:
    rows = words.sequence_rows(report)
    return f"<h3>Sequences that shared steps</h3>{facts(dict(rows))}" if rows else ""


def _bandwidths(report: RunReport) -> str:
    rows = ""
    for tier in TIERS:
        limit, got = report.bandwidth.of(tier), report.achieved.get(tier)
        if not limit:
            continue
        part = (got or 0.0) / limit
        said = f"{number(got)} of {number(limit)} GB/s ({words.bandwidth_share(part)})"
        if not got:
            said = f"not read; {number(limit)} GB/s measured"
        rows += _measure(TIER_NAMES[tier], said, svg_plots.track(part, tier), doubt=part > 1.005)
    if report.bandwidth.pcie_gb_s:
        rows += _measure("PCIe", f"{number(report.bandwidth.pcie_gb_s)} GB/s measured", "")
    return rows


def _measure(name: str, said: str, tracks: str, *, doubt: bool = False) -> str:
    css = "measure doubt" if doubt else "measure"
    head = f'<div class="head"><span>{text(name)}</span><span class="said">{text(said)}</span></div>'
    return f'<div class="{css}">{head}{tracks}</div>'


def _predicted(name: str, predicted: float | None, measured: float | None) -> str:
    if not predicted or not measured:
        return _measure(name, f"{number(measured)} tokens/s; nothing was predicted", "")
    top = max(predicted, measured)
    off = words.deviation(measured / predicted - 1)
    tracks = svg_plots.track(measured / top, "plain") + svg_plots.track(predicted / top, "other", thin=True)
    said = f"{number(measured)} tokens/s measured, {number(predicted)} predicted ({off})"
    return _measure(name, said, tracks, doubt=words.is_far_off(predicted, measured))
