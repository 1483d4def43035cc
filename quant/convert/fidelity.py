"""How much quantization changed the weights: per tensor and per role, from sums of squares.

Relative error is ‖Ŵ - W‖ / ‖W‖ (Frobenius); SQNR is the same in decibels, 10·log10(‖W‖² / ‖Ŵ - W‖²).
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from quant.convert.parts import Part
from quant.destination.journal import Sums
from quant.model.families import Role
from quant.scheme import Scheme


@dataclass
class _Total:
    squared_sum: float = 0.0
    squared_error: float = 0.0

    def add(self, squared_sum: float, squared_error: float) -> None:
        self.squared_sum += squared_sum
        self.squared_error += squared_error

    @property
    def relative_error(self) -> float:
        return math.sqrt(self.squared_error / self.squared_sum) if self.squared_sum else 0.0


@dataclass(frozen=True)
class TensorFidelity:
    """What quantization cost one weight."""

    module: str
    role: Role
    scheme: Scheme
    relative_error: float

    @property
    def sqnr_db(self) -> float | None:
        """Decibels; None where nothing was lost."""
        return _decibels(self.relative_error)


@dataclass(frozen=True)
class RoleFidelity:
    """What quantization cost a role: over all its weights, and for the worst of its tensors. ``schemes`` by
    falling number of tensors."""

    role: Role
    schemes: tuple[Scheme, ...]
    tensors: int
    relative_error: float
    worst: TensorFidelity

    @property
    def scheme(self) -> str:
        """The scheme's name, or those of all that the role has."""
        return ", ".join(map(str, self.schemes))

    @property
    def sqnr_db(self) -> float | None:
        """Decibels; None where nothing was lost."""
        return _decibels(self.relative_error)

    def to_json(self) -> dict[str, Any]:
        return {
            "scheme": self.scheme,
            "tensors": self.tensors,
            "relative_error": self.relative_error,
            "sqnr_db": self.sqnr_db,
            "worst": {"tensor": self.worst.module, "sqnr_db": self.worst.sqnr_db},
        }


@dataclass(frozen=True)
class Fidelity:
    """All quantized tensors in the order they were made, and their roles."""

    tensors: tuple[TensorFidelity, ...]
    roles: tuple[RoleFidelity, ...]

    @classmethod
    def measure(cls, parts: Iterable[Part], done: Iterable[Sums]) -> "Fidelity":
        """Add up the sums that each part's pieces left in the journal."""
        modules: dict[str, _Total] = {}
        roles: dict[Role, _Total] = {}
        known: dict[str, tuple[Role, Scheme]] = {}
        for part, sums in zip(parts, done, strict=True):
            for piece, (squared_sum, squared_error) in zip(part.pieces, sums, strict=True):
                if piece.scheme.kind == "bf16":
                    continue
                known[piece.target] = (piece.role, piece.scheme)
                modules.setdefault(piece.target, _Total()).add(squared_sum, squared_error)
                roles.setdefault(piece.role, _Total()).add(squared_sum, squared_error)
        tensors = tuple(
            TensorFidelity(module, *known[module], _rounded(total.relative_error)) for module, total in modules.items()
        )
        return cls(tensors, tuple(_role(role, total, tensors) for role, total in roles.items()))

    def to_json(self) -> dict[str, Any]:
        return {
            "roles": {role.role: role.to_json() for role in self.roles},
            "tensors": {tensor.module: [tensor.relative_error, tensor.sqnr_db] for tensor in self.tensors},
        }


def _role(role: Role, total: _Total, tensors: tuple[TensorFidelity, ...]) -> RoleFidelity:
    own = [tensor for tensor in tensors if tensor.role == role]
    worst = max(own, key=lambda tensor: tensor.relative_error)
    schemes = tuple(scheme for scheme, _ in Counter(tensor.scheme for tensor in own).most_common())
    return RoleFidelity(role, schemes, len(own), _rounded(total.relative_error), worst)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _decibels(relative_error: float) -> float | None:
    return round(-20 * math.log10(relative_error), 3) if relative_error else None
