"""What quantization cost a model: its predictions for a text beside the reference's, token by token."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from offload.documents import save
from offload.model.kv_cache import Storage
from offload.quality.divergence import Divergence, TokenMeasures
from offload.quality.image_rows import ImageRows, compare_images
from offload.quality.layerwise import Layerwise
from offload.quality.reference import Reference, finite_log_probs
from offload.quality.reference_cache import reference_of
from offload.quality.windows import Windows, tokenizer_identity
from offload.text.tokenizer import load_tokenizer
from offload.vision.image_file import ImageSource
from quant.checkpoint.checkpoint import Checkpoint
from quant.checkpoint.inventory import schemes_of_tensors
from quant.errors import CheckpointError
from quant.model.hub import resolve_model
from quant.model.shape import ModelShape
from quant.progress import Progress, nobody
from quant.scheme import BF16


@dataclass(frozen=True)
class Evaluation:
    """One evaluation. ``floor`` is the reference's divergence from itself in bf16; ``router_agreement`` gives
    per MoE layer the share of expert choices that the two models have in common; ``kv`` is how keys and
    values were stored (None: not at all, whole windows at once), ``notes`` what has to be said about it; ``images``
    compares what pictures become, if any were shown."""

    model: Path
    reference: Path
    windows: int
    window_tokens: int
    divergence: Divergence
    floor: Mapping[str, Any]
    router_agreement: Mapping[int, float]
    kv: Storage | None
    seconds: float
    notes: tuple[str, ...] = ()
    images: ImageRows | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "reference": str(self.reference),
            "windows": self.windows,
            "window_tokens": self.window_tokens,
            "kv": self.kv,
            **self.divergence.to_json(),
            "floor": dict(self.floor),
            "router_agreement": {str(layer): share for layer, share in self.router_agreement.items()},
            "seconds": self.seconds,
            **({"notes": list(self.notes)} if self.notes else {}),
            **({"images": self.images.to_json()} if self.images else {}),
        }

    def save(self, path: str | Path) -> None:
        """Write it to ``path``: as a page if that ends in .html, as JSON if in .json. Raises OutputError."""
        save(self, "evaluation", path)


def evaluate(
    model: str | Path,
    reference: str | Path,
    text: str,
    *,
    cache: str | Path | None = None,
    windows: int | None = 32,
    length: int = 512,
    expert_slots: int | None = None,
    kv: Storage | None = None,
    images: Sequence[ImageSource] = (),
    progress: Progress = nobody,
) -> Evaluation:
    """Compare the checkpoint ``model`` with ``reference`` on the first ``windows`` windows of ``text``.

    Both are directories or Hub ids; a window is ``length`` tokens, and ``windows`` None runs all of them. The
    reference's predictions are kept in ``cache`` (None: the user's cache folder). ``images`` are shown to both towers.
    Raises
    CheckpointError if the two are not of one architecture and vocabulary, or one of them changes meanwhile or
    predicts no numbers, InputError if the text is too short, OutputError if ``cache`` cannot be written.
    """
    started = time.perf_counter()
    model, reference = resolve_model(model), resolve_model(reference)
    ours, theirs = Checkpoint.open(model), Checkpoint.open(reference)
    check_comparable(ours, theirs)
    seen = compare_images(ours, theirs, images, progress) if images else None
    cut = Windows.cut(text, load_tokenizer(reference), length, windows)
    kept = reference_of(theirs, cut, Path(cache or default_cache()), expert_slots=expert_slots, progress=progress)
    with Layerwise(ours, expert_slots=expert_slots, kv=kv) as walk:
        agreement, hidden = _walk(walk, cut, kept, progress)
        parts = []
        for window in range(len(cut.ids)):
            progress(window, len(cut.ids), "comparing, window by window")
            parts.append(kept.window(window).measure(finite_log_probs(walk, hidden[window]), cut.ids[window, 1:]))
    ours.check_unchanged()
    return Evaluation(
        model=model,
        reference=reference,
        windows=len(cut.ids),
        window_tokens=length,
        divergence=Divergence.of(TokenMeasures.joined(parts), length),
        floor=kept.about.floor,
        router_agreement=agreement,
        kv=kv,
        seconds=time.perf_counter() - started,
        notes=(*kept.notes, *_unseen(ours, seen)),
        images=seen,
    )


def _unseen(model: Checkpoint, seen: ImageRows | None) -> Iterator[str]:
    """A note if a tower was rounded and nothing was shown to it."""
    scheme = schemes_of_tensors(model).get("vision", BF16)
    if scheme != BF16 and seen is None:
        yield f"the vision tower is {scheme}, which no text tells: --image FILE compares what it makes of pictures"


def default_cache() -> Path:
    """Where the user's caches are, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coldstream" / "reference"


def check_comparable(ours: Checkpoint, theirs: Checkpoint) -> None:
    """Raise CheckpointError unless both have one architecture and one vocabulary."""
    for what, name in _DIMENSIONS.items():
        found, expected = getattr(ours.shape, name), getattr(theirs.shape, name)
        if found != expected:
            raise CheckpointError(
                f"{theirs.path} is no reference for {ours.path}: it has {what} {_short(expected)}, the model "
                f"{_short(found)}; expected the checkpoint that the model was quantized from"
            )
    mine, other = (tokenizer_identity(load_tokenizer(path)) for path in (ours.path, theirs.path))
    if mine != other:
        raise CheckpointError(
            f"{theirs.path} is no reference for {ours.path}: their tokenizers have different vocabularies; "
            "expected the checkpoint that the model was quantized from"
        )


_DIMENSIONS = {
    "architecture": "family",
    "layers:": "num_layers",
    "hidden size": "hidden_size",
    "MoE layers": "moe_layers",
    "experts:": "num_experts",
    "experts per token:": "top_k",
    "a vocabulary of": "vocab_size",
}
assert all(name in ModelShape.__dataclass_fields__ for name in _DIMENSIONS.values())


def _short(value: Any) -> str:
    return str(getattr(value, "name", value))


def _walk(walk: Layerwise, cut: Windows, kept: Reference, progress: Progress) -> tuple[dict[int, float], Tensor]:
    agreement: dict[int, float] = {}
    hidden = walk.embed(cut.ids)
    for layer in range(walk.shape.num_layers):
        progress(layer, walk.shape.num_layers, "model, layer by layer")
        _, chosen = walk.run_routed(layer, hidden, hidden)
        if layer in walk.shape.moe_layers:
            agreement[layer] = _overlap(chosen, kept.routes[walk.shape.moe_layers.index(layer)])
    return agreement, hidden


def _overlap(a: Tensor, b: Tensor) -> float:
    """The share of choices ``[tokens, k]`` that both have."""
    return (a[:, :, None] == b[:, None, :]).any(2).float().mean().item()
