"""How fast a run will be: bytes over bandwidths, overlapped as the runtime overlaps them.

Decode at batch 1 is bound by memory: what a token reads from each tier ÷ what the tier gives. Prefill is
bound by arithmetic, or by the experts that must be fetched, each once per prompt chunk. Times are seconds,
bandwidths GB/s of 10^9 bytes.

The constants below are the only numbers here that were not measured on the machine at hand. They say what
part of a probed rate the runtime gets, and were fitted to runs of mini-scout on a 2-core Zen 4 (AVX-512
VNNI).
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from offload.hardware.gpu import Gpu
from offload.hardware.probe import Machine
from offload.plan.speed_prediction import Limit, SpeedPrediction
from quant.errors import MachineError

# How experts outside VRAM are computed beside a GPU: the CPU where they lie, the GPU after a copy, or
# both at once.
ColdPath = Literal["split", "cpu", "pcie"]
KERNEL_STEP = 32  # intermediate features that the GPU's kernels share out at once
_WORTH = 1.05  # a split that gains less is not worth its second reader

OF_RAM = 0.97  # a decode step's products against the probe, which only reads and sums
EXPOSED = 0.4  # of a decode step's arithmetic, the part that its reads do not hide
OF_VRAM = 0.85
OF_PCIE = 0.92
OF_DISK = 1.0
OF_GEMM = 0.70  # a prompt's products against the probe's: fewer rows per expert
OF_GPU_COMPUTE = 0.50
NF4_GB_S_PER_CORE = 0.12  # bitsandbytes' nf4 has no fused CPU product: dequantize, then multiply
GUESS_WASTE = 0.1  # bytes read from disk for experts that were guessed and not needed, per needed byte
DECODE_SERIAL = 0.45  # of the shorter of disk and memory time, the part that the two do not overlap
PREFILL_SERIAL = 0.3
CPU_LAYER_S = 0.04e-3  # per layer and step: norms, RoPE, handing work to threads
STEP_S = 0.5e-3  # per token: embedding, sampling, text, the record
STOCK_LAYER_S = 1.0e-3  # the same where transformers' own modules compute attention and routing, on a GPU, too
# Beside a GPU nothing has been measured: these four are estimates.
KERNEL_S = 2.0e-6  # a small kernel of a CUDA graph that waits for the one before it
KERNELS = 15  # of them per layer in offload/decode/gpu_step.py, the products among them
GPU_LAYER_S = KERNELS * KERNEL_S
GPU_STEP_S = 0.3e-3  # from a step's end to the next one's begin: sampling, tables, embedding row, launch
BELL_S = 18e-6  # a miss that the CPU computes: request and answer (11 µs measured), the bus both ways
# While the GPU works, the CPU reads what the next layer will probably ask of it into its caches (--warm).
PREFETCHED_PART = 0.5  # of L2 and L3, at most
FORESEEN = 0.6  # of its experts that a layer asks for, those that were so read: the demo model's guesses
CACHED_GB_S_PER_CORE = 25.0  # the products from L3; 29 measured per core of a Zen 4


@dataclass(frozen=True)
class Workload:
    """What a run reads, in bytes: ``dense`` by every token from its home tier, ``kv`` the cache at the
    length that is predicted for, ``expert`` one expert. ``requests`` counts (layer, expert) requests of a
    token, ``experts`` those there are per layer, ``shared`` the bytes of one layer's shared expert (part of
    ``dense``), ``head`` those of the head (likewise). ``dense_weights``, ``head_weights`` and
    ``expert_weights`` count weights, for arithmetic; ``attention_width`` query values of layers that attend to all,
    ``chunked_width`` of those that do within chunks of ``attention_chunk`` tokens. ``vram_hits`` and ``hits`` are the
    shares of requests that find the expert in VRAM, and in VRAM or RAM. ``sequences`` get a token in each decode
    step, which together ask for ``union`` different experts (None: those of one). ``stock`` and ``stock_on_gpu``:
    transformers' own modules compute attention and routing. There are ``filled`` tokens in the KV cache; of layers
    that attend to everything the latest ``kv_ram_tokens`` are in RAM (None: all), and a token takes ``kv_full_token``
    bytes in all of them.
    """

    dense: int
    kv: int
    expert: int
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    dense_weights: int
    head_weights: int
    expert_weights: int
    attention_width: int
    chunked_width: int
    attention_chunk: int
    shared: int
    vram_hits: float
    hits: float
    resident: float
    head: int = 0
    nf4: bool = False
    sequences: int = 1
    union: float | None = None
    stock: bool = False
    stock_on_gpu: bool = False
    filled: int = 0
    kv_full_token: int = 0
    kv_ram_tokens: int | None = None

    def kv_disk(self, tokens: int) -> int:
        """Bytes of the KV cache that are on disk, and read by each step, once ``tokens`` are in it."""
        return 0 if self.kv_ram_tokens is None else max(0, tokens - self.kv_ram_tokens) * self.kv_full_token

    def layer_s(self, *, on_gpu: bool) -> float:
        """Seconds of a layer that are not bytes or arithmetic."""
        return layer_s(on_gpu=on_gpu, stock=self.stock_on_gpu if on_gpu else self.stock)

    @property
    def requests(self) -> int:
        """(layer, expert) requests of one token."""
        return self.moe_layers * self.top_k

    @property
    def step_requests(self) -> float:
        """(layer, expert) pairs that a decode step of all sequences asks for, each once."""
        return self.requests if self.union is None else self.union

    @property
    def token_weights(self) -> int:
        """Weights that a token is multiplied with."""
        return self.dense_weights + self.head_weights + self.requests * self.expert_weights


def layer_s(*, on_gpu: bool, stock: bool) -> float:
    """Seconds of a layer and step that are not bytes or arithmetic; see ``Workload.stock``."""
    return STOCK_LAYER_S if stock else GPU_LAYER_S if on_gpu else CPU_LAYER_S


def decode(load: Workload, machine: Machine, cold: ColdPath = "split") -> SpeedPrediction:
    """A token of each sequence at a time; beside a GPU one sequence after the other."""
    if machine.gpu is not None:
        load = replace(load, sequences=1, union=None)
    routed, count = load.step_requests * load.expert, load.sequences
    missed = (1 - load.hits) * routed * (1 + GUESS_WASTE)
    disk = (missed + load.kv_disk(load.filled)) / _rate(machine.disk_gb_s, OF_DISK)
    if machine.gpu is None:
        memory: dict[Limit, float] = {
            "ram bandwidth": (load.dense + count * load.kv + routed) / _rate(machine.ram_gb_s, OF_RAM),
            "compute": _arithmetic(load, machine, count * load.token_weights, routed),
            "overhead": load.layers * load.layer_s(on_gpu=False) + count * STEP_S,
        }
        return _prediction(count, memory, disk, DECODE_SERIAL)
    return _beside_gpu(load, machine, machine.gpu, cold, disk)


def _beside_gpu(load: Workload, machine: Machine, gpu: Gpu, cold: ColdPath, disk: float) -> SpeedPrediction:
    """The GPU computes what lies in VRAM; of a miss, which it overlaps with the shared expert, ``cold`` says
    who computes what."""
    vram, pcie = _rate(gpu.vram_gb_s, OF_VRAM), _rate(gpu.h2d_gb_s, OF_PCIE)
    missed = (1 - load.vram_hits) * load.requests
    if cold == "pcie" or load.nf4 or not load.expert:  # a copy, and then the product; in a dense model neither
        share, miss = 0.0, load.expert / pcie + load.expert / vram
    else:
        saved = read_ahead_s(load, machine)
        split = miss_split(machine, load.expert, load.expert_weights, load.shared, saved)
        share = 1.0 if cold == "cpu" else 1 - split.gpu_part
        reading = split.cpu_gb_s if cold == "cpu" else split.gb_s
        saved = min(saved, share * load.expert / (reading * 1e9))
        # The shared expert runs meanwhile; what a miss takes longer is waited for.
        miss = max(0.0, load.expert / (reading * 1e9) + BELL_S - saved - load.shared / vram / load.top_k)
    slow: Limit = "ram bandwidth" if share >= 0.5 else "pcie"
    memory: dict[Limit, float] = {
        "vram bandwidth": (load.dense + load.kv + load.vram_hits * load.requests * load.expert) / vram,
        slow: missed * miss,
        "overhead": load.layers * load.layer_s(on_gpu=True) + GPU_STEP_S,
    }
    return _prediction(1, memory, disk, DECODE_SERIAL, share)


def prefetch_bytes(machine: Machine) -> int:
    """Bytes of a coming miss that the CPU may read into its caches: unproven, no run on a card has shown what
    that is worth."""
    return int(machine.cache_bytes * PREFETCHED_PART)


def with_prefetch_bytes(machine: Machine, nbytes: int) -> Machine:
    """``machine`` as one whose caches have room for ``nbytes`` of a coming miss."""
    return replace(machine, cache_bytes=int(nbytes / PREFETCHED_PART))


def cached_gain(machine: Machine, cpu: float) -> float:
    """Seconds that a byte in the CPU's caches saves against one that it reads at ``cpu`` bytes per second."""
    return max(0.0, 1 / cpu - 1 / _rate(CACHED_GB_S_PER_CORE * machine.cores, 1))


