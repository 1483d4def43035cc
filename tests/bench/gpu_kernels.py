"""The CUDA kernels against the bandwidth and the arithmetic of the card, at Scout's sizes.

Every figure is the median of several timed runs after one that compiles. Weights are random bytes, several
times what the L2 cache holds, so that every run reads VRAM. On a CPU the kernels' torch references run
instead, at small sizes: that tests this file and measures nothing.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from offload.hardware.gpu import measure_gpu
from quant.kernels.cuda.attention import AttentionScratch, KvRows, decode_attention
from quant.kernels.cuda.experts import HOST, VRAM, ChosenExperts, DecodeScratch, moe_decode
from quant.kernels.cuda.fused import rms_norm
from quant.kernels.cuda.layout import ExpertLayout
from quant.kernels.cuda.linear import cuda_linear
from quant.kernels.cuda.prefill import PrefillScratch, arrange_tokens, combine, group_tokens, moe_prefill
from quant.pack import Packed
from quant.scheme import Scheme

Figures = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured: Scout's dimensions, or small ones where the references stand in. ``experts`` lie in
    VRAM at once, ``prompt`` tokens go through the grouped product."""

    hidden: int = 5120
    inter: int = 8192
    vocab: int = 202048
    heads: int = 40
    kv_heads: int = 8
    head_dim: int = 128
    experts: int = 16
    prompt: int = 2048
    contexts: tuple[int, ...] = (512, 4096, 8192)
    runs: int = 20

    @classmethod
    def small(cls) -> "Sizes":
        """For a machine without a card."""
        return cls(256, 256, 512, 4, 2, 64, 4, 16, (64,), 1)


