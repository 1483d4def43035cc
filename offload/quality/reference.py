"""A reference model's predictions for a text, computed once and kept on disk, compactly.

Per token: log-probabilities as 16-bit steps down from the largest (``top - step * code``, where ``step``
spans the token's own range: an error of some 2e-4 without a bias, where float16 would err by 4e-3). A
vocabulary of up to 16,384 is kept whole; of a larger one the 16,384 most probable tokens and what is left of
the probability, which makes the KL divergence a lower bound. The true tokens' log-probabilities are kept in
f32, beside the experts that each token was routed to.

Legend: B windows, T tokens of a window, V vocabulary, S stored entries per token, L MoE layers, k experts per
token.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload.quality.divergence import Divergence, TokenMeasures
from offload.quality.layerwise import Layerwise
from offload.quality.windows import Windows
from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import OutputError
from quant.progress import Progress, nobody

VERSION = 2
MAX_STORED = 16384
_LEVELS = 65535


@dataclass(frozen=True)
class Forecast:
    """One window's log-probabilities: ``values`` ``[T, S]`` of tokens ``ids`` ``[T, S]`` (None: all of V),
    the log of the probability left over ``rest`` ``[T]`` (None where nothing is), and the true tokens'
    ``true`` ``[T - 1]``."""

    values: Tensor
    ids: Tensor | None
    rest: Tensor | None
    true: Tensor

    def measure(self, log_probs: Tensor, following: Tensor) -> TokenMeasures:
        """Compare a model's ``log_probs`` ``[T, V]`` with these; ``following`` ``[T - 1]`` are true."""
        theirs = log_probs if self.ids is None else log_probs.gather(1, self.ids)
        p = self.values.exp()
        kl = (p * (self.values - theirs)).sum(1)
        if self.rest is not None:
            left = torch.log1p(-theirs.exp().sum(1).clamp(max=1 - 1e-7))
            kl += self.rest.exp() * (self.rest - left)
        best = self.values.argmax(1)
        top = best if self.ids is None else self.ids.gather(1, best[:, None]).squeeze(1)
        nll = -log_probs[:-1].gather(1, following[:, None]).squeeze(1)
        columns = (
            kl.clamp_min(0),  # below zero by rounding only
            (top == log_probs.argmax(1)).float(),
            p.max(1).values,
            nll,
            -self.true,
        )
        return TokenMeasures(*(column.double().numpy() for column in columns))