def read_ahead_s(load: Workload, machine: Machine) -> float:
    """Seconds of a missed expert that reading ahead saves, on average: what the host's memory, idle from
    one answer to the next request, has brought into the caches by then, if it was the right expert.

    Idle is the time of a layer's dense part; where the layer before found all its experts in VRAM nothing was
    asked, and theirs as well.
    """
    if machine.gpu is None or load.nf4 or load.vram_hits >= 1:
        return 0.0
    vram, cpu = _rate(machine.gpu.vram_gb_s, OF_VRAM), _cpu_rate(machine, load.expert, load.expert_weights)
    dense = (load.dense + load.kv - load.head) / load.moe_layers - load.shared
    idle = dense / vram + load.layers * load.layer_s(on_gpu=True) / load.moe_layers + BELL_S
    quiet = load.vram_hits**load.top_k
    longer = (load.shared + load.top_k * load.expert) / vram - BELL_S
    in_ram = load.hits - load.vram_hits
    per_layer = load.top_k * in_ram  # experts in RAM that a layer asks for
    if per_layer <= 0:
        return 0.0
    room = min(prefetch_bytes(machine), load.expert * max(1.0, per_layer))
    prefetched = sum(part * min(room, seconds * cpu) for part, seconds in ((1 - quiet, idle), (quiet, idle + longer)))
    known = (load.moe_layers - 1) / load.moe_layers  # nothing is known of the first
    known *= in_ram / (1 - load.vram_hits)  # what comes from disk is in no cache
    return known * FORESEEN * prefetched * cached_gain(machine, cpu) / max(1.0, per_layer)


