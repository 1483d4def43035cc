"""A RunReport on the terminal: what to know in a few lines."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from cli.terminal.words import (
    TIER_NAMES,
    bandwidth_share,
    deviation,
    how_many,
    limit_name,
    number,
    percent,
    sequence_rows,
    size,
)
from offload.run.draft_report import DraftReport, DraftTask
from offload.run.report import RunReport
from offload.tiers import TIERS, role_name

if TYPE_CHECKING:  # it imports torch
    from offload.run.sequence_bench import Arrival
    from offload.run.stock_benchmark import StockSpeed

INDENT = "  "
_ROLES = 4  # of a tier, the largest


def summary_rows(report: RunReport, *, said: Collection[str] = (), every_role: bool = False) -> list[tuple[str, str]]:
    """A label and a text per line; without the notes that were ``said`` before."""
    shown = None if every_role else _ROLES
    rows = [
        ("prefill", _prefill(report)),
        ("reused", _reused(report)),
        ("decode", _decode(report)),
        ("floor", _floor(report)),
        *(("together", f"{several}: {said}") for several, said in sequence_rows(report)),
        ("predicted", _predicted(report)),
        ("bandwidth", _bandwidth(report)),
        ("experts", _experts(report)),
        ("left out", _left_out(report)),
        *(("drafts", line) for line in _drafts(report)),
        ("VRAM", _roles(report.memory.vram, shown)),
        ("RAM", _roles(report.memory.ram, shown)),
        ("files", _roles(report.memory.disk, shown)),
        ("resident", _resident(report)),
        ("kernel", report.environment.kernel),
        *(("doubt", doubt) for doubt in report.doubts),
        *(("note", note) for note in report.notes if note not in said),
    ]
    return [(label, text) for label, text in rows if text]


def _prefill(report: RunReport) -> str:
    prefill = report.prefill
    if not prefill.tokens:
        return ""
    return (
        f"{number(prefill.tokens_per_s)} tokens/s ({how_many(prefill.tokens, 'token')} in {number(prefill.seconds)} s)"
    )


def _reused(report: RunReport) -> str:
    reused = report.prefill.reused
    parts = [f"{reused.memory:,} prompt tokens from memory"] if reused.memory else []
    if reused.disk:
        rate = f", {number(reused.disk_bytes / reused.disk_seconds / 1e9)} GB/s" if reused.disk_seconds else ""
        read = f"{size(reused.disk_bytes)} in {number(reused.disk_seconds)} s{rate}"
        parts.append(f"{reused.disk:,} prompt tokens from the prompt cache ({read})")
    return ", ".join(parts)


def _decode(report: RunReport) -> str:
    decode = report.decode
    if not decode.tokens:
        return ""
    made = len(report.records)
    tokens = f"{decode.tokens:,} of {made:,} tokens timed" if made > decode.tokens else f"{decode.tokens:,} tokens"
    text = f"{number(decode.tokens_per_s)} tokens/s ({tokens}; "
    text += f"{number(decode.ms_per_token_p50)} ms median, {number(decode.ms_per_token_p90)} ms at 90 %)"
    if decode.spread and decode.spread[0] != decode.spread[1]:
        text += f", runs from {number(decode.spread[0])} to {number(decode.spread[1])}"
    return text


def _floor(report: RunReport) -> str:
    decode = report.decode
    if decode.floor_ms_per_token is None:
        return ""
    text = f"{number(decode.floor_ms_per_token)} ms per token by {limit_name(report.limited_by)}"
    if (decode.fraction_of_floor or 0.0) > 1:
        return f"{text}, unreliable: decode is faster"
    text += f"; decode is at {percent(decode.fraction_of_floor)} of its speed"
    return text + (", unreliable" if report.doubts else "")


def arrival_line(found: "Arrival") -> str:
    """A prompt that arrived while others were being answered."""
    return (
        f"{found.prompt_tokens:,} tokens beside {found.sequences} sequences: first token after "
        f"{number(found.first_token_s)} s; the others waited {number(found.longest_gap_ms)} ms at most (a chunk of "
        f"{found.prompt_chunk:,} takes {number(found.chunk_ms)} ms, a step {number(found.step_ms)})"
    )


def against_line(found: "StockSpeed", ours: RunReport) -> str:
    """What transformers and accelerate made of the same directory."""
    parts = [found.engine + ":"]
    for name, theirs, here in (
        ("decode", found.tokens_per_s, ours.decode.tokens_per_s),
        ("prefill", found.prefill_tokens_per_s, ours.prefill.tokens_per_s),
    ):
        if theirs:
            times = f", {number(here / theirs)} times as fast" if here else ""
            parts.append(f"{name} {number(theirs)} tokens/s (here {number(here or 0)}{times});")
    if found.failed:
        parts.append(f"{found.failed};")
    if found.load_seconds is not None:
        parts.append(f"loaded in {number(found.load_seconds)} s;")
    if found.peak_rss_bytes:
        budget = (
            "" if found.ram_bytes is None else f" where --ram says {size(found.ram_bytes)}, which bounds its map alone"
        )
        parts.append(f"peak {size(found.peak_rss_bytes)} resident{budget}")
    return " ".join(parts).removesuffix(";")


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
    """Of decode, which is what a reader waits for; a prompt asks for nearly every expert, wherever it is."""
    decode, whole = report.decode_experts, report.experts
    requests = decode.hits + decode.misses
    if not requests:
        return f"{percent(whole.hit_rate)} hits in the prompt" if whole.hits + whole.misses else ""
    by_tier = decode.by_tier
    places = ", ".join(f"{TIER_NAMES[tier]} {percent(by_tier[tier] / requests)}" for tier in TIERS if by_tier[tier])
    return f"{percent(decode.hit_rate)} hits in decode ({places}), {percent(whole.hit_rate)} with the prompt's requests"


def _left_out(report: RunReport) -> str:
    """What the whole run did not read of the KV cache."""
    found = report.left_out
    if found is None or not found.pages:
        return ""
    share = f"at most {found.greatest_share:.1e} of a softmax, of {found.epsilon:g} allowed" if found.left_out else ""
    text = f"{percent(found.left_out / found.pages)} of {found.pages:,} KV pages ({size(found.left_out_bytes)}"
    return f"{text}; {share})" if share else f"{text})"


def _drafts(report: RunReport) -> list[str]:
    draft = report.draft
    if draft is None:
        return []
    lines = [f"{draft.kind}: {_drafted(draft)}"] if not draft.tasks else []
    for name, task in draft.tasks.items():
        speeds = f"{number(task.tokens_per_s)} tokens/s, {number(task.plain_tokens_per_s)} without"
        lines.append(f"{name}: {task.speedup:.2f}× ({speeds}), {_drafted(task)}")
    return lines


def _drafted(draft: DraftReport | DraftTask) -> str:
    if draft.acceptance is None:
        return "nothing was drafted: it would not have paid"
    return (
        f"{percent(draft.acceptance)} of {draft.drafted:,} tokens drafted were right, "
        f"{number(draft.tokens_per_step)} tokens per step"
    )


def _roles(parts: Mapping[str, int], most: int | None) -> str:
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    if not ordered:
        return ""
    listed = ", ".join(f"{role_name(role)} {size(count)}" for role, count in ordered[:most])
    rest = sum(count for _, count in ordered[most:]) if most else 0
    return f"{size(sum(parts.values()))}: {listed}" + (f", other {size(rest)}" if rest else "")


def _resident(report: RunReport) -> str:
    memory = report.memory
    side = "more" if memory.unaccounted_bytes >= 0 else "less"
    text = f"{size(memory.rss_bytes)}, {size(abs(memory.unaccounted_bytes))} {side} than listed in RAM; "
    text += f"peak {size(memory.peak_rss_bytes)}"
    return text + (f", VRAM peak {size(memory.peak_vram_bytes)}" if memory.peak_vram_bytes else "")
