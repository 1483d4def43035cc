"""The options that say what each role of a model is stored as: a recipe, or by hand, or a recipe amended by
hand.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options.groups import expands
from cli.options.run import Recipe
from quant.errors import UsageError

if TYPE_CHECKING:
    from quant.model.families import Role
    from quant.model.recipe import Recipe as LoadedRecipe
    from quant.model.shape import ModelShape
    from quant.scheme import Scheme

Experts = Annotated[
    str | None,
    typer.Option(
        metavar="SCHEME", help="Routed experts: int2, int3, int4, int8, nf4 or bf16; int4-g32 sets its groups."
    ),
]
SharedExpert = Annotated[str | None, typer.Option(metavar="SCHEME", help="The shared expert.")]
DenseMlp = Annotated[str | None, typer.Option(metavar="SCHEME", help="MLPs of layers without experts.")]
Attention = Annotated[str | None, typer.Option(metavar="SCHEME", help="q, k, v and o projections.")]
LmHead = Annotated[
    str | None,
    typer.Option(metavar="SCHEME", help="The output head. In quantize with a goal, auto chooses a role's bits, too."),
]
Vision = Annotated[
    str | None, typer.Option(metavar="SCHEME", help="Llama 4's vision tower and projector: int8 or bf16.")
]
GroupSize = Annotated[
    int | None,
    typer.Option(
        help="Weights that share a scale, of roles named by hand: 32, 64, 128 (default) or 256.", show_default=False
    ),
]
GROUP_SIZE = 128
AUTO = "auto"  # the scheme of a role whose bits are to be chosen


@dataclass(frozen=True)
class AskedSchemes:
    """A recipe's name or file, what is named by hand (which wins), and the group size of the latter."""

    recipe: str | None = None
    roles: "Mapping[Role, str]" = field(default_factory=dict)
    group_size: int | None = None

    @classmethod
    def of(cls, recipe: str | None, group_size: int | None, **roles: Any) -> "AskedSchemes":
        """As the command line gives it: None is a role that was not named."""
        return cls(recipe, {role: text for role, text in roles.items() if text is not None}, group_size)  # type: ignore[misc]

    def load_recipe(self) -> "LoadedRecipe | None":
        """The recipe, if one is named. Raises UsageError if nobody knows it, RecipeError for what is in it."""
        from quant.model.recipe import load_recipe

        return None if self.recipe is None else load_recipe(self.recipe)

    def by_hand(self) -> "dict[Role, Scheme]":
        """The schemes that options name. Raises UsageError, with the option, for one that is none."""
        from quant.errors import SchemeError
        from quant.scheme import Scheme

        schemes: dict[Role, Scheme] = {}
        for role, text in self.roles.items():
            try:
                schemes[role] = Scheme.parse(text, self.group_size or GROUP_SIZE)
            except SchemeError as error:
                said = (
                    "chosen for `quantize` with --target-bits, --target-size or --fit only" if text == AUTO else error
                )
                raise UsageError(f"--{role.replace('_', '-')} {text}: {said}") from None
        return schemes

    def schemes_of(self, shape: "ModelShape") -> "Mapping[Role, Scheme]":
        """Recipe and hand together for a model of ``shape``, whose layers a recipe may tell apart."""
        recipe = self.load_recipe()
        return self.by_hand() if recipe is None else recipe.schemes_of(shape, self.by_hand())

    def schemes(self) -> "dict[Role, Scheme]":
        """The same by role, of any model. Raises as these do, and UsageError if nothing is named at all."""
        recipe = self.load_recipe()
        schemes = {**(recipe.schemes if recipe else {}), **self.by_hand()}
        if recipe is not None and self.group_size is not None and not self.roles:
            raise UsageError(
                f"--group-size {self.group_size} says nothing beside a recipe, which has its own: name a role by "
                f"hand, for example --experts int4-g{self.group_size}"
            )
        if not schemes:
            raise UsageError("nothing to do: give --recipe NAME, or at least one role, for example --experts int4")
        return schemes


takes_schemes = expands(
    "stored",
    {
        "recipe": (Recipe, None),
        "experts": (Experts, None),
        "shared_expert": (SharedExpert, None),
        "dense_mlp": (DenseMlp, None),
        "attention": (Attention, None),
        "lm_head": (LmHead, None),
        "vision": (Vision, None),
        "group_size": (GroupSize, None),
    },
    AskedSchemes.of,
)
