"""A planned run: what a model is stored as, the options under a recipe's defaults, the machine, and the plan.

Every command and Session decide a run here, so that what is planned, simulated, fitted and run is one thing.
Needs no torch, and of a model only its config.json, and its files' headers where it has any.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offload.hardware.gpu_catalog import described_machine
from offload.hardware.probe import Machine, Say, probe
from offload.plan.cost_model import with_prefetch_bytes
from offload.plan.kv_room import KvRoom
from offload.plan.placement import PlanRow
from offload.plan.plan import Plan
from offload.plan.planner import make_plan
from offload.records import RunOptions
from quant.architecture.shape import shape_of
from quant.checkpoint.config_groups import check_groups, in_fitting_groups
from quant.checkpoint.headers import CheckpointHeaders
from quant.checkpoint.inventory import open_headers, schemes_of_tensors, wider_bytes
from quant.checkpoint.stored import stored_schemes
from quant.errors import BudgetError, CheckpointError, UsageError
from quant.model.config import quantization_of
from quant.model.families import Role
from quant.model.hub import resolve_config
from quant.model.known_shapes import shape_names
from quant.model.recipe import Recipe, load_recipe, recipe_names
from quant.model.shape import ModelShape
from quant.scheme import Scheme
from quant.sizes import format_size

if TYPE_CHECKING:  # imports numpy, which a plan without a profile does without
    from offload.routing.stats import RoutingStats

_DEFAULT_RECIPE = "fast"
_AS_STORED = "as stored"


@dataclass(frozen=True)
class PlannedModel:
    """A model and what its weights are stored as, or will be. ``origin`` says in words how that is known;
    ``recipe`` is the one whose defaults hold for a run of it, if any; ``wider`` what weights that are kept in f32 take
    beyond two bytes each, by role, and ``source_nbytes`` what the tensors of a source take on disk, where they are
    there to tell."""

    shape: ModelShape
    schemes: Mapping[Role, Scheme]
    origin: str
    recipe: Recipe | None = None
    wider: Mapping[Role, int] = field(default_factory=dict)
    source_nbytes: int | None = None

    @property
    def is_stored(self) -> bool:
        """Whether its files are there as they are planned."""
        return self.origin.startswith(_AS_STORED)

    @property
    def file_nbytes(self) -> int:
        """Bytes of its tensors on disk."""
        return sum(self.shape.role_nbytes(self.schemes).values()) + sum(self.wider.values())


@dataclass(frozen=True)
class PlannedRun:
    """A run that is decided: ``options`` as asked, with the recipe's defaults where nothing was asked;
    ``routing`` the profile that the options name, ``draft`` the run of the draft model, whose bytes are in the plan."""

    model: PlannedModel
    options: RunOptions
    machine: Machine
    plan: Plan
    routing: "RoutingStats | None" = None
    draft: "PlannedRun | None" = None


def planned_model(
    model: str | Path, recipe: str | None = None, schemes: Mapping[Role, Scheme] | None = None
) -> PlannedModel:
    """``model`` (a directory, a config.json, a shape's name or a Hub id) as it is stored; or in ``schemes`` over those
    of ``recipe``, as ``quantize`` would make it; or for a bare config by the recipe of its name, else ``fast``.

    A quantized model that runs stays as it is under a recipe, which gives a run its defaults, as in every command.
    Of a directory with weights the headers are read, and what a run (of a source: a conversion) would refuse is
    refused. Of a Hub id only the config is fetched. Raises CheckpointError, UsageError, RecipeError, and
    SchemeError for groups that do not divide what they are asked for.
    """
    name = str(model)
    config = resolve_config(name)
    shape = shape_of(config)
    named = load_recipe(recipe) if recipe else None
    has_files = next(Path(name).glob("*.safetensors*"), None) is not None  # what is there counts, as in a run
    if schemes or (named is not None and not _runs_quantized(config, shape)):
        origin = f"recipe {named.name}" if named else "by hand"
        over = named.schemes_of(shape, schemes) if named else dict(schemes or {})
        check_groups(shape, over)
        if not has_files:
            return PlannedModel(shape, over, origin, named)
        source = _source(Path(name), config)
        nbytes = sum(entry.file_nbytes for entry in source.entries.values())
        return PlannedModel(shape, over, origin, named, wider_bytes(source, over), nbytes)
    stored = stored_schemes(config, shape)
    if has_files:
        headers = open_headers(Path(name))
        wider = wider_bytes(headers)
        if stored is not None:
            return PlannedModel(shape, schemes_of_tensors(headers), _under(named), named, wider)
        return PlannedModel(shape, {}, f"{_AS_STORED}; --recipe plans it quantized", wider=wider)
    if stored is not None:
        return PlannedModel(shape, stored, _under(named), named)
    default = load_recipe(name if name in shape_names() and name in recipe_names() else _DEFAULT_RECIPE)
    fitting = in_fitting_groups(shape, default.schemes)  # nobody asked for its groups
    origin = f"recipe {default.name}" + (", in smaller groups" if fitting != default.schemes else "")
    return PlannedModel(shape, fitting, origin, default)


def _under(recipe: Recipe | None) -> str:
    return f"{_AS_STORED}; recipe {recipe.name} for a run's defaults" if recipe else _AS_STORED


def _runs_quantized(config: Mapping[str, Any], shape: ModelShape) -> bool:
    """Whether ``config`` is of a quantized model that can be run, and need not be converted before."""
    try:
        return stored_schemes(config, shape) is not None
    except CheckpointError:
        return False


def _source(path: Path, config: Mapping[str, Any]) -> CheckpointHeaders:
    """The checkpoint in ``path`` as a conversion reads it."""
    if quantization_of(config) is None:
        return open_headers(path)
    from quant.sources.open import open_source  # imports torch, which a plan of anything else does without

    return open_source(path)


def planned_machine(
    model: str | Path,
    gpu: str | None = None,
    *,
    ram: int | None = None,
    ram_gb_s: float | None = None,
    disk_gb_s: float | None = None,
    refresh: bool = False,
    say: Say | None = None,
) -> Machine:
    """This machine, with the disk that ``model`` lies on, or a desktop around the card called ``gpu`` with at
    least ``ram`` bytes free. Rates that are given (GB/s) hold. Raises UsageError for an unknown card."""
    if gpu is not None:
        return described_machine(gpu, ram=ram, ram_gb_s=ram_gb_s, disk_gb_s=disk_gb_s)
    machine = probe(Path(model), refresh=refresh, say=say)
    return replace(machine, ram_gb_s=ram_gb_s or machine.ram_gb_s, disk_gb_s=disk_gb_s or machine.disk_gb_s)


def planned_run(
    model: str | Path | PlannedModel,
    options: RunOptions | None = None,
    *,
    recipe: str | None = None,
    machine: Machine | str | None = None,
    slot_bytes: int | None = None,
    prompt: int | None = None,
    curve: bool = False,
) -> PlannedRun:
    """Decide a run of ``model`` (as planned_model takes it, in the schemes of ``recipe``; or what that
    returned) on ``machine``: a desktop with the card of that name, or by default this one.

    The run is to have room for ``prompt`` tokens, and speeds are predicted for as many (None: 512).
    ``slot_bytes`` is what an expert takes in memory, where that is known from its tensors; ``curve`` compares other
    contexts. Raises BudgetError,
    with the nearest thing that fits, for what does not fit, ProfileError for a routing profile that is none
    or of another shape, and what planned_model raises.
    """
    subject = model if isinstance(model, PlannedModel) else planned_model(model, recipe)
    asked, shape = options or RunOptions(), subject.shape
    if not shape.keeps_pages and asked.kv is None and subject.recipe is not None:
        asked = replace(asked, kv="bf16")  # a recipe's int8 is a wish, and this family's own attention has none
    options = asked.over(subject.recipe)
    if not shape.keeps_pages and options.kv == "int8":
        raise UsageError(
            "--kv int8 is for families whose attention keeps keys and values of every token and nothing else: a "
            f"{shape.family.name} model's keeps something else, in the dtype of the activations; leave it out"
        )
    routing = None
    if options.routing is not None:
        from offload.routing.stats import RoutingStats

        routing = RoutingStats.load(options.routing, shape)
    if not isinstance(machine, Machine):
        machine = planned_machine("" if isinstance(model, PlannedModel) else model, machine, ram=options.ram)
    if options.kv_disk is not None:
        _check_kv_disk(options, shape, machine)
    if options.kv_epsilon:
        _check_kv_epsilon(options, shape, machine)
    if options.prefetch_bytes is not None:
        machine = with_prefetch_bytes(machine, options.prefetch_bytes)
    made = partial(
        make_plan,
        shape,
        subject.schemes,
        vram=0 if options.device == "cpu" else options.vram,
        context=options.context or (prompt if prompt and prompt > shape.context() else None),
        kv_bits=_kv_bits(options, shape, machine),
        routing=routing,
        prompt_chunk=options.prompt_chunk,
        slot_bytes=slot_bytes,
        filled=prompt or 512,
        images=options.images and shape.reads_images,
        wider=subject.wider,
        sequences=options.sequences if _on_cpu(options, machine) and shape.keeps_pages and not options.kv_disk else 1,
        curve=curve,
        cold="split" if options.graph else "pcie",  # without the graph, what is missed is copied first
        kv_room=None if options.kv_disk is None else KvRoom(options.kv_ram),
        kv_bounds=options.kv_epsilon > 0,
    )
    plan, draft = made(machine, ram=options.ram), None
    if options.draft_model is not None:
        draft = _draft_run(options.draft_model, options, machine, plan)
        plan = _beside(draft.plan, made, machine, options.ram)
    if idle := _idle(options, machine):
        plan = replace(
            plan, notes=(*plan.notes, f"the run is on the CPU, where this changes nothing: {', '.join(idle)}")
        )
    return PlannedRun(subject, options, machine, plan, routing, draft)


def _draft_run(model: Path, options: RunOptions, machine: Machine, plan: Plan) -> PlannedRun:
    """The run of the draft ``model`` beside ``plan``: on the CPU, all of it in RAM."""
    subject = planned_model(model)
    limit = subject.shape.max_position_embeddings or plan.context
    asked = RunOptions(
        context=min(plan.context, limit),
        kv=options.kv if subject.shape.is_native else None,
        device="cpu",
        exact=options.exact,
        page_cache=options.page_cache,
        threads=options.threads,
        sequences=plan.kv_sequences,
    )
    found = planned_run(subject, asked, machine=replace(machine, gpu=None))
    if found.plan.ram_slots < found.plan.experts:
        raise BudgetError(
            f"the draft model {model} does not fit into {format_size(found.plan.ram)} of RAM: drafts pay only if "
            "all of it is there; leave out --draft-model, or take a smaller one"
        )
    return found


def _beside(draft: Plan, made: Callable[..., Plan], machine: Machine, ram: int | None) -> Plan:
    """The plan of what is left of ``ram`` beside a ``draft`` model, whose bytes are in it."""
    size = draft.total("ram") - draft.framework_bytes
    less = replace(machine, ram_available_bytes=max(0, machine.ram_available_bytes - size))
    try:
        plan = made(less, ram=None if ram is None else max(0, ram - size))
    except BudgetError as error:
        raise BudgetError(f"beside a draft model of {format_size(size)}: {error}") from None
    return replace(plan, ram=plan.ram + size, rows=(*plan.rows, PlanRow("draft_model", "ram", size)))


def _kv_bits(options: RunOptions, shape: ModelShape, machine: Machine) -> int:
    if options.exact or (
        _on_cpu(options, machine) and not shape.keeps_pages
    ):  # transformers' caches are of the activations' dtype
        return 32
    return 8 if options.kv == "int8" else 16


def _idle(options: RunOptions, machine: Machine) -> list[str]:
    """What was asked, here or by a recipe, that only a GPU could do; the plan itself says it of a machine without."""
    if not _on_cpu(options, machine):
        return []
    asked = {
        "a budget for VRAM": options.device == "cpu" and bool(options.vram),
        "--no-graph": not options.graph,
        "--warm": bool(options.prefetch_bytes),
        "--regain": options.regain,
    }
    return [name for name, given in asked.items() if given]


def _check_kv_disk(options: RunOptions, shape: ModelShape, machine: Machine) -> None:
    """Raise UsageError where no part of the KV cache can be on disk."""
    if not _on_cpu(options, machine):
        raise UsageError("--kv-disk is for runs on the CPU: beside a GPU the KV cache is in VRAM; add --vram 0")
    if not shape.layers_on_cpu:
        raise UsageError(
            f"--kv-disk is for families whose layers the native kernels compute: those of a {shape.family.name} model "
            "run in transformers' modules; leave it out"
        )


def _check_kv_epsilon(options: RunOptions, shape: ModelShape, machine: Machine) -> None:
    """Raise UsageError where no part of the KV cache can be left out."""
    name = shape.family.name
    if not _on_cpu(options, machine):
        raise UsageError("--kv-epsilon is for runs on the CPU: beside a GPU all of the KV cache is read; add --vram 0")
    if not shape.layers_on_cpu or shape.latent:
        why = "run in transformers' modules" if not shape.layers_on_cpu else "keep keys and values compressed"
        raise UsageError(f"--kv-epsilon is for layers with keys that can be bounded: those of a {name} model {why}")


def _on_cpu(options: RunOptions, machine: Machine) -> bool:
    return machine.gpu is None or options.device == "cpu" or options.vram == 0