@dataclass(frozen=True)
class MissSplit:
    """How one missed expert is shared out: ``gpu_part`` of its intermediate rows are read in place over PCIe,
    the CPU computes the others where they lie. Rates are GB/s of packed bytes: ``cpu_gb_s`` of the CPU alone,
    ``pcie_gb_s`` of the GPU alone, ``gb_s`` of both at once with this split."""

    gpu_part: float
    cpu_gb_s: float
    pcie_gb_s: float
    gb_s: float


def rows_of(part: float, inter: int, group: int) -> int:
    """``part`` of ``inter`` rows, in whole groups."""
    return min(inter, round(part * inter / group) * group)


def miss_split(machine: Machine, expert: int, expert_weights: int, shared: int = 0, ahead: float = 0.0) -> MissSplit:
    """The split of an expert of ``expert`` bytes and ``expert_weights`` weights that takes the least time.

    CPU and GPU read the same DIMMs, so both at once get at most ``dimm_rate``, in equal shares where both
    want more than half of it; where the CPU alone takes nearly all, it does everything. The GPU runs the
    shared expert of ``shared`` bytes first, the CPU starts when the doorbell has reached it and gains
    ``ahead`` seconds by what it has in its caches: both are to end together. Raises MachineError without a
    GPU.
    """
    if machine.gpu is None:
        raise MachineError(f"{machine.name} has no GPU: expected one to share missed experts with")
    cpu = _cpu_rate(machine, expert, expert_weights)
    alone, dimm = _rate(machine.gpu.h2d_gb_s, OF_PCIE), dimm_rate(machine)
    pcie = min(alone, max(dimm - cpu, dimm / 2))
    beside = min(cpu, dimm - pcie)
    head_start = BELL_S - ahead - shared / _rate(machine.gpu.vram_gb_s, OF_VRAM)
    # expert · part / pcie = head_start + expert · (1 - part) / beside
    if not expert:  # a dense model has none to share
        return MissSplit(0.0, cpu / 1e9, alone / 1e9, cpu / 1e9)
    part = min(1.0, (head_start + expert / beside) / (expert / beside + expert / pcie))
    if beside + pcie <= cpu * _WORTH or part <= 0:
        return MissSplit(0.0, cpu / 1e9, alone / 1e9, cpu / 1e9)
    return MissSplit(part, cpu / 1e9, alone / 1e9, min(beside / max(1 - part, 1e-9), pcie / part) / 1e9)


def dimm_rate(machine: Machine) -> float:
    """Bytes per second that the host's memory gives to the CPU and the bus together: measured, or no more
    than the CPU's probe found."""
    together = machine.gpu.together_gb_s if machine.gpu and machine.gpu.together_gb_s else machine.ram_gb_s
    return _rate(max(together, machine.ram_gb_s), OF_RAM)


_MOST_CHUNKS = 4096  # that are looked at one by one


