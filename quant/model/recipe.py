"""Recipes: what each role of a model is stored as, and with what budgets it is run. TOML, by name or by file.

description = "…"            one line, shown by the commands
[weights]                    a role that is not named stays bf16
group_size = 128
experts = "int4"             or "int4-g32", "int8", "int3", "int2", "nf4", "bf16"; or a list of such, which the
                             layers with experts take in turn: ["int3", "int2"] is int2 in every second
shared_expert = "int4"
dense_mlp = "int4"
attention = "bf16"
lm_head = "int8"
vision = "bf16"              or "int8": the tower that looks at images
[run]                        defaults; the command line wins
vram = "24GiB"
ram = "64GiB"
context = 32768
kv = "bf16"                  or "int8"
prompt_chunk = 2048
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal, cast

from quant.errors import RecipeError, SchemeError, UsageError
from quant.input_file import read_bytes, short
from quant.model.families import QUANTIZABLE, Role
from quant.model.mixed_precision import joined
from quant.model.shape import ModelShape
from quant.scheme import Scheme
from quant.sizes import parse_size

_TOP = ("description", "weights", "run")
_MOST_BYTES = 2**20
_MOST = 2**40  # of a count
_MOST_TURNS = 1024
RUN_DEFAULTS = ("vram", "ram", "context", "kv", "prompt_chunk")


@dataclass(frozen=True)
class Recipe:
    """One recipe. ``vram`` and ``ram`` are bytes; None means that the recipe does not say. ``schemes`` are by role;
    where ``turns`` are given, layers with experts take those in turn, and ``schemes`` has the commonest."""

    name: str
    description: str = ""
    schemes: Mapping[Role, Scheme] = field(default_factory=dict)
    turns: tuple[Scheme, ...] = ()
    vram: int | None = None
    ram: int | None = None
    context: int | None = None
    kv: Literal["bf16", "int8"] | None = None
    prompt_chunk: int | None = None

    def schemes_of(self, shape: ModelShape, by_hand: Mapping[Role, Scheme] | None = None) -> Mapping[Role, Scheme]:
        """The schemes of a model of ``shape``, those named ``by_hand`` in place of the recipe's: by role, or as a
        MixedPrecision where layers take turns."""
        schemes = {**self.schemes, **(by_hand or {})}
        if not self.turns or "experts" in (by_hand or {}):
            return schemes
        turns = {layer: self.turns[i % len(self.turns)] for i, layer in enumerate(shape.moe_layers)}
        beside = (*shape.dense_linears(), *shape.vision_linears())
        kept = ((linear, schemes[linear.role]) for linear in beside if linear.role in schemes)
        routed = (
            (linear, turns[layer])
            for layer in shape.moe_layers
            for expert in range(shape.num_experts)
            for linear in shape.expert_linears(layer, expert)
        )
        return joined((*kept, *routed))


def recipe_names() -> list[str]:
    """The recipes that come with Coldstream."""
    return sorted(item.name[:-5] for item in files("recipes").iterdir() if item.name.endswith(".toml"))


def load_recipe(name: str) -> Recipe:
    """The recipe called ``name``, or that of the file at path ``name``.

    Raises UsageError if no recipe is called that, RecipeError for what is in a file.
    """
    source: Path | Traversable = Path(name)
    if not name.endswith(".toml"):
        if name not in recipe_names():
            raise UsageError(f"no recipe is called {name!r}: expected {', '.join(recipe_names())}, or a .toml file")
        source = files("recipes").joinpath(f"{name}.toml")
    try:
        content = read_bytes(source, RecipeError, _MOST_BYTES) if isinstance(source, Path) else source.read_bytes()
        data = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {name} is no valid TOML: {error}") from None
    except RecursionError:
        raise RecipeError(f"recipe {name} has lists in lists without end: expected tables of plain values") from None
    return parse_recipe(Path(name).stem, data)


def parse_recipe(name: str, data: Mapping[str, Any]) -> Recipe:
    """A recipe from its TOML data. Raises RecipeError for an unknown key or a bad value."""
    _known(name, "", data, _TOP)
    weights, run = _table(name, data, "weights"), _table(name, data, "run")
    _known(name, "weights.", weights, ("group_size", *QUANTIZABLE))
    _known(name, "run.", run, RUN_DEFAULTS)
    group_size = weights.get("group_size", 128)
    if type(group_size) is not int or not 1 <= group_size <= _MOST:
        raise RecipeError(f"recipe {name}: weights.group_size is {short(group_size)}: expected a whole number")
    schemes: dict[Role, Scheme] = {}
    turns: tuple[Scheme, ...] = ()
    for role in QUANTIZABLE:
        if role in weights:
            said = weights[role]
            if role == "experts" and isinstance(said, list) and 1 <= len(said) <= _MOST_TURNS:
                turns = tuple(_scheme(name, role, one, group_size) for one in said)
                schemes[role] = max(turns, key=lambda scheme: (turns.count(scheme), -scheme.bits_per_weight))
            else:
                schemes[role] = _scheme(name, role, said, group_size)
    kv = run.get("kv")
    if kv not in (None, "bf16", "int8"):
        raise RecipeError(f"recipe {name}: run.kv is {short(kv)}: expected 'bf16' or 'int8'")
    description = data.get("description", "")
    if not isinstance(description, str):
        raise RecipeError(f"recipe {name}: description is {short(description)}: expected text")
    return Recipe(
        name=name,
        description=description,
        schemes=schemes,
        turns=turns,
        vram=_size(name, run, "vram"),
        ram=_size(name, run, "ram"),
        context=_count(name, run, "context"),
        kv=cast(Literal["bf16", "int8"] | None, kv),
        prompt_chunk=_count(name, run, "prompt_chunk"),
    )


def _scheme(name: str, role: Role, said: object, group_size: int) -> Scheme:
    try:
        return Scheme.parse(str(said), group_size)
    except SchemeError as error:
        raise RecipeError(f"recipe {name}: weights.{role}: {error}") from None


def _known(name: str, prefix: str, data: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    for key in data:
        if key not in allowed:
            raise RecipeError(f"recipe {name}: unknown key {prefix}{key}: expected one of {', '.join(allowed)}")


def _table(name: str, data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = data.get(key, {})
    if not isinstance(value, dict):
        raise RecipeError(f"recipe {name}: {key} is {short(value)}: expected a table")
    return value


def _size(name: str, run: Mapping[str, Any], key: str) -> int | None:
    if key not in run:
        return None
    try:
        return parse_size(str(run[key]))
    except UsageError as error:
        raise RecipeError(f"recipe {name}: run.{key}: {error}") from None


def _count(name: str, run: Mapping[str, Any], key: str) -> int | None:
    value = run.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST):
        raise RecipeError(
            f"recipe {name}: run.{key} is {short(value)}: expected a whole number above 0, at most {_MOST:,}"
        )
    return value
