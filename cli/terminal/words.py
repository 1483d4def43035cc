"""How a report's facts are said, the same on the terminal and on the page."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from offload.run.report import RunReport
from offload.tiers import Tier, role_name
from quant.model.families import Role
from quant.model.mixed_precision import MixedPrecision, scheme_of
from quant.model.shape import ModelShape
from quant.scheme import Scheme
from quant.sizes import format_size

if TYPE_CHECKING:  # it imports torch
    from offload.quality.evaluate import Evaluation

TIER_NAMES: dict[Tier, str] = {"vram": "VRAM", "ram": "RAM", "disk": "Disk"}
PLACES: dict[Tier, str] = {"vram": "in VRAM", "ram": "in RAM", "disk": "on disk"}
_KL = {"median": "kl_median", "90 %": "kl_p90", "99 %": "kl_p99", "max": "kl_max"}
size = format_size
_LIMITS = {
    "vram bandwidth": "VRAM bandwidth",
    "ram bandwidth": "RAM bandwidth",
    "disk": "disk bandwidth",
    "pcie": "PCIe bandwidth",
    "compute": "arithmetic",
}


def schemes_line(schemes: Mapping[Role, Scheme], shape: ModelShape) -> str:
    """What each role that the model has is stored as: ``routed experts int3-g128 and int2-g64, LM head int8-g128``."""
    present = {role for role, nbytes in shape.role_nbytes({}).items() if nbytes}
    used: dict[Role, dict[Scheme, None]] = {role: {scheme: None} for role, scheme in schemes.items()}
    if isinstance(schemes, MixedPrecision):
        for linear in shape.linears():
            used.setdefault(linear.role, {})[scheme_of(schemes, linear)] = None
    return ", ".join(f"{role_name(role)} {_alternatives(used[role])}" for role in schemes if role in present)


def _alternatives(schemes: Iterable[Scheme]) -> str:
    """Up to three schemes of a role, or the one that most of its weights have, which comes first."""
    first, *others = map(str, schemes)
    return " and ".join((first, *others)) if len(others) < 3 else f"mostly {first}"


def sentence(text: str) -> str:
    """``text`` with its first letter capital."""
    return text[:1].upper() + text[1:]


def number(value: float | None) -> str:
    """``value`` to three significant digits, thousands separated; a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if abs(value) < 0.1:
        return f"{value:.2g}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    places = max(3 - max(whole, 1), 0)
    return f"{value:,.{places}f}"


def how_many(count: int, what: str) -> str:
    """``1 token``, ``1,024 tokens``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def percent(part: float | None) -> str:
    """``part`` of 1 in percent; a dash for None."""
    if part is None:
        return "–"
    if 0 < part < 0.0005:
        return "< 0.1 %"
    if 0.9995 <= part < 1:
        return "> 99.9 %"
    return f"{100 * part:.1f} %" if 0 < part < 0.0095 or 0.9905 < part < 1 else f"{100 * part:.0f} %"


def deviation(part: float) -> str:
    """A signed difference in percent: ``+4 %``; from three times as much on, how many times: ``11×``."""
    if part >= 2:
        return f"{1 + part:.2g}×" if part < 9 else f"{1 + part:,.0f}×"
    return f"{100 * part:+.0f} %".replace("-", "−")


def is_far_off(predicted: float, measured: float) -> bool:
    """Whether a prediction missed by so much that a reader should not build on it."""
    return not 0.75 < measured / predicted < 1.35


def divergence_rows(found: "Evaluation") -> list[tuple[str, str, str]]:
    """An evaluation's figures: what each is called, the model's, and the noise floor's."""
    ours, floor = found.divergence, found.floor
    ratio = f"{ours.log_ratio:+.5f} ± {ours.log_ratio_error:.5f}"
    return [
        ("ln(perplexity ratio)", ratio, f"{floor['log_ratio']:+.5f}"),
        ("KL mean", f"{ours.kl_mean:.6f} ± {ours.kl_error:.6f}", f"{floor['kl_mean']:.6f}"),
        *((f"KL {name}", f"{getattr(ours, key):.6f}", f"{floor[key]:.6f}") for name, key in _KL.items()),
        ("same top token", f"{ours.same_top:.3%} ± {ours.same_top_error:.3%}", f"{floor['same_top']:.3%}"),
        ("true token’s p, mean change", f"{ours.delta_p_mean:+.4%}", f"{floor['delta_p_mean']:+.4%}"),
        ("true token’s p, RMS change", f"{ours.delta_p_rms:.4%}", f"{floor['delta_p_rms']:.4%}"),
    ]


def floor_share(report: RunReport) -> str:
    """How near decode came to its floor's speed, in percent or in words where there is no sense in percent."""
    fraction = report.decode.fraction_of_floor
    if fraction is not None and fraction > 1:
        return "exceeded"
    return percent(fraction)


def bandwidth_share(part: float) -> str:
    """How much of a bandwidth was reached: more than was measured is no share of anything."""
    return "more than was measured" if part > 1.005 else percent(part)


def limit_name(limit: str) -> str:
    """What limits a phase (Limit of the cost model), in words."""
    return _LIMITS.get(limit, limit)


def sequence_rows(report: RunReport) -> list[tuple[str, str]]:
    """How fast steps were by the number of sequences in them; nothing if each sequence had its own."""
    if all(speed.n == 1 for speed in report.sequences):
        return []
    rows = []
    for speed in report.sequences:
        said = f"{number(speed.tokens_per_s)} tokens/s, {number(speed.per_sequence_tokens_per_s)} each "
        said += f"({number(speed.ms_per_step_p50)} ms and {number(speed.experts_per_step)} experts per step)"
        if speed.fraction_of_floor is not None and speed.floor_limited_by:
            said += f"; {percent(speed.fraction_of_floor)} of the floor by {limit_name(speed.floor_limited_by)}"
            if speed.products_ms_per_step is not None:
                said += f" (reading {number(speed.read_ms_per_step or 0)} ms at {number(speed.ram_gb_s or 0)} GB/s, "
                said += f"products {number(speed.products_ms_per_step)} ms)"
        rows.append((f"{speed.n} sequence{'s' * (speed.n > 1)}", said))
    return rows


def verdict(report: RunReport) -> str:
    """The sentence a reader takes away: how fast, what limits it, how far from there."""
    speed = report.decode.tokens_per_s
    if speed is None:
        return "Only the prompt was run: there is no decode speed to report."
    said = f"Decode runs at {number(speed)} tokens/s"
    fraction, limit = report.decode.fraction_of_floor, limit_name(report.limited_by)
    if fraction is not None and fraction > 1:
        said += f", faster than the {limit} that was measured allows: that measurement is unreliable"
    elif fraction is not None:
        said += f", {percent(fraction)} of what the {limit} of this machine allows"
    elif limit:
        said += f"; {limit} limits it"
    misses = report.decode_experts.misses
    if misses:
        part = misses / (misses + report.decode_experts.hits)
        said += f"; {percent(part)} of its expert requests had to read the disk"
    return said + "."
