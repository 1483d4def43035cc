"""A reference model's predictions for a text, in files, compactly.

Per token: log-probabilities as 16-bit steps down from the largest (``top - step * code``, where ``step``
spans the token's own range: an error of some 2e-4 without a bias, where float16 would err by 4e-3). A
vocabulary of up to 16,384 is kept whole; of a larger one the 16,384 most probable tokens and what is left of
the probability, which makes the KL divergence a lower bound. The true tokens' log-probabilities are kept in
f32, beside the experts that each token was routed to.

Legend: B windows, T tokens of a window, V vocabulary, S stored entries per token, L MoE layers, k experts per
token.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor

from offload.quality.divergence import Divergence, TokenMeasures
from offload.quality.layerwise import Layerwise
from offload.quality.windows import Windows
from quant.errors import NonFiniteError, OutputError
from quant.input_file import validated
from quant.kept_file import file_sum, keep, kept
from quant.model.shape import ModelShape
from quant.output_file import sync_file, writing
from quant.progress import Progress

VERSION: Literal[3] = 3
MAX_STORED = 16384
_LEVELS = 65535
_FILES = ("codes", "span", "true", "ids")


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


class About(BaseModel):
    """What a reference says of itself: ``identity`` of model and text, tokens of a window, windows, entries stored
    per token and whether those are a part of the vocabulary, and the SHA-256 of each file.

    ``floor`` is the reference against itself with hidden states rounded to bf16 after every layer.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    version: Literal[3] = VERSION
    identity: str
    length: PositiveInt
    windows: PositiveInt
    stored: PositiveInt
    partial: bool
    floor: dict[str, Any]
    files: dict[str, str]


class Reference:
    """The predictions in one folder, which ``offload.quality.reference_cache`` finds or makes. ``notes`` are what
    has to be said about it."""

    def __init__(self, folder: Path, about: About, notes: tuple[str, ...] = ()) -> None:
        self.folder, self.about, self.notes = folder, about, notes

    @classmethod
    def open(cls, folder: Path, identity: str, notes: tuple[str, ...] = ()) -> Self:
        """The reference in ``folder``. Raises OutputError if it is another's or not as it was written."""
        about: About = validated(About, kept(folder / "about.json"), f"{folder / 'about.json'}", OutputError)
        if about.identity != identity or set(about.files) != set(_names(about.partial)):
            raise OutputError(f"{folder} holds predictions of another model or text")
        for name, expected in about.files.items():
            if file_sum(folder / name) != expected:
                raise OutputError(f"{folder / name} is not as it was written: its checksum is another")
        return cls(folder, about, notes)

    @cached_property
    def routes(self) -> Tensor:
        """int64 ``[L, B·T, k]``: the experts of each token, sorted."""
        return torch.from_numpy(np.load(self.folder / "routes.npy").astype(np.int64))

    def window(self, index: int) -> Forecast:
        """The forecast of window ``index``. Raises OutputError if it cannot be read."""
        stored = self.about.stored
        codes = self._rows("codes", np.uint16, stored, index)
        span = self._rows("span", np.float32, 3, index)
        true = self._rows("true", np.float32, 1, index).squeeze(1)[:-1]
        values = span[:, :1] - span[:, 1:2] * codes.float()
        if not self.about.partial:
            return Forecast(torch.log_softmax(values, -1), None, None, true)
        ids = self._rows("ids", np.int32, stored, index).long()
        return Forecast(values, ids, span[:, 2], true)

    def _rows(self, name: str, dtype: Any, width: int, index: int) -> Tensor:
        """A window's rows ``[T, width]`` of a file, read and not mapped: a mapped file that somebody cuts ends the
        process."""
        file, count = self.folder / f"{name}.bin", self.about.length * width
        with writing(file, resumable=False):
            found: Any = np.fromfile(file, dtype, count, offset=index * count * np.dtype(dtype).itemsize)
        if len(found) < count:
            raise OutputError(f"{file} was cut while it was read: run again")
        return torch.from_numpy(found.astype(np.int32) if dtype is np.uint16 else found).view(-1, width)


def _names(partial: bool) -> list[str]:
    return [f"{name}.bin" for name in _FILES[: 4 if partial else 3]] + ["routes.npy"]


def reference_nbytes(shape: ModelShape, tokens: int) -> int:
    """Bytes on disk of the predictions for so many ``tokens``."""
    stored = min(shape.vocab_size, MAX_STORED)
    entry = 2 if stored == shape.vocab_size else 2 + 4
    return tokens * (stored * entry + 4 * 4 + 2 * len(shape.moe_layers) * shape.top_k)


def make_reference(walk: Layerwise, windows: Windows, folder: Path, identity: str, progress: Progress) -> None:
    """Compute what the model of ``walk`` predicts for ``windows`` and write it into the empty ``folder``.

    Raises NonFiniteError if the model predicts no numbers, OSError or OutputError if a file cannot be written.
    """
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
    np.save(folder / "routes.npy", torch.stack(routes or [torch.empty(0)]).numpy().astype(np.int16))
    stored = min(shape.vocab_size, MAX_STORED)
    partial = stored < shape.vocab_size
    with _Writer(folder, stored, partial) as writer:
        for window in range(count):
            progress(window, count, "reference, window by window")
            writer.add(finite_log_probs(walk, hidden[window]), ids[window])
    about = About(identity=identity, length=length, windows=count, stored=stored, partial=partial, floor={}, files={})
    made, parts = Reference(folder, about), []
    for window in range(count):
        progress(window, count, "reference, its own noise")
        parts.append(made.window(window).measure(walk.log_probs(noisy[window]), ids[window, 1:]))
    about.floor = Divergence.of(TokenMeasures.joined(parts), length).to_json()
    for name in _names(partial):
        sync_file(folder / name)
        about.files[name] = file_sum(folder / name)
    keep(folder / "about.json", about.model_dump())


def finite_log_probs(walk: Layerwise, hidden: Tensor) -> Tensor:
    """``[T, V]``: what ``walk`` predicts from ``hidden`` ``[T, H]``. Raises NonFiniteError if that is no number."""
    found = walk.log_probs(hidden)
    if not found.isfinite().all():
        raise NonFiniteError(
            f"{walk.checkpoint.path} predicts NaN or infinity for this text: expected a model that gives numbers; "
            "download or quantize it again"
        )
    return found


class _Writer:
    """Appends tokens to the files of a reference."""

    def __init__(self, folder: Path, stored: int, partial: bool) -> None:
        names = _FILES if partial else _FILES[:3]
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
