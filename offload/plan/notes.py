"""What a plan has to say beside its numbers."""

from collections.abc import Mapping

from offload.batch.kv_tiers import KvTiers
from offload.hardware.probe import Machine
from offload.plan.footprint import Footprint
from quant.model.families import Role
from quant.model.mixed_precision import few_bits
from quant.model.shape import ModelShape
from quant.scheme import Scheme
from quant.sizes import format_size


def queue(room: int, sequences: int, context: int) -> tuple[str, ...]:
    """That sequences will have to wait for one another, if the KV cache cannot be made for all of them."""
    if room >= sequences:
        return ()
    return (
        f"the KV cache has room for {room} of {sequences} sequences of {context:,} tokens: others "
        "wait for pages; a larger budget or a smaller --context makes room",
    )


def kv_on_disk(tiers: KvTiers | None, nbytes: int, sequences: int, bounded: bool) -> tuple[str, ...]:
    """What a KV cache of which ``nbytes`` are on disk asks of that, and of those who wait. Where it is ``bounded``,
    pages that are proved not to matter are left out."""
    if tiers is None or not nbytes:
        return ()
    said = f"with the full context {format_size(nbytes)} of the KV cache are on disk, and read for every step"
    but = ", but for pages that --kv-epsilon leaves out" if bounded else ""
    alone = "; sequences run one after the other" if sequences > 1 else ""
    return (said + but + alone,)


def padding(footprint: Footprint) -> tuple[str, ...]:
    """What experts of different size cost in memory, where that is more than their pages' ends."""
    largest, mean = footprint.shape.largest_expert(footprint.schemes), footprint.expert_bytes
    if largest <= mean * 1.01:
        return ()
    return (
        f"experts differ in size: a slot has room for the largest, {format_size(largest)}, the mean is "
        f"{format_size(mean)}: {1 - mean / largest:.0%} of the memory for experts is padding",
    )


def beyond(shape: ModelShape, context: int) -> tuple[str, ...]:
    """A note that ``context`` tokens are more than the model has learned to read, if they are."""
    limit = shape.max_position_embeddings
    if not 0 < limit < context:
        return ()
    return (
        f"a context of {context:,} tokens is beyond the {limit:,} that this model was made for "
        "(max_position_embeddings): what it makes of later ones may be no sense",
    )


def untried(schemes: Mapping[Role, Scheme], machine: Machine) -> tuple[str, ...]:
    """That a GPU's kernels of some of ``schemes`` have run on no card."""
    few = few_bits(schemes) if machine.gpu else []
    if not few:
        return ()
    return (
        f"{', '.join(few)}: a GPU's kernels for that compile and, interpreted, equal the reference, but no card "
        "has run them yet (--vram 0 leaves the GPU alone)",
    )
