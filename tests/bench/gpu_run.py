"""Whole models on a CUDA card: do its paths agree, and how fast is Scout beside the floor and the prediction.

Speeds, floors and memory come from one process: bandwidths are probed right before the run. The floor of a
token is the time to read its bytes where they lie, VRAM and RAM one after the other, as in
offload/run/speed.py; RAM gives what the CPU and the bus read at once. The floor of a prompt is the longer of
copying its cold experts over the bus and multiplying, at the rate of a large bf16 product.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from offload.decode.gpu import GraphDecoder
from offload.experts.storage.store import ExpertStore
from offload.hardware import cuda_driver as driver
from offload.hardware.probe import Machine, probe
from offload.plan.cost_model import Workload
from offload.plan.plan import Plan
from offload.records import RunOptions, Sampling, TokenRecord
from offload.run.session import Session
from offload.simulator.simulation import Simulation
from offload.tiers import Tier
from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.inventory import schemes_of_tensors
from quant.convert.convert import convert
from quant.model.known_shapes import load_shape
from quant.model.recipe import load_recipe
from quant.model.shape import ModelShape
from quant.synth.synth import synthesize
from tests import sessions

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPE = "scout-rtx4090"
CONTEXT, PROMPT, TOKENS = 4096, 2048, 64
_AGREE, _PROMPTS = 32, 3  # tokens and prompts that are compared
# Where in held_out.txt prompts begin along whose answer the best token leads by far more than bf16 moves
# logits (about 0.1): elsewhere a card may well choose otherwise and be right.
_CLEAR = (53838, 56829, 58823)
_CHARACTERS, _PROMPT_TOKENS = 500, 120
_RAM_PART = 0.8  # of what is free, for slots, embeddings and what lies in memory instead of on a disk
GIB = 2**30


def scout(layers: int) -> dict[str, Any]:
    """Scout's config with its first ``layers`` layers."""
    config = load_shape("scout")
    config = dict(config.get("text_config") or config)
    config["num_hidden_layers"] = layers
    return config


def scout_bytes(layers: int) -> int:
    """What ``scout(layers)`` takes on disk by the recipe."""
    roles = ModelShape.from_config(scout(layers)).role_nbytes(load_recipe(RECIPE).schemes)
    return sum(size for role, size in roles.items() if role != "vision") + 2**26


@dataclass(frozen=True)
class Room:
    """A folder that a model could be written to: bytes free, GB/s of writing, and whether it lies in RAM."""

    folder: Path
    free: int
    gb_s: float
    in_ram: bool

    @classmethod
    def of(cls, folder: Path) -> "Room":
        """Measured by writing half a GiB; nothing is free where that fails (a /dev/shm of 64 MiB, say)."""
        file = folder / f"coldstream-room-{os.getpid()}"
        in_ram = folder.is_relative_to("/dev/shm")
        block = os.urandom(2**22)
        started = time.perf_counter()
        try:
            with file.open("wb") as stream:
                for _ in range(128):
                    stream.write(block)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:
            return cls(folder, 0, 1e-3, in_ram)
        finally:
            file.unlink(missing_ok=True)
        seconds = time.perf_counter() - started
        return cls(folder, shutil.disk_usage(folder).free, 2**29 / seconds / 1e9, in_ram)


def most_layers(rooms: Sequence[Room], ram: int, seconds: float) -> tuple[Room, int]:
    """The room where the most of Scout's 48 layers fit: on its disk, within ``seconds`` of writing, and with
    slots beside it in ``ram`` bytes. 0 layers where not even one does."""

    def fits(room: Room, layers: int) -> bool:
        size = scout_bytes(layers)
        memory = size * (2 if room.in_ram else 1)  # all experts in RAM at the most
        return size < 0.97 * room.free and size / room.gb_s / 1e9 < seconds and memory < _RAM_PART * ram

    found = [(next((n for n in range(48, 0, -1) if fits(room, n)), 0), room) for room in rooms]
    layers, room = max(found, key=lambda one: (one[0], not one[1].in_ram))
    return room, layers


