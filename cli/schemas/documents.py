"""Every key of every document that --json prints, by command: its type, and what it means.

The schemas in this folder and the tables of docs/json.md are made from here:

    python -m cli.schemas.documents
"""

import json
from collections.abc import Iterator
from pathlib import Path

from cli.schemas.parts import MACHINE, MESSAGE, NOTES, PLAN, REPLAY, REPORT, SEEN
from cli.schemas.types import Schema, by, count, flag, many, maybe, number, one_of, record, text, typed, without
from offload.documents import SCHEMA_VERSION

WHY = one_of("why the text ends", "stop", "length", "context")
QUANTIZED: dict[str, Schema] = {
    "path": text("of the checkpoint that was written"),
    "source_bytes": count(),
    "output_bytes": count(),
    "bytes_read": count(),
    "seconds": number(),
    "mb_per_s": number("written"),
    "bits_per_weight": number("of the whole checkpoint"),
    "roles": by(
        "role",
        record(
            scheme=text(),
            tensors=count(),
            relative_error=number("of the stored weights against those of SRC"),
            sqnr_db=maybe(number("null: exact")),
            worst=record(tensor=text(), sqnr_db=maybe(number())),
        ),
        "what rounding did",
    ),
    "notes": NOTES,
}
ALLOCATION = record(
    "with --target-bits, --target-size or --fit",
    judged_by=text(),
    bits=number("per quantized weight"),
    bytes=count(),
    expected_loss=number(),
    units=many(
        record(
            role=text(),
            layer=maybe(count()),
            part=text(),
            expert=maybe(count()),
            scheme=text(),
            bytes=count(),
            loss=number("expected"),
            loss_at_least_bits=number("with the fewest bits"),
        ),
        "what was chosen",
    ),
)
OUTPUT_ERRORS = by(
    "role",
    record(
        calibrated=number("of its outputs on the text, relative"),
        alone=number("the same, had each weight been rounded for itself"),
    ),
    "what rounding does to outputs, with --calibrate",
)
PROFILED: dict[str, Schema] = {
    "out": text("the profile's file"),
    "model_id": text(),
    "tokens": count("that the profile counts"),
    "tokens_run": count("of them in this run"),
    "image_tokens": count("of all, those that are rows of images"),
    "image_overlap": many(
        number("how alike images and text use the experts of a layer, 0 to 1"), "by layer; empty unless both were seen"
    ),
    "seconds": number(),
    "moe_layers": many(count()),
    **SEEN,
    "skew": many(
        record(
            "a layer",
            layer=count(),
            top10=number("share of requests to the most used 10 %"),
            top25=number(),
            top50=number(),
            entropy=number("bits"),
        )
    ),
}
DIVERGENCE: dict[str, Schema] = {
    "tokens": count(),
    "log_ratio": number("ln(perplexity ÷ reference's)"),
    "log_ratio_error": number(),
    "kl_mean": number("divergence of the reference's predictions from the model's, nats per token"),
    "kl_error": number(),
    "kl_median": number(),
    "kl_p90": number(),
    "kl_p99": number(),
    "kl_max": number(),
    "same_top": number("share of tokens whose likeliest is the same"),
    "same_top_error": number(),
    "delta_p_mean": number("change of the true token's probability"),
    "delta_p_rms": number(),
    "buckets": many(
        record(low=number(), high=number(), tokens=count(), kl_mean=number(), same_top=number()),
        "by the reference's top probability",
    ),
    "histogram": by("lower edge in nats", count(), "tokens"),
    "by_position": many(number(), "mean KL over a window"),
    "perplexity": number(),
    "perplexity_error": number(),
    "reference_perplexity": number(),
    "reference_perplexity_error": number(),
}
TRACE = record(name=text(), tokens=count(), layers=count(), **SEEN)
CALIBRATION = record(
    "with --calibrate",
    tokens=count("of the text"),
    tokens_counted=flag("by the model's tokenizer; otherwise a token is taken for four bytes"),
    bytes=by("what they are for", count(), "RAM"),
    total_bytes=count(),
    tuning_bytes=count("more with --tune"),
)
FILES = record(
    "bytes on disk",
    source=maybe(count("what is to be quantized: what is there, or the bf16 checkpoint to download; null for none")),
    stored=count("the quantized checkpoint"),
    converting=maybe(count("both")),
)

