"""How far one model's predictions are from another's: perplexity, KL divergence, same top token, change of
the true token's probability, overall and by how sure the reference was.

Means are over tokens as in llama.cpp's ``llama-perplexity --kl-divergence``. Standard errors are those of a
mean of independent tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
BUCKETS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.95, 1.0)
SLICES = 16  # that a window is cut into, to show where in it predictions differ


@dataclass
class TokenMeasures:
    """One number per token. ``nll`` and what concerns the true token lack the last token of each window."""

    kl: Floats
    same_top: Floats
    confidence: Floats
    nll: Floats
    reference_nll: Floats

    @classmethod
    def joined(cls, parts: "list[TokenMeasures]") -> "TokenMeasures":
        """All windows' tokens one after the other."""
        names = ("kl", "same_top", "confidence", "nll", "reference_nll")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood; ``error`` is one standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, nll: Floats) -> "Perplexity":
        value = math.exp(nll.mean())
        return cls(value, value * standard_error(nll))


@dataclass(frozen=True)
class Bucket:
    """Tokens whose most likely successor had, in the reference, a probability from ``low`` to ``high``."""

    low: float
    high: float
    tokens: int
    kl_mean: float
    same_top: float


@dataclass(frozen=True)
class Divergence:
    """What ``eval`` reports. KL is D(reference ‖ model) in nats per token; ``delta_p`` concerns the true
    token's probability (model minus reference); ``log_ratio`` is the mean of ln(perplexity / reference
    perplexity). ``histogram`` counts tokens by half decade of KL, keyed by its lower edge; ``by_position`` is
    mean KL in equal slices of a window, first to last (empty if the window was not given).
    """

    tokens: int
    perplexity: Perplexity
    reference_perplexity: Perplexity
    log_ratio: float
    log_ratio_error: float
    kl_mean: float
    kl_error: float
    kl_median: float
    kl_p90: float
    kl_p99: float
    kl_max: float
    same_top: float
    same_top_error: float
    delta_p_mean: float
    delta_p_rms: float
    buckets: tuple[Bucket, ...]
    histogram: Mapping[str, int]
    by_position: tuple[float, ...] = ()

    @classmethod
    def of(cls, measures: TokenMeasures, window: int = 0) -> "Divergence":
        """The summary of ``measures``, of windows of ``window`` tokens (0: not told)."""
        kl, ratio = measures.kl, measures.nll - measures.reference_nll
        delta = np.exp(-measures.nll) - np.exp(-measures.reference_nll)
        median, p90, p99 = (float(value) for value in np.quantile(kl, (0.5, 0.9, 0.99)))
        return cls(
            tokens=len(kl),
            perplexity=Perplexity.of(measures.nll),
            reference_perplexity=Perplexity.of(measures.reference_nll),
            log_ratio=float(ratio.mean()),
            log_ratio_error=standard_error(ratio),
            kl_mean=float(kl.mean()),
            kl_error=standard_error(kl),
            kl_median=median,
            kl_p90=p90,
            kl_p99=p99,
            kl_max=float(kl.max()),
            same_top=float(measures.same_top.mean()),
            same_top_error=standard_error(measures.same_top),
            delta_p_mean=float(delta.mean()),
            delta_p_rms=float(np.sqrt(np.square(delta).mean())),
            buckets=tuple(_buckets(measures)),
            histogram=_histogram(kl),
            by_position=_positions(kl, window) if window else (),
        )

    def to_json(self) -> dict[str, Any]:
        names = (name for name in self.__dataclass_fields__ if name not in ("perplexity", "reference_perplexity"))
        plain: dict[str, Any] = {name: getattr(self, name) for name in names}
        plain["buckets"] = [bucket.__dict__ for bucket in self.buckets]
        plain["perplexity"], plain["perplexity_error"] = self.perplexity.value, self.perplexity.error
        plain["reference_perplexity"] = self.reference_perplexity.value
        plain["reference_perplexity_error"] = self.reference_perplexity.error
        return plain


def standard_error(values: Floats) -> float:
    """Of the mean of ``values``; 0 where there is only one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _buckets(measures: TokenMeasures) -> list[Bucket]:
    found = []
    for low, high in pairwise(BUCKETS):
        inside = (measures.confidence >= low) & ((measures.confidence < high) | (high == 1.0))
        if count := int(inside.sum()):
            kl, same = float(measures.kl[inside].mean()), float(measures.same_top[inside].mean())
            found.append(Bucket(low, high, count, kl, same))
    return found


def _histogram(kl: Floats) -> dict[str, int]:
    """Tokens by half decade of their KL divergence; the key is the lower edge, the ends are open."""
    halves = np.clip(np.floor(2 * np.log10(np.maximum(kl, 1e-12))), -12, 3).astype(int)
    return {f"{1 if half % 2 == 0 else 3}e{half // 2}": int((halves == half).sum()) for half in range(-12, 4)}


def _positions(kl: Floats, window: int) -> tuple[float, ...]:
    """Mean KL of each slice of a window, over all windows."""
    by_place = kl.reshape(-1, window).mean(0)
    return tuple(float(part.mean()) for part in np.array_split(by_place, min(SLICES, window)))
