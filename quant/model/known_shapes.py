"""Shapes: the config.json of models that need not be there. Planning and synthesis take a shape's name in place of
a model."""

from importlib.resources import files
from typing import Any

from quant.errors import UsageError
from quant.input_file import parse_json


def shape_names() -> list[str]:
    """The shapes that come with Coldstream."""
    return sorted(
        item.name[:-5] for item in files("recipes").joinpath("shapes").iterdir() if item.name.endswith(".json")
    )


def load_shape(name: str) -> dict[str, Any]:
    """The config.json of the shape called ``name``. Raises UsageError naming the known ones."""
    if name not in shape_names():
        raise UsageError(f"no shape is called {name!r}: expected one of {', '.join(shape_names())}")
    data = files("recipes").joinpath("shapes", f"{name}.json").read_bytes()
    config: dict[str, Any] = parse_json(data, name)
    return config
