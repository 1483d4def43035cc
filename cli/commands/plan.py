"""``coldstream plan``: where every byte goes, how fast it runs, what limits it. Needs neither weights nor
torch."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import common as options
from cli.options.schemes import Attention, DenseMlp, Experts, GroupSize, LmHead, SharedExpert, schemes_by_hand
from cli.terminal.console import Console

if TYPE_CHECKING:
    from offload.hardware.probe import Machine
    from offload.plan.plan import Plan
    from quant.model.families import Role
    from quant.model.recipe import Recipe
    from quant.model.shape import ModelShape
    from quant.scheme import Scheme

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model directory, a Hub id, a config.json or a shape: scout …")
]
Gpu = Annotated[
    str | None, typer.Option(metavar="NAME", help='Plan for a desktop with this card, for example "RTX 4090".')
]
RamBandwidth = Annotated[
    float | None, typer.Option(metavar="GB/S", min=0.1, help="Take this for the RAM's read bandwidth.")
]
DiskBandwidth = Annotated[
    float | None, typer.Option(metavar="GB/S", min=0.01, help="Take this for the disk's sequential rate.")
]
Calibrate = Annotated[
    Path | None,
    typer.Option("--calibrate", metavar="FILE", help="Say what `quantize --calibrate FILE` takes of memory."),
]
Refresh = Annotated[bool, typer.Option("--refresh", help="Measure this machine again first.")]
_DEFAULT_RECIPE = "fast"
_REPLAYED = 32  # tokens
_BYTES_PER_TOKEN = 4


def plan(
    model: Model,
    vram: options.Vram = None,
    ram: options.Ram = None,
    context: options.Context = None,
    kv: options.Kv = None,
    gpu: Gpu = None,
    ram_bandwidth: RamBandwidth = None,
    disk_bandwidth: DiskBandwidth = None,
    recipe: options.Recipe = None,
    experts: Experts = None,
    shared_expert: SharedExpert = None,
    dense_mlp: DenseMlp = None,
    attention: Attention = None,
    lm_head: LmHead = None,
    group_size: GroupSize = None,
    routing: options.Routing = None,
    prompt_chunk: options.PromptChunk = None,
    calibrate: Calibrate = None,
    refresh: Refresh = False,
    json: options.Json = False,
) -> None:
    """Say where every byte of a run of MODEL goes, what speed to expect, what limits it, and what a GiB
    more buys.

    A quantized MODEL is planned as it is. Otherwise --recipe or schemes by hand say what it will be
    stored as; a shape without either takes the recipe of its name, or `fast`.
    """
    from cli.terminal.words import number
    from offload.plan.plan import make_plan
    from offload.simulator.simulation import Setup
    from quant.model.hub import fetch_config, is_hub_id
    from quant.model.recipe import load_recipe, resolve_config
    from quant.model.shape import ModelShape

    console = Console(json=json)
    config = resolve_config(str(fetch_config(model)) if is_hub_id(model) else model)
    shape = ModelShape.from_config(config)
    by_hand: dict[Role, str | None] = {
        "experts": experts,
        "shared_expert": shared_expert,
        "dense_mlp": dense_mlp,
        "attention": attention,
        "lm_head": lm_head,
    }
    named = load_recipe(recipe) if recipe else None
    schemes, defaults, origin = planned_schemes(model, config, shape, named, by_hand, group_size)
    if defaults is not None:
        vram, ram = vram if vram is not None else defaults.vram, ram if ram is not None else defaults.ram
        context, kv = context or defaults.context, kv or defaults.kv
        prompt_chunk = prompt_chunk or defaults.prompt_chunk
    machine = planned_machine(model, gpu, ram, ram_bandwidth, disk_bandwidth, refresh, console.step)
    made = make_plan(
        shape,
        schemes,
        machine,
        vram=vram,
        ram=ram,
        context=shape.context(context),
        kv_bits=8 if kv == "int8" else 16,
        routing=_routing(routing, shape),
        prompt_chunk=prompt_chunk,
    )
    replay = Setup.of(shape, schemes, made, machine)
    decode, prefill = replay.decode(_REPLAYED), replay.prefill()
    notes = (*machine.notes, *made.notes)
    calibration = _calibration(model, calibrate, shape) if calibrate is not None else None
    if not json:
        _show(console, made, machine, f"{model}: {_weights(shape)}", f"{_described(schemes)} ({origin})")
        console.say(
            f"replayed  {number(decode.tokens_per_s)} tokens/s, prefill {number(prefill.tokens_per_s)}: "
            "the same run event by event (coldstream simulate)"
        )
        if calibration is not None:
            _show_calibration(console, calibration)
        console.notes(notes)
    console.result(
        {
            **made.to_json(),
            "replayed": {"decode": decode.to_json(), "prefill": prefill.to_json()},
            "model": model,
            "schemes": {role: str(scheme) for role, scheme in schemes.items()},
            "machine": machine.to_json(),
            "notes": notes,
            **({"calibration": calibration} if calibration else {}),
        }
    )


def _calibration(model: str, text: Path, shape: "ModelShape") -> dict[str, Any]:
    """Tokens of the text, and the bytes that calibrating on it takes. Without the model's tokenizer a token
    is taken for four bytes. Raises InputError for a text too short to calibrate on, as quantize does."""
    from cli.options.texts import read_text
    from offload.plan.footprint import CALIBRATION_WINDOW, calibration_nbytes, check_calibration

    words, counted = read_text(text), (Path(model) / "tokenizer.json").is_file()
    if counted:
        from tokenizers import Tokenizer

        tokenizer: Any = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
        tokens = len(tokenizer.encode(words, add_special_tokens=False).ids)
    else:
        tokens = len(words.encode()) // _BYTES_PER_TOKEN
    check_calibration(shape, tokens // CALIBRATION_WINDOW * CALIBRATION_WINDOW, counted=counted)
    parts = calibration_nbytes(shape, tokens)
    tuning = calibration_nbytes(shape, tokens, tuned=True)["tuning"]
    return {
        "tokens": tokens,
        "tokens_counted": counted,
        "bytes": parts,
        "total_bytes": sum(parts.values()),
        "tuning_bytes": tuning,
    }


def _show_calibration(console: Console, found: Mapping[str, Any]) -> None:
    from cli.terminal.words import size

    parts = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in found["bytes"].items())
    about = "" if found["tokens_counted"] else "about "
    console.say(
        f"calibrate {size(found['total_bytes'])} of RAM for {about}{found['tokens']:,} tokens: {parts}; "
        f"{size(found['tuning_bytes'])} more with --tune"
    )


def planned_schemes(
    model: str,
    config: Mapping[str, Any],
    shape: "ModelShape",
    named: "Recipe | None",
    by_hand: "Mapping[Role, str | None]",
    group_size: int | None,
) -> "tuple[Mapping[Role, Scheme], Recipe | None, str]":
    """Each role's scheme, the recipe whose defaults hold for the run, and where the schemes are from."""
    from quant.checkpoint.stored import stored_schemes
    from quant.model.recipe import load_recipe, recipe_names, shape_names

    chosen = schemes_by_hand(by_hand, group_size)
    if named is not None or chosen:
        origin = f"recipe {named.name}" if named else "by hand"
        return {**(named.schemes if named else {}), **chosen}, named, origin
    stored = stored_schemes(config, shape)
    if stored is not None:
        return stored, None, "as stored"
    if next(Path(model).glob("*.safetensors"), None) is not None:
        return {}, None, "as stored; --recipe plans it quantized"
    name = model if model in shape_names() and model in recipe_names() else _DEFAULT_RECIPE
    recipe = load_recipe(name)
    return recipe.schemes, recipe, f"recipe {name}"


