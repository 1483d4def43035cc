"""SpeedPrediction: how fast something will be, and what its time is spent on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Limit = Literal["ram bandwidth", "vram bandwidth", "pcie", "disk", "compute", "overhead"]


@dataclass(frozen=True)
class SpeedPrediction:
    """``tokens_per_s``, the ``seconds`` of a step by what they are spent on, and the largest of these.

    ``cpu_share`` is the part of cold experts' bytes that the CPU computes where they lie, the rest crosses
    PCIe.
    """

    tokens_per_s: float
    seconds: Mapping[Limit, float]
    limited_by: Limit
    cpu_share: float | None = None

    @property
    def ms_per_token(self) -> float:
        """Milliseconds per token."""
        return 1e3 / self.tokens_per_s
