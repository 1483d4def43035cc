"""``coldstream synth``: a checkpoint of random weights in any shape: try a machine before a download."""

from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options.output import takes_console
from cli.options.run import WITH_CONFIG
from cli.options.schemes import AskedSchemes, takes_schemes
from cli.options.typed import typed_path
from cli.terminal.console import Console
from cli.terminal.progress import progress_bar
from quant.errors import UsageError
from quant.sizes import format_size

if TYPE_CHECKING:
    from quant.model.families import Role
    from quant.scheme import Scheme


@takes_console
@takes_schemes
def synth(
    stored: AskedSchemes,
    console: Console,
    shape: Annotated[str | None, typer.Argument(metavar="[SHAPE]", help=f"Whose shape. {WITH_CONFIG}.")] = None,
    destination: Annotated[
        Path | None,
        typer.Argument(metavar="DST", parser=typed_path, help="A new or empty directory.", show_default=False),
    ] = None,
    hidden: Annotated[
        int, typer.Option(min=1, help="Without SHAPE: hidden size, a multiple of the group size.")
    ] = 2048,
    layers: Annotated[int, typer.Option(min=1, help="Layers.")] = 16,
    experts_per_layer: Annotated[int, typer.Option(min=2, help="Routed experts per layer.")] = 16,
    top_k: Annotated[int, typer.Option(min=1, help="Experts per token.")] = 1,
    intermediate: Annotated[int, typer.Option(min=1, help="Intermediate size of an expert, likewise.")] = 4096,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 16,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key and value heads.")] = 4,
    head_dim: Annotated[int, typer.Option(min=2, help="Size of a head.")] = 128,
    vocab: Annotated[int, typer.Option(min=1, help="Vocabulary.")] = 32000,
    dense_every: Annotated[
        int, typer.Option(min=1, help="1: every layer routes; 2: every other one is dense, as in Maverick.")
    ] = 1,
    zipf: Annotated[float, typer.Option(min=0, help="Exponent of the experts' use; 0 is uniform.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Other weights for each; the same for the same.")] = 0,
) -> None:
    """Write a quantized checkpoint of random weights to DST: `synth SHAPE DST`, or `synth DST --hidden …`.

    Without --recipe or schemes by hand, the recipe named like the shape is used, else int4 throughout and an
    int8 head.
    """
    from cli.terminal.words import schemes_line
    from quant.architecture.shape import shape_of
    from quant.model.families import TEXT_ROLES
    from quant.model.hub import resolve_config
    from quant.model.known_shapes import shape_names
    from quant.model.recipe import recipe_names
    from quant.synth.config import llama4_config
    from quant.synth.synth import synthesize

    name, folder = (shape, destination) if destination is not None else (None, shape)
    if not folder:
        raise UsageError("synth needs a destination: coldstream synth SHAPE DST, for example mini-scout DST")
    numbers = {
        "hidden": hidden,
        "layers": layers,
        "experts_per_layer": experts_per_layer,
        "top_k": top_k,
        "intermediate": intermediate,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab": vocab,
        "dense_every": dense_every,
    }
    if name is None:
        if str(folder) in shape_names():
            raise UsageError(
                f"{folder} is a shape, and no destination was given: coldstream synth {folder} DST (or "
                f"./{folder} for a folder of that name)"
            )
        config = llama4_config(**numbers)
    else:
        usual = signature(synth).parameters
        given = [f"--{key.replace('_', '-')}" for key, value in numbers.items() if value != usual[key].default]
        if given:
            raise UsageError(f"{' and '.join(given)} make a model of their own: leave out the shape {name}")
        config = resolve_config(name)
    if stored.recipe is None and not stored.roles:
        if name in recipe_names():
            stored = replace(stored, recipe=name)
        else:
            stored = replace(stored, roles={role: "int8" if role == "lm_head" else "int4" for role in TEXT_ROLES})
    by_role = stored.schemes()
    if name is None:
        _check({"--hidden": hidden, "--intermediate": intermediate}, by_role)
        _check({"--heads times --head-dim": heads * head_dim}, by_role)
        if heads % kv_heads or head_dim % 2 or top_k > experts_per_layer:
            raise UsageError(
                f"--heads {heads}, --kv-heads {kv_heads}, --head-dim {head_dim}, --top-k {top_k}: expected "
                f"key-value heads that divide the heads, an even size of a head, and at most "
                f"{experts_per_layer} experts per token"
            )
    schemes = stored.schemes_of(shape_of(config))
    console.step(f"writing random weights to {folder}: {schemes_line(schemes, shape_of(config))}")
    with progress_bar(console, "writing", "bytes") as show:
        report = synthesize(config, folder, schemes, zipf=zipf, seed=seed, progress=show)
    console.notes(report.notes)
    size = format_size(report.output_bytes)
    console.step(f"{size} in {report.seconds:.1f} s, {report.mb_per_s:,.0f} MB/s: {report.path}")
    console.result(report.to_json())


def _check(widths: dict[str, int], schemes: "Mapping[Role, Scheme]") -> None:
    """Raise UsageError, with the nearest that is allowed, for a width that the groups do not divide."""
    group = max((scheme.group_size for scheme in schemes.values() if scheme.is_packed), default=1)
    for option, width in widths.items():
        if width % group:
            below, above = width // group * group, -(-width // group) * group
            raise UsageError(
                f"{option} {width}: expected a multiple of {group}, the group size: "
                f"{f'{below} or ' if below else ''}{above} (or a smaller --group-size: 32, 64)"
            )
