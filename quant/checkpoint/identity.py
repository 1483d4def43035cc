"""Which model a checkpoint is, whatever its weights are stored as."""

import hashlib
import json

from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import CheckpointError


def model_id(checkpoint: Checkpoint) -> str:
    """A name for the model whatever its weights are stored as: a hash over its shape and its first router,
    which quantization never changes. 16 hex digits."""
    shape = checkpoint.shape
    dims = [shape.hidden_size, shape.num_layers, shape.num_experts, shape.top_k, shape.vocab_size, shape.moe_layers]
    digest = hashlib.sha256(json.dumps(dims).encode())
    first = shape.moe_layers[0]
    router = next((k for k, name in checkpoint.names.items() if name.role == "router" and name.layer == first), None)
    if router is None:
        raise CheckpointError(f"{checkpoint.path} has no router in layer {first}: expected one in every MoE layer")
    digest.update(checkpoint.read(router).float().numpy().tobytes())
    return digest.hexdigest()[:16]
