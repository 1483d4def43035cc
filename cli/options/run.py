"""The options of a run, written once, and how a recipe fills in what the command line leaves out."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cli.options.groups import complete, expands
from cli.options.typed import typed_name, typed_path, typed_size
from offload.records import RunOptions
from offload.routing.eviction import DEFAULT_POLICY, POLICIES, check_policy
from quant.errors import ProfileError
from quant.model.known_shapes import shape_names
from quant.model.recipe import load_recipe, recipe_names

WITH_WEIGHTS = "A model directory or a Hub id"
WITH_CONFIG = f"{WITH_WEIGHTS}, a config.json or a shape: {', '.join(shape_names())}"
Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"{WITH_WEIGHTS}.")]
ModelOrShape = Annotated[str, typer.Argument(metavar="MODEL", help=f"{WITH_CONFIG}.")]
Vram = Annotated[
    int | None,
    typer.Option("--vram", parser=typed_size, metavar="SIZE", help="VRAM budget, for example 24GiB; never exceeded."),
]
Ram = Annotated[
    int | None,
    typer.Option("--ram", parser=typed_size, metavar="SIZE", help="RAM budget, for example 64GiB; never exceeded."),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context",
        min=1,
        metavar="TOKENS",
        help="Tokens that a sequence may have (4096, or more where experts leave room, up to what the model knows).",
    ),
]
Kv = Annotated[Literal["bf16", "int8"] | None, typer.Option("--kv", help="How the KV cache is stored (bf16).")]
KvDisk = Annotated[
    Path | None,
    typer.Option(
        "--kv-disk",
        parser=typed_path,
        metavar="DIR",
        help="Keep the older part of the KV cache here, on a fast disk, where RAM has no room for it.",
    ),
]
KvRam = Annotated[
    int | None,
    typer.Option(
        "--kv-ram",
        parser=typed_size,
        metavar="SIZE",
        help="What the KV cache may take of RAM beside that (what experts leave).",
    ),
]
KvEpsilon = Annotated[
    float | None,
    typer.Option(
        "--kv-epsilon",
        metavar="SHARE",
        help="Do not read pages of the KV cache that are proved to weigh less than this in all (0: read everything).",
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        parser=typed_name,
        metavar="NAME|FILE",
        help=f"Schemes and defaults for a run: {', '.join(recipe_names())}, or a TOML file.",
        autocompletion=complete(recipe_names()),
    ),
]
Routing = Annotated[
    Path | None,
    typer.Option(
        "--routing",
        parser=typed_path,
        metavar="FILE",
        help="Routing profile that seeds placement (coldstream profile).",
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"] | None, typer.Option("--device", help="Where to compute (auto: a GPU if any).")
]
Exact = Annotated[
    bool, typer.Option("--exact", help="Keep activations in floating point on the CPU: slower, bit-faithful.")
]
PageCache = Annotated[
    bool, typer.Option("--page-cache", help="Read experts through the page cache instead of direct I/O.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, metavar="N", help="CPU threads (all physical cores).")]
NoGraph = Annotated[
    bool, typer.Option("--no-graph", help="On a GPU, decode layer by layer instead of as one CUDA graph: slower.")
]
PrefetchBytes = Annotated[
    int | None,
    typer.Option(
        "--warm",
        parser=typed_size,
        metavar="SIZE",
        help="Unproven: beside a GPU, read this much of a coming expert into the CPU's caches (half of their size).",
    ),
]
Regain = Annotated[
    bool,
    typer.Option(
        "--regain", help="Unproven: take VRAM again that was given up for another program, once that has left it."
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(
        "--policy",
        metavar="NAME",
        help=f"Which experts to keep: {', '.join(POLICIES)} ({DEFAULT_POLICY}; seeded needs --routing).",
        autocompletion=complete(POLICIES),
    ),
]
PromptChunk = Annotated[
    int | None, typer.Option("--prompt-chunk", min=1, metavar="TOKENS", help="Prompt tokens run at once.")
]
Draft = Annotated[
    Literal["ngram"] | None,
    typer.Option("--draft", help="Try tokens that the text itself suggests, several per step, where that pays."),
]

DraftModel = Annotated[
    Path | None,
    typer.Option(
        "--draft-model",
        parser=typed_path,
        metavar="MODEL",
        help="Try tokens that this smaller model of the same tokenizer suggests, where that pays.",
    ),
]
PromptFolder = Annotated[
    Path | None,
    typer.Option(
        "--prompt-cache",
        parser=typed_path,
        metavar="DIR",
        help="Keep here what is computed of prompts, for later runs.",
    ),
]
PromptSize = Annotated[
    int | None,
    typer.Option(
        "--prompt-cache-size",
        parser=typed_size,
        metavar="SIZE",
        help="What that may take on disk (50GiB); what was used longest ago goes first.",
    ),
]


def run_options(recipe: str | None = None, **asked: Any) -> RunOptions:
    """RunOptions of what was asked on the command line, over what ``recipe`` says.

    Raises RecipeError, UsageError for names that nobody knows, and ProfileError if ``routing`` is no file: before the
    machine is measured and a model loaded for nothing.
    """
    routing: Path | None = asked.get("routing")
    check_policy(asked.get("policy"), seeded=routing is not None)
    if routing is not None and not routing.is_file():
        raise ProfileError(f"{routing} is no file: expected a profile that `coldstream profile` wrote")
    graph = not asked.pop("no_graph", False)
    given = {name: value for name, value in asked.items() if value is not None}
    return RunOptions(graph=graph, **given).over(load_recipe(recipe) if recipe else None)


_MEMORY: dict[str, tuple[Any, Any]] = {
    "vram": (Vram, None),
    "ram": (Ram, None),
    "context": (Context, None),
    "kv": (Kv, None),
    "kv_disk": (KvDisk, None),
    "kv_ram": (KvRam, None),
    "kv_epsilon": (KvEpsilon, 0.0),
}
takes_budgets = expands(
    "options", _MEMORY | {"prompt_chunk": (PromptChunk, None), "draft_model": (DraftModel, None)}, RunOptions
)
_RUN = _MEMORY | {
    "recipe": (Recipe, None),
    "routing": (Routing, None),
    "policy": (Policy, None),
    "device": (Device, None),
    "threads": (Threads, None),
    "prompt_chunk": (PromptChunk, None),
    "exact": (Exact, False),
    "page_cache": (PageCache, False),
    "no_graph": (NoGraph, False),
    "prefetch_bytes": (PrefetchBytes, None),
    "regain": (Regain, False),
    "draft": (Draft, None),
    "draft_model": (DraftModel, None),
}
takes_run_options = expands("run", _RUN, run_options)
takes_run_and_prompt_options = expands(
    "run", _RUN | {"prompt_cache": (PromptFolder, None), "prompt_cache_size": (PromptSize, None)}, run_options
)