def planned_machine(
    model: str,
    gpu: str | None,
    ram: int | None,
    ram_gb_s: float | None,
    disk_gb_s: float | None,
    refresh: bool = False,
    say: Callable[[str], None] | None = None,
) -> "Machine":
    """The desktop around the card ``gpu``, or the machine at hand; rates that are given hold."""
    from dataclasses import replace

    from offload.hardware.gpu_catalog import described_machine
    from offload.hardware.probe import probe

    if gpu is not None:
        return described_machine(gpu, ram=ram, ram_gb_s=ram_gb_s, disk_gb_s=disk_gb_s)
    path = Path(model)
    machine = probe(path if path.is_dir() else Path(), refresh=refresh, say=say)
    return replace(machine, ram_gb_s=ram_gb_s or machine.ram_gb_s, disk_gb_s=disk_gb_s or machine.disk_gb_s)


def _routing(path: Path | None, shape: "ModelShape") -> Any:
    if path is None:
        return None
    from offload.routing.stats import RoutingStats

    return RoutingStats.load(path, shape)


def _weights(shape: "ModelShape") -> str:
    roles = shape.role_nbytes({})
    total, routed = sum(roles.values()) / 2, roles["experts"] / 2
    active = total - routed * (1 - shape.top_k / shape.num_experts) - roles.get("vision", 0) / 2
    layers = f"{len(shape.moe_layers)} MoE layers of {shape.num_experts} experts, top-{shape.top_k}"
    return f"{_billions(total)} weights, {_billions(active)} per token; {layers}"


def _billions(count: float) -> str:
    return f"{count / 1e9:,.0f}B" if count >= 1e10 else f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


def _described(schemes: "Mapping[Role, Scheme]") -> str:
    from cli.terminal.words import schemes_line

    return schemes_line(schemes) or "bf16 throughout"


def _show(console: Console, plan: "Plan", machine: "Machine", model: str, schemes: str) -> None:
    from cli.terminal.plan_table import advice, byte_table, machine_line, speeds

    console.say(model)
    console.say(schemes)
    console.say(machine_line(machine))
    console.say()
    console.show(byte_table(plan))
    console.say()
    for line in (*speeds(plan), *advice(plan)):
        console.say(line)
