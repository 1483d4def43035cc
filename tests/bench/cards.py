"""Scout and Maverick planned for cards of 8 to 32 GB: the table of docs/planning.md. Nothing is measured.

python -m tests.bench.cards
"""

from offload.cards import CARDS, GIB, described_machine
from offload.plan import Plan, make_plan
from quant.errors import BudgetError
from quant.recipe import load_recipe, load_shape
from quant.shape import ModelShape

NAMES = ("RTX 4060", "RTX 3060 12GB", "RTX 4060 Ti 16GB", "RTX 4080", "RTX 3090", "RTX 4090", "RTX 5090")
CONTEXT = 8192


def planned(shape: ModelShape, card: str) -> Plan | str:
    """The plan of ``shape`` by recipe ``fast``, or why there is none."""
    recipe = load_recipe("fast")
    machine = described_machine(card)
    try:
        return make_plan(shape, recipe.schemes, machine, context=CONTEXT, kv_bits=8)
    except BudgetError as error:
        return str(error)


def row(model: str, card: str) -> str:
    """One line of the table."""
    sold = next(one for one in CARDS if one.name == card)
    plan = planned(ModelShape.from_config(load_shape(model)), card)
    head = f"| {model} | {card} ({sold.vram_gib} GB) |"
    if isinstance(plan, str):
        return f"{head} refused: {plan} |"
    dense = plan.total("vram") - plan.total("vram", "experts_hot") - plan.total("vram", "padding")
    shares = " / ".join(f"{100 * plan.hit_rates[tier]:.0f}" for tier in ("vram", "ram", "disk"))
    speeds = f"{plan.predicted_tokens_per_s:.1f} | {plan.predicted_prefill_tokens_per_s:.0f}"
    return f"{head} {dense / GIB:.1f} GiB | {plan.vram_slots} | {shares} % | {speeds} | {plan.limited_by} |"


def main() -> None:
    heads = "| model | card | dense part | experts in VRAM | VRAM / RAM / disk | decode | prefill |"
    print(f"{heads} decode limited by |")
    print("|---|---|---:|---:|---:|---:|---:|---|")
    for model in ("scout", "maverick"):
        for card in NAMES:
            print(row(model, card))


if __name__ == "__main__":
    main()
