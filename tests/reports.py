"""Run reports of invented runs, in the sizes that real ones have: Scout's 48 layers of 16 experts, Maverick's
24 of 128, thousands of tokens. The records are made by arithmetic from a seed, the report from them."""

import random

from offload.records import TokenRecord
from offload.run.report import Environment, ExpertMap, Memory, Prediction, RunReport, Subject
from offload.run.speed import Bandwidth
from offload.tiers import Tier

GIB = 2**30


def records(
    tokens: int, *, layers: int = 48, prompt: int = 512, disk: float = 0.04, vram: float = 0.0, seed: int = 7
) -> list[TokenRecord]:
    """A prefill of ``prompt`` tokens and ``tokens`` decode steps, ``disk`` of the expert requests missing."""
    random_ = random.Random(seed)
    rss = 2 * GIB
    steps = [TokenRecord("prefill", 1, "", prompt, 3.1, {"ram": layers * 14, "disk": layers * 2}, {}, rss)]
    for index in range(tokens):
        misses = sum(random_.random() < disk for _ in range(layers))
        on_gpu = sum(random_.random() < vram for _ in range(layers - misses))
        rss = min(rss + misses * 65 * 2**20, 52 * GIB)
        by_tier: dict[Tier, int] = {"vram": on_gpu, "ram": layers - misses - on_gpu, "disk": misses}
        seconds = 0.004 + 0.0011 * by_tier["ram"] + 0.009 * misses + random_.expovariate(1 / 0.0015)
        seconds *= 5 if random_.random() < 0.002 else 1
        read: dict[Tier, int] = {
            "vram": (on_gpu * 65 * 2**20 + 3 * GIB) if vram else 0,
            "ram": by_tier["ram"] * 65 * 2**20 // 3,
            "disk": misses * 65 * 2**20 // 3,
        }
        steps.append(TokenRecord("decode", index, "word ", 1, seconds, by_tier, read, rss, 21 * GIB if vram else 0))
    return steps


def report(
    *,
    tokens: int = 2000,
    layers: int = 48,
    experts: int = 16,
    vram: float = 0.0,
    disk: float = 0.04,
    model: str = "Llama-4-Scout-17B-16E-int4",
    notes: tuple[str, ...] = ("direct I/O is not available on this filesystem: reads go through the page cache",),
) -> RunReport:
    """``layers`` × ``experts`` experts, ``tokens`` decoded tokens; ``vram`` > 0 invents a GPU."""
    random_ = random.Random(11)
    counts = tuple(
        tuple(
            int(tokens / (1 + rank) ** 0.9) if rank < experts - 2 else 0
            for rank in random_.sample(range(experts), experts)
        )
        for _ in range(layers)
    )

    def place(count: int) -> Tier:
        if vram and count > tokens / 4:
            return "vram"
        return "ram" if count > tokens / 9 else "disk"

    return RunReport.of(
        [records(tokens, layers=layers, vram=vram, disk=disk)],
        subject=Subject("bench", "2026-10-02 14:05", model, "0123456789ab", "llama4", experts, 1, 4096, 8.4),
        environment=Environment(
            cpu="AMD Ryzen 9 7950X 16-Core Processor",
            gpu="NVIDIA GeForce RTX 4090" if vram else None,
            threads=16,
            kernel="native avx512-vnni int8 activations",
            platform="Linux 6.8 x86_64",
            versions={"coldstream": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"},
        ),
        bandwidth=Bandwidth(62.3, 6.9, 24.8 if vram else None, 941.0 if vram else None),
        memory=Memory(
            vram={"attention": 6 * GIB, "experts": 12 * GIB, "kv_cache": 2 * GIB} if vram else {},
            ram={
                "experts": 40 * GIB,
                "attention": 3 * GIB,
                "shared_expert": 3 * GIB,
                "embeddings": 2 * GIB,
                "lm_head": 2 * GIB,
                "kv_cache": GIB,
                "router": GIB // 16,
                "framework": GIB // 2,
            },
            disk={
                "experts": 50 * GIB,
                "attention": 3 * GIB,
                "shared_expert": 3 * GIB,
                "embeddings": 2 * GIB,
                "lm_head": 2 * GIB,
                "vision": GIB,
            },
            rss_bytes=52 * GIB,
            peak_rss_bytes=53 * GIB,
            peak_vram_bytes=21 * GIB if vram else 0,
            unaccounted_bytes=300 * 2**20,
        ),
        plan=Prediction(17.2, 190.0, "ram"),
        expert_map=ExpertMap(tuple(range(layers)), counts, tuple(tuple(map(place, row)) for row in counts)),
        notes=notes,
        warmup=1,
    )
