"""The options that give `quantize` a goal: so many bits, a size, or the memory of a machine."""

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from cli.options.groups import expands
from cli.options.run import Context, Ram, Vram
from cli.options.typed import typed_size
from quant.errors import UsageError
from quant.scheme import LEAST_BITS

TargetBits = Annotated[
    float | None,
    typer.Option(
        "--target-bits",
        metavar="BITS",
        min=0.1,
        help="Choose each part's bits by what they are worth: at most so many per quantized weight in the "
        "mean, scales counted, over all roles that are not named by hand.",
    ),
]
TargetSize = Annotated[
    int | None,
    typer.Option(
        "--target-size", parser=typed_size, metavar="SIZE", help="The same, for a checkpoint of at most this size."
    ),
]
Fit = Annotated[
    str | None,
    typer.Option(
        "--fit",
        metavar="CARD",
        help='The same, the best whose experts all fit memory: of a desktop with this card ("RTX 4090"), or '
        "of this machine (this); with --vram, --ram, --context.",
    ),
]
Speed = Annotated[
    float | None,
    typer.Option(
        "--speed",
        metavar="TOKENS/S",
        min=0.01,
        help="With --fit: the best that is predicted to decode so fast there, whatever lies on disk.",
    ),
]
LeastBits = Annotated[
    int,
    typer.Option(
        "--least-bits",
        metavar="BITS",
        min=2,
        max=LEAST_BITS,
        help="Let routed experts have 3 bits, or 2 and 3, where they are worth no more.",
    ),
]
PerExpert = Annotated[
    bool,
    typer.Option(
        "--per-expert",
        help="Let each expert have bits of its own, 8 for the hot and 4 for the cold. Runs are slower, every "
        "expert takes the memory of the largest, and vLLM cannot serve it.",
    ),
]


@dataclass(frozen=True)
class Goal:
    """What the bits are chosen for: one of ``bits``, ``size`` and ``fit``, the last by memory or by ``speed``."""

    bits: float | None
    size: int | None
    fit: str | None
    per_expert: bool
    vram: int | None
    ram: int | None
    context: int | None
    speed: float | None = None
    least_bits: int = LEAST_BITS

    @classmethod
    def of(cls, **asked: Any) -> "Goal | None":
        """The goal that was asked for, if any. Raises UsageError for two, or for none with options of one."""
        goal = cls(**asked)
        named = [name for name in ("bits", "size", "fit") if asked[name] is not None]
        if len(named) > 1:
            options = {"bits": "--target-bits", "size": "--target-size", "fit": "--fit"}
            raise UsageError(f"{' and '.join(options[name] for name in named)} are two goals: give one")
        extras = [f"--{name}" for name in ("vram", "ram", "context", "speed") if asked[name] is not None]
        if goal.fit is None and extras:
            raise UsageError(f"{' and '.join(extras)} say what --fit is to fit: give --fit, or leave them out")
        for option, given in (("--per-expert", goal.per_expert), ("--least-bits", goal.least_bits < LEAST_BITS)):
            if not named and given:
                raise UsageError(f"{option} needs a goal: --target-bits, --target-size or --fit")
        return goal if named else None


takes_goal = expands(
    "goal",
    {
        "bits": (TargetBits, None),
        "size": (TargetSize, None),
        "fit": (Fit, None),
        "vram": (Vram, None),
        "ram": (Ram, None),
        "context": (Context, None),
        "speed": (Speed, None),
        "per_expert": (PerExpert, False),
        "least_bits": (LeastBits, LEAST_BITS),
    },
    Goal.of,
)
