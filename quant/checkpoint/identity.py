"""Which model a checkpoint is, whatever its weights are stored as."""

import hashlib
import json

from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import CheckpointError


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