DOCUMENTS: dict[str, Schema] = {
    "quantize": without(
        record(**QUANTIZED, allocation=ALLOCATION, output_errors=OUTPUT_ERRORS), "allocation", "output_errors"
    ),
    "profile": record(**PROFILED),
    "plan": without(
        record(
            **PLAN
            | {
                "machine": record("that was planned for", **MACHINE),
                "replayed": record("the run event by event", decode=REPLAY, prefill=REPLAY),
                "model": text(),
                "schemes": by("role", text(), "what weights are, or will be, stored as"),
                "files": FILES,
                "calibration": CALIBRATION,
            }
        ),
        "calibration",
    ),
    "generate": record(**REPORT, prompt_tokens=count(), text=text("the answer"), finish_reason=maybe(WHY)),
    "chat": without(
        record(
            "A chat without a question has command, messages and notes only.",
            **REPORT,
            messages=many(MESSAGE, "the conversation"),
            finish_reason=maybe(WHY),
        ),
        *(key for key in REPORT if key not in ("command", "notes")),
        "finish_reason",
    ),
    "serve": record(
        "When it has ended.",
        command=text(),
        model=text("as clients call it"),
        answers=count("begun or queued"),
        prompt_tokens=count("computed"),
        cached_tokens=count("that the KV cache held"),
        generated_tokens=count(),
    ),
    "bench": without(
        record(
            **REPORT,
            prompt_tokens=count("of each prompt"),
            tokens=count("decoded after each"),
            repeat=count("measured repetitions"),
            filled=count("tokens of random keys and values before each prompt"),
            prompt_cache=record(
                "with --prompt-cache: the last prompt, read from disk",
                tokens=count("read"),
                disk_bytes=count(),
                disk_seconds=number(),
                gb_s=number(),
                fraction_of_disk=maybe(number("of the disk's sequential rate")),
                computed_seconds=number("that computing as many tokens took"),
                speedup=number("computed_seconds ÷ disk_seconds"),
            ),
            arrival=record(
                "with --arriving: a prompt that arrives while others are being answered",
                sequences=count("that are being answered"),
                prompt_tokens=count("of the prompt that arrives"),
                prompt_chunk=count("tokens of it that are run at once"),
                first_token_s=number("from its arrival"),
                longest_gap_ms=number("that one of the others waited for a token"),
                step_ms=number("before it arrived, median"),
                chunk_ms=number("a chunk of the prompt, mean"),
                bound_ms=number("three steps and a chunk: no gap should be longer"),
            ),
            against=record(
                "with --against: the same directory by others",
                engine=text("name and version"),
                ram_bytes=maybe(count("of the budget that it was given; null: what there is")),
                vram_bytes=maybe(count("likewise; 0: no GPU")),
                load_seconds=maybe(number("null: it was not loaded")),
                placed=maybe(record("bytes of weights by accelerate's map", vram=count(), ram=count(), disk=count())),
                prefill_tokens_per_s=maybe(number()),
                tokens_per_s=maybe(number("decoded")),
                ms_per_token_p50=maybe(number("median")),
                peak_rss_bytes=count("resident at most, whatever the budget"),
                failed=maybe(text("why there is no more; null: it ran to the end")),
            ),
        ),
        "prompt_cache",
        "arrival",
        "against",
    ),
    "eval": without(
        record(
            model=text(),
            reference=text(),
            windows=count(),
            window_tokens=count(),
            kv=maybe(text()),
            **DIVERGENCE,
            floor=record("the same of bf16 arithmetic alone: the noise floor", **DIVERGENCE),
            router_agreement=by("layer", number(), "experts in common"),
            seconds=number(),
            notes=NOTES,
            images=record(
                "of rows that --image makes, beside the reference's",
                rows=count(),
                relative_error=number(),
                cosine_mean=number(),
                cosine_min=number(),
            ),
        ),
        "notes",
        "images",
    ),
    "check": record(
        model=text("its directory"), engine=text("its name and version"), loads=flag("true: what fails is an error")
    ),
    "synth": record(path=text(), output_bytes=count(), seconds=number(), mb_per_s=number(), notes=NOTES),
    "probe": record(**MACHINE),
    "simulate": record(
        decode=REPLAY,
        prefill=REPLAY,
        gpu_part=number("of a miss, what the GPU reads in place"),
        planned_tokens_per_s=number("by arithmetic"),
        planned_prefill_tokens_per_s=number("by arithmetic"),
        model=text(),
        stored=text("what weights are stored as, and how that is known"),
        trace=text("routing"),
        notes=NOTES,
        machine=record(**MACHINE),
        plan=record(**PLAN),
    ),
    "rank-policies": record(
        trace=TRACE,
        chunk=count("tokens run at once"),
        slots=many(count(), "cache sizes"),
        slot_bytes=maybe(count("with --model")),
        slots_of_ram=maybe(count("with --ram")),
        hit_rates=by("policy", many(number()), "an entry per cache size"),
        tokens_per_s=by("policy", many(number()), "predicted decode, with --model"),
        regret=by("policy", number(), "hit rate below the clairvoyant bound, mean"),
        best=text("policy with the least regret"),
        default=text("policy of a run"),
    ),
    "demo": record(
        quantize=record(**QUANTIZED),
        profile=record(**PROFILED),
        plan=record(**PLAN),
        generate=record(**REPORT),
        seconds=number(),
        kept=maybe(text("the folder that was kept")),
    ),
    "error": record(
        "Of any command that fails; the exit code is the process's, too.",
        error=record(
            kind=text("UsageError, CheckpointError, BudgetError … or Interrupted"),
            message=text("one line: what was found, what was expected, what to do"),
            exit_code=typed("integer", "1 failed, 2 wrong usage, 130 Ctrl-C"),
        ),
    ),
}


