"""generation_config.json: how a model's makers mean text to be drawn from it, and which tokens end it."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from quant.input_file import read_object, validated

_TokenId = Annotated[int, Field(ge=-1, le=2**31)]
_Share = Annotated[float, Field(ge=0, le=1)]


class GenerationConfig(BaseModel):
    """The keys that are used; all of them may be absent."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)

    eos_token_id: _TokenId | list[_TokenId] | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    top_p: _Share | None = None
    min_p: _Share | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text."""
        return token_ids(self.eos_token_id)


def read_generation_config(folder: Path) -> GenerationConfig:
    """What the generation_config.json of a model directory says; nothing where there is none.

    Raises CheckpointError if it cannot be read or a value is none that can be meant.
    """
    file = folder / "generation_config.json"
    if not os.path.lexists(file):
        return GenerationConfig()
    found: GenerationConfig = validated(GenerationConfig, read_object(file, "a generation config"), str(file))
    return found


def token_ids(value: int | list[int] | None) -> frozenset[int]:
    """What a config's ``eos_token_id`` names: one token, several or none."""
    return frozenset([value] if isinstance(value, int) else value or ())
