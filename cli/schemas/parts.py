"""What several documents have in them: a machine, a plan, a replayed phase, the report of a run.

Units: bytes; GB/s of 10^9 bytes; seconds, or milliseconds where a name says ms; shares from 0 to 1.
"""

from cli.schemas.types import Schema, by, count, flag, many, maybe, number, one_of, record, text, typed, without

TIERS = "tier (vram, ram, disk)"
NOTES = many(text(), "what has to be said about it, a sentence each")
SEEN = {"num_experts": count("routed experts of a layer"), "top_k": count("experts that a token asks for in a layer")}
LIMIT = one_of(
    "what most of the time goes to", "vram bandwidth", "ram bandwidth", "pcie", "disk", "compute", "overhead"
)
RATES = {
    "ram_gb_s": maybe(number("read from RAM")),
    "disk_gb_s": maybe(number("read from disk, sequential")),
    "vram_gb_s": maybe(number("read from VRAM")),
}
SPREAD = maybe(many(number(), "tokens/s of the slowest and the fastest run"))
GPU = record(
    "the GPU",
    name=text(),
    vram_bytes=count(),
    vram_gb_s=number("read from VRAM"),
    h2d_gb_s=number("pinned copies to the GPU"),
    d2h_gb_s=number("pinned copies back"),
    bf16_tflops=number("dense products, 10^12 operations per second"),
    together_gb_s=maybe(number("what RAM gives to the bus and the CPU at once")),
)
MACHINE: dict[str, Schema] = {
    "version": count("of this record"),
    "name": text("processor, and GPU"),
    "cpu": text(),
    "cores": count("physical"),
    "isa": text("instruction set that the native kernels use"),
    "ram_bytes": count(),
    "ram_available_bytes": count("that the process could take now"),
    "ram_gb_s": number("read from RAM"),
    "disk_gb_s": number("read from disk, sequential, direct"),
    "int8_gops": number("10^9 operations per second of the prefill kernel"),
    "gpu": maybe(GPU),
    "cache_bytes": count("L2 and L3; 0: not known"),
    "measured": flag("false for a machine that was described"),
    "quiet": flag("nothing spoke against the measurement"),
    "notes": NOTES,
    "doubts": count("measurements in a row that were not quiet"),
    "measured_at": number("seconds since 1970; 0 if described"),
    "looked_at": number("when it was last looked at again; seconds since 1970"),
    "pcie_gb_s": maybe(number("to the GPU")),
    "vram_gb_s": maybe(number("read from VRAM")),
}
PREDICTED = {
    "predicted_tokens_per_s": maybe(number("decode")),
    "predicted_prefill_tokens_per_s": maybe(number("prefill; null where the prompt was too short to compare")),
    "limited_by": {**LIMIT, "enum": [*LIMIT["enum"], ""]},
}
SPEED = {
    "tokens_per_s": number(),
    "seconds": by("limit", number(), "seconds of a step"),
    "limited_by": LIMIT,
    "cpu_share": maybe(number("of what is not in VRAM, what the CPU computes")),
}
PLAN: dict[str, Schema] = {
    **PREDICTED,
    "prefill_limited_by": LIMIT,
    "bytes": by(TIERS, by("role", count(), "bytes"), "where every byte is; disk: what is nowhere else"),
    "total_bytes": by(TIERS, count(), "their sums"),
    "machine": text("its name"),
    "budgets": record("in bytes", vram=count("0 without a GPU"), ram=count("without Python and its libraries")),
    "context": count("tokens that a sequence may have"),
    "context_asked": flag("somebody said so; otherwise it is the longest that costs no speed"),
    "context_limit": count("tokens that it never exceeds of itself: those that the model was made for, as a rule"),
    "kv_sequences": count("of that many tokens, that the KV cache has room for"),
    "kv_bits": count("bits per value of the KV cache"),
    "prompt_chunk": count("prompt tokens run at once"),
    "filled": count("tokens in the KV cache that speeds are predicted for"),
    "slot_bytes": count("of one expert in memory"),
    "experts": count("routed experts of all layers"),
    "vram_slots": count("expert slots"),
    "ram_slots": count("expert slots"),
    "vram_reserve": count("of vram_slots, those that hold no expert for good"),
    "pinned": many(many(count()), "(layer, expert) that VRAM starts with, hottest first"),
    "hit_rates": by(TIERS, number(), "expected share of expert requests"),
    "routing_known": flag("a routing profile was given"),
    "decode": record("one token at a time", **SPEED, ms_per_token=number()),
    "prefill": record("a prompt of ``filled`` tokens", **SPEED),
    "sequences": many(
        record(
            "decode with so many sequences in each step",
            n=count(),
            tokens_per_s=number("of all together"),
            experts_per_step=number("requests, each expert of a layer once"),
            limited_by=LIMIT,
            per_sequence_tokens_per_s=number(),
        ),
        "as expected if sequences choose their experts independently",
    ),
    "contexts": many(
        record(
            "a run with room for so many tokens",
            context=count("tokens"),
            kv_bytes=count("of its KV cache"),
            experts=count("routed experts in VRAM and RAM"),
            tokens_per_s=number("decode with ``filled`` tokens in the KV cache"),
            full_tokens_per_s=number("decode once it is full"),
            fill_seconds=number("computing a prompt that fills it"),
        ),
        "this context, twice as many and others, as far as they fit",
    ),
    "with_one_more_gib": by(TIERS, number(), "decode tokens/s with a GiB more, where that is more"),
    "notes": NOTES,
}
REPLAY = record(
    "a phase, replayed event by event",
    tokens=count(),
    tokens_per_s=number(),
    waited=by("cause", number(), "seconds per token"),
    used=by("resource", number(), "share of what it could have moved"),
    moved=by("resource", number(), "bytes (operations, of arithmetic) per token"),
    hit_rates=by(TIERS, number(), "share of expert requests"),
    swaps_per_token=number("experts copied into VRAM"),
    token_seconds=many(number(), "every token"),
    ms_per_token=number(),
    limited_by=LIMIT,
)
MESSAGE = without(
    record(
        "a turn",
        role=one_of("who speaks", "system", "user", "assistant"),
        content=text(),
        images=many(text("a path"), "images that come before the text"),
        videos=many(text("a path"), "videos that come before the text"),
    ),
    "images",
    "videos",
)
SEQUENCES = many(
    record(
        "decode steps of so many sequences",
        n=count("sequences in the step"),
        steps=count(),
        tokens_per_s=number("of all together"),
        per_sequence_tokens_per_s=number("of each, as its reader sees them come"),
        ms_per_step_p50=number("median"),
        experts_per_step=number("requests, each expert of a layer once"),
        bytes_per_step=by(TIERS, count(), "bytes read"),
        floor_ms_per_step=maybe(number("the least that a step can take")),
        floor_limited_by=maybe(LIMIT),
        fraction_of_floor=maybe(number("floor ÷ median")),
        ram_gb_s=maybe(number("by which the floor is told: read beside these runs, if all experts are in RAM")),
        read_ms_per_step=maybe(number("the least that reading takes")),
        products_ms_per_step=maybe(number("the least that int8 products take; in the floor, of each role the longer")),
    ),
    "by the number of sequences",
)
REQUESTS = {
    "hits": count("requests that found the expert in VRAM or RAM"),
    "misses": count("requests that had to read the disk"),
    "by_tier": by(TIERS, count(), "requests"),
    "hit_rate": maybe(number("hits ÷ requests")),
}
DRAFTED: dict[str, Schema] = {
    "drafted": count("tokens that were tried ahead"),
    "accepted": count("of them, those that were right"),
    "acceptance": maybe(number("accepted ÷ drafted; null if nothing was drafted")),
    "tokens_per_step": maybe(number("of decode")),
}
COLUMN = many(count())
REPORT: dict[str, Schema] = {
    "command": text(),
    "started": text("local time"),
    "model": text("its directory's name"),
    "model_id": text("the model, whatever it is stored as"),
    "family": text(),
    **SEEN,
    "context": count("tokens that the KV cache holds"),
    "load_seconds": number(),
    "request": record(
        "what was asked",
        command_line=text("quoted for a shell; empty for a run that Python started"),
        schemes=by("role", text(), "what weights are stored as"),
        ram_bytes=count("budget, Python included"),
        vram_bytes=count("budget"),
        messages=many(MESSAGE, "prompts and answers in order"),
    ),
    "prefill": record(
        "prompts",
        tokens=count("computed"),
        seconds=number(),
        tokens_per_s=maybe(number()),
        spread=SPREAD,
        reused=record(
            "prompt tokens that were not computed",
            memory=count("that the KV cache held"),
            disk=count("read from the prompt cache"),
            disk_bytes=count("read for them"),
            disk_seconds=number(),
        ),
        hit_rate=maybe(number("reused ÷ all prompt tokens")),
    ),
    "decode": record(
        "tokens made one by one, without the first of each text (prefill makes it) and warm-up",
        tokens=count("timed"),
        seconds=number(),
        tokens_per_s=maybe(number()),
        spread=SPREAD,
        ms_per_token_p50=maybe(number("median")),
        ms_per_token_p90=maybe(number()),
        ms_per_token_min=maybe(number()),
        ms_per_token_max=maybe(number()),
        bytes_per_token=by(TIERS, count(), "bytes read"),
        floor_ms_by_tier=by(TIERS, number(), "ms to read them"),
        floor_ms_per_token=maybe(number("the least that a token can take")),
        floor_limited_by=maybe(LIMIT),
        fraction_of_floor=maybe(number("floor ÷ median; above 1 the bandwidths are unreliable")),
        time_ms=by("part (vram, ram, disk, rest)", number(), "where a token's time went"),
    ),
    "sequences": SEQUENCES,
    "bandwidth": record(
        "measured", **RATES, pcie_gb_s=maybe(number("to the GPU")), achieved=record("by decode", **RATES)
    ),
    "memory": record(
        "bytes",
        vram=by("role", count(), "bytes"),
        ram=by("role", count(), "bytes"),
        disk=by("role", count(), "bytes of the checkpoint's files, whatever else holds a copy"),
        rss_bytes=count("resident at the end"),
        peak_rss_bytes=count(),
        peak_vram_bytes=count("as the driver counts"),
        unaccounted_bytes=typed("integer", "resident beside what ``ram`` lists; negative where that is not resident"),
    ),
    "experts": record("requests of prefill and decode", **REQUESTS, decode=record("those of decode", **REQUESTS)),
    "plan": record("said before the run", **PREDICTED, measured_over_predicted=maybe(number("decode"))),
    "environment": record(
        cpu=text(),
        gpu=maybe(text()),
        threads=count(),
        kernel=text("that multiplied"),
        platform=text(),
        versions=by("package", text(), "versions"),
    ),
    "draft": maybe(
        record(
            "what came of drafts; null without --draft and --draft-model",
            kind=text("ngram: from the text itself; model: from a draft model"),
            **DRAFTED,
            speedup=maybe(number("over all tasks; null where nothing ran without drafts")),
            tasks=by(
                "task (free, quote, edit, recorded)",
                record(
                    kind=text("recorded: an answer drafted back, some tokens wrong"),
                    **DRAFTED,
                    tokens_per_s=number("decode, median"),
                    plain_tokens_per_s=number("without drafts"),
                    speedup=number(),
                ),
                "with bench",
            ),
        )
    ),
    "left_out": maybe(
        record(
            "what decode steps did not read of the KV cache since the model was loaded; null without --kv-epsilon",
            epsilon=number("that was allowed"),
            pages=count("that they could see, counted for each KV head and token"),
            left_out=count("of these"),
            left_out_bytes=count("keys and values"),
            greatest_share=number("of a softmax that those of one token can have had"),
        )
    ),
    "doubts": many(text(), "what makes a bandwidth or the floor unreliable"),
    "notes": NOTES,
    "expert_map": record(
        "a row per MoE layer",
        moe_layers=many(count()),
        counts=many(many(count()), "requests of each expert"),
        tiers=many(many(one_of("", "vram", "ram", "disk")), "where each is at the end"),
        requests=many(by(TIERS, count(), "requests")),
    ),
    "timeline": record(
        "a column per quantity, an entry per step",
        phase=many(one_of("", "prefill", "decode")),
        tokens_in=COLUMN,
        ms=many(number(), "that a reader waited"),
        own_ms=many(number(), "of the model's time, which sequences in a step divide among themselves"),
        sequences=COLUMN,
        rss_bytes=COLUMN,
        vram_bytes=COLUMN,
        **{f"requests_{tier}": COLUMN for tier in ("vram", "ram", "disk")},
        **{f"read_{tier}_bytes": COLUMN for tier in ("vram", "ram", "disk")},
    ),
}