# What several documents have in them stands once in the tables.
SHARED = {"report": REPORT, "plan of a run": PLAN, "machine": MACHINE, "replay": REPLAY["properties"]}


def schema(name: str) -> Schema:
    """The JSON Schema of document ``name``. Keys that it does not list may come with later versions."""
    document = DOCUMENTS[name]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"coldstream {name} --json",
        **document,
        "properties": {"schema_version": {"const": SCHEMA_VERSION}, **document["properties"]},
        "required": ["schema_version", *document["required"]],
    }


def schema_text(name: str) -> str:
    """The file of ``schema``: a line for each key of the document."""
    document = schema(name)
    keys = document.pop("properties")
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in keys.items()]
    head = json.dumps(document, ensure_ascii=False)[:-1]
    return head + ',\n"properties": {\n' + ",\n".join(lines) + "\n}}\n"


def tables() -> str:
    """All documents as the tables of docs/json.md; what several have in them stands there once."""
    parts = {name: record(**keys) for name, keys in SHARED.items()}
    return "\n".join(_section(name, document) for name, document in (DOCUMENTS | parts).items())


def _section(name: str, document: Schema) -> str:
    about = document.get("description")
    head = f"## {name}\n\n" + (f"{about}\n\n" if about else "")
    return head + "| key | type | meaning |\n|---|---|---|\n" + "\n".join(_rows(document, "", name)) + "\n"


def _rows(schema: Schema, prefix: str, section: str) -> Iterator[str]:
    keys = dict(schema.get("properties", {}))
    for name, part in SHARED.items():
        same = [key for key in part if keys.get(key) is part[key]]
        if name != section and len(same) >= len(part) - 1:
            keys = {key: value for key, value in keys.items() if key not in same}
            yield f"| `{prefix}…` | | the keys of a [{name}](#{name.replace(' ', '-')}) |"
    for key, value in keys.items():
        kinds = value.get("type", "one of " + ", ".join(f"`{one}`" for one in value.get("enum", ()) if one))
        kind = kinds if isinstance(kinds, str) else " or ".join(kinds)
        yield f"| `{prefix}{key}` | {kind} | {value.get('description', '')} |"
        inner = value.get("items") or value.get("additionalProperties") or value
        yield from _rows(inner, f"{prefix}{key}{'[]' if 'items' in value else '.*' if inner is not value else ''}.", "")


def main() -> None:
    """Write the schemas beside this file, and the tables to docs/json.md below its introduction."""
    here = Path(__file__).parent
    for name in DOCUMENTS:
        (here / f"{name}.json").write_text(schema_text(name))
    page = here.parents[1] / "docs" / "json.md"
    introduction = page.read_text().partition("## quantize\n")[0]
    page.write_text(introduction + tables())


if __name__ == "__main__":
    main()
