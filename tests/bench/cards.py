"""Scout and Maverick on cards of 8 to 32 GB, replayed: the tables of docs/planning.md. Nothing is measured.

    python -m tests.bench.cards                       uniform routing
    python -m tests.bench.cards --trace routing.json  and Scout with routing like that of the demo model
    python -m tests.bench.cards --trace routing.json --assumptions   what each assumption is worth on a 4090
    python -m tests.bench.cards --trace routing.json --swaps         VRAM hits by how swaps are chosen

The trace is that of `coldstream profile` on the demo model with ``--trace`` (docs/policy.md).
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from offload.hardware.gpu_catalog import CARDS, GIB, described_machine
from offload.hardware.probe import Machine
from offload.plan.plan import Plan
from offload.plan.planner import make_plan
from offload.routing.eviction import make_policy
from offload.routing.trace import Synthetic, Trace, load_trace
from offload.simulator.requests import Tiers, replayed, shares, stretched
from offload.simulator.simulation import Simulation
from offload.tiers import Key
from quant.errors import BudgetError
from quant.model.families import Role
from quant.model.known_shapes import load_shape
from quant.model.recipe import load_recipe
from quant.model.shape import ModelShape
from quant.scheme import Scheme

NAMES = ("RTX 4060", "RTX 3060 12GB", "RTX 4060 Ti 16GB", "RTX 4080", "RTX 3090", "RTX 4090", "RTX 5090")
CONTEXT, PROMPT, TOKENS = 8192, 2048, 256


@dataclass(frozen=True)
class Known:
    """Routing to replay, and the counts that a profile of what came before it holds."""

    trace: Trace | None = None
    counts: Mapping[Key, float] | None = None

    @classmethod
    def of(cls, whole: Trace) -> "Known":
        """The second half, with the first as the profile."""
        learned, judged = whole.halves()
        return cls(judged, {key: float(count) for key, count in learned.counts().items()})


def planned(
    shape: ModelShape,
    machine: Machine,
    schemes: Mapping[Role, Scheme],
    *,
    kv_bits: int = 8,
    context: int = CONTEXT,
    vram: int | None = None,
) -> Plan | str:
    """The plan, or why there is none."""
    try:
        return make_plan(
            shape, schemes, machine, context=context, kv_bits=kv_bits, vram=vram, filled=min(PROMPT, context)
        )
    except BudgetError as error:
        return str(error)


def row(model: str, card: str, known: Known) -> str:
    """One line of the table of cards."""
    sold = next(one for one in CARDS if one.name == card)
    shape, machine = ModelShape.from_config(load_shape(model)), described_machine(card)
    schemes = load_recipe("fast").schemes
    plan = planned(shape, machine, schemes)
    head = f"| {model} | {card} ({sold.vram_gib} GB) |"
    if isinstance(plan, str):
        return f"{head} refused: {plan} |"
    setup = Simulation.of(shape, schemes, plan, machine, swaps=1)
    dense = plan.total("vram") - plan.total("vram", "experts_hot") - plan.total("vram", "padding")
    shares = " / ".join(f"{100 * plan.hit_rates[tier]:.0f}" for tier in ("vram", "ram", "disk"))
    uniform, prompt = setup.decode(TOKENS), setup.prefill(PROMPT)
    routed = "–"
    if known.trace is not None and shape.num_experts == known.trace.num_experts:
        replay = setup.decode(TOKENS, trace=known.trace, counts=known.counts)
        routed = f"{replay.tokens_per_s:.1f} ({100 * replay.hit_rates['vram']:.0f} %)"
    return (
        f"{head} {dense / GIB:.1f} GiB | {plan.vram_slots - plan.vram_reserve} | {shares} % | "
        f"{plan.predicted_tokens_per_s:.1f} | {uniform.tokens_per_s:.1f} | {routed} | "
        f"{prompt.tokens_per_s:,.0f} | {uniform.limited_by} / {prompt.limited_by} |"
    )


def assumption(
    name: str,
    machine: Machine,
    known: Known,
    *,
    recipe: str = "scout-rtx4090",
    kv_bits: int = 8,
    vram: float = 22.5,
    swaps: int = 0,
    part: float | None = None,
) -> str:
    """One line of the table of what an assumption is worth: Scout on a 4090, 16,384 tokens of context."""
    shape = ModelShape.from_config(load_shape("scout"))
    chosen: dict[Role, Scheme] = dict(load_recipe(recipe).schemes)
    plan = planned(shape, machine, chosen, kv_bits=kv_bits, context=16384, vram=int(vram * GIB))
    assert isinstance(plan, Plan), plan
    setup = Simulation.of(shape, chosen, plan, machine, swaps=swaps, gpu_part=part)
    replay = setup.decode(TOKENS, trace=known.trace, counts=known.counts)
    ms = 1e3 / replay.tokens_per_s
    return (
        f"| {name} | {plan.vram_slots - plan.vram_reserve} | {100 * replay.hit_rates['vram']:.0f} % | "
        f"{replay.swaps_per_token:.1f} | {setup.part:.2f} | {ms:.1f} | {replay.tokens_per_s:.1f} |"
    )


def assumptions(recorded: Trace) -> list[str]:
    """The table of assumptions, one after another; those after the first recipe lines build on it alone."""
    card = described_machine("RTX 4090")
    uniform, demo = Known(), Known.of(stretched(recorded, 48, len(recorded.steps)))
    unseeded = replace(demo, counts=None)
    zipf = Known.of(Synthetic("zipf", layers=48, tokens=2 * (TOKENS + 64)).trace())
    faster = replace(card, ram_gb_s=80.0)
    assert card.gpu is not None
    together = replace(card, gpu=replace(card.gpu, together_gb_s=80.0))
    return [
        assumption("recipe with a bf16 KV cache, uniform routing", card, uniform, kv_bits=16),
        assumption("**recipe `scout-rtx4090`** (KV int8), uniform routing", card, uniform),
        assumption("… routing like the demo model's, its profile's hottest in VRAM", card, demo),
        assumption("… and one swap per token at most", card, demo, swaps=1),
        assumption("… swaps without a profile", card, unseeded, swaps=1),
        assumption("… a skew like Zipf's (1/r), profile and swaps", card, zipf, swaps=1),
        assumption("recipe `fast` (attention int4), uniform", card, uniform, recipe="fast"),
        assumption("… demo model's routing, profile and swaps", card, demo, recipe="fast", swaps=1),
        assumption("… and `--vram 23.4GiB`, no screen", card, demo, recipe="fast", swaps=1, vram=23.4),
        assumption("recipe, uniform, nothing read ahead", replace(card, cache_bytes=0), uniform),
        assumption("… demo model's routing, profile and swaps", replace(card, cache_bytes=0), demo, swaps=1),
        assumption("recipe, CPU reads 80 GB/s (DDR5-6400), uniform", faster, uniform),
        assumption("… demo model's routing, profile and swaps", faster, demo, swaps=1),
        assumption("… and recipe `fast`, 23.4 GiB", faster, demo, recipe="fast", swaps=1, vram=23.4),
        assumption("recipe, memory gives 80 to CPU and bus together, uniform", together, uniform),
        assumption("recipe, uniform, a fifth of each miss over PCIe all the same", card, uniform, part=0.2),
        assumption("recipe, uniform, half of each miss", card, uniform, part=0.5),
        assumption("recipe, uniform, all of each miss (no CPU)", card, uniform, part=1.0),
    ]


def swaps(recorded: Trace, slots: int = 250) -> list[str]:
    """VRAM hits (and swaps per token) of Scout with ``slots`` of 768 experts in VRAM, over 600 tokens."""
    zipf = Synthetic("zipf", layers=48, tokens=1200).trace()
    kinds = {"demo model": Known.of(stretched(recorded, 48, len(recorded.steps))), "zipf": Known.of(zipf)}
    rows = []
    for half_life, margin, most in (
        (64, 1.5, 0),
        (16, 1.5, 1),
        (64, 1.0, 1),
        (64, 1.5, 1),
        (64, 2.0, 1),
        (64, 1.5, 4),
        (256, 1.5, 1),
    ):
        cells = []
        for known in kinds.values():
            assert known.trace is not None
            tiers = Tiers(
                known.trace,
                slots,
                768 - slots,
                lambda: make_policy("lru"),
                counts=known.counts,
                swaps=most,
                half_life=half_life,
                margin=margin,
            )
            steps = replayed(tiers, 600)
            swapped = sum(step.swaps for step in steps) / len(steps)
            cells.append(f"{100 * shares(steps)['vram']:.0f} % ({swapped:.1f})")
        rows.append(f"| {half_life} | {margin} | {most} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--assumptions", action="store_true")
    parser.add_argument("--swaps", action="store_true")
    arguments = parser.parse_args()
    recorded = load_trace(arguments.trace) if arguments.trace else None
    if (arguments.assumptions or arguments.swaps) and recorded is None:
        parser.error("this replays a recorded trace: give one with --trace")
    if arguments.swaps and recorded is not None:
        print("| half-life, tokens | margin | swaps per token, at most | demo model: hits (swaps) | zipf |")
        print("|---:|---:|---:|---:|---:|")
        print("\n".join(swaps(recorded)))
        return
    if arguments.assumptions and recorded is not None:
        print("| Scout on an RTX 4090 | experts in VRAM | VRAM hits | swaps | GPU part | ms | tok/s |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        print("\n".join(assumptions(recorded)))
        return
    heads = "| model | card | dense part | experts in VRAM | VRAM / RAM / disk | planned | replayed |"
    print(f"{heads} like the demo model (VRAM hits) | prefill | limited by |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---|")
    known = Known() if recorded is None else Known.of(stretched(recorded, 48, len(recorded.steps)))
    for model in ("scout", "maverick"):
        for card in NAMES:
            print(row(model, card, known), flush=True)


if __name__ == "__main__":
    main()
