"""generation_config.json: how a model's makers mean text to be drawn from it, and which tokens end it."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from quant.input_file import is_there, read_object, validated

FILE = "generation_config.json"
_TokenId = Annotated[int, Field(ge=-1, le=2**31)]
_Share = Annotated[float, Field(ge=0, le=1)]


class GenerationConfig(BaseModel):
    """The keys that are used; all of them may be absent."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)

    eos_token_id: _TokenId | list[_TokenId] | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None  # 0 and -1: all
    top_p: _Share | None = None
    min_p: _Share | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text."""
        return token_ids(self.eos_token_id)

    @property
    def sampling(self) -> dict[str, float]:
        """How tokens should be drawn: temperature and filters by name, without those that change nothing.

        As in transformers, they hold where ``do_sample`` is true, and text is greedy otherwise.
        """
        found: dict[str, float] = {}
        if self.do_sample:
            found["temperature"] = 1.0 if self.temperature is None else self.temperature
            if self.top_k is not None and self.top_k > 0:
                found["top_k"] = self.top_k
            if self.top_p is not None and 0 < self.top_p < 1:
                found["top_p"] = self.top_p
            if self.min_p:
                found["min_p"] = self.min_p
        if self.repetition_penalty not in (None, 1.0):
            found["repetition_penalty"] = self.repetition_penalty
        return found


def read_generation_config(folder: Path) -> GenerationConfig:
    """What the generation_config.json of a model directory says; nothing where there is none.

    Raises CheckpointError if it cannot be read or a value is none that can be meant.
    """
    file = folder / FILE
    if not is_there(file):
        return GenerationConfig()
    found: GenerationConfig = validated(GenerationConfig, read_object(file, "a generation config"), str(file))
    return found


def token_ids(value: int | list[int] | None) -> frozenset[int]:
    """What a config's ``eos_token_id`` names: one token, several or none."""
    return frozenset([value] if isinstance(value, int) else value or ())
