"""A RunReport on the terminal: what to know in a few lines."""

from collections.abc import Mapping

from cli.terminal.words import TIER_NAMES, bandwidth_share, deviation, limit_name, number, percent, role_name, size
from offload.run.report import RunReport
from offload.tiers import TIERS


def summary(report: RunReport) -> str:
    """The report as aligned plain lines."""
    rows = [
        ("prefill", _prefill(report)),
        ("decode", _decode(report)),
        ("floor", _floor(report)),
        ("predicted", _predicted(report)),
        ("bandwidth", _bandwidth(report)),
        ("experts", _experts(report)),
    ]
    for tier in TIERS:
        parts = report.memory.of(tier)
        if parts:
            rows.append((TIER_NAMES[tier], _roles(parts)))
    rows.append(("resident", _resident(report)))
    rows.append(("kernel", report.environment.kernel))
    rows += [("doubt", doubt) for doubt in report.doubts]
    lines = [f"  {name:<10}{text}" for name, text in rows if text]
    return "\n".join([*lines, *(f"  {'note':<10}{note}" for note in report.notes)])


def _prefill(report: RunReport) -> str:
    prefill = report.prefill
    if not prefill.tokens:
        return ""
    return f"{number(prefill.tokens_per_s)} tokens/s ({prefill.tokens:,} tokens in {number(prefill.seconds)} s)"


def _decode(report: RunReport) -> str:
    decode = report.decode
    if not decode.tokens:
        return ""
    text = f"{number(decode.tokens_per_s)} tokens/s ({decode.tokens:,} tokens; "
    text += f"{number(decode.ms_per_token_p50)} ms median, {number(decode.ms_per_token_p90)} ms at 90 %)"
    if decode.spread and decode.spread[0] != decode.spread[1]:
        text += f", runs from {number(decode.spread[0])} to {number(decode.spread[1])}"
    return text


def _floor(report: RunReport) -> str:
    decode = report.decode
    if decode.floor_ms_per_token is None:
        return ""
    text = f"{number(decode.floor_ms_per_token)} ms per token by {limit_name(report)}"
    if (decode.fraction_of_floor or 0.0) > 1:
        return f"{text}, unreliable: decode is faster"
    text += f"; decode is at {percent(decode.fraction_of_floor)} of its speed"
    return text + (", unreliable" if report.doubts else "")


def _predicted(report: RunReport) -> str:
    plan, parts = report.plan, []
    for name, predicted, measured in (
        ("decode", plan.predicted_tokens_per_s, report.decode.tokens_per_s),
        ("prefill", plan.predicted_prefill_tokens_per_s, report.prefill.tokens_per_s),
    ):
        if predicted and measured:
            parts.append(f"{name} {number(predicted)} tokens/s (measured {deviation(measured / predicted - 1)})")
    return ", ".join(parts)


def _bandwidth(report: RunReport) -> str:
    parts = []
    for tier in TIERS:
        limit, got = report.bandwidth.of(tier), report.achieved.get(tier)
        if limit and got:
            parts.append(f"{TIER_NAMES[tier]} {number(got)} of {number(limit)} GB/s ({bandwidth_share(got / limit)})")
    return ", ".join(parts)


def _experts(report: RunReport) -> str:
    requests = report.experts.hits + report.experts.misses
    if not requests:
        return ""
    by_tier = report.experts.by_tier
    places = ", ".join(f"{TIER_NAMES[tier]} {percent(by_tier[tier] / requests)}" for tier in TIERS if by_tier[tier])
    return f"{percent(report.experts.hit_rate)} hits of {requests:,} requests: {places}"


def _roles(parts: Mapping[str, int]) -> str:
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    listed = ", ".join(f"{role_name(role)} {size(count)}" for role, count in ordered[:4])
    rest = sum(count for _, count in ordered[4:])
    return f"{size(sum(parts.values()))}: {listed}" + (f", other {size(rest)}" if rest else "")


def _resident(report: RunReport) -> str:
    memory = report.memory
    side = "more" if memory.unaccounted_bytes >= 0 else "less"
    text = f"{size(memory.rss_bytes)}, {size(abs(memory.unaccounted_bytes))} {side} than listed in RAM; "
    text += f"peak {size(memory.peak_rss_bytes)}"
    return text + (f", VRAM peak {size(memory.peak_vram_bytes)}" if memory.peak_vram_bytes else "")
