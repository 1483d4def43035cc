"""From a session and its records to a RunReport: what ledger, system and caches say."""

import platform
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Protocol

import torch

from offload.experts.cache.expert_cache import ExpertCache
from offload.generate.runner import Runner
from offload.hardware.ledger import MemoryLedger, peak_resident_bytes, resident_bytes
from offload.hardware.probe import Machine
from offload.hardware.system import cpu_name
from offload.hardware.vram_limit import VramMeter
from offload.model.page_pool import PagePool
from offload.plan.plan import Plan
from offload.records import RunOptions
from offload.routing.stats import RoutingStats
from offload.run.draft_report import DraftReport
from offload.run.readings import better, doubts, exceeded, read_after
from offload.run.report import Environment, ExpertMap, Memory, Message, Prediction, RunReport, RunRequest, Subject
from offload.run.sequence_speed import Arithmetic, Together, sequence_speeds
from offload.run.speed import Bandwidth, DecodeSpeed, Run
from offload.tiers import TIERS, Key, Tier
from quant.checkpoint.checkpoint import Checkpoint
from quant.kernels import native
from quant.model.families import Role
from quant.model.mixed_precision import MixedPrecision, scheme_of
from quant.model.shape import ModelShape
from quant.scheme import BF16, Scheme

_PACKAGES = ("coldstream", "torch", "transformers", "bitsandbytes", "safetensors")


class Accounted(Protocol):
    """What an account is made of: a session."""

    checkpoint: Checkpoint
    shape: ModelShape
    schemes: Mapping[Role, Scheme]
    options: RunOptions
    plan: Plan
    machine: Machine
    device: torch.device
    context: int
    kernel: str
    load_seconds: float
    notes: list[str]
    ledger: MemoryLedger
    routing: RoutingStats
    experts: ExpertCache
    vram: VramMeter | None
    runner: Runner
    kv_pool: PagePool

    def expert_tiers(self) -> dict[Key, Tier]:
        """Where each expert is now."""


def account(
    session: Accounted,
    runs: Sequence[Run],
    *,
    command: str,
    command_line: str = "",
    messages: Sequence[Message] = (),
    bandwidth: Bandwidth | None = None,
    again: bool = False,
    warmup: int = 0,
    median: bool = False,
    draft: DraftReport | None = None,
    together: Together | None = None,
) -> RunReport:
    """The report of ``runs`` in ``session``.

    ``command_line`` and ``messages`` are told as they are. ``bandwidth`` is what was probed for this run, by
    default what the session's machine was probed at; with ``again``, and where the run was faster than that
    allows, it is read once more now and the better counts. ``draft`` is what a benchmark of drafts found, ``together``
    are the runs that several sequences are judged by, by default all. See RunReport.of for ``warmup`` and ``median``.
    """
    shape = session.shape
    memory = memory_of(session)  # before reading bandwidths again, which takes some
    bandwidth, found = _judged(session, runs, bandwidth or bandwidth_of(session), warmup, again)
    return RunReport.of(
        runs,
        subject=Subject(
            command=command,
            started=time.strftime("%Y-%m-%d %H:%M"),
            model=session.checkpoint.path.resolve().name,
            model_id=session.routing.model_id,
            family=shape.family.name,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            context=session.context,
            load_seconds=session.load_seconds,
        ),
        environment=environment_of(session),
        bandwidth=bandwidth,
        memory=memory,
        plan=prediction_of(session, runs),
        expert_map=expert_map_of(session),
        notes=notes_of(session, runs),
        request=RunRequest(command_line, _schemes(session), *_budgets(session), tuple(messages)),
        doubts=found,
        draft=draft or _draft(session, runs),
        left_out=None if session.kv_pool.bounds is None else session.kv_pool.bounds.left_out,
        warmup=warmup,
        median=median,
        sequences=sequence_speeds(together or Together(runs), bandwidth, _arithmetic(session, together)),
    )


def _arithmetic(session: Accounted, together: Together | None) -> Arithmetic | None:
    """The int8 products of a step, where their rate was measured and the CPU does them all."""
    if together is None or not together.dot_rate or session.device.type != "cpu" or session.options.exact:
        return None
    shape, dense = session.shape, dict[Role, tuple[int, int]]()
    for linear in shape.dense_linears():
        scheme = scheme_of(session.schemes, linear)
        if scheme.is_packed:
            size, weights = dense.get(linear.role, (0, 0))
            dense[linear.role] = size + scheme.nbytes(linear.out_features, linear.in_features), weights + linear.weights
    packed = session.schemes.get("experts", BF16).is_packed
    routed = shape.expert_weights * shape.top_k * len(shape.moe_layers) if packed else 0
    return Arithmetic(together.dot_rate, tuple(dense.values()), routed)


