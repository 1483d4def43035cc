"""quantize: a checkpoint quantized in one call, as ``coldstream quantize`` does it without a text."""

from collections.abc import Mapping
from pathlib import Path

from quant.convert.convert import ConversionReport, convert
from quant.errors import UsageError
from quant.model.families import Role
from quant.model.hub import resolve_model
from quant.model.recipe import Recipe, load_recipe
from quant.progress import Progress, nobody
from quant.rounding.rounding import Rounder, Rounding
from quant.scheme import Scheme
from quant.sources.open import is_gguf, open_source

GROUP_SIZE = 128


def quantize(
    source: str | Path,
    destination: str | Path,
    *,
    recipe: str | Recipe | None = None,
    experts: str | Scheme | None = None,
    shared_expert: str | Scheme | None = None,
    dense_mlp: str | Scheme | None = None,
    attention: str | Scheme | None = None,
    lm_head: str | Scheme | None = None,
    vision: str | Scheme | None = None,
    group_size: int = GROUP_SIZE,
    rounding: Rounding | Rounder = "search",
    resume: bool = False,
    progress: Progress = nobody,
) -> ConversionReport:
    """Quantize the checkpoint ``source`` (a directory, a GGUF file or a Hub id) into the new directory ``destination``.

    Each role is stored as it is named, "int4", "int4-g32", "int8", "nf4", "bf16" or a Scheme, else as the
    ``recipe`` says, else as it is. ``group_size`` holds for names that do not give one. ``rounding``,
    ``resume`` and ``progress`` are those of ``convert``. Raises UsageError if nothing is to be done, and what
    ``convert`` raises.
    """
    named: Mapping[Role, str | Scheme | None] = {
        "experts": experts,
        "shared_expert": shared_expert,
        "dense_mlp": dense_mlp,
        "attention": attention,
        "lm_head": lm_head,
        "vision": vision,
    }
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    by_hand = {
        role: Scheme.parse(scheme, group_size) if isinstance(scheme, str) else scheme
        for role, scheme in named.items()
        if scheme is not None
    }
    if not by_hand and (chosen is None or not chosen.schemes):
        raise UsageError("nothing to do: expected a recipe or the scheme of a role, for example experts='int4'")
    how = {"rounding": rounding} if isinstance(rounding, str) else {"rounder": rounding}
    checkpoint = open_source(Path(source) if is_gguf(source) else resolve_model(source))
    return convert(
        checkpoint,
        destination,
        by_hand if chosen is None else chosen.schemes_of(checkpoint.shape, by_hand),
        resume=resume,
        progress=progress,
        **how,
    )
