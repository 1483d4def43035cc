"""RunReport: what a run did, in one frozen object that renders as a table, as JSON and as a page.

Everything in it was measured or counted; what was predicted stands beside it under ``plan``. Sizes are bytes,
bandwidths GB/s of 10^9 bytes, speeds tokens per second.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offload.documents import save
from offload.records import LeftOut, TokenRecord
from offload.run.draft_report import DraftReport
from offload.run.sequence_speed import SequenceSpeed, Together, sequence_speeds
from offload.run.speed import Bandwidth, DecodeSpeed, PrefillSpeed, Run
from offload.tiers import TIERS, Tier


@dataclass(frozen=True)
class Subject:
    """The model that ran, and the run's frame; ``started`` is the local time as people write it."""

    command: str
    started: str
    model: str
    model_id: str
    family: str
    num_experts: int
    top_k: int
    context: int
    load_seconds: float


@dataclass(frozen=True)
class Message:
    """One turn of what was said: ``role`` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class RunRequest:
    """What was asked of the run, and what it answered.

    ``command_line`` is what was typed, quoted for a shell (empty for a run that Python started). ``schemes``
    are what the weights of each role are stored as. ``ram_bytes`` is what the whole process may take of RAM,
    Python and its libraries included, ``vram_bytes`` of VRAM (both 0 if nobody planned the run). ``messages``
    are prompts and answers in order; a benchmark has none.
    """

    command_line: str = ""
    schemes: Mapping[str, str] = field(default_factory=dict)
    ram_bytes: int = 0
    vram_bytes: int = 0
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Environment:
    """What it ran on: processor and GPU by name, the kernel that multiplied, versions by package."""

    cpu: str
    gpu: str | None
    threads: int
    kernel: str
    platform: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Memory:
    """Bytes by tier and role as the run counted them, beside what the operating system says.

    ``rss_bytes`` is the resident size at the end, ``peak_vram_bytes`` the most that the driver counted as
    ours after any step, CUDA's context included. ``unaccounted_bytes`` is what of it the roles in RAM do not
    explain: allocator slack, buffers of libraries; negative where counted memory is not resident.
    """

    vram: Mapping[str, int]
    ram: Mapping[str, int]
    disk: Mapping[str, int]
    rss_bytes: int
    peak_rss_bytes: int
    peak_vram_bytes: int
    unaccounted_bytes: int

    def of(self, tier: Tier) -> Mapping[str, int]:
        """Bytes by role in ``tier``."""
        by_tier: dict[Tier, Mapping[str, int]] = {"vram": self.vram, "ram": self.ram, "disk": self.disk}
        return by_tier[tier]


@dataclass(frozen=True)
class ExpertRequests:
    """How often an expert was asked for, by the tier that held it then. A hit found it in VRAM or RAM."""

    hits: int
    misses: int
    by_tier: Mapping[Tier, int]

    @classmethod
    def of(cls, records: Sequence[TokenRecord]) -> "ExpertRequests":
        """Counted over ``records``."""
        total: Counter[Tier] = Counter()
        for record in records:
            total.update(record.by_tier)
        by_tier = {tier: total[tier] for tier in TIERS}
        return cls(by_tier["vram"] + by_tier["ram"], by_tier["disk"], by_tier)

    @property
    def hit_rate(self) -> float | None:
        """Hits ÷ requests; None if nothing was asked for."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else None


@dataclass(frozen=True)
class Prediction:
    """What the plan said before the run, and which resource it said would limit decode."""

    predicted_tokens_per_s: float | None
    predicted_prefill_tokens_per_s: float | None
    limited_by: str


@dataclass(frozen=True)
class ExpertMap:
    """Use and residency of every expert: ``counts[l][e]`` requests, ``tiers[l][e]`` its last tier.

    ``requests[l]`` says how many of a layer's requests found their expert in each tier (empty if nobody counted).
    """

    moe_layers: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    tiers: tuple[tuple[Tier, ...], ...]
    requests: tuple[Mapping[Tier, int], ...] = ()