def _judged(
    session: Accounted, runs: Sequence[Run], before: Bandwidth, warmup: int, again: bool
) -> tuple[Bandwidth, list[str]]:
    """The bandwidths to judge ``runs`` by, and what makes them unreliable."""
    speed = DecodeSpeed.of(runs, before, warmup=warmup)
    wanted = list(speed.bytes_per_token) if again else exceeded(speed, before)
    after = read_after(session.checkpoint.path, wanted) if wanted else Bandwidth()
    doubt = [session.machine.doubt] if session.machine.doubt and before == bandwidth_of(session) else []
    bandwidth = better(before, after)
    return bandwidth, doubt + doubts(before, after, DecodeSpeed.of(runs, bandwidth, warmup=warmup))


def notes_of(session: Accounted, runs: Sequence[Run] = ()) -> list[str]:
    """What the run, its plan and the measuring of its machine have to tell."""
    notes = [*session.notes, *session.experts.notes]
    if any(run[-1].finish == "context" for run in runs if run):
        limit = session.shape.max_position_embeddings
        notes.append(
            f"the text was cut off because the context of {session.context:,} tokens was full: give more "
            "with --context" + (f" (the model was made for up to {limit:,})" if limit > session.context else "")
        )
    return [*notes, *session.plan.notes, *session.machine.notes]


def _draft(session: Accounted, runs: Sequence[Run]) -> DraftReport | None:
    drafts = session.runner.drafts
    return None if drafts is None else DraftReport.of(drafts.kind, [record for run in runs for record in run])


def _schemes(session: Accounted) -> dict[str, str]:
    mostly = "mostly " if isinstance(session.schemes, MixedPrecision) else ""
    return {role: f"{mostly}{scheme}" for role, scheme in session.schemes.items()}


def _budgets(session: Accounted) -> tuple[int, int]:
    """Bytes of RAM, Python included, and of VRAM that the run may take."""
    return session.ledger.baseline_rss + session.plan.ram, session.plan.vram


def environment_of(session: Accounted) -> Environment:
    """Processor, GPU, kernel and versions of this process."""
    gpu = torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else None
    return Environment(
        cpu=cpu_name(),
        gpu=gpu,
        threads=session.options.threads or native.threads(),
        kernel=session.kernel,
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        versions={"python": platform.python_version(), **_versions()},
    )


def memory_of(session: Accounted) -> Memory:
    """The ledger's roles, the Python process before the model among them, beside the system's count."""
    entries = session.ledger.snapshot()
    ram = {"process": session.ledger.baseline_rss, **entries["ram"]}
    if "kv_cache" in ram:
        ram["kv_cache"] = session.kv_pool.reached_nbytes
    resident = resident_bytes()
    if session.vram is not None:
        session.vram.used()
    return Memory(
        vram=entries["vram"],
        ram=ram,
        disk=disk_bytes_by_role(session.checkpoint) | session.kv_pool.disk_nbytes,
        rss_bytes=resident,
        peak_rss_bytes=peak_resident_bytes(),
        peak_vram_bytes=session.vram.peak if session.vram is not None else 0,
        unaccounted_bytes=resident - sum(ram.values()),
    )


def disk_bytes_by_role(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of the checkpoint's tensors on disk by role: all of them, whatever else holds a copy."""
    total: Counter[str] = Counter()
    for key, name in checkpoint.names.items():
        total[name.role] += checkpoint.entries[key].nbytes
    return dict(total)


def expert_map_of(session: Accounted) -> ExpertMap:
    """Use of every expert so far, and where it is now."""
    tiers = session.expert_tiers()
    disk: Tier = "disk"
    layers, experts = session.shape.moe_layers, range(session.shape.num_experts)
    requests = session.experts.requests
    return ExpertMap(
        moe_layers=tuple(layers),
        counts=tuple(tuple(int(count) for count in row) for row in session.routing.counts),
        tiers=tuple(tuple(tiers.get((layer, expert), disk) for expert in experts) for layer in layers),
        requests=tuple({tier: requests[layer][tier] for tier in TIERS} for layer in layers),
    )


def prediction_of(session: Accounted, runs: Sequence[Run]) -> Prediction:
    """What the session's plan said. Prefill is predicted for a prompt of some hundred tokens; of ``runs``
    with short ones only it says nothing."""
    plan = session.plan
    longest = max((r.tokens_in for run in runs for r in run if r.phase == "prefill"), default=0)
    prefill = plan.predicted_prefill_tokens_per_s if 2 * longest >= plan.filled else None
    return Prediction(plan.predicted_tokens_per_s, prefill, plan.limited_by)


def bandwidth_of(session: Accounted) -> Bandwidth:
    """What the session's machine was probed at."""
    machine = session.machine
    return Bandwidth(machine.ram_gb_s, machine.disk_gb_s, machine.pcie_gb_s, machine.vram_gb_s)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        if name in sys.modules or name == "coldstream":
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = "not installed"
    return found
