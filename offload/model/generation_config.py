"""What a model's makers recommend for choosing tokens: ``generation_config.json``."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from quant.input_file import read_object, validated

FILE = "generation_config.json"


class _Recommended(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None


def recommended_sampling(path: Path) -> dict[str, Any]:
    """Fields of ``Sampling`` that the model in ``path`` asks for, without those that change nothing.

    As in transformers, temperature and filters hold where ``do_sample`` is true, and greedy otherwise. Raises
    CheckpointError if the file is there and not as it must be.
    """
    file = path / FILE
    if not file.exists():
        return {}
    said: _Recommended = validated(_Recommended, read_object(file, "a model's generation config"), str(file))
    found: dict[str, Any] = {}
    if said.do_sample:
        found["temperature"] = 1.0 if said.temperature is None else said.temperature
        if said.top_k is not None and said.top_k > 0:
            found["top_k"] = said.top_k
        found |= {"top_p": said.top_p} if said.top_p and said.top_p < 1 else {}
        found |= {"min_p": said.min_p} if said.min_p else {}
    if said.repetition_penalty not in (None, 1.0):
        found["repetition_penalty"] = said.repetition_penalty
    return found
