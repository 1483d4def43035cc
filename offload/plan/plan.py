"""Plan: where every byte of a run goes, how fast that will be, and what limits it. Pure Python.

With a GPU, all that every token reads lives on it (attention, shared experts, dense MLPs, norms, routers,
head, KV cache); embeddings stay on the host, of which a token reads one row. What is left of ``vram`` holds
the hottest experts, what is left of ``ram`` the next, and the rest is read from disk when asked for. Without
a GPU the same holds one tier lower. Budgets are hard: what does not fit is refused with the numbers and the
nearest thing that does.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from offload.batch.kv_tiers import KvTiers
from offload.plan.context import ContextPrediction
from offload.plan.placement import PlanRow
from offload.plan.sequences import SequencePrediction
from offload.plan.speed_prediction import Limit, SpeedPrediction
from offload.tiers import TIERS, Key, Tier

__all__ = ["Plan", "PlanRow"]

# What a document has as it is.
_RUN = ("context", "context_asked", "context_limit", "kv_sequences", "kv_bits", "prompt_chunk", "filled")
_SLOTS = ("slot_bytes", "experts", "vram_slots", "ram_slots", "vram_reserve")


@dataclass(frozen=True)
class Plan:
    """A placement that fits, and its prediction.

    ``vram`` and ``ram`` are the budgets in bytes (``vram`` 0 without a GPU); the framework's share of RAM
    lies beside the budget. ``vram_slots`` and ``ram_slots`` count expert slots, of which ``vram_reserve``
    are for what comes and goes. ``vram_seeds`` are the (layer, expert) that VRAM starts with, hottest first;
    swaps may replace them. It is empty without routing counts. ``hit_rates`` are the shares of expert
    requests that each tier is expected to serve. ``gains`` are the decode tokens/s with one more GiB of a
    tier, where that is more. Decode is predicted with ``filled`` tokens in the KV cache, prefill for a
    prompt of as many.

    ``gpu_rows`` is how many intermediate features of an expert in RAM the GPU computes in a decode step, the
    CPU the others; ``prefetch_bytes`` of an expert that will probably be asked for are read into the CPU's
    caches meanwhile. ``guess_tokens``: guess the next token while the disk is waited for, to read for it.
    ``fills``: fill free slots after the first token, instead of as experts are asked for. The KV cache has room for
    ``kv_sequences`` of ``context`` tokens each, ``together`` are the speeds of several, and a token is multiplied with
    ``token_weights``. ``contexts`` are this and others, for comparison; ``context_asked``: somebody said how long,
    and of itself it is never longer than ``context_limit``. ``ram_bytes`` are what experts in RAM take at the most.
    ``kv_tiers`` say which part of the KV cache is on disk, if any may be.
    """

    machine: str
    vram: int
    ram: int
    context: int
    kv_bits: int
    prompt_chunk: int
    filled: int
    rows: tuple[PlanRow, ...]
    slot_bytes: int
    experts: int
    vram_slots: int
    ram_slots: int
    vram_reserve: int
    vram_seeds: tuple[Key, ...]
    hit_rates: Mapping[Tier, float]
    routing_known: bool
    decode: SpeedPrediction
    prefill: SpeedPrediction
    gains: Mapping[Tier, float]
    notes: tuple[str, ...] = ()
    gpu_rows: int = 0
    prefetch_bytes: int = 0
    guess_tokens: bool = True
    fills: bool = True
    kv_sequences: int = 1
    together: tuple[SequencePrediction, ...] = ()
    token_weights: int = 0
    context_asked: bool = True
    context_limit: int = 0
    contexts: tuple[ContextPrediction, ...] = ()
    ram_bytes: int = 0
    kv_tiers: KvTiers | None = None

    @property
    def predicted_tokens_per_s(self) -> float:
        """Decode."""
        return self.decode.tokens_per_s

    @property
    def predicted_prefill_tokens_per_s(self) -> float:
        """Prefill."""
        return self.prefill.tokens_per_s

    @property
    def limited_by(self) -> Limit:
        """What decode spends most of its time on."""
        return self.decode.limited_by

    @property
    def framework_bytes(self) -> int:
        """Host memory beside ``ram``: Python, torch and transformers."""
        return self.total("ram", "framework")

    def total(self, tier: Tier, role: str | None = None) -> int:
        """Bytes in ``tier``, of ``role`` or of all roles."""
        return sum(row.nbytes for row in self.rows if row.tier == tier and role in (None, row.role))

    def table(self) -> dict[Tier, dict[str, int]]:
        """Bytes by tier and role."""
        return {tier: {row.role: row.nbytes for row in self.rows if row.tier == tier} for tier in TIERS}

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, predictions at top level."""
        return {
            "predicted_tokens_per_s": self.predicted_tokens_per_s,
            "predicted_prefill_tokens_per_s": self.predicted_prefill_tokens_per_s,
            "limited_by": self.limited_by,
            "prefill_limited_by": self.prefill.limited_by,
            "bytes": self.table(),
            "total_bytes": {tier: self.total(tier) for tier in TIERS},
            "machine": self.machine,
            "budgets": {"vram": self.vram, "ram": self.ram},
            **{name: getattr(self, name) for name in (*_RUN, *_SLOTS)},
            "pinned": [list(key) for key in self.vram_seeds],
            "hit_rates": dict(self.hit_rates),
            "routing_known": self.routing_known,
            "decode": {**asdict(self.decode), "ms_per_token": self.decode.ms_per_token},
            "prefill": asdict(self.prefill),
            "sequences": [prediction.to_json() for prediction in self.together],
            "contexts": [prediction.to_json() for prediction in self.contexts],
            "with_one_more_gib": dict(self.gains),
            "notes": list(self.notes),
        }
