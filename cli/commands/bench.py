"""``coldstream bench``: prefill and decode measured apart, beside the floor that memory and disk set."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.options.output import Report, takes_console
from cli.options.run import Model, takes_run_and_prompt_options
from cli.options.typed import typed_path
from cli.terminal.console import Console
from cli.terminal.imports import seldom_collecting
from offload.records import RunOptions, TokenRecord
from quant.errors import UsageError

if TYPE_CHECKING:  # they import torch
    from offload.run.benchmark import Benchmark
    from offload.run.stock_benchmark import StockSpeed

PromptTokens = Annotated[int, typer.Option("--prompt-tokens", min=1, metavar="N", help="Tokens of each prompt.")]
Tokens = Annotated[int, typer.Option("--tokens", min=1, metavar="N", help="Tokens decoded after each prompt.")]
Repeat = Annotated[int, typer.Option("--repeat", min=1, metavar="N", help="Measured repetitions, after one warm-up.")]
Text = Annotated[
    Path | None,
    typer.Option(
        "--text", parser=typed_path, metavar="FILE", help="Text the prompts are cut from (Python source, if left out)."
    ),
]
DraftErrors = Annotated[
    float,
    typer.Option(
        "--draft-errors", min=0.0, max=1.0, metavar="PART", help="Of a recorded answer, the tokens drafted wrongly."
    ),
]

Sequences = Annotated[
    str | None,
    typer.Option("--sequences", metavar="N,N,…", help="Also measure so many sequences at a time, for example 1,2,4,8."),
]
Arriving = Annotated[
    int,
    typer.Option(
        "--arriving",
        min=0,
        metavar="TOKENS",
        help="Also measure a prompt of so many that arrives while 3 are answered.",
    ),
]
Filled = Annotated[
    int,
    typer.Option(
        "--filled",
        min=0,
        metavar="N",
        help="Tokens in the KV cache before each prompt, with random keys and values: what a long context costs.",
    ),
]
Against = Annotated[
    Literal["accelerate"] | None,
    typer.Option(
        "--against",
        help="Also run MODEL by transformers with accelerate's offload, in a process of its own: accelerate.",
    ),
]
_MOST = 16  # sequences in a step


@takes_console
@takes_run_and_prompt_options
def bench(
    model: Model,
    run: RunOptions,
    console: Console,
    prompt_tokens: PromptTokens = 512,
    tokens: Tokens = 64,
    repeat: Repeat = 3,
    text: Text = None,
    draft_errors: DraftErrors = 0.1,
    sequences: Sequences = None,
    arriving: Arriving = 0,
    filled: Filled = 0,
    against: Against = None,
    report: Report = None,
) -> None:
    """Measure MODEL: prefill and decode apart, after a warm-up, as medians with their spread.

    Bandwidths are measured before and after, and the better counts. The floor is the time to read a token's bytes
    at those. With --sequences, several texts at a time follow, each number beside its own floor: the bytes of all
    experts that any of them asks for, or int8 products where these take longer. With --filled, prompts come after
    so many tokens that were not computed. With --draft, tasks are then run with and without drafts: free text,
    quoting, editing, a recorded answer. With --against, one prompt and its tokens are run by transformers before, its
    weights placed by accelerate within the same --ram and --vram, for a quarter of an hour at most.
    """
    from cli.steps.finish import check_page, command_line, finish
    from cli.steps.open_model import find_model, open_session
    from cli.steps.texts import read_text, sample_text
    from cli.terminal.run_summary import INDENT, against_line, arrival_line

    check_page(report)
    if filled and run.prompt_cache is not None:
        raise UsageError("--filled puts random keys and values before the prompts: leave out --prompt-cache")
    path = find_model(model)
    source = read_text(text) if text else sample_text()
    with seldom_collecting():
        from offload.run.collect import account
    from offload.hardware.ledger import forget_peak
    from offload.hardware.probe import probe
    from offload.run.benchmark import Benchmark
    from offload.run.draft_bench import DraftBenchmark
    from offload.run.sequence_bench import SequenceBenchmark
    from quant.architecture.shape import shape_of
    from quant.model.hub import resolve_config

    plan = Benchmark(prompt_tokens, tokens, repeat, filled)
    several = SequenceBenchmark(plan, counts_of(sequences), arriving)
    shape = shape_of(resolve_config(str(path)))
    if run.context is not None or several.counts or arriving or several.context > shape.context():
        run = replace(run, context=max(run.context or 0, plan.context, several.context))
    run = replace(run, sequences=several.sequences)
    other = None
    if against is not None:
        console.step("transformers with accelerate's offload, in a process of its own")
        other = _run_stock(path, run, plan, source)
    console.step("measuring bandwidths")
    probe(path, refresh=True)
    peak_is_clean = forget_peak()
    with open_session(path, run, console, filled or None) as session:
        if not peak_is_clean:
            session.notes.append("the peak of resident memory includes what measuring the machine took")
        runs = plan.run(session, source, console.step)
        drafts = DraftBenchmark(prompt_tokens, tokens, repeat, draft_errors).run(session, source, console.step)
        together = several.run(session, source, console.step)
        arrival = several.arrive(session, source, console.step)
        measured = account(
            session,
            runs,
            command="bench",
            command_line=command_line(),
            again=True,
            median=True,
            draft=drafts,
            together=together,
        )
        console.say()
        extra: dict[str, Any] = {"prompt_tokens": prompt_tokens, "tokens": tokens, "repeat": repeat, "filled": filled}
        if filled:
            console.prose(
                f"behind {filled:,} tokens of random keys and values, which take as long to read as those of a text; "
                "what the model said means nothing"
            )
        loaded = plan.from_disk(session, source)
        if loaded is not None:
            extra["prompt_cache"] = _loaded(loaded, runs[-1][0].seconds, prompt_tokens, measured.bandwidth.disk_gb_s)
            console.prose(f"prompt cache: {_told(extra['prompt_cache'])}")
        if arrival is not None:
            extra["arrival"] = arrival.to_json()
            console.rows([("arrival", arrival_line(arrival))], INDENT)
        if other is not None:
            extra["against"] = other.to_json()
            console.rows([("against", against_line(other, measured))], INDENT)
        finish(measured, console, report, extra)


def _run_stock(path: Path, run: RunOptions, plan: "Benchmark", source: str) -> "StockSpeed":
    """What transformers and accelerate make of the first prompt that is measured here."""
    from offload.run.stock_benchmark import StockBenchmark
    from offload.text.tokenizer import encode, load_tokenizer

    prompt = plan.prompt(encode(load_tokenizer(path), source), 1)
    return StockBenchmark(path, prompt, plan.tokens, run.ram, 0 if run.device == "cpu" else run.vram).run()


def _loaded(record: TokenRecord, computed: float, prompt_tokens: int, disk_gb_s: float | None) -> dict[str, Any]:
    """What reading a prompt took, beside computing as many tokens of it in ``computed`` seconds for all."""
    reused = record.reused
    rate = reused.disk_bytes / reused.disk_seconds / 1e9
    seconds = computed * reused.disk / prompt_tokens
    return {
        "tokens": reused.disk,
        "disk_bytes": reused.disk_bytes,
        "disk_seconds": reused.disk_seconds,
        "gb_s": rate,
        "fraction_of_disk": rate / disk_gb_s if disk_gb_s else None,
        "computed_seconds": seconds,
        "speedup": seconds / reused.disk_seconds,
    }


def _told(found: dict[str, Any]) -> str:
    from cli.terminal.words import number, percent, size

    share = found["fraction_of_disk"]
    of_disk = f", {percent(share)} of the disk's rate" if share else ""
    return (
        f"{found['tokens']:,} tokens ({size(found['disk_bytes'])}) read in {number(found['disk_seconds'])} s{of_disk}; "
        f"computing them takes {number(found['computed_seconds'])} s, {number(found['speedup'])} times as long"
    )


def counts_of(listed: str | None) -> tuple[int, ...]:
    """Numbers of sequences as people list them: ``1,2,4,8``. Raises UsageError for anything else."""
    if listed is None:
        return ()
    parts = [part.strip() for part in listed.split(",")]
    if not all(part.isascii() and part.isdigit() and 1 <= int(part) <= _MOST for part in parts):
        raise UsageError(f"--sequences is {listed!r}: expected numbers from 1 to {_MOST}, as in 1,2,4,8")
    return tuple(sorted({int(part) for part in parts}))
