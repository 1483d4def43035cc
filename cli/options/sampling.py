"""The sampling options of generate and chat, written once."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options.groups import expands
from cli.options.typed import typed_texts
from offload.records import Sampling

MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", "-n", min=1, metavar="N", help="Tokens to generate at most (generate: 256)."),
]
Temperature = Annotated[float | None, typer.Option("--temperature", min=0.0, metavar="T", help="0 is greedy.")]
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


@dataclass(frozen=True)
class AskedSampling:
    """What was asked on the command line; the rest is the model's to say."""

    asked: Mapping[str, Any]

    def of(self, model: Path, *, max_tokens: int) -> tuple[Sampling, str]:
        """The sampling of the model in ``model``, and a line that says it; ``max_tokens`` if none were asked.

        Raises CheckpointError for a generation_config.json that is not as it must be.
        """
        from quant.model.generation_config import read_generation_config

        sampling = Sampling(**{"max_tokens": max_tokens, **read_generation_config(model).sampling, **self.asked})
        return sampling, f"sampling: {self._told(sampling)}"

    def _told(self, sampling: Sampling) -> str:
        """The settings in force, and whose they are."""
        from quant.model.generation_config import FILE

        greedy = sampling.temperature == 0
        names = ("repetition_penalty",) if greedy else _TOLD
        told = {name: value for name in names if (value := getattr(sampling, name)) is not None}
        parts: dict[bool, list[str]] = {True: [], False: ["greedy"] if greedy else []}
        for name, value in told.items():
            parts[name not in self.asked].append(f"{name.replace('_', ' ')} {value}")
        asked, recommended = ", ".join(parts[False]), ", ".join(parts[True])
        return "; ".join(part for part in (asked, recommended and f"{recommended} (by {FILE})") if part)


_TOLD = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def asked_sampling(stop: list[str], **values: Any) -> AskedSampling:
    """What was asked. Raises UsageError for a value that cannot be: before a model is looked for."""
    asked = {name: value for name, value in values.items() if value is not None}
    if stop:
        asked["stop"] = tuple(stop)
    Sampling(**asked)
    return AskedSampling(asked)


takes_sampling = expands(
    "sampling",
    {
        "max_tokens": (MaxTokens, None),
        "temperature": (Temperature, None),
        "top_k": (TopK, None),
        "top_p": (TopP, None),
        "min_p": (MinP, None),
        "repetition_penalty": (RepetitionPenalty, None),
        "seed": (Seed, None),
        "stop": (Stop, None),
    },
    asked_sampling,
)
