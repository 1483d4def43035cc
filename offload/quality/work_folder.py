"""The work folder of a calibration: what each finished layer was rounded to, and where the next one begins. What
was spoiled since it was written is noticed by its checksum."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, NonNegativeInt
from torch import Tensor

from quant.checkpoint.tensor_file import load_tensors, save_tensors
from quant.errors import OutputError
from quant.input_file import validated
from quant.kept_file import file_sum, keep, kept
from quant.model.families import Role
from quant.output_file import writing


@dataclass
class Calibration:
    """What a calibration saw: tokens of the least used expert by layer, Linears that needed more damping, and
    by layer the relative squared error of its output before and after tuning, on text kept back.

    ``outputs`` are squares, summed by role over a sample of its Linears' outputs on the text: of the outputs aimed
    at, of how far off what GPTQ rounded is, and of how far off it would be had each weight been rounded for itself.
    """

    tokens: int
    least_used: dict[int, int] = field(default_factory=dict)
    damped: dict[str, float] = field(default_factory=dict)
    tuned: dict[int, tuple[float, float]] = field(default_factory=dict)
    outputs: dict[Role, tuple[float, float, float]] = field(default_factory=dict)

    def add_outputs(self, role: Role, squares: tuple[float, float, float]) -> None:
        """Count one Linear's sums of squares, as ``outputs`` has them."""
        before = self.outputs.get(role, (0.0, 0.0, 0.0))
        self.outputs[role] = (before[0] + squares[0], before[1] + squares[1], before[2] + squares[2])

    def output_errors(self) -> dict[Role, dict[str, float]]:
        """By role the relative error of its outputs on the text, and what it would be had each weight been rounded
        for itself."""
        return {
            role: {"calibrated": math.sqrt(error / power), "alone": math.sqrt(alone / power)}
            for role, (power, error, alone) in self.outputs.items()
            if power > 0
        }

    def notes(self) -> list[str]:
        """What the user should know."""
        layer = min(self.least_used, key=lambda name: self.least_used[name], default=None)
        said = [f"calibrated on {self.tokens:,} tokens"]
        if layer is not None:
            said[0] += f"; the least used expert saw {self.least_used[layer]:,} of them (layer {layer})"
        if self.damped:
            worst = max(self.damped, key=lambda name: self.damped[name])
            said.append(
                f"{len(self.damped)} Hessians were not positive definite and were damped more, up to "
                f"{self.damped[worst]:g} of their mean diagonal ({worst})"
            )
        if self.tuned:
            ratios = [after / before if before else 1.0 for before, after in self.tuned.values()]
            same = sum(ratio >= 1 for ratio in ratios)
            gain = f"{1 - median(ratios):.1%}"
            told = f"tuning lowered the error of a layer's output on text kept back by {gain} (median)"
            if gain == "0.0%":
                told = "tuning gained nothing: on text kept back, a layer's output is as far off as before (median)"
            said.append(told + (f"; {same} layers came no nearer and are as GPTQ left them" if same else ""))
        return said


class _About(BaseModel):
    """What the folder says of itself: for what ``job``, the layer to go on with, the SHA-256 of each file, and what
    was seen."""

    model_config = ConfigDict(extra="forbid")  # not strict: the keys of JSON are text, its lists are tuples here
    job: dict[str, Any]
    layer: NonNegativeInt
    files: dict[str, str] = {}
    least_used: dict[int, int] = {}
    damped: dict[str, FiniteFloat] = {}
    tuned: dict[int, tuple[float, float]] = {}
    outputs: dict[Role, tuple[float, float, float]] = {}


class CalibrationState:
    """The work folder: a file of results per layer, both streams after the last, and what was seen."""

    def __init__(self, folder: Path, job: Mapping[str, Any], about: _About) -> None:
        self.folder, self.job = folder, job
        self.layer, self._files = about.layer, about.files
        self.calibration = Calibration(0, about.least_used, about.damped, about.tuned, about.outputs)

    @classmethod
    def open(cls, folder: Path, job: Mapping[str, Any], resume: bool) -> "CalibrationState":
        """The folder of ``job``, new or as a stopped run left it. Raises OutputError if it is another job's, if it is
        not to be resumed, or if a file in it is not as it was written."""
        file = folder / "about.json"
        with writing(folder):
            if not file.exists():
                folder.mkdir(parents=True, exist_ok=True)
                return cls(folder, job, _About(job=dict(job), layer=0))
        try:
            about: _About = validated(_About, kept(file), str(file), OutputError)
            if resume and about.job == json.loads(json.dumps(job)):
                _check_files(folder, about.files)
                return cls(folder, job, about)
        except OutputError as error:
            raise OutputError(f"{error}: remove {folder} and start again without --resume") from None
        why = "was begun with another model, text or scheme" if resume else "is a stopped calibration's"
        raise OutputError(f"{folder} {why}: continue it with --resume and the same, or remove it")

    def streams(self, embedded: Tensor) -> list[Tensor]:
        """The original's hidden states and the quantized model's, after the layers done."""
        if not self.layer:
            return [embedded, embedded.clone()]
        kept = load_tensors(self._streams_file(self.layer))
        return [kept["plain"], kept["quantized"]]

    def keep(self, layer: int, results: dict[str, Tensor], streams: list[Tensor]) -> None:
        """Write what ``layer`` came to, so that a resumed run begins with the next. Raises OutputError."""
        made, left = _layer_file(self.folder, layer), self._streams_file(layer)
        save_tensors(made, results)
        plain, quantized = streams
        following = self._streams_file(layer + 1)
        save_tensors(following, {"plain": plain, "quantized": quantized})
        self._files.pop(left.name, None)
        self._files |= {file.name: file_sum(file) for file in (made, following)}
        seen = self.calibration
        about = {
            "job": self.job,
            "layer": layer + 1,
            "files": self._files,
            "least_used": seen.least_used,
            "damped": seen.damped,
            "tuned": seen.tuned,
            "outputs": seen.outputs,
        }
        keep(self.folder / "about.json", about)
        with writing(self.folder):
            left.unlink(missing_ok=True)

    def _streams_file(self, layer: int) -> Path:
        return self.folder / f"streams-{layer:05d}.safetensors"


def _layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:05d}.safetensors"


def _check_files(folder: Path, sums: Mapping[str, str]) -> None:
    for name, expected in sums.items():
        if file_sum(folder / name) != expected:
            raise OutputError(f"{folder / name} is not as it was written: its checksum is another")
