"""The options that say how `quantize` finds values: without a text, by an importance matrix, or calibrated."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.options.groups import expands
from cli.options.typed import typed_path
from quant.errors import UsageError

if TYPE_CHECKING:  # it imports torch
    from quant.rounding.rounding import Rounding

Method = Annotated[
    Literal["search", "rtn"], typer.Option("--rounding", help="search: the best without data; rtn: plain absmax.")
]
Calibrate = Annotated[
    Path | None,
    typer.Option("--calibrate", parser=typed_path, metavar="FILE", help="Round by GPTQ on this text (slower, better)."),
]
Tune = Annotated[
    int,
    typer.Option(
        "--tune",
        metavar="PASSES",
        min=0,
        max=100,
        help="After GPTQ, tune dense weights by their layer's output (with --calibrate; 6 is good).",
    ),
]
ImatrixFile = Annotated[
    Path | None,
    typer.Option(
        "--imatrix",
        parser=typed_path,
        metavar="FILE",
        help="Round by how strongly this text excites each input channel; or by a matrix that was saved.",
    ),
]
SaveImatrix = Annotated[
    Path | None, typer.Option("--save-imatrix", parser=typed_path, metavar="FILE", help="Keep it for another run.")
]


@dataclass(frozen=True)
class AskedRounding:
    """A method that needs no text, and what to round by beside it: a text for GPTQ and passes of tuning, or a text or
    file for an importance matrix and where to keep that."""

    rounding: "Rounding"
    calibrate: Path | None
    tune: int
    imatrix: Path | None
    save_imatrix: Path | None

    @classmethod
    def of(cls, **asked: Any) -> "AskedRounding":
        """As the command line gives it. Raises UsageError for options that contradict each other."""
        made = cls(**asked)
        if made.calibrate is not None and made.imatrix is not None:
            raise UsageError("--calibrate already weighs inputs, and more exactly than --imatrix: give one of them")
        if made.tune and made.calibrate is None:
            raise UsageError("--tune goes on from GPTQ: give the text with --calibrate as well")
        if made.save_imatrix is not None and made.imatrix is None:
            raise UsageError("--save-imatrix has nothing to save: give the text with --imatrix")
        return made

    @property
    def text(self) -> Path | None:
        """The text that is run through the model, if any is."""
        if self.imatrix is not None and self.imatrix.suffix != ".safetensors":
            return self.imatrix
        return self.calibrate


takes_rounding = expands(
    "asked",
    {
        "rounding": (Method, "search"),
        "calibrate": (Calibrate, None),
        "tune": (Tune, 0),
        "imatrix": (ImatrixFile, None),
        "save_imatrix": (SaveImatrix, None),
    },
    AskedRounding.of,
)