def prefill(load: Workload, machine: Machine, tokens: int, chunk: int) -> SpeedPrediction:
    """A prompt of ``tokens`` in chunks of ``chunk``; each expert that a chunk needs is read once for it. Of very many
    chunks those in the middle of equal groups stand for the group."""
    seconds: dict[Limit, float] = {}
    disk = 0.0
    whole = (tokens - 1) // chunk  # chunks before the last
    groups = min(whole, _MOST_CHUNKS)
    bounds = [whole * group // groups for group in range(groups + 1)] if groups else []
    taken = [((first + last - 1) // 2 * chunk, last - first) for first, last in pairwise(bounds)]
    for before, count in [*taken, (whole * chunk, 1)]:
        for name, value in _chunk(load, machine, min(chunk, tokens - before), before, tokens).items():
            if name == "disk":
                disk += value * count
            else:
                seconds[name] = seconds.get(name, 0.0) + value * count
    return _prediction(tokens, seconds, disk, PREFILL_SERIAL)


def _chunk(load: Workload, machine: Machine, tokens: int, before: int, prompt: int) -> dict[Limit, float]:
    # An expert is touched unless none of the chunk's requests falls on it.
    unused = (1 - load.top_k / load.experts) ** tokens if load.experts else 1
    touched = load.experts * (1 - unused) * load.moe_layers
    weights = load.dense_weights * tokens + load.requests * load.expert_weights * tokens
    weights += load.head_weights if before + tokens == prompt else 0
    seen = before + tokens / 2  # on average, by a token of the chunk
    within = seen if before + tokens <= load.attention_chunk else load.attention_chunk / 2
    attended = tokens * (seen * load.attention_width + within * load.chunked_width) * 2
    operations = 2.0 * (weights + attended)
    missed = touched * (1 - scan_hits(load.resident)) * load.expert
    disk = (missed + load.kv_disk(before)) / _rate(machine.disk_gb_s, OF_DISK)
    if machine.gpu is None:
        compute = operations / _rate(machine.int8_gops, OF_GEMM)
        if load.nf4:
            compute += touched * load.expert / _nf4_rate(machine)
        read = (load.dense + touched * load.expert) / _rate(machine.ram_gb_s, OF_RAM)
        overhead = load.layers * load.layer_s(on_gpu=False) + STEP_S
        # Blocks of weights are multiplied while the next are read: the longer of both counts.
        if read > compute:
            return {"ram bandwidth": read, "overhead": overhead, "disk": disk}
        return {"compute": compute, "overhead": overhead, "disk": disk}
    gpu = machine.gpu
    compute = operations / _rate(gpu.bf16_tflops * 1e3, OF_GPU_COMPUTE)
    read = (load.dense + touched * load.expert) / _rate(gpu.vram_gb_s, OF_VRAM)
    copied = touched * (1 - load.vram_hits) * load.expert / _rate(gpu.h2d_gb_s, OF_PCIE)
    overhead = load.layers * load.layer_s(on_gpu=True)
    name: Limit = "pcie" if copied > max(compute, read) else "compute" if compute > read else "vram bandwidth"
    return {name: max(copied, compute, read), "overhead": overhead, "disk": disk}


def scan_hits(resident: float) -> float:
    """Share of experts that a prompt chunk, which passes over all layers, finds in a cache of ``resident`` of
    them: a little less than were there, for what the pass fetches evicts some of what it comes to later.
    Fitted to replays of the default policy (docs/policy.md); under LRU it would be near 0."""
    return max(0.0, resident - 0.09 * (1 - resident))


def _prediction(
    tokens: int, memory: dict[Limit, float], disk: float, serial: float, cpu_share: float | None = None
) -> SpeedPrediction:
    """``serial`` is the part of the shorter of disk and memory time during which the other waits."""
    busy = sum(memory.values())
    total = max(busy, disk) + serial * min(busy, disk)
    seconds = {**memory, "disk": disk}
    limit: Limit = "disk" if disk >= busy else max(memory, key=lambda name: memory[name])
    return SpeedPrediction(tokens / total, {name: s for name, s in seconds.items() if s}, limit, cpu_share)


def _arithmetic(load: Workload, machine: Machine, weights: int, routed: float) -> float:
    """Seconds of multiplying a token with ``weights`` weights, ``routed`` bytes of them in experts, beside
    what it takes to read them."""
    slow = routed / _nf4_rate(machine) if load.nf4 else 0.0
    return EXPOSED * 2 * weights / _rate(machine.int8_gops, 1) + slow


def _cpu_rate(machine: Machine, nbytes: int, weights: int) -> float:
    """Bytes per second of one expert that the CPU computes where it lies."""
    if not nbytes:  # a dense model has none
        return _rate(machine.ram_gb_s, OF_RAM)
    reading = nbytes / _rate(machine.ram_gb_s, OF_RAM)
    return nbytes / (reading + EXPOSED * 2 * weights / _rate(machine.int8_gops, 1))


def _nf4_rate(machine: Machine) -> float:
    return NF4_GB_S_PER_CORE * machine.cores * 1e9


def _rate(gb_s: float, part: float) -> float:
    return gb_s * 1e9 * part
