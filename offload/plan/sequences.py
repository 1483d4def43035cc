"""SequencePrediction: how fast several sequences are together."""

from dataclasses import asdict, dataclass
from typing import Any

from offload.plan.speed_prediction import Limit


@dataclass(frozen=True)
class SequencePrediction:
    """Decode with ``n`` sequences in each step, which ask for ``experts_per_step`` different experts."""

    n: int
    tokens_per_s: float
    experts_per_step: float
    limited_by: Limit

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "per_sequence_tokens_per_s": self.tokens_per_s / self.n}
