"""Weights: what they are on disk, and how to multiply by them. Knows nothing of tiers or devices' budgets.

The names below are imported when they are first used: importing ``quant`` is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quant.checkpoint.checkpoint import Checkpoint as Checkpoint
    from quant.convert.quantize import quantize as quantize
    from quant.errors import ColdstreamError as ColdstreamError
    from quant.model.recipe import Recipe as Recipe
    from quant.model.recipe import load_recipe as load_recipe
    from quant.scheme import Scheme as Scheme

_MODULES = {
    "Checkpoint": "quant.checkpoint.checkpoint",
    "ColdstreamError": "quant.errors",
    "Recipe": "quant.model.recipe",
    "Scheme": "quant.scheme",
    "load_recipe": "quant.model.recipe",
    "quantize": "quant.convert.quantize",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
