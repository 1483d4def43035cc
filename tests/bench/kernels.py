"""Native kernels against the memory floor: ``python -m tests.bench.kernels [--isa avx2] [--only int2] [--json]``.

The floor comes first: what all threads together read from a buffer of huge pages, probed again beside every
decode figure, because shared machines drift. Decode figures are GB/s of weights and scales, prefill ones
Gop/s (two per weight and token), medians over the rounds. Weights lie in huge pages, and one round streams
far more of them than the caches hold. On a busy machine only the fractions mean anything, and those of many
short calls suffer most. The last line of stdout is one JSON document.
"""

import argparse
import json
import mmap
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant.kernels import native
from quant.kernels.native import Attention, AttentionShape, GatedMlp, KvPages, MoeBlock, Weight
from quant.kernels.quantize import quantize_pack
from quant.scheme import Kind, Scheme

HIDDEN, INNER, EXPERTS = 2048, 4096, 16  # mini-scout
HUGE = 2 * 2**20


@dataclass
class Weights:
    """Random weights in one arena of huge pages."""

    nbytes: int
    used: int = 0
    arena: Tensor = field(init=False)

    def __post_init__(self) -> None:
        memory = mmap.mmap(-1, self.nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self.arena = whole[-whole.data_ptr() % HUGE :][: self.nbytes]

    def take(self, kind: Kind, n: int, k: int, group: int = 128) -> Weight:
        """A random ``[n, k]`` weight of ``kind`` in the next free bytes."""
        words, scales = n * k * Scheme(kind).bits // 8, n * k // group * 2
        start = self.used
        self.used += words + scales
        assert self.used <= self.nbytes
        self.arena[start : start + words].random_(0, 255)
        self.arena[start + words : self.used].view(torch.bfloat16).uniform_(0.001, 0.003)
        base = self.arena.data_ptr() + start
        return Weight(kind, group, n, k, base, base + words, self.arena)


def bytes_of(weight: Weight) -> int:
    """Bytes of packed words and scales."""
    values = weight.out_features * weight.in_features
    return values * Scheme(weight.kind).bits // 8 + values // weight.group_size * 2


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def streamed(nbytes: int, call: Callable[[], object], rounds: int) -> dict[str, float]:
    """Median GB/s of a call that reads ``nbytes``, and its fraction of the floor probed beside it."""
    rates, fractions = [], []
    call()
    for _ in range(rounds):
        floor = native.read_bandwidth(1 << 30, 0.05)
        rate = nbytes / statistics.median(seconds(call) for _ in range(3)) / 1e9
        rates.append(rate)
        fractions.append(rate / floor)
    return {"gb_per_s": statistics.median(rates), "fraction_of_floor": statistics.median(fractions)}


def decode_gemv(kind: Kind, tokens: int, rounds: int, group: int = 128) -> dict[str, float]:
    """One large matrix against a few tokens."""
    n = 2**28 * 8 // HIDDEN // Scheme(kind).bits
    weight = Weights(2**29).take(kind, n, HIDDEN, group)
    x, out = torch.randn(tokens, HIDDEN), torch.empty(tokens, n)
    return streamed(bytes_of(weight), lambda: native.linear(x, weight, out=out), rounds)


def in_cache(kind: Kind, tokens: int, rounds: int) -> dict[str, float]:
    """GB/s of weights that one core gets through when they lie in its second-level cache: what arithmetic allows.

    Processor time, so that other programs matter little; the difference of two sizes, so that calling costs nothing.
    """
    sizes = 2048 // Scheme(kind).bits, 512 // Scheme(kind).bits
    weights = Weights(2**21)
    x, used = torch.randn(tokens, HIDDEN), native.threads()
    pairs = [(weights.take(kind, n, HIDDEN), torch.empty(tokens, n)) for n in sizes]
    took = [float("inf")] * len(pairs)
    native.set_threads(1)
    try:
        for _ in range(40 * rounds):
            for index, (weight, out) in enumerate(pairs):
                start = time.thread_time()
                for _ in range(4):
                    native.linear(x, weight, out=out)
                took[index] = min(took[index], (time.thread_time() - start) / 4)
    finally:
        native.set_threads(used)
    return {"gb_per_s_of_one_core": (bytes_of(pairs[0][0]) - bytes_of(pairs[1][0])) / (took[0] - took[1]) / 1e9}


def decode_layers(rounds: int, context: int = 512, layers: int = 8) -> dict[str, float]:
    """Attention and MoE blocks of some mini-scout layers, one token, two experts of each layer in use."""
    weights = Weights(layers * 60 * 2**20)

    def expert() -> GatedMlp:
        pair = (weights.take("int4", INNER, HIDDEN), weights.take("int4", INNER, HIDDEN))
        return GatedMlp(*pair, weights.take("int4", HIDDEN, INNER))

    blocks: list[tuple[Attention, KvPages, MoeBlock]] = []
    table = torch.arange(-(-(context + 1) // 128), dtype=torch.int32)
    for _ in range(layers):
        shape = AttentionShape(16, 4, 128, "interleaved", l2_norm=True)
        q, k, v, o = (weights.take("int4", n, 2048) for n in (2048, 512, 512, HIDDEN))
        attention = Attention(shape, q, k, v, o, norm=torch.ones(HIDDEN))
        router = Weight.from_tensors("bf16", torch.randn(EXPERTS, HIDDEN).bfloat16())
        moe = MoeBlock(router, 1, "sigmoid_input", shared=expert(), norm=torch.ones(HIDDEN))
        experts = [expert(), expert()]
        for e in range(EXPERTS):
            moe.set_expert(e, experts[e % 2])
        keys, values = (torch.randn(len(table), 4, 128, 128).bfloat16() for _ in range(2))
        blocks.append((attention, KvPages(keys, values), moe))
    one = bytes_of(weights.take("int4", INNER, HIDDEN))
    attended = 2 * (2048 * HIDDEN + 512 * HIDDEN) * 66 // 128
    angles = torch.randn(1, 64), torch.randn(1, 64)

    def step() -> None:
        x = torch.randn(1, HIDDEN)
        for attention, cache, moe in blocks:
            result = moe.run(attention.run(x, context, cache, table, *angles))
            assert result.out is not None
            x = result.out

    nbytes = layers * (6 * one + attended + 2 * 2 * 4 * context * 128)
    return {**streamed(nbytes, step, rounds), "layers": layers, "context": context}


def prefill(kind: Kind, n: int, k: int, tokens: int, rounds: int) -> dict[str, float]:
    """One expert's matrix against a prompt."""
    weight = Weights(2**25).take(kind, n, k)
    x, out = torch.randn(tokens, k), torch.empty(tokens, n)
    took = statistics.median(seconds(lambda: native.linear(x, weight, out=out)) for _ in range(rounds + 2))
    return {"gop_per_s": 2 * n * k * tokens / took / 1e9}


def quantizing(kind: Kind, transposed: bool, rounds: int) -> dict[str, float]:
    """bf16 weights of Scout's gate_up_proj shape to packed words; GB/s of source."""
    source = torch.randn(2560, 8192).bfloat16()
    took = statistics.median(seconds(lambda: quantize_pack(source, kind, 128, transposed)) for _ in range(rounds + 2))
    return {"gb_per_s": source.nbytes / took / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", default="", help="instruction set (default: the best)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="figures whose name holds this")
    parser.add_argument("--json", action="store_true", help="only the JSON document")
    options = parser.parse_args()
    native.set_isa(options.isa)
    rounds: int = options.rounds
    jobs: dict[str, Callable[[], dict[str, float]]] = {
        "floor": lambda: {"gb_per_s": native.read_bandwidth(1 << 30, 1.0)},
        "decode int4 g128, 1 token": lambda: decode_gemv("int4", 1, rounds),
        "decode int8 g128, 1 token": lambda: decode_gemv("int8", 1, rounds),
        **{
            f"decode {kind} g128, {tokens} tokens": lambda kind=kind, tokens=tokens: decode_gemv(kind, tokens, rounds)
            for kind, tokens in (("int4", 2), ("int4", 4), ("int4", 8), ("int8", 4))
        },
        **{
            f"decode {kind} g{group}, 1 token": lambda kind=kind, group=group: decode_gemv(kind, 1, rounds, group)
            for kind, group in (("int3", 128), ("int3", 64), ("int2", 64), ("int2", 32))
        },
        **{
            f"from cache {kind} g128, {tokens} tokens": lambda kind=kind, tokens=tokens: in_cache(kind, tokens, rounds)
            for kind in ("int4", "int8", "int3", "int2")
            for tokens in (1, 2, 4, 8)
        },
        "decode layers, mini-scout": lambda: decode_layers(rounds),
        "prefill int4 2048→4096, 512 tokens": lambda: prefill("int4", 4096, 2048, 512, rounds),
        "prefill int4 4096→2048, 512 tokens": lambda: prefill("int4", 2048, 4096, 512, rounds),
        "prefill int4 2048→4096, 32 tokens": lambda: prefill("int4", 4096, 2048, 32, rounds),
        "prefill int8 2048→4096, 512 tokens": lambda: prefill("int8", 4096, 2048, 512, rounds),
        "quantize int4, rows": lambda: quantizing("int4", False, rounds),
        "quantize int4, transposed": lambda: quantizing("int4", True, rounds),
    }
    report: dict[str, object] = {"isa": native.isa(), "threads": native.threads()}
    for name, job in jobs.items():
        if options.only not in name:
            continue
        figures = job()
        report[name] = figures
        if not options.json:
            print(f"{name:38}", "  ".join(f"{unit} {value:.3g}" for unit, value in figures.items()))
    print(json.dumps(report, ensure_ascii=False))


if __name__ == "__main__":
    main()
