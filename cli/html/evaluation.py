"""The page of one evaluation: what quantization cost, token by token, self-contained like the run report.

Four plots: how KL divergence spreads over tokens, where in the window it arises, how it depends on the
reference's confidence, and which layers choose other experts. Beside the model's values stands the noise
floor: the reference against itself in bf16.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cli.html import svg_plots
from cli.html.document import Compared, document, facts, figures, notes_section, section, text
from cli.html.request import command
from cli.html.svg_plots import Tick, value_ticks
from cli.terminal.words import divergence_rows, number

if TYPE_CHECKING:  # these import torch
    from offload.quality.divergence import Bucket
    from offload.quality.evaluate import Evaluation


def render_evaluation(found: "Evaluation", *, command_line: str = "", notes: Sequence[str] = ()) -> str:
    """The whole page as HTML text; ``command_line`` and ``notes`` are told as they are."""
    readouts: dict[str, list[str]] = {}
    about = {
        "Model": str(found.model),
        "Reference": str(found.reference),
        "Text": f"{found.windows:,} windows of {found.window_tokens:,} tokens",
        "KV cache": found.kv or "none: whole windows at once",
        "Took": f"{number(found.seconds)} s",
    }
    sections = (
        section("What was run", command(command_line) + facts(about), css="request"),
        _cards(found),
        f'<div class="pair">{_spread(found, readouts)}{_positions(found, readouts)}</div>',
        f'<div class="pair">{_confidence(found.divergence.buckets, readouts)}'
        f"{_routing(found.router_agreement, readouts)}</div>",
        _numbers(found),
        notes_section(notes) if notes else "",
    )
    title = f"{found.model.name}: quality beside {found.reference.name}"
    return document(
        title, _head(found), "".join(sections), report=found.to_json(), readouts=readouts, compared=_COMPARED
    )


def _head(found: "Evaluation") -> str:
    ours = found.divergence
    ratio, error = 100 * ours.log_ratio, 100 * ours.log_ratio_error
    verdict = f"{ours.kl_mean:.4f} nats of KL divergence per token"
    if found.floor["kl_mean"]:
        verdict += f", {ours.kl_mean / found.floor['kl_mean']:,.0f} times the noise of bf16"
    verdict += f"; perplexity {ratio:+.2f} % ± {error:.2f}".replace("-", "−")
    verdict += "." if _is_told(found) else ", which this text is too short to tell from no change."
    return (
        '<div class="eyebrow">Coldstream eval, '
        f"{found.windows:,} windows of {found.window_tokens:,} tokens{_kv(found)}</div>"
        f"<h1>{text(found.model.name)} beside {text(found.reference.name)}</h1>"
        f'<p class="verdict">{text(verdict)}</p>'
    )


def _is_told(found: "Evaluation") -> bool:
    """Whether the change of perplexity is more than chance would make of none."""
    return abs(found.divergence.log_ratio) >= 2 * found.divergence.log_ratio_error


def _kv(found: "Evaluation") -> str:
    return f", {found.kv} KV cache" if found.kv else ""


def _cards(found: "Evaluation") -> str:
    ours, floor, theirs = found.divergence, found.floor, found.divergence.reference_perplexity
    noise = f"± {ours.kl_error:.4f}; noise {_short(floor['kl_mean'])}"
    reference = f"reference {theirs.value:.2f} ± {theirs.error:.2f}"
    change = f"mean change {100 * ours.delta_p_mean:+.3f} %"
    worst = f"99 % lie below; the largest is {ours.kl_max:.3f}"
    return figures(
        [
            ("KL divergence", f"{ours.kl_mean:.4f}", "nats", noise),
            ("Perplexity", f"{ours.perplexity.value:.2f}", "", reference),
            ("Same top token", f"{100 * ours.same_top:.1f}", "%", f"noise {100 * floor['same_top']:.1f} %"),
            ("True token’s p", f"{100 * ours.delta_p_rms:.2f}", "% RMS", change),
            ("Worst tokens", f"{ours.kl_p99:.3f}", "nats", worst),
        ],
        () if _is_told(found) else ("Perplexity",),
    )


def _spread(found: "Evaluation", readouts: dict[str, list[str]]) -> str:
    edges = list(found.divergence.histogram)
    counts, noise = (
        [histogram[edge] / (sum(histogram.values()) or 1) for edge in edges]
        for histogram in (found.divergence.histogram, found.floor["histogram"])
    )
    readouts["spread"] = [
        f"{_interval(edges, index)} nats: {100 * share:.1f} % of the model’s tokens, "
        f"{100 * other:.1f} % of the noise floor’s"
        for index, (share, other) in enumerate(zip(counts, noise, strict=True))
    ]
    top = 1.1 * max(*counts, *noise)
    ours = _bars(counts, top, narrow=True)
    drawing = f'<g class="other"><path class="range" d="{_bars(noise, top)}"/></g>'
    drawing += f'<g class="plain"><path class="solid" d="{ours}"/></g>'
    label = "Share of tokens by KL divergence, model and noise floor"
    x = [((index + 0.5) / len(edges), edge) for index, edge in enumerate(edges) if edge[0] == "1"]
    figure = svg_plots.plot("spread", drawing, label=label, x=x, y=value_ticks(top, " %", 100))
    return section(
        "How divergence spreads over tokens", figure + _LEGEND, note="Share of tokens by KL divergence in nats."
    )


_LEGEND = (
    '<ul class="legend"><li><span class="swatch plain"></span>Model</li>'
    '<li><span class="swatch other" style="--part:32%"></span>Noise floor: the reference in bf16</li></ul>'
)


def _positions(found: "Evaluation", readouts: dict[str, list[str]]) -> str:
    values = found.divergence.by_position
    if not values:
        return ""
    length, count = found.window_tokens, len(values)
    spans = [(length * index // count, length * (index + 1) // count) for index in range(count)]
    readouts["position"] = [
        f"Tokens {start + 1:,} to {end:,}: {_short(value)} nats"
        for (start, end), value in zip(spans, values, strict=True)
    ]
    x: list[Tick] = [(0.0, "1"), (0.5, f"{length // 2:,}"), (1.0, f"{length:,}")]
    figure = _kl_plot("position", values, "position in the window", x)
    return section("Where in the window", figure, note="Mean KL divergence in nats, by the token’s position.")


def _confidence(buckets: "Sequence[Bucket]", readouts: dict[str, list[str]]) -> str:
    values = [bucket.kl_mean for bucket in buckets]
    readouts["confidence"] = [
        f"Top probability {bucket.low:g} to {bucket.high:g}: {bucket.tokens:,} tokens, "
        f"{_short(bucket.kl_mean)} nats, same top token {100 * bucket.same_top:.1f} %"
        for bucket in buckets
    ]
    x = [(index / len(buckets), f"{bucket.low:g}") for index, bucket in enumerate(buckets)]
    x += [(1.0, f"{bucket.high:g}") for bucket in buckets[-1:]]
    figure = _kl_plot("confidence", values, "the reference’s confidence", x)
    note = "Mean KL divergence in nats, by the probability of the reference’s most likely token."
    return section("By how sure the reference was", figure, note=note)


def _routing(agreement: Mapping[int, float], readouts: dict[str, list[str]]) -> str:
    if not agreement:
        return ""
    layers, shares = list(agreement), list(agreement.values())
    readouts["routing"] = [
        f"Layer {layer}: {100 * share:.2f} % of expert choices in common" for layer, share in agreement.items()
    ]
    low = nice_below(min(shares))
    span = 1 - low
    above = [share - low for share in shares]
    drawing = f'<path class="line" d="{svg_plots.line(above, 1.05 * span)}"/>'
    if len(above) <= _DOTS:
        drawing += f'<path class="dots" d="{svg_plots.dots(above, 1.05 * span)}"/>'
    drawing = f'<g class="plain">{drawing}</g>'
    step = max(1, len(layers) // 8)
    x = [((index + 0.5) / len(layers), str(layer)) for index, layer in enumerate(layers) if index % step == 0]
    y = [(part / 4 / 1.05, f"{100 * (low + span * part / 4):.4g} %") for part in range(5)]
    label = f"Router agreement by layer, from {100 * min(shares):.2f} % to {100 * max(shares):.2f} %"
    figure = svg_plots.plot("routing", drawing, label=label, x=x, y=y)
    note = "Share of expert choices that the model has in common with the reference, by layer."
    if low:
        note += f" The axis begins at {100 * low:g} %."
    return section("Router agreement", figure, note=note)


def nice_below(share: float) -> float:
    """A round share below ``share`` that leaves its distance from 1 to be seen: 0, 0.5, 0.8, 0.9, 0.95 …"""
    steps = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
    return max(step for step in steps if step == 0 or step < share)


_COMPARED: tuple[Compared, ...] = (
    ("KL divergence, mean", "kl_mean", "", "less"),
    ("KL divergence, 99 %", "kl_p99", "", "less"),
    ("Perplexity", "perplexity", "", "less"),
    ("ln(perplexity ratio)", "log_ratio", "", ""),
    ("Same top token", "same_top", "%", "more"),
    ("True token’s p, RMS change", "delta_p_rms", "%", "less"),
    ("Noise floor, KL mean", "floor.kl_mean", "", ""),
    ("Model", "model", "", ""),
    ("Reference", "reference", "", ""),
    ("Windows", "windows", "", ""),
    ("Tokens of a window", "window_tokens", "", ""),
    ("KV cache", "kv", "", ""),
)
_DOTS = 64  # layers that can be told apart as dots


def _numbers(found: "Evaluation") -> str:
    cells = "".join(
        f'<tr><th scope="row">{name}</th><td class="number">{value}</td><td class="number">{noise}</td></tr>'
        for name, value, noise in divergence_rows(found)
    )
    return (
        '<section><h2>The numbers</h2><table class="wraps"><thead><tr><th></th><th class="number">model</th>'
        f'<th class="number">noise floor</th></tr></thead><tbody>{cells}</tbody></table></section>'
    )


def _bars(values: Sequence[float], top: float, *, narrow: bool = False) -> str:
    return svg_plots.bars([0.0] * len(values), values, top, narrow=narrow)


def _kl_plot(name: str, values: Sequence[float], by: str, x: Sequence[Tick]) -> str:
    """A bar per value of mean KL divergence."""
    top = 1.15 * max(max(values), 1e-12)
    drawing = f'<g class="plain"><path class="solid" d="{_bars(values, top)}"/></g>'
    return svg_plots.plot(name, drawing, label=f"Mean KL divergence by {by}", x=x, y=value_ticks(top))


def _interval(edges: Sequence[str], index: int) -> str:
    if index == 0:
        return f"below {edges[1]}"
    return f"from {edges[index]}" if index == len(edges) - 1 else f"{edges[index]} to {edges[index + 1]}"


def _short(value: Any) -> str:
    return f"{value:.2g}"
