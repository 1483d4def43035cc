"""The page of a replayed timeline: one self-contained HTML file in the style of the run report."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cli.html import svg_plots
from cli.html.document import Compared, document, figures, none, save, section, text
from cli.html.svg_plots import Bins, nice_ticks
from cli.terminal.simulation_tables import RESOURCES, causes
from cli.terminal.simulation_tables import document as plain_data
from cli.terminal.words import number, percent, size
from offload.simulator.engine import Span
from offload.simulator.simulation import Replay, Setup

_LANES = {"vram": "vram", "gpu": "vram", "cpu": "ram", "cpu compute": "ram", "pcie": "plain", "disk": "disk"}
_BINS = 250


def write_replay(setup: Setup, decode: Replay, prefill: Replay, title: str, path: Path) -> None:
    """Write the page to ``path``. Raises OutputError if that cannot be."""
    save(render_replay(setup, decode, prefill, title), path)


def render_replay(setup: Setup, decode: Replay, prefill: Replay, title: str) -> str:
    """The whole page as HTML text."""
    readouts: dict[str, list[str]] = {}
    head = (
        f'<div class="eyebrow">Coldstream simulate: nothing on this page was measured</div>'
        f'<h1>{text(title)}</h1><p class="verdict">{text(_verdict(setup, decode))}</p>'
    )
    body = (
        f"{_figures(setup, decode, prefill)}"
        f'<div class="pair">{_waits(setup, decode)}{_resources(decode)}</div>'
        + section("One token", lanes("token", decode.spans, readouts))
        + section("The prompt", lanes("prompt", prefill.spans, readouts))
        + section("Token by token", _tokens(decode, readouts))
    )
    report = plain_data(setup, decode, prefill)
    return document(title, head, body, report=report, readouts=readouts, compared=COMPARED)


COMPARED: tuple[Compared, ...] = (
    ("Decode", "decode.tokens_per_s", "tokens/s", "more"),
    ("Prefill", "prefill.tokens_per_s", "tokens/s", "more"),
    ("Planned decode", "planned_tokens_per_s", "tokens/s", ""),
    ("Hits in VRAM", "decode.hit_rates.vram", "%", "more"),
    ("Hits in RAM", "decode.hit_rates.ram", "%", ""),
    ("Read from disk", "decode.hit_rates.disk", "%", "less"),
    ("Limited by", "decode.limited_by", "", ""),
)


def lanes(name: str, spans: Sequence[Span], readouts: dict[str, list[str]]) -> str:
    """What each resource is busy with over time, one lane below the other."""
    present = [lane for lane in _LANES if any(span.lane == lane for span in spans)]
    if not present:
        return none("nothing was recorded")
    end = max(span.end for span in spans)
    height = svg_plots.HEIGHT / len(present)
    drawing = ""
    for row, lane in enumerate(present):
        top = row * height + 0.15 * height
        cells = "".join(
            f"M{svg_plots.WIDTH * span.start / end:.2f} {top:.1f}"
            f"h{max(0.4, svg_plots.WIDTH * (span.end - span.start) / end):.2f}v{0.7 * height:.1f}"
            f"h-{max(0.4, svg_plots.WIDTH * (span.end - span.start) / end):.2f}z"
            for span in spans
            if span.lane == lane
        )
        drawing += f'<g class="{_LANES[lane]}"><path class="solid" d="{cells}"/></g>'
    readouts[name] = [_at(spans, present, end * (index + 0.5) / _BINS) for index in range(_BINS)]
    unit, scale = ("ms", 1e3) if end < 1 else ("s", 1.0)
    x = [(value / (end * scale), f"{value:g} {unit}") for value in nice_ticks(end * scale, 6)]
    y = [(1 - (row + 0.5) / len(present), RESOURCES[lane]) for row, lane in enumerate(present)]
    label = f"What {', '.join(RESOURCES[lane] for lane in present)} do over {number(end * scale)} {unit}."
    return svg_plots.plot(name, drawing, label=label, x=x, y=y)


def _at(spans: Sequence[Span], present: Sequence[str], when: float) -> str:
    doing = dict.fromkeys(present, "idle")
    for span in spans:
        if span.start <= when < span.end:
            doing[span.lane] = span.what
    listed = ", ".join(f"{RESOURCES[lane]} {what}" for lane, what in doing.items())
    return f"{number(1e3 * when)} ms: {listed}"


def _verdict(setup: Setup, decode: Replay) -> str:
    slowest = max(decode.waited, key=lambda cause: decode.waited[cause])
    share = percent(decode.waited[slowest] * decode.tokens_per_s)
    return (
        f"Decode should reach {number(decode.tokens_per_s)} tokens/s; "
        f"{share} of a token is waiting for {causes(setup).get(slowest, slowest)}."
    )


def _figures(setup: Setup, decode: Replay, prefill: Replay) -> str:
    plan = setup.plan
    hits = percent(decode.hit_rates["vram"] if setup.machine.gpu else decode.hit_rates["ram"])
    cards = [
        (
            "Decode",
            number(decode.tokens_per_s),
            "tokens/s",
            f"{number(1e3 / decode.tokens_per_s)} ms per token; plan {number(plan.predicted_tokens_per_s)}",
        ),
        (
            "Prefill",
            number(prefill.tokens_per_s),
            "tokens/s",
            f"a prompt of {prefill.tokens:,}; plan {number(plan.predicted_prefill_tokens_per_s)}",
        ),
        ("Hits", hits, "", f"{plan.vram_slots:,} experts in VRAM, {plan.ram_slots:,} in RAM"),
        ("Swaps", number(decode.swaps_per_token), "per token", size(plan.slot_bytes) + " each"),
    ]
    return figures(cards)


def _waits(setup: Setup, decode: Replay) -> str:
    names = causes(setup)
    rows = "".join(
        _row(names.get(cause, cause), f"{number(1e3 * seconds)} ms", percent(seconds * decode.tokens_per_s))
        for cause, seconds in sorted(decode.waited.items(), key=lambda item: -item[1])
    )
    return f"<section><h2>What a token waits for</h2><table><tbody>{rows}</tbody></table></section>"


def _resources(decode: Replay) -> str:
    moved: Mapping[str, float] = decode.moved
    rows = "".join(
        _row(RESOURCES[name], size(round(amount)), f"{percent(decode.used[name])} of its rate")
        for name, amount in moved.items()
        if amount and "arithmetic" not in RESOURCES[name]
    )
    return f"<section><h2>What passes per token</h2><table><tbody>{rows}</tbody></table></section>"


def _row(name: str, *values: str) -> str:
    cells = "".join(f'<td class="number">{text(value)}</td>' for value in values)
    return f'<tr><th scope="row">{text(name)}</th>{cells}</tr>'


def _tokens(decode: Replay, readouts: dict[str, list[str]]) -> str:
    times = [1e3 * seconds for seconds in decode.token_seconds]
    bins = Bins(len(times))
    middles = [sum(times[start:end]) / (end - start) for start, end in bins.spans]
    top = 1.15 * max(middles)
    drawing = f'<g class="plain"><path class="line" d="{svg_plots.line(middles, top)}"/></g>'
    readouts["tokens"] = [f"Token {s + 1:,}: {number(v)} ms" for (s, _), v in zip(bins.spans, middles, strict=True)]
    y = [(value / top, f"{value:g}") for value in nice_ticks(top)]
    return svg_plots.plot("tokens", drawing, label="ms per token", x=bins.ticks(), y=y, css="low")
