"""The shape of a config.json, whatever its family: from our tables where the family is in them, which needs
nothing but the numbers, else read off transformers' own model."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from quant.errors import DenseModelError
from quant.model.families import is_tabled
from quant.model.shape import ModelShape


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """The shape of a config.json's dict. Raises UnknownFamilyError, or CheckpointError naming what is missing, wrong
    or not understood."""
    if is_tabled(config.get("model_type")):
        try:
            return ModelShape.from_config(config)
        except DenseModelError:
            pass  # our tables are of models with experts
    return _general(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=4)
def _general(text: str) -> ModelShape:
    from quant.architecture.general_shape import GeneralShape

    return GeneralShape.of(json.loads(text))