def synth(folders: Sequence[Path], prefix: str, seconds: float) -> dict[str, Any]:
    """Write as much of Scout as fits, where it fits best, in a folder whose name begins with ``prefix``. The
    path is in ``model``."""
    from offload.hardware.system import memory

    rooms = [Room.of(folder) for folder in folders if folder.is_dir() and os.access(folder, os.W_OK)]
    room, layers = most_layers(rooms, memory()[1], seconds)
    if not layers:
        return {"skipped": f"not one layer of Scout ({scout_bytes(1) / GIB:.1f} GiB) fits into any of {rooms}"}
    target = Path(tempfile.mkdtemp(prefix=prefix, dir=room.folder)) / "model"
    report = synthesize(scout(layers), target, load_recipe(RECIPE).schemes)
    return {
        "model": str(target),
        "layers": layers,
        "gib": report.output_bytes / GIB,
        "seconds": report.seconds,
        "mb_per_s": report.mb_per_s,
        "in_ram": room.in_ram,
        "write_gb_s": room.gb_s,
    }


@dataclass
class VramWatch:
    """The most VRAM that the driver saw in use beyond ``before``, sampled while it runs."""

    before: int = field(default_factory=lambda: _used_before())
    peak: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "VramWatch":
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while torch.cuda.is_available() and not self._stop.wait(0.01):
            if not driver.has_context(0):  # the run's own is measured as it is made: none may be there before
                continue
            free, total = torch.cuda.mem_get_info()
            self.peak = max(self.peak, total - free - self.before)


def _used_before() -> int:
    """Bytes in use on the card before this process has a context on it, as far as the driver tells."""
    if not torch.cuda.is_available():
        return 0
    address = driver.bus_id(0)
    free = driver.free_vram(address) if address else None
    total = torch.cuda.get_device_properties(0).total_memory
    # The two libraries do not agree to the MiB on what a card has.
    return max(0, total - free) if free is not None else 0


def demo(folder: Path) -> Path:
    """The demo model, quantized."""
    target = folder / "demo"
    if not target.exists():
        convert(ROOT / "recipes" / "demo", target, load_recipe("demo").schemes)
    return target


