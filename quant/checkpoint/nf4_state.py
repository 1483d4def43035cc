"""What bitsandbytes notes beside a weight in nf4: a small JSON text in a tensor, which its loader takes as it is."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.weight_files import TensorEntry
from quant.errors import CheckpointError
from quant.input_file import parse_json, validated
from quant.scheme import NF4_BLOCK


class _State(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    quant_type: Literal["nf4"]
    blocksize: int
    dtype: Literal["bfloat16", "float16", "float32"]
    shape: Annotated[list[int], Field(min_length=2, max_length=2)]


def check_nf4_state(checkpoint: Checkpoint, entry: TensorEntry, dims: tuple[int, int]) -> None:
    """Raise CheckpointError unless tensor ``entry`` describes plain nf4 of a weight of ``dims``."""
    name = f"{checkpoint.path}: tensor {entry.key}"
    state: _State = validated(_State, parse_json(checkpoint.read(entry.key).numpy().tobytes(), name), name)
    found, expected = (state.blocksize, tuple(state.shape)), (NF4_BLOCK, dims)
    if found != expected:
        raise CheckpointError(
            f"{name} says blocks of {found[0]} and shape {list(found[1])}: expected {expected[0]} and {list(dims)}"
        )