class Reference:
    """The predictions in one folder. ``open`` or ``make`` it through ``reference_of``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = json.loads((folder / "about.json").read_text())

    @cached_property
    def routes(self) -> Tensor:
        """int64 ``[L, B·T, k]``: the experts of each token, sorted."""
        return torch.from_numpy(np.load(self.folder / "routes.npy").astype(np.int64))

    @property
    def floor(self) -> dict[str, Any]:
        """The reference against itself with hidden states rounded to bf16 after every layer."""
        floor: dict[str, Any] = self.about["floor"]
        return floor

    def window(self, index: int) -> Forecast:
        """The forecast of window ``index``."""
        length, stored = self.about["length"], self.about["stored"]
        rows = slice(index * length, (index + 1) * length)
        codes = self._file("codes", np.uint16, stored)[rows]
        span = torch.from_numpy(self._file("span", np.float32, 3)[rows].copy())
        true = torch.from_numpy(self._file("true", np.float32, 1)[rows].copy()).squeeze(1)[:-1]
        values = span[:, :1] - span[:, 1:2] * torch.from_numpy(codes.astype(np.float32))
        if not self.about["partial"]:
            return Forecast(torch.log_softmax(values, -1), None, None, true)
        ids = torch.from_numpy(self._file("ids", np.int32, stored)[rows].astype(np.int64))
        return Forecast(values, ids, span[:, 2], true)

    def _file(self, name: str, dtype: Any, width: int) -> Any:
        return np.memmap(self.folder / f"{name}.bin", dtype, "r").reshape(-1, width)


def reference_of(
    checkpoint: Checkpoint,
    windows: Windows,
    cache: Path,
    *,
    expert_slots: int | None = None,
    progress: Progress = nobody,
) -> Reference:
    """The kept predictions of ``checkpoint`` for ``windows``, made now if ``cache`` does not have them.

    They are found by the identity of checkpoint, files and text. Raises OutputError if ``cache`` cannot
    be written.
    """
    folder = cache / _identity(checkpoint, windows)
    if (folder / "about.json").is_file():
        return Reference(folder)
    draft = folder.with_suffix(".partial")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        with Layerwise(checkpoint, expert_slots=expert_slots) as walk:
            _make(walk, windows, draft, progress)
        draft.rename(folder)
    except OSError as error:
        raise OutputError(f"{cache} cannot keep the reference's predictions: {error.strerror}") from None
    return Reference(folder)


def _identity(checkpoint: Checkpoint, windows: Windows) -> str:
    files = sorted({entry.file for entry in checkpoint.entries.values()})
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = f"{VERSION} {checkpoint.identity} {states} {windows.identity}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _make(walk: Layerwise, windows: Windows, folder: Path, progress: Progress) -> None:
    ids, shape = windows.ids, walk.shape
    count, length = ids.shape
    hidden = walk.embed(ids)
    noisy = hidden.bfloat16().float()
    routes = []
    for layer in range(shape.num_layers):
        progress(layer, shape.num_layers, "reference, layer by layer")
        _, chosen = walk.run_routed(layer, hidden, hidden)
        if layer in shape.moe_layers:
            routes.append(chosen.sort(1).values)
        walk.run(layer, noisy, noisy)
        noisy = noisy.bfloat16().float()
    np.save(folder / "routes.npy", torch.stack(routes).numpy().astype(np.int16))
    stored = min(shape.vocab_size, MAX_STORED)
    partial = stored < shape.vocab_size
    about: dict[str, Any] = {"length": length, "windows": count, "stored": stored, "partial": partial}
    with _Writer(folder, stored, partial) as writer:
        for window in range(count):
            progress(window, count, "reference, window by window")
            writer.add(walk.log_probs(hidden[window]), ids[window])
    (folder / "about.json").write_text(json.dumps(about))
    made, parts = Reference(folder), []
    for window in range(count):
        progress(window, count, "reference, its own noise")
        parts.append(made.window(window).measure(walk.log_probs(noisy[window]), ids[window, 1:]))
    about["floor"] = Divergence.of(TokenMeasures.joined(parts), length).to_json()
    (folder / "about.json").write_text(json.dumps(about))


class _Writer:
    """Appends tokens to the files of a reference."""

    def __init__(self, folder: Path, stored: int, partial: bool) -> None:
        names = ("codes", "span", "true", "ids") if partial else ("codes", "span", "true")
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in names}
        self._stored, self._partial = stored, partial

    def add(self, log_probs: Tensor, ids: Tensor) -> None:
        """One window: ``log_probs`` ``[T, V]`` of what follows each of ``ids`` ``[T]``."""
        true = torch.zeros(len(ids))
        true[:-1] = log_probs[:-1].gather(1, ids[1:, None]).squeeze(1)
        rest = torch.zeros(len(ids), 1)
        values = log_probs
        if self._partial:
            values, kept = log_probs.topk(self._stored, dim=1)
            rest = torch.log1p(-values.exp().sum(1, keepdim=True).clamp(max=1 - 1e-7))
            self._files["ids"].write(kept.to(torch.int32).numpy().tobytes())
        top = values.max(1, keepdim=True).values
        step = ((top - values.min(1, keepdim=True).values) / _LEVELS).clamp_min(1e-12)
        codes = ((top - values) / step).round().clamp(0, _LEVELS).numpy().astype(np.uint16)
        self._files["codes"].write(codes.tobytes())
        self._files["span"].write(torch.cat((top, step, rest), 1).numpy().astype(np.float32).tobytes())
        self._files["true"].write(true.numpy().astype(np.float32).tobytes())

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()
