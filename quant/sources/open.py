"""Opening a source of a conversion, in whichever form its weights are."""

from collections.abc import Iterator
from pathlib import Path

from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.headers import read_headers
from quant.checkpoint.inventory import check_tensors
from quant.errors import UsageError
from quant.model.config import quantization_of
from quant.sources.bitsandbytes import bitsandbytes_weights
from quant.sources.checkpoint import SourceCheckpoint
from quant.sources.float8 import float8_weights
from quant.sources.gptq import transposed_weights
from quant.sources.integers import integer_weights
from quant.sources.mxfp4 import mxfp4_weights
from quant.sources.settings import Awq, CompressedTensors, FineGrainedFloat8, Gptq, Settings, read_settings
from quant.sources.weight import SourceWeight

_SCALES = ("_scale",)
_INVERSE = ("_scale_inv",)


def open_source(path: Path | str, tokenizer: Path | None = None) -> Checkpoint:
    """The checkpoint in ``path``, a model directory or the first GGUF file, with all weights in floating point: as they
    are, or those that its quantized weights stand for. ``tokenizer`` is a directory that has what a GGUF file lacks.

    Raises CheckpointError if it cannot be read, a tensor is missing, unfit or unexplained, or its form is not known.
    """
    if is_gguf(path):
        from quant.sources.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint.open_file(Path(path), tokenizer)
    if tokenizer is not None:
        raise UsageError("--tokenizer is for a GGUF file: a model directory has its own")
    raw = Checkpoint(*read_headers(path))
    found = quantization_of(raw.config)
    if found is None:
        check_tensors(raw)
        return raw
    method, settings = read_settings(found)
    return SourceCheckpoint(raw, _weights(raw, method, settings))


def _weights(raw: Checkpoint, method: str, settings: Settings) -> Iterator[SourceWeight]:
    if isinstance(settings, CompressedTensors):
        settings.check()
        yield from float8_weights(raw, _SCALES, settings.blocks, settings.strategies)
        yield from integer_weights(raw, settings)
    elif isinstance(settings, FineGrainedFloat8):
        size = settings.weight_block_size
        if size:
            yield from float8_weights(raw, _INVERSE, [(size[0], size[1])], ("block",))
        else:
            yield from float8_weights(raw, _INVERSE)
    elif isinstance(settings, Gptq | Awq):
        yield from transposed_weights(raw, settings)
    elif method == "fbgemm_fp8":
        yield from float8_weights(raw, _SCALES, shared=("channel",))
    elif method == "mxfp4":
        yield from mxfp4_weights(raw)
    else:
        yield from bitsandbytes_weights(raw)


def is_gguf(path: Path | str) -> bool:
    """Whether ``path`` is a GGUF file, by its name."""
    return Path(path).suffix.lower() == ".gguf" and not Path(path).is_dir()