@dataclass
class Bench:
    """Measures on ``device``; ``vram_gb_s`` is the rate that reads are judged by."""

    device: torch.device
    sizes: Sizes
    vram_gb_s: float = 0.0
    h2d_gb_s: float = 0.0
    tflops: float = 0.0
    notes: list[str] = field(default_factory=list)

    def all(self) -> Figures:
        """Every figure by name; one that fails is recorded as a failure, and the others go on."""
        jobs: dict[str, Callable[[], Figures]] = {
            "bandwidth": self.bandwidth,
            "moe_decode int4, expert in VRAM": lambda: self.moe(4, VRAM),
            "moe_decode int8, expert in VRAM": lambda: self.moe(8, VRAM),
            "moe_decode int4, read in place over PCIe": lambda: self.moe(4, HOST),
            "linear int8, q_proj": lambda: self.linear(8, self.sizes.hidden),
            "linear int4, q_proj": lambda: self.linear(4, self.sizes.hidden),
            "linear int8, head": lambda: self.linear(8, self.sizes.vocab),
            **{
                f"decode_attention {kind}, {context:,} tokens": self._attention(kind, context)
                for kind in ("bf16", "int8")
                for context in self.sizes.contexts
            },
            "grouped prefill int4": lambda: self.prefill(4),
            "small kernel in a graph": self.small_kernel,
        }
        found: Figures = {}
        for name, job in jobs.items():
            print(name, flush=True)  # to the log: where it was, should it end here
            try:
                found[name] = job()
            except Exception as error:  # noqa: BLE001  # recorded: one kernel's failure hides no other's figure
                found[name] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
        return found

    def bandwidth(self) -> Figures:
        """What the card's memory gives to a copy and to a sum, the bus, and the tensor cores."""
        if self.device.type != "cuda":
            return {"skipped": "no CUDA device"}
        gpu = measure_gpu()
        assert gpu is not None
        source = torch.ones(2**30 // 4, device=self.device)
        read = source.nbytes / self._seconds(lambda: source.sum()) / 1e9
        self.vram_gb_s, self.h2d_gb_s, self.tflops = max(read, gpu.vram_gb_s), gpu.h2d_gb_s, gpu.bf16_tflops
        return {
            "read_gb_s": read,
            "copy_gb_s": gpu.vram_gb_s,
            "h2d_gb_s": gpu.h2d_gb_s,
            "d2h_gb_s": gpu.d2h_gb_s,
            "cpu_and_bus_gb_s": gpu.together_gb_s,
            "bf16_tflops": gpu.bf16_tflops,
        }

    def moe(self, bits: int, place: int) -> Figures:
        """One expert of a layer after another for one token."""
        sizes = self.sizes
        layout, slots = self._experts(bits, on_host=place == HOST)
        addresses = self._addresses(slots)
        places = torch.full((len(slots),), place, dtype=torch.uint8, device=self.device)
        gpu_rows = torch.tensor([sizes.inter], dtype=torch.int32, device=self.device)
        x = torch.randn(1, sizes.hidden, device=self.device).bfloat16()
        scores = torch.ones(1, 1, device=self.device)
        chosen = [torch.tensor([[e]], dtype=torch.int32, device=self.device) for e in range(len(slots))]
        asked = [ChosenExperts(one, scores, addresses, places, gpu_rows, scales_input=True) for one in chosen]
        scratch = DecodeScratch.allocate(layout, 1, 1, self.device)
        out = torch.zeros(1, sizes.hidden, device=self.device)

        def step() -> None:
            for one in asked:
                moe_decode(x, one, layout, scratch, out)

        nbytes = layout.nbytes * len(slots)
        limit = self.h2d_gb_s if place == HOST else self.vram_gb_s
        return self._read(nbytes, self._seconds(step), limit, len(slots))

    def linear(self, bits: int, rows: int) -> Figures:
        """A matrix-vector product, through several weights so that none stays in a cache."""
        hidden, group = self.sizes.hidden, 128
        nbytes = rows * hidden * bits // 8 + rows * hidden // group * 2
        count = max(1, -(-(2**29 if self.device.type == "cuda" else 2**16) // nbytes))
        weights = [self._weight(rows, hidden, bits, group) for _ in range(count)]
        x = torch.randn(1, hidden, device=self.device).bfloat16()

        def step() -> None:
            for weight in weights:
                cuda_linear(x, weight)

        return self._read(nbytes * count, self._seconds(step), self.vram_gb_s, count)

    def _attention(self, kind: str, context: int) -> Callable[[], Figures]:
        return lambda: self.attention(kind, context)

    def attention(self, kind: str, context: int) -> Figures:
        """One token over a full cache of ``context`` tokens, layer by layer."""
        sizes = self.sizes
        shape = (sizes.kv_heads, context, sizes.head_dim)
        per_layer = 2 * sizes.kv_heads * context * (2 * sizes.head_dim if kind == "bf16" else sizes.head_dim + 4)
        count = max(1, (2**28 if self.device.type == "cuda" else 1) // per_layer)
        layers: list[KvRows] = []
        for _ in range(count):
            pair = [torch.randn(shape, device=self.device) for _ in range(2)]
            if kind == "bf16":
                layers.append(KvRows(pair[0].bfloat16(), pair[1].bfloat16()))
            else:
                scales = [torch.full((*shape[:2], 1), 0.01, device=self.device) for _ in range(2)]
                stored = [(one * 30).clamp(-127, 127).to(torch.int8) for one in pair]
                layers.append(KvRows(*stored, *scales))
        query = torch.randn(sizes.heads, sizes.head_dim, device=self.device).bfloat16()
        position = torch.tensor([context - 1], dtype=torch.int64, device=self.device)
        scratch = AttentionScratch.allocate(sizes.heads, sizes.head_dim, context, self.device)

        def step() -> None:
            for rows in layers:
                decode_attention(query, rows, position, 0, 0.09, scratch)

        return self._read(per_layer * count, self._seconds(step), self.vram_gb_s, count)

    def prefill(self, bits: int) -> Figures:
        """A prompt's tokens over all experts of a layer."""
        sizes = self.sizes
        layout, slots = self._experts(bits, on_host=False)
        addresses = self._addresses(slots)
        x = torch.randn(sizes.prompt, sizes.hidden, device=self.device).bfloat16()
        chosen = torch.randint(len(slots), (sizes.prompt, 1), device=self.device)
        scores = torch.ones(sizes.prompt, 1, device=self.device)
        scratch = PrefillScratch.allocate(layout, sizes.prompt, self.device)
        out = torch.zeros(sizes.prompt, sizes.hidden, device=self.device, dtype=torch.bfloat16)
        ids = torch.arange(len(slots), dtype=torch.int32, device=self.device)

        def step() -> None:
            groups = group_tokens(chosen, scores, len(slots), scales_input=True)
            arrange_tokens(x, groups, layout, scratch)
            moe_prefill(groups, ids, addresses, layout, scratch, out)
            combine(out, 1)

        seconds = self._seconds(step)
        tflops = 2 * 3 * sizes.hidden * sizes.inter * sizes.prompt / seconds / 1e12
        return {"ms": 1e3 * seconds, "tflops": tflops, "of_bf16_peak": tflops / self.tflops if self.tflops else None}

    def small_kernel(self) -> Figures:
        """Microseconds of a norm of one token in a CUDA graph of many: what a kernel costs that does
        little."""
        if self.device.type != "cuda":
            return {"skipped": "no CUDA device"}
        count = 200
        weight = torch.ones(self.sizes.hidden, device=self.device)
        x = torch.randn(1, self.sizes.hidden, device=self.device)

        def chain() -> None:
            y = x
            for _ in range(count):
                y = rms_norm(y, weight, 1e-5, torch.float32)

        return {"us": 1e6 * self._seconds(chain) / count}

    def _read(self, nbytes: int, seconds: float, limit: float, launches: int) -> Figures:
        rate = nbytes / seconds / 1e9
        return {
            "gb_s": rate,
            "of_bandwidth": rate / limit if limit else None,
            "us_each": 1e6 * seconds / launches,
            "mb_each": nbytes / launches / 1e6,
        }

    def _seconds(self, call: Callable[[], object]) -> float:
        """Median seconds of a call, after one that warms up. On a card it is captured into a CUDA graph
        first, as the runtime does, so that launching from Python does not count, and timed by the card's
        own clock."""
        call()
        run = call
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            run = graph.replay
            run()
        times = []
        for _ in range(self.sizes.runs):
            if self.device.type == "cuda":
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                run()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / 1e3)
            else:
                started = time.perf_counter()
                run()
                times.append(time.perf_counter() - started)
        return float(statistics.median(times))

    def _weight(self, rows: int, columns: int, bits: int, group: int) -> Packed:
        words = torch.randint(-(2**31), 2**31 - 1, (rows, columns * bits // 32), dtype=torch.int32, device=self.device)
        scale = torch.full((rows, columns // group), 0.003, dtype=torch.bfloat16, device=self.device)
        return Packed(Scheme("int4" if bits == 4 else "int8", group), words, scale)

    def _experts(self, bits: int, *, on_host: bool) -> tuple[ExpertLayout, list[Tensor]]:
        """Random experts, each in one piece of memory, and where its tensors lie in it."""
        sizes, scheme = self.sizes, Scheme("int4" if bits == 4 else "int8")
        words = sizes.hidden * sizes.inter * bits // 8
        scales = sizes.hidden * sizes.inter // 128 * 2
        offsets, place = {}, 0
        for name in ("gate_proj", "up_proj", "down_proj"):
            offsets[name, "weight_packed"] = place
            offsets[name, "weight_scale"] = place + words
            place += words + scales
        names = ("gate_proj", "up_proj", "down_proj")
        layout = ExpertLayout.from_offsets(sizes.hidden, sizes.inter, dict.fromkeys(names, scheme), offsets)
        slots = []
        for _ in range(sizes.experts):
            where = torch.device("cpu") if on_host else self.device
            slot = torch.randint(0, 255, (place,), dtype=torch.uint8, device=where)
            for name in names:
                start = offsets[name, "weight_scale"]
                slot[start : start + scales].view(torch.bfloat16).fill_(0.003)
            slots.append(slot.pin_memory() if on_host and self.device.type == "cuda" else slot)
        return layout, slots

    def _addresses(self, slots: list[Tensor]) -> Tensor:
        return torch.tensor([slot.data_ptr() for slot in slots], dtype=torch.int64, device=self.device)
