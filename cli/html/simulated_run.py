"""The page of a simulated run: what was planned, what a token waits for, and what every resource does meanwhile."""

from collections.abc import Mapping, Sequence

from cli.html import svg_plots
from cli.html.document import Compared, banners, document, facts, figures, none, notes_section, section, text
from cli.html.request import command
from cli.html.svg_plots import Bins, nice_ticks, value_ticks
from cli.terminal.replay_tables import RESOURCES, causes, replay_document
from cli.terminal.words import number, percent, sentence, size
from offload.simulator.event_engine import Span
from offload.simulator.simulation import SimulatedPhase, Simulation

# From the fastest memory down to the slowest, the processors beside the memory that feeds them.
LANES = ("vram", "gpu", "pcie", "ram", "cpu", "cpu compute", "disk")
_BINS = 250
_CAUSES = {"vram": "vram", "cpu": "ram", "pcie": "theirs", "disk": "disk", "compute": "role4", "doorbell": "mark"}
# What lanes are busy with: six colours at most, by what the engine's flows are called.
_WORK = {
    "expert": ("role0", "routed experts"),
    "attention": ("role1", "attention, norms, router"),
    "shared": ("role2", "shared experts, dense MLPs"),
    "head": ("role3", "LM head"),
    "read": ("role4", "read from disk"),
    "copy": ("role-other", "copied over PCIe"),
}
# What crosses a memory beside the reads of a processor has a strip of its own there, and a whole lane elsewhere.
_BESIDE = {"read": "disk", "copy": "pcie"}
_SAME = {"experts": "expert", "in place": "expert", "dense": "shared", "swap": "copy"}

_COMPARED: tuple[Compared, ...] = (
    ("Decode", "decode.tokens_per_s", "tokens/s", "more"),
    ("Time per token", "decode.ms_per_token", "ms", "less"),
    ("Prefill", "prefill.tokens_per_s", "tokens/s", "more"),
    ("Planned decode", "planned_tokens_per_s", "tokens/s", ""),
    ("Hits in VRAM", "decode.hit_rates.vram", "%", "more"),
    ("Hits in RAM", "decode.hit_rates.ram", "%", ""),
    ("Requests that read the disk", "decode.hit_rates.disk", "%", "less"),
    ("Waiting for VRAM", "decode.waited.vram", "s", ""),
    ("Waiting for the CPU or RAM", "decode.waited.cpu", "s", ""),
    ("Waiting for PCIe", "decode.waited.pcie", "s", ""),
    ("Waiting for the disk", "decode.waited.disk", "s", ""),
    ("Decode limited by", "decode.limited_by", "", ""),
    ("Prefill limited by", "prefill.limited_by", "", ""),
)


