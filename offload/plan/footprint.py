"""Footprint: the bytes of a run that are not experts, and the Workload that a token puts on the machine.

Pure Python: counted from the shape of the model, as the runtime allocates. Sizes in bytes.

Legend: T tokens of a prompt chunk, H hidden, I intermediate.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from offload.batch.kv_tiers import KvTiers
from offload.hardware.framework import MIB
from offload.plan.cost_model import Workload
from offload.plan.kv_room import KvRoom
from quant.checkpoint.layout import PAGE
from quant.errors import InputError
from quant.model.families import Role
from quant.model.mixed_precision import MixedPrecision
from quant.model.shape import ModelShape
from quant.scheme import BF16, Scheme
from quant.sizes import KV_PAGE_TOKENS

HUGE_PAGE = 2 * MIB
_LARGE = 16 * HUGE_PAGE
# What allocators, threads and the reader keep.
SLACK = 48 * MIB
CALIBRATION_WINDOW = 512  # tokens of a text that are run as one
IMAGE_TILES = 136  # of one prompt: eight pictures of sixteen tiles and the whole, or as many small ones
ROW_TILES = 17  # of one picture
TILES_AT_ONCE = 4
_ATTENTION_BLOCK, _ATTENTION_ROWS, _RUNS = 256, 96, 64  # of attention.cpp and kernels.h
_TABLE_ENTRY, _STRETCH_RECORD = 4, 768  # bytes that a block of a layer's table takes, and what is known of a stretch
_IDS = 3 * 4  # bytes of a token's id: of the text as it was given, as it grows, and as what is left of it
MIN_EXPERT_TOKENS = 64  # that an expert must see on average


@dataclass(frozen=True)
class Footprint:
    """What a model in ``schemes`` takes for ``context`` tokens of KV cache in ``kv_bits`` (8, 16 or 32), for each of
    ``sequences``.

    ``slot_bytes`` is what one expert takes in an arena: whole pages, as direct I/O wants them, and where
    experts differ as many as the largest needs. Beside a GPU all slots are that large; on the CPU an expert takes
    what it needs, ``mean_slot_bytes`` in the mean. With ``images`` there is room to look at pictures. ``wider`` is
    what the weights of a role that are not quantized take beyond two bytes each, where they are kept in f32. With a
    ``kv_room`` the KV cache of one sequence is in RAM in part; with ``kv_bounds`` the smallest and the largest key of
    each of its pages are in RAM, wherever the page is.
    """

    shape: ModelShape
    schemes: Mapping[Role, Scheme]
    context: int
    kv_bits: int
    slot_bytes: int = 0
    images: bool = False
    wider: Mapping[Role, int] = field(default_factory=dict)
    sequences: int = 1
    kv_room: KvRoom | None = None
    kv_bounds: bool = False

    def __post_init__(self) -> None:
        if not self.slot_bytes:
            object.__setattr__(
                self, "slot_bytes", slot_bytes_of(self.shape.largest_expert(self.schemes) + self._wider_expert)
            )

    @cached_property
    def _sizes(self) -> list[int]:
        """Bytes of every routed expert where they differ in size, else none."""
        mixed = self.experts and isinstance(self.schemes, MixedPrecision)
        sizes = list(self.shape.expert_sizes(self.schemes)) if mixed else []
        return sizes if len(set(sizes)) > 1 else []

    @cached_property
    def mean_slot_bytes(self) -> int:
        """What an expert takes in an arena where none takes more than it needs."""
        if not self._sizes:
            return self.slot_bytes
        taken = sum(self.taken_sizes)
        # What is said to lie across one more page than it has bytes for does so in every size.
        beyond = self.slot_bytes - slot_bytes_of(max(self._sizes) + self._wider_expert)
        return min(self.slot_bytes, -(-taken // len(self._sizes)) + max(0, beyond))

    @cached_property
    def taken_sizes(self) -> list[int]:
        """What each routed expert takes in an arena where none takes more than it needs, layer after layer; empty where
        all are of one size."""
        grain = granularity(self.slot_bytes)
        return [-(-(size + self._wider_expert) // grain) * grain for size in self._sizes]

    def used_bytes(self, shares: Sequence[float]) -> int:
        """Bytes of an expert that is asked for, if ``shares`` of the requests go to each: none, to all alike."""
        if not (self._sizes and shares):
            return self.expert_bytes
        return round(sum(size * share for size, share in zip(self._sizes, shares, strict=True))) + self._wider_expert

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of one expert that a forward pass reads; of the mean one where they differ."""
        return self.shape.experts_nbytes(self.schemes) // max(self.experts, 1) + self._wider_expert

    @property
    def _wider_expert(self) -> int:
        return self.wider.get("experts", 0) // max(self.experts, 1)

    @property
    def experts(self) -> int:
        """Routed experts in all layers."""
        return self.shape.num_experts * len(self.shape.moe_layers)

    def roles(self) -> dict[Role, int]:
        """Bytes of every role but the routed experts."""
        return dict(self._roles)

    @cached_property
    def _roles(self) -> dict[Role, int]:
        sizes = self.shape.role_nbytes(self.schemes)
        return {role: size + self.wider.get(role, 0) for role, size in sizes.items() if role != "experts"}

    @property
    def kv_cache(self) -> int:
        """Bytes of the KV cache with the full context of every sequence, in whole pages, wherever they are."""
        if not self.shape.keeps_pages:
            return self.sequences * self.kv_at(self.context)
        return self.sequences * self.shape.kv_pages(self.context) * self.kv_page

    @property
    def kv_page(self) -> int:
        """Bytes of a page of the KV cache: keys and values of one layer."""
        values = KV_PAGE_TOKENS * 2 * self.shape.num_kv_heads * self.shape.head_dim
        return round(values * self._kv_bytes_per_value)

    def kv_tiers(self, chunk: int) -> KvTiers | None:
        """Which pages are in RAM beside prompts in chunks of ``chunk``; None where all are."""
        return None if self.kv_room is None else self.kv_room.tiers(self.shape, self.context, chunk, self.kv_page)

    def kv_parts(self, chunk: int) -> tuple[int, int]:
        """Bytes of the KV cache in memory, and on disk."""
        tiers = self.kv_tiers(chunk)
        bounds = self.kv_cache // self.kv_page * self._page_bounds if self.kv_bounds else 0
        if tiers is None:
            return self.kv_cache + bounds, 0
        beyond = max(0, self.kv_cache // self.kv_page - tiers.pages)
        tables = _TABLE_ENTRY * self.shape.num_layers * -(-self.context // KV_PAGE_TOKENS)
        known = _STRETCH_RECORD * (beyond // tiers.stretch)
        return tiers.memory_pages * self.kv_page + tables + known + bounds, beyond * self.kv_page

    @property
    def _page_bounds(self) -> int:
        """Bytes of what bounds the keys of a page: two bf16 for every channel, in sixteens."""
        return self.shape.num_kv_heads * 4 * -(-self.shape.head_dim // 16) * 16

    def kv_at(self, tokens: int) -> int:
        """Bytes of the KV cache once ``tokens`` are in it; int8 keeps one f32 scale per token and head."""
        return self.shape.kv_nbytes(tokens, self._kv_bytes_per_value)

    @property
    def _kv_bytes_per_value(self) -> float:
        return self.kv_bits / 8 + (4 / self.shape.head_dim if self.kv_bits == 8 else 0)

    def scratch(self, chunk: int, *, on_gpu: bool) -> int:
        """Bytes of activations while ``chunk`` tokens run beside a full cache; f32 on the CPU, bf16 on a GPU.

        The residual stream and what norms and blocks make of it; queries, keys and values; gate, up and their
        product in the widest MLP; what attention needs beside its cache; logits; on a GPU what grouped products
        need, and routers in f32 that guess a layer ahead; on the CPU, routers and norms in f32 beside their stored
        form; the tokens' ids.
        """
        shape, size = self.shape, 2 if on_gpu else 4
        query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        widest = max(shape.shared_intermediate, shape.expert_intermediate, shape.dense_intermediate)
        states = chunk * (6 * shape.hidden_size + 3 * (query + 2 * key) + 3 * widest) * size
        if on_gpu:  # rows per token and choice: arranged, between the halves of an expert, and out of it
            states += chunk * shape.top_k * (2 * shape.hidden_size + shape.expert_intermediate) * size
            states += 4 * len(shape.moe_layers) * shape.num_experts * shape.hidden_size
        attention = self._attention(chunk, size, on_gpu=on_gpu)
        logits = 2 * shape.vocab_size * 4
        plain = (t.elements for t in shape.plain_tensors() if t.role != "embeddings")
        ids = max(0, _IDS * self.context * self.sequences - SLACK // 4)  # up to a million lie in the slack
        return states + attention + logits + ids + (0 if on_gpu else 4 * sum(plain)) + SLACK

    def _attention(self, chunk: int, size: int, *, on_gpu: bool) -> int:
        """Bytes beside the cache. The CPU's own kernels keep the queries and sums of the rows that look at keys
        together, in ``_ATTENTION_BLOCK`` tokens, and of ``_RUNS`` runs of keys that are to be merged, however long the
        context is. Transformers' modules, and a prompt on a GPU, take two masks, and one layer's keys and values as
        attention reads them."""
        shape = self.shape
        width, kv_heads = shape.head_dim, shape.num_kv_heads
        if not on_gpu and shape.layers_on_cpu and self.schemes.get("experts", BF16).kind != "nf4":
            group = shape.num_heads // kv_heads
            heads = min(group, _ATTENTION_ROWS)
            tokens = _ATTENTION_ROWS // heads
            # What is on disk is read once for all of a chunk.
            together = chunk if self.kv_room is not None else min(chunk, _ATTENTION_BLOCK)
            units = kv_heads * -(-group // heads) * -(-together // tokens)
            return 4 * _ATTENTION_ROWS * (units * (3 * width + 4) + _RUNS * (2 * width + 2))
        longest = max((tokens for _, tokens in shape.kv_layers(self.context)), default=0)
        return 2 * chunk * (longest + chunk) + 2 * longest * kv_heads * width * size

    def image_workspace(self, *, on_gpu: bool) -> int:
        """Bytes that looking at pictures takes at most, 0 for a run of text: pixels of ``IMAGE_TILES`` tiles in bf16
        and the rows that two large pictures become; and while one is encoded, the activations of
        ``TILES_AT_ONCE`` tiles and one of the tower's Linears, as stored and as computed with.
        """
        tower = self.shape.vision_tower
        if not self.images or tower is None:
            return 0
        size, width = 2 if on_gpu else 4, tower.hidden_size
        tokens = (tower.image_size // tower.patch_size) ** 2 + 1
        pixels = tower.num_channels * tower.image_size**2
        row = max(self.shape.hidden_size, tower.vision_output_dim)
        states = (
            tokens * (10 * width + 3 * tower.intermediate_size) + tokens**2 * tower.num_attention_heads + 2 * pixels
        )
        linears = (width * tower.intermediate_size, tower.intermediate_size * tower.projector_input_dim)
        largest = max(*linears, tower.projector_output_dim**2, tower.vision_output_dim * self.shape.hidden_size)
        kept = IMAGE_TILES * pixels * 2 + 2 * ROW_TILES * tokens * row * size // 4
        return TILES_AT_ONCE * states * size + largest * (2 + size) + kept + SLACK // 4

    def load(self, *, filled: int, vram_hits: float, hits: float, resident: float, chunk: int = 1) -> Workload:
        """What a token reads with ``filled`` tokens in the KV cache; see Workload for the shares. Prompts come in
        chunks of ``chunk`` tokens."""
        shape, roles = self.shape, self.roles()
        tied = shape.tie_word_embeddings
        dense = {role: size for role, size in roles.items() if role != "vision" and (tied or role != "embeddings")}
        head = shape.vocab_size * shape.hidden_size
        experts = self.schemes.get("experts", BF16)
        return Workload(
            dense=sum(dense.values()),
            kv=self.kv_at(filled),
            expert=self.expert_bytes,
            layers=shape.num_layers,
            moe_layers=len(shape.moe_layers),
            experts=shape.num_experts,
            top_k=shape.top_k,
            dense_weights=sum(linear.weights for linear in shape.dense_linears() if linear.role != "lm_head"),
            head_weights=head,
            expert_weights=shape.expert_weights,
            attention_width=(shape.num_layers - len(shape.chunked_layers)) * shape.num_heads * shape.head_dim,
            chunked_width=len(shape.chunked_layers) * shape.num_heads * shape.head_dim,
            attention_chunk=shape.attention_chunk_size,
            shared=roles.get("shared_expert", 0) // max(1, len(shape.moe_layers)),
            vram_hits=vram_hits,
            hits=hits,
            resident=resident,
            head=roles.get("lm_head", 0) or roles.get("embeddings", 0),
            nf4=experts.kind == "nf4",
            stock=not shape.layers_on_cpu,
            stock_on_gpu=not shape.is_native,
            filled=filled,
            kv_full_token=(shape.num_layers - len(shape.chunked_layers)) * self.kv_page // KV_PAGE_TOKENS,
            kv_ram_tokens=self._kv_ram_tokens(chunk),
        )

    def _kv_ram_tokens(self, chunk: int) -> int | None:
        tiers, shape = self.kv_tiers(chunk), self.shape
        full = shape.num_layers - len(shape.chunked_layers)
        if tiers is None or not full:
            return None
        beyond = max(0, shape.kv_pages(self.context) - tiers.pages) // full * KV_PAGE_TOKENS
        return self.context - beyond


def calibration_nbytes(shape: ModelShape, tokens: int, *, tuned: bool = False) -> dict[str, int]:
    """Bytes that ``quantize --calibrate`` takes for a text of ``tokens`` tokens, by what they are for.

    The dense weights of the whole model in bf16, one layer's routed experts, two streams of hidden states
    and both inputs of an MLP in f32, and the Hessians of one Linear with what is made of them. If ``tuned``
    (``--tune``): a layer's dense weights in f32 with gradients and Adam's two moments, the dense weights they
    make, one expert in f32, and the predictions for a window.
    """
    roles = shape.role_nbytes({})
    dense = sum(size for role, size in roles.items() if role not in ("experts", "vision"))
    widest = max(shape.hidden_size, shape.expert_intermediate, shape.dense_intermediate)
    parts = {
        "dense weights": dense,
        "experts of one layer": shape.num_experts * shape.expert_weights * 2,
        "hidden states": tokens * shape.hidden_size * 16,
        "hessians": 6 * widest * widest * 4,
    }
    if tuned:
        by_layer = Counter[int]()
        for spec in shape.dense_linears():
            if spec.layer is not None:
                by_layer[spec.layer] += spec.out_features * spec.in_features
        parts["tuning"] = 6 * 4 * max(by_layer.values()) + 4 * shape.expert_weights
        parts["tuning"] += 5 * 4 * CALIBRATION_WINDOW * shape.vocab_size
    return parts


def check_calibration(shape: ModelShape, tokens: int, *, counted: bool = True) -> None:
    """Raise InputError if a text of ``tokens`` tokens (about that many, if not ``counted``) is too short to
    calibrate the experts on, saying how many one would see."""
    each = tokens * shape.top_k // max(shape.num_experts, 1)
    about = "" if counted else "about "
    if each < MIN_EXPERT_TOKENS:
        needed = MIN_EXPERT_TOKENS * shape.num_experts // shape.top_k
        raise InputError(
            f"the calibration text has {about}{tokens:,} tokens in whole windows, of which an expert sees "
            f"{each:,} on average: expected at least {MIN_EXPERT_TOKENS}, so a text of {needed:,} tokens"
        )


def granularity(slot_bytes: int) -> int:
    """The bytes in which an expert takes memory where experts differ in size, the largest of ``slot_bytes``: large ones
    lie in huge pages, which no two of them can share."""
    return HUGE_PAGE if slot_bytes >= _LARGE else PAGE


def slot_bytes_of(expert_bytes: int) -> int:
    """An expert in whole pages; one page for what is none, in a dense model."""
    return max(1, -(-expert_bytes // PAGE)) * PAGE
