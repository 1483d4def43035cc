"""The sampling options of generate and chat, written once."""

from typing import Annotated

import typer

from cli.options.groups import expands
from cli.options.typed import typed_texts
from offload.records import Sampling

MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", min=1, metavar="N", help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, metavar="T", help="0 is greedy.")]
TopK = Annotated[int | None, typer.Option("--top-k", min=1, metavar="K", help="Keep the k likeliest tokens.")]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", min=0.0, max=1.0, metavar="P", help="Keep the likeliest tokens up to this mass."),
]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", min=0.0, max=1.0, metavar="P", help="Drop tokens below this part of the likeliest."),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option("--repetition-penalty", min=0.0, metavar="R", help="Above 1 discourages repetition.")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, metavar="N", help="Makes sampling repeatable.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop", metavar="TEXT", callback=typed_texts, help="End at this text or special token; may be given again."
    ),
]

takes_sampling = expands(
    "sampling",
    {
        "max_tokens": (MaxTokens, 256),
        "temperature": (Temperature, 0.0),
        "top_k": (TopK, None),
        "top_p": (TopP, None),
        "min_p": (MinP, None),
        "repetition_penalty": (RepetitionPenalty, None),
        "seed": (Seed, None),
        "stop": (Stop, None),
    },
    lambda stop, **asked: Sampling(stop=tuple(stop or ()), **asked),
)