def render_replay(
    setup: Simulation,
    decode: SimulatedPhase,
    prefill: SimulatedPhase,
    title: str,
    *,
    command_line: str = "",
    about: Mapping[str, str] | None = None,
    doubts: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> str:
    """The whole page as HTML text. ``about`` are facts of the run by name, told as they are like ``notes`` and
    ``doubts``, which stand out."""
    readouts: dict[str, list[str]] = {}
    head = (
        '<div class="eyebrow">Coldstream simulate: nothing on this page was measured</div>'
        f'<h1>{text(title)}</h1><p class="verdict">{text(_verdict(setup, decode))}</p>{banners(doubts)}'
    )
    body = (
        section("What was simulated", command(command_line) + facts(_about(setup) | dict(about or {})), css="request")
        + _figures(setup, decode, prefill)
        + _waits(setup, decode)
        + section(
            "One token",
            lanes("token", decode.spans, readouts),
            note="What every resource does during a typical token. A lane that is full all along sets the speed. "
            "The strip below the RAM lane is what disk and PCIe move there.",
        )
        + section(
            "The prompt",
            lanes("prompt", prefill.spans, readouts),
            note=f"The same over a prompt of {prefill.tokens:,} tokens, in chunks of {setup.plan.prompt_chunk:,}.",
        )
        + f'<div class="pair">{_resources(decode)}'
        + section("Token by token", _tokens(decode, readouts), note="Time per token in ms, over the decoded tokens.")
        + "</div>"
        + (notes_section(notes) if notes else "")
    )
    report = replay_document(setup, decode, prefill)
    return document(title, head, body, report=report, readouts=readouts, compared=_COMPARED)


def lanes(name: str, spans: Sequence[Span], readouts: dict[str, list[str]]) -> str:
    """What each resource is busy with over time, one lane below the other."""
    present = [lane for lane in LANES if any(span.lane == lane and span.end > span.start for span in spans)]
    if not present:
        return none("nothing was recorded")
    end = max(span.end for span in spans)
    height = svg_plots.HEIGHT / len(present)
    shapes: dict[str, list[str]] = {kind: [] for kind in _WORK}
    for span in spans:
        if span.lane in present and span.end > span.start:
            beside = _kind(span) in _BESIDE and span.lane not in _BESIDE.values()
            top = (present.index(span.lane) + (0.64 if beside else 0.14)) * height
            tall = (0.22 if beside else 0.46 if span.lane == "ram" else 0.72) * height
            left, width = svg_plots.WIDTH * span.start / end, svg_plots.WIDTH * (span.end - span.start) / end
            shapes[_kind(span)].append(f"M{left:.2f} {top:.1f}h{max(width, 0.4):.2f}v{tall:.1f}H{left:.2f}z")
    drawing = "".join(
        f'<g class="{_WORK[kind][0]}"><path class="solid" d="{"".join(cells)}"/></g>' for kind, cells in shapes.items()
    )
    readouts[name] = [_at(spans, present, end * (index + 0.5) / _BINS) for index in range(_BINS)]
    unit, scale = ("ms", 1e3) if end < 1 else ("s", 1.0)
    x = [
        (value / (end * scale), f"{value:g} {unit}")
        for value in nice_ticks(end * scale, 5)
        if value < 0.75 * end * scale
    ]
    x.append((1.0, f"{number(end * scale)} {unit}"))
    y = [(1 - (row + 0.5) / len(present), _label(lane)) for row, lane in enumerate(present)]
    label = f"What {', '.join(RESOURCES[lane] for lane in present)} do over {number(end * scale)} {unit}."
    figure = svg_plots.plot(name, drawing, label=label, x=x, y=y, css="lanes")
    legend = "".join(
        f'<li><span class="swatch {css}"></span>{said}</li>' for kind, (css, said) in _WORK.items() if shapes[kind]
    )
    return f'<div style="--lanes:{len(present)}">{figure}</div><ul class="legend">{legend}</ul>'


def _kind(span: Span) -> str:
    kind = _SAME.get(span.what, span.what)
    return kind if kind in _WORK else "copy"


def _label(lane: str) -> str:
    return sentence(RESOURCES[lane])


def _at(spans: Sequence[Span], present: Sequence[str], when: float) -> str:
    doing = dict.fromkeys(present, "idle")
    for span in spans:
        if span.start <= when < span.end and span.lane in doing:
            doing[span.lane] = _WORK[_kind(span)][1]
    listed = "; ".join(f"{_label(lane)}: {what}" for lane, what in doing.items())
    return f"{number(1e3 * when)} ms. {listed}"


def _verdict(setup: Simulation, decode: SimulatedPhase) -> str:
    slowest = max(decode.waited, key=lambda cause: decode.waited[cause])
    share = percent(decode.waited[slowest] * decode.tokens_per_s)
    return (
        f"Decode should reach {number(decode.tokens_per_s)} tokens/s; "
        f"{share} of a token is waiting for {causes(setup).get(slowest, slowest)}."
    )


def _about(setup: Simulation) -> dict[str, str]:
    plan, machine = setup.plan, setup.machine
    rates = [f"RAM {number(machine.ram_gb_s)}", f"disk {number(machine.disk_gb_s)}"]
    if machine.gpu:
        rates = [f"VRAM {number(machine.gpu.vram_gb_s)}", *rates, f"PCIe {number(machine.gpu.h2d_gb_s)}"]
    budgets = [f"{size(count)} of {tier}" for tier, count in (("VRAM", plan.vram), ("RAM", plan.ram)) if count]
    return {
        "Machine": machine.name,
        "Rates": f"{', '.join(rates)} GB/s, {'measured' if machine.measured else 'assumed'}",
        "Budgets": " and ".join(budgets),
        "Context": f"{plan.context:,} tokens, {plan.filled:,} of them filled",
    }


def _figures(setup: Simulation, decode: SimulatedPhase, prefill: SimulatedPhase) -> str:
    plan, gpu = setup.plan, setup.machine.gpu is not None
    slots = f"{plan.ram_slots:,} of {plan.experts:,} experts in RAM"
    if gpu:
        slots = f"{plan.vram_slots:,} in VRAM and {plan.ram_slots:,} in RAM, of {plan.experts:,} experts"
    cards = [
        (
            "Decode",
            number(decode.tokens_per_s),
            "tokens/s",
            f"{number(1e3 / decode.tokens_per_s)} ms per token; the plan says {number(plan.predicted_tokens_per_s)}",
        ),
        (
            "Prefill",
            number(prefill.tokens_per_s),
            "tokens/s",
            f"a prompt of {prefill.tokens:,}; the plan says {number(plan.predicted_prefill_tokens_per_s)}",
        ),
    ]
    if plan.experts:
        cards.append(
            ("Hits in VRAM" if gpu else "Hits in RAM", percent(decode.hit_rates["vram" if gpu else "ram"]), "", slots)
        )
    if plan.experts and gpu:
        cards.append(("Swaps", number(decode.swaps_per_token), "per token", f"{size(plan.slot_bytes)} each"))
    return figures(cards)


def _waits(setup: Simulation, decode: SimulatedPhase) -> str:
    names = causes(setup)
    parts = [
        (
            _CAUSES.get(cause, "rest"),
            names.get(cause, cause),
            seconds * decode.tokens_per_s,
            f"{number(1e3 * seconds)} ms, {percent(seconds * decode.tokens_per_s)}",
        )
        for cause, seconds in sorted(decode.waited.items(), key=lambda item: -item[1])
        if seconds
    ]
    label = ", ".join(f"{name} {said}" for _, name, _, said in parts)
    note = f"{number(1e3 / decode.tokens_per_s)} ms per decoded token, by what was waited for."
    return section("Where a token’s time goes", svg_plots.stacked(parts, label), note=note)


def _resources(decode: SimulatedPhase) -> str:
    rows = "".join(
        f'<tr><th scope="row">{text(_label(name))}</th><td class="number">{size(round(amount))}</td>'
        f'<td class="number">{percent(decode.used[name])}</td></tr>'
        for name, amount in decode.moved.items()
        if amount and "arithmetic" not in RESOURCES[name]
    )
    head = '<th scope="col">Through</th><th scope="col" class="number">per token</th>'
    head += '<th scope="col" class="number">of what it could</th>'
    return section("What passes per token", f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")


def _tokens(decode: SimulatedPhase, readouts: dict[str, list[str]]) -> str:
    times = [1e3 * seconds for seconds in decode.token_seconds]
    bins = Bins(len(times))
    middles = [sum(times[start:end]) / (end - start) for start, end in bins.spans]
    top = 1.15 * max(middles)
    drawing = f'<g class="plain"><path class="line" d="{svg_plots.line(middles, top)}"/></g>'
    readouts["tokens"] = [f"Token {s + 1:,}: {number(v)} ms" for (s, _), v in zip(bins.spans, middles, strict=True)]
    return svg_plots.plot("tokens", drawing, label="ms per token", x=bins.ticks(), y=value_ticks(top), css="low")