@dataclass(frozen=True)
class RunReport:
    """One run's measurements. ``records`` are all measured steps in order, warm-up runs not among them;
    ``doubts`` are what makes a figure unreliable."""

    subject: Subject
    environment: Environment
    prefill: PrefillSpeed
    decode: DecodeSpeed
    bandwidth: Bandwidth
    achieved: Mapping[Tier, float]
    memory: Memory
    experts: ExpertRequests
    decode_experts: ExpertRequests
    plan: Prediction
    expert_map: ExpertMap
    notes: tuple[str, ...]
    records: tuple[TokenRecord, ...]
    request: RunRequest = RunRequest()
    doubts: tuple[str, ...] = ()
    draft: DraftReport | None = None
    sequences: tuple[SequenceSpeed, ...] = ()
    left_out: LeftOut | None = None

    @classmethod
    def of(
        cls,
        runs: Sequence[Run],
        *,
        subject: Subject,
        environment: Environment,
        bandwidth: Bandwidth,
        memory: Memory,
        plan: Prediction,
        expert_map: ExpertMap,
        notes: Sequence[str] = (),
        request: RunRequest = RunRequest(),
        doubts: Sequence[str] = (),
        draft: DraftReport | None = None,
        left_out: LeftOut | None = None,
        warmup: int = 0,
        median: bool = False,
        sequences: Sequence[SequenceSpeed] | None = None,
    ) -> "RunReport":
        """Summarize ``runs``, each the records of one ``generate``.

        ``warmup`` decode steps at the start are left out of the speeds; ``median`` is for runs that repeat
        one another: it takes the median run's rate instead of that of all together. ``sequences`` None are told from
        the runs.
        """
        decode = DecodeSpeed.of(runs, bandwidth, warmup=warmup, median=median)
        records = tuple(record for run in runs for record in run)
        return cls(
            subject=subject,
            environment=environment,
            prefill=PrefillSpeed.of(runs, median=median),
            decode=decode,
            bandwidth=bandwidth,
            achieved=decode.achieved(),
            memory=memory,
            experts=ExpertRequests.of(records),
            decode_experts=ExpertRequests.of([record for record in records if record.phase == "decode"]),
            plan=plan,
            expert_map=expert_map,
            notes=tuple(dict.fromkeys(notes)),
            records=records,
            request=request,
            doubts=tuple(doubts),
            draft=draft,
            left_out=left_out,
            sequences=sequence_speeds(Together(runs), bandwidth) if sequences is None else tuple(sequences),
        )

    @property
    def limited_by(self) -> str:
        """What sets the floor of decode: disk, ram or vram; what the plan says if that is not known."""
        return self.decode.floor_limited_by or self.plan.limited_by

    def prediction_error(self) -> float | None:
        """Measured decode speed over the predicted one, minus 1; None without both."""
        predicted, measured = self.plan.predicted_tokens_per_s, self.decode.tokens_per_s
        return measured / predicted - 1 if predicted and measured else None

    def to_json(self) -> dict[str, Any]:
        """The report as plain data; ``timeline`` has one entry per step in each column."""
        requests = dataclasses.asdict(self.experts)
        return {
            **dataclasses.asdict(self.subject),
            "request": dataclasses.asdict(self.request),
            "prefill": {**dataclasses.asdict(self.prefill), "hit_rate": self.prefill.hit_rate},
            "decode": {**dataclasses.asdict(self.decode), "time_ms": self.decode.time_ms()},
            "sequences": [dataclasses.asdict(speed) for speed in self.sequences],
            "bandwidth": {
                **dataclasses.asdict(self.bandwidth),
                "achieved": {f"{tier}_gb_s": self.achieved.get(tier) for tier in TIERS},
            },
            "memory": dataclasses.asdict(self.memory),
            "experts": {
                **requests,
                "hit_rate": self.experts.hit_rate,
                "decode": {**dataclasses.asdict(self.decode_experts), "hit_rate": self.decode_experts.hit_rate},
            },
            "plan": {**dataclasses.asdict(self.plan), "measured_over_predicted": _plus_one(self.prediction_error())},
            "environment": dataclasses.asdict(self.environment),
            "draft": None if self.draft is None else dataclasses.asdict(self.draft),
            "left_out": None if self.left_out is None else dataclasses.asdict(self.left_out),
            "doubts": list(self.doubts),
            "notes": list(self.notes),
            "expert_map": dataclasses.asdict(self.expert_map),
            "timeline": self.history(),
        }

    def save(self, path: str | Path) -> None:
        """Write the report to ``path``: as a page if it ends in .html, as JSON if in .json. Raises OutputError."""
        save(self, "run", path)

    def history(self) -> dict[str, list[Any]]:
        """The records as columns: phase, tokens, ms, resident bytes, requests and bytes read by tier."""
        columns: dict[str, list[Any]] = {
            "phase": [record.phase for record in self.records],
            "tokens_in": [record.tokens_in for record in self.records],
            "ms": [round(record.seconds * 1e3, 4) for record in self.records],
            "own_ms": [round(record.busy_seconds * 1e3, 4) for record in self.records],
            "sequences": [record.sequences for record in self.records],
            "rss_bytes": [record.rss_bytes for record in self.records],
            "vram_bytes": [record.vram_bytes for record in self.records],
        }
        for tier in TIERS:
            columns[f"requests_{tier}"] = [record.by_tier.get(tier, 0) for record in self.records]
            columns[f"read_{tier}_bytes"] = [record.bytes_read.get(tier, 0) for record in self.records]
        return columns


def _plus_one(error: float | None) -> float | None:
    return None if error is None else error + 1
