"""The work folder of a calibration: what each finished layer was rounded to, and where the next one
begins."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from quant.checkpoint.tensor_file import load_tensors, save_tensors
from quant.errors import OutputError
from quant.output_file import replace_file, writing


@dataclass
class Calibration:
    """What a calibration saw: tokens of the least used expert by layer, Linears that needed more damping, and
    by layer the relative squared error of its output before and after tuning, on text kept back."""

    tokens: int
    least_used: dict[int, int] = field(default_factory=dict)
    damped: dict[str, float] = field(default_factory=dict)
    tuned: dict[int, tuple[float, float]] = field(default_factory=dict)

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


class CalibrationState:
    """The work folder: a file of results per layer, both streams after the last, and what was seen."""

    def __init__(self, folder: Path, job: Mapping[str, Any], about: dict[str, Any]) -> None:
        self.folder, self.job = folder, job
        self.layer: int = about["layer"]
        least = {int(layer): count for layer, count in about["least_used"].items()}
        tuned = {int(layer): (before, after) for layer, (before, after) in about["tuned"].items()}
        self.calibration = Calibration(0, least, about["damped"], tuned)

    @classmethod
    def open(cls, folder: Path, job: Mapping[str, Any], resume: bool) -> "CalibrationState":
        file = folder / "about.json"
        fresh: dict[str, Any] = {"layer": 0, "least_used": {}, "damped": {}, "tuned": {}}
        with writing(folder):
            if not file.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                return cls(folder, job, fresh)
            about: dict[str, Any] = json.loads(file.read_bytes())
        if not resume or about["job"] != job:
            why = "was begun with another model, text or scheme" if resume else "is a stopped calibration's"
            raise OutputError(f"{folder} {why}: continue it with --resume and the same, or remove it")
        return cls(folder, job, about)

    def streams(self, embedded: Tensor) -> list[Tensor]:
        """The original's hidden states and the quantized model's, after the layers done."""
        if not self.layer:
            return [embedded, embedded.clone()]
        kept = load_tensors(self._streams_file(self.layer))
        return [kept["plain"], kept["quantized"]]

    def keep(self, layer: int, results: dict[str, Tensor], streams: list[Tensor]) -> None:
        """Write what ``layer`` came to, so that a resumed run begins with the next. Raises OutputError."""
        save_tensors(_layer_file(self.folder, layer), results)
        plain, quantized = streams
        save_tensors(self._streams_file(layer + 1), {"plain": plain, "quantized": quantized})
        seen = self.calibration
        about = {
            "job": self.job,
            "layer": layer + 1,
            "least_used": seen.least_used,
            "damped": seen.damped,
            "tuned": seen.tuned,
        }
        replace_file(self.folder / "about.json", json.dumps(about).encode())
        with writing(self.folder):
            self._streams_file(layer).unlink(missing_ok=True)

    def _streams_file(self, layer: int) -> Path:
        return self.folder / f"streams-{layer:05d}.safetensors"


def _layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:05d}.safetensors"
