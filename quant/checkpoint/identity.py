"""Which model a checkpoint is, whatever its weights are stored as."""

import hashlib
import json
import os
from pathlib import Path

from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import CheckpointError

_SAMPLE = 4096  # bytes of a tensor
_EXPERTS_SAMPLED = 17  # every so many of their tensors


def model_id(checkpoint: Checkpoint) -> str:
    """A name for the model whatever its weights are stored as: a hash over its shape and its first router
    (of a dense model: its first norm), which quantization never changes. 16 hex digits."""
    shape = checkpoint.shape
    dims = [shape.hidden_size, shape.num_layers, shape.num_experts, shape.top_k, shape.vocab_size, shape.moe_layers]
    digest = hashlib.sha256(json.dumps(dims).encode())
    first = next(iter(shape.moe_layers), 0)
    role = "router" if shape.moe_layers else "norm"
    found = (key for key, name in checkpoint.names.items() if name.role == role and name.layer == first)
    router = min(found, key=lambda key: (not key.endswith("weight"), key), default=None)
    if router is None:
        raise CheckpointError(f"{checkpoint.path} has no {role} in layer {first}: expected one in every layer")
    digest.update(checkpoint.read(router).float().numpy().tobytes())
    return digest.hexdigest()[:16]


def weights_id(checkpoint: Checkpoint) -> str:
    """A name for these weights as they are stored: a hash over config and headers, size and time of change of every
    file, and a sample of every tensor but those of most experts. 64 hex digits.

    A copy with other times is another model to it, never the other way round. Raises CheckpointError if a file cannot
    be read.
    """
    digest = hashlib.sha256(f"{checkpoint.identity} {checkpoint.states.listed(checkpoint.files)}".encode())
    descriptors: dict[Path, int] = {}
    try:
        for index, key in enumerate(sorted(checkpoint.names)):
            if checkpoint.names[key].role == "experts" and index % _EXPERTS_SAMPLED:
                continue
            entry = checkpoint.entries[key]
            if entry.file not in descriptors:
                descriptors[entry.file] = os.open(entry.file, os.O_RDONLY)
            length = min(_SAMPLE, entry.nbytes)
            middle = entry.offset + (entry.nbytes - length) // 2
            digest.update(os.pread(descriptors[entry.file], length, middle))
    except OSError as error:
        raise CheckpointError(f"{checkpoint.path} cannot be read: {error.strerror}") from None
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    return digest.hexdigest()
