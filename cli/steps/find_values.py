"""How `quantize` finds values: what its options name is read at once, and measured or calibrated when it is time."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cli.options.rounding import AskedRounding
from cli.terminal.console import Console
from cli.terminal.progress import progress_bar
from quant.sizes import format_size

if TYPE_CHECKING:  # they import torch
    from offload.quality.windows import Windows
    from quant.checkpoint.checkpoint import Checkpoint
    from quant.model.families import Role
    from quant.rounding.imatrix import Imatrix
    from quant.rounding.rounding import Rounder
    from quant.scheme import Scheme


@dataclass
class Values:
    """What values are found by: the text in whole windows and the importance matrix, as far as there are any."""

    checkpoint: "Checkpoint"
    asked: AskedRounding
    windows: "Windows | None"
    imatrix: "Imatrix | None"
    output_errors: "Mapping[Role, Mapping[str, float]]" = field(default_factory=dict)  # by role, of a calibration

    @classmethod
    def read(cls, checkpoint: "Checkpoint", asked: AskedRounding) -> "Values":
        """Read the text or the matrix. Raises InputError if it cannot be used for this model."""
        windows = None if asked.text is None else _windows(checkpoint.path, asked.text)
        matrix = None
        if asked.calibrate is not None and windows is not None:
            from offload.plan.footprint import check_calibration

            check_calibration(checkpoint.shape, windows.tokens)
        if asked.imatrix is not None and windows is None:
            from quant.rounding.imatrix import Imatrix

            matrix = Imatrix.load(asked.imatrix, checkpoint.identity)
        return cls(checkpoint, asked, windows, matrix)

    @property
    def name(self) -> str:
        """What the finished checkpoint's report will call it; the same text and options give the same."""
        from quant.rounding.imatrix import imatrix_name
        from quant.rounding.prepared import gptq_name

        if self.asked.calibrate is not None and self.windows is not None:
            return gptq_name(self.windows.identity, self.asked.tune)
        text = self.windows.identity if self.windows else self.imatrix.text if self.imatrix else None
        return self.asked.rounding if text is None else imatrix_name(text)

    def rounder(self, console: Console) -> "Rounder":
        """How values are found where no calibration has found them; measures the matrix of a text."""
        from quant.rounding.rounding import make_rounder

        plain = make_rounder(self.asked.rounding, self.checkpoint)
        if self.asked.imatrix is None:
            return plain
        from quant.rounding.imatrix import Weighted

        if self.imatrix is None:
            self.imatrix = self._measured(console)
        return Weighted(self.imatrix, plain)

    def _measured(self, console: Console) -> "Imatrix":
        from offload.quality.importance import measure_importance

        assert self.windows is not None
        console.step(f"measuring inputs on {self.windows.tokens:,} tokens")
        with progress_bar(console, "measuring inputs", "layers") as show:
            found = measure_importance(self.checkpoint, self.windows, show)
        self.checkpoint.check_unchanged()
        if self.asked.save_imatrix is not None:
            found.save(self.asked.save_imatrix)
            console.step(f"saved the importance matrix: {self.asked.save_imatrix}")
        return found

    def calibrated(
        self, schemes: "Mapping[Role, Scheme]", other: "Rounder", folder: Path, resume: bool, console: Console
    ) -> "Rounder":
        """Round every layer by the text, into ``folder``; ``other`` finds what is in no layer."""
        from offload.plan.footprint import calibration_nbytes
        from offload.quality.calibrate import calibrate
        from quant.rounding.prepared import Prepared

        assert self.windows is not None
        tokens, passes = self.windows.tokens, self.asked.tune
        parts = calibration_nbytes(self.checkpoint.shape, tokens, tuned=passes > 0)
        named = ", ".join(f"{name} {format_size(nbytes)}" for name, nbytes in parts.items())
        needed = format_size(sum(parts.values()))
        console.step(f"calibrating on {tokens:,} tokens; takes about {needed} of memory ({named})")

        with progress_bar(console, "calibrating", "layers") as show:
            seen = calibrate(
                self.checkpoint, schemes, self.windows, folder, passes=passes, resume=resume, progress=show
            )
        console.step(f"calibrated {self.checkpoint.shape.num_layers} layers")
        console.notes(seen.notes())
        self.output_errors = seen.output_errors()
        return Prepared(folder, self.name, other)


def _windows(path: Path, text: Path) -> "Windows":
    """The text in whole windows. Raises InputError if it cannot be read or is too short."""
    from cli.steps.texts import read_text
    from offload.plan.footprint import CALIBRATION_WINDOW
    from offload.quality.windows import Windows
    from offload.text.tokenizer import load_tokenizer

    return Windows.cut(read_text(text), load_tokenizer(path), CALIBRATION_WINDOW)