def agreement(folder: Path, tokens: int = _AGREE, prompts: int = _PROMPTS) -> dict[str, Any]:
    """Greedy tokens of the demo model by every path, and how far each agrees with the CPU's in f32: all
    experts in VRAM, half of them with the CPU or the GPU computing the rest, and some of that from disk.

    Without a card the same steps run on the CPU's doubles.
    """
    model = demo(folder)
    checkpoint = Checkpoint.open(model)
    count, inter = len(ExpertStore(checkpoint).experts()), checkpoint.shape.expert_intermediate
    everything, half = {"ram_slots": 2, "vram_slots": count}, {"ram_slots": count, "vram_slots": count // 2}
    ways = {
        "cpu": ({"ram_slots": count}, False),
        "graph, all in VRAM": (everything, True),
        "graph, half in VRAM, the CPU computes the rest": (half, True),
        "graph, half in VRAM, the GPU reads the rest in place": (half | {"gpu_rows": inter}, True),
        "graph, a quarter in VRAM, most on disk": ({"ram_slots": 8, "vram_slots": count // 4}, True),
        "no-graph, all in VRAM": (everything, False),
        "no-graph, half in VRAM": (half, False),
    }
    card = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = {}
    for name, (placed, graph) in ways.items():
        device = torch.device("cpu") if name == "cpu" else card
        options = RunOptions(context=512, graph=graph, exact=device.type == "cpu")
        sampling = Sampling(max_tokens=tokens, ignore_eos=True)
        print(name, flush=True)  # to the log: where it was, should it end here
        runs[name] = greedy(model, options, placed, device, sampling, prompts)
    return compared(runs)


def greedy(
    model: Path, options: RunOptions, placed: Mapping[str, int], device: torch.device, sampling: Sampling, prompts: int
) -> dict[str, Any]:
    """Tokens that follow some prompts, and which kernel made them; or why there are none."""
    text = (ROOT / "recipes" / "demo" / "held_out.txt").read_text()
    try:
        with sessions.session(model, options, device.type, **placed) as session:
            found = []
            for start in _CLEAR[:prompts]:
                session.reset()
                prompt = session.encode(text[start : start + _CHARACTERS])[:_PROMPT_TOKENS]
                found.append([record.token_id for record in session.generate(prompt, sampling)])
            return {"tokens": found, "kernel": session.kernel, "notes": list(session.notes)}
    except Exception as error:  # noqa: BLE001  # recorded: one path's failure hides no other's tokens
        why = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
        return {"tokens": [[] for _ in range(prompts)], "kernel": "failed", "notes": [why]}


def compared(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """How many leading tokens each run shares with the first, per prompt; ``identical`` if all do wholly."""
    first = next(iter(runs.values()))["tokens"]
    agreed = {
        name: [
            next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))
            for one, other in zip(first, run["tokens"], strict=True)
        ]
        for name, run in runs.items()
    }
    whole = [len(one) for one in first]
    return {
        "agreed_tokens": agreed,
        "of": whole,
        "identical": all(found == whole for found in agreed.values()),
        "kernels": {name: run["kernel"] for name, run in runs.items()},
        "notes": sorted({note for run in runs.values() for note in run["notes"]}),
    }


def run(
    model: Path,
    vram: int,
    *,
    graph: bool = True,
    in_ram: bool = False,
    rounds: int = 2,
    tokens: int = TOKENS,
    prompt: int = PROMPT,
) -> dict[str, Any]:
    """Decode and prefill of ``model`` within ``vram``, beside floor, prediction and simulation. Without a
    card it runs on the CPU."""
    # In a process of its own: what measuring leaves on the card would count as this run's.
    code = f"import pathlib, offload.hardware.probe as m; m.probe(pathlib.Path({str(model)!r}), refresh=True)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    watch, machine = VramWatch(), probe(model)
    context = max(CONTEXT, prompt + tokens + 1)
    options = RunOptions(vram=vram, context=context, kv="int8", graph=graph, page_cache=in_ram)
    with watch, Session.open(model, options) as session:
        span = session.shape.vocab_size - 200
        ids = [100 + index * 7919 % span for index in range(prompt)]
        list(session.generate(ids[:64], Sampling(max_tokens=8, ignore_eos=True)))
        session.finish_filling()
        runs = []
        for _ in range(rounds + 1):  # the first compiles the kernels of a prompt
            session.reset()
            runs.append(list(session.generate(ids, Sampling(max_tokens=tokens + 1, ignore_eos=True))))
        ahead = warming(session, ids, tokens, runs[1:])
        figures = measured(runs[1:], session.plan, machine, session.shape, schemes_of_tensors(session.checkpoint))
        return {
            **figures,
            "warming": ahead,
            "layers": session.shape.num_layers,
            "kernel": session.kernel,
            "load_seconds": session.load_seconds,
            "notes": [*session.notes, *session.experts.notes],
            "vram_budget": vram,
            "vram_peak": watch.peak,
            "vram_before": watch.before,
            "vram_slots": session.plan.vram_slots,
            "experts": session.plan.experts,
        }


def warming(
    session: Session, ids: Sequence[int], tokens: int, runs: Sequence[Sequence[TokenRecord]]
) -> dict[str, Any] | None:
    """What reading ahead into the CPU's caches brings: ms per token with it (``runs``) and without, the share
    of missed experts that were foreseen, MB read per hint. None where it is not done."""
    if not isinstance(session.decoder, GraphDecoder) or not session.decoder.prefetch_bytes:
        return None
    bell = session.decoder.worker.bell
    counted, budget = bell.prefetched, bell.prefetch_bytes
    bell.prefetch_bytes = 0
    session.reset()
    without = list(session.generate(ids, Sampling(max_tokens=tokens + 1, ignore_eos=True)))
    bell.prefetch_bytes = budget

    def ms(records: Sequence[TokenRecord]) -> float:
        return 1e3 * statistics.median(record.seconds for record in records if record.phase == "decode")

    return {
        "budget": budget,
        "ms_with": ms([record for one in runs for record in one]),
        "ms_without": ms(without),
        "foreseen": counted.foreseen / max(1, counted.asked),
        "mb_per_hint": counted.nbytes / max(1, counted.hints) / 1e6,
        "asked": counted.asked,
    }


def measured(
    runs: Sequence[Sequence[TokenRecord]], plan: Plan, machine: Machine, shape: ModelShape, schemes: Any
) -> dict[str, Any]:
    """Speeds of ``runs``, their floors on ``machine``, and what was planned and simulated of them."""
    decode = [record for run in runs for record in run if record.phase == "decode"]
    prompts = [record for run in runs for record in run if record.phase == "prefill"]
    seconds = statistics.median(record.seconds for record in decode)
    requests = sum(sum(record.by_tier.values()) for record in decode)
    hits = {tier: sum(r.by_tier.get(tier, 0) for r in decode) / max(1, requests) for tier in plan.hit_rates}
    length = prompts[-1].tokens_in
    filled = length + len(decode) // len(runs) // 2
    setup = Simulation.of(shape, schemes, replace(plan, hit_rates=hits, filled=filled), machine)
    floor = decode_floor(setup, hits)
    simulated = setup.decode(TOKENS)
    prompt_s = statistics.median(record.seconds for record in prompts)
    prompt_floor = prefill_floor(setup, prompts[-1])
    prompt_simulated = setup.prefill(length)
    return {
        "decode": {
            "tokens_per_s": 1 / seconds,
            "ms": 1e3 * seconds,
            "floor_ms": 1e3 * floor,
            "of_floor": floor / seconds,
            "hit_rates": hits,
            "planned_tokens_per_s": plan.predicted_tokens_per_s,
            "simulated_tokens_per_s": simulated.tokens_per_s,
            "simulated_over_measured": simulated.tokens_per_s * seconds,
            "simulated_waits_ms": {name: 1e3 * value for name, value in simulated.waited.items()},
        },
        "prefill": {
            "tokens": length,
            "tokens_per_s": length / prompt_s,
            "s": prompt_s,
            "floor_s": prompt_floor,
            "of_floor": prompt_floor / prompt_s,
            "simulated_tokens_per_s": prompt_simulated.tokens_per_s,
        },
        "machine": machine.to_json(),
    }


def decode_floor(setup: Simulation, hits: Mapping[Tier, float]) -> float:
    """Seconds to read a token's bytes where they lie, at the probed rates."""
    machine, load = setup.machine, _load(setup)
    routed = load.requests * load.expert
    host = machine.ram_gb_s
    if machine.gpu is None:
        seconds = (load.dense + load.kv + routed) / host / 1e9
    else:
        host = max(host, machine.gpu.together_gb_s or 0.0)
        seconds = (load.dense + load.kv + hits["vram"] * routed) / machine.gpu.vram_gb_s / 1e9
        seconds += (1 - hits["vram"]) * routed / host / 1e9
    return float(max(seconds, hits["disk"] * routed / machine.disk_gb_s / 1e9))


def prefill_floor(setup: Simulation, record: TokenRecord) -> float:
    """Seconds to copy what a prompt did not find in VRAM, or to multiply, whichever is longer."""
    machine, load = setup.machine, _load(setup)
    operations = 2 * (load.dense_weights + load.requests * load.expert_weights) * record.tokens_in
    if machine.gpu is None:
        return float(operations / machine.int8_gops / 1e9)
    cold = sum(count for tier, count in record.by_tier.items() if tier != "vram")
    copied = cold * load.expert / machine.gpu.h2d_gb_s / 1e9
    return float(max(copied, operations / machine.gpu.bf16_tflops / 1e12))


def _load(setup: Simulation) -> Workload:
    return setup.footprint.load(filled=setup.plan.filled, vram_hits=0, hits=1, resident=1)
