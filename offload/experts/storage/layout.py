"""Where the tensors of a layer's experts lie inside a slot, for kernels that read them in place."""

import math

from offload.experts.storage.store import ExpertStore
from quant.errors import SchemeError
from quant.kernels.cuda.layout import ExpertLayout


def layer_layout(store: ExpertStore, layer: int) -> ExpertLayout:
    """Where the tensors of every expert of ``layer`` lie, from its first byte on.

    Raises SchemeError if its experts are not all stored alike, or not as the kernels read them.
    """
    shape = store.shape
    records = [store.record(layer, expert) for expert in range(shape.num_experts)]
    found = set()
    for record in records:
        schemes = tuple((name, place.scheme) for name, place in record.weights.items())
        offsets = tuple(
            ((name, suffix), tensor.position - record.start)
            for name, place in record.weights.items()
            for suffix, tensor in place.tensors.items()
        )
        if any(place.transposed or not place.scheme.is_packed for place in record.weights.values()):
            raise SchemeError(f"experts of layer {layer} are not packed (int2 to int8)")
        found.add((schemes, offsets))
    if len(found) > 1:
        raise SchemeError(f"experts of layer {layer} are stored in {len(found)} ways: expected one")
    schemes, offsets = found.pop()
    alignment = math.gcd(16, *(record.start for record in records))
    return ExpertLayout.from_offsets(
        shape.hidden_size, shape.expert_intermediate, dict(schemes), dict(offsets), alignment
    )
