"""The options that say what each role of a model is stored as: a recipe, or by hand, or a recipe amended by
hand.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from quant.errors import UsageError

if TYPE_CHECKING:
    from quant.model.families import Role
    from quant.scheme import Scheme

Experts = Annotated[
    str | None,
    typer.Option(metavar="SCHEME", help="Routed experts: int4, int8, nf4 or bf16; int4-g32 sets its groups."),
]
SharedExpert = Annotated[str | None, typer.Option(metavar="SCHEME", help="The shared expert.")]
DenseMlp = Annotated[str | None, typer.Option(metavar="SCHEME", help="MLPs of layers without experts.")]
Attention = Annotated[str | None, typer.Option(metavar="SCHEME", help="q, k, v and o projections.")]
LmHead = Annotated[str | None, typer.Option(metavar="SCHEME", help="The output head.")]
GroupSize = Annotated[
    int | None,
    typer.Option(
        help="Weights that share a scale, of roles named by hand: 32, 64, 128 (default) or 256.", show_default=False
    ),
]
GROUP_SIZE = 128


def schemes_by_hand(by_hand: "Mapping[Role, str | None]", group_size: int | None) -> "dict[Role, Scheme]":
    """The scheme of each role that an option names. Raises UsageError, with the option, if it is none."""
    from quant.errors import SchemeError
    from quant.scheme import Scheme

    schemes: dict[Role, Scheme] = {}
    for role, text in by_hand.items():
        if text:
            try:
                schemes[role] = Scheme.parse(text, group_size or GROUP_SIZE)
            except SchemeError as error:
                raise UsageError(f"--{role.replace('_', '-')} {text}: {error}") from None
    return schemes


def chosen_schemes(
    recipe: str | None, by_hand: "Mapping[Role, str | None]", group_size: int | None
) -> "dict[Role, Scheme]":
    """The scheme of each role that was named; what is named by hand wins over the recipe.

    Raises UsageError if neither names any or what is named is none, RecipeError for a bad recipe file.
    """
    schemes: dict[Role, Scheme] = {}
    if recipe is not None:
        from quant.model.recipe import load_recipe

        schemes.update(load_recipe(recipe).schemes)
    schemes.update(schemes_by_hand(by_hand, group_size))
    if recipe is not None and group_size is not None and not any(by_hand.values()):
        raise UsageError(
            f"--group-size {group_size} says nothing beside a recipe, which has its own: name a role by "
            f"hand, for example --experts int4-g{group_size}"
        )
    if not schemes:
        raise UsageError("nothing to do: give --recipe NAME, or at least one role, for example --experts int4")
    return schemes
