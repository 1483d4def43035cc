"""MixedPrecision: schemes by role, where the Linears of one role need not all have the same.

Wherever schemes are given by role (``Mapping[Role, Scheme]``) a MixedPrecision may stand: as a mapping it gives
the scheme that most of a role's weights have, and ``scheme_of`` the one that a single Linear has.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping

from quant.model.families import QUANTIZABLE, Role
from quant.model.tensors import LinearSpec
from quant.scheme import BF16, Scheme


class MixedPrecision(Mapping[Role, Scheme]):
    """``modules`` gives the scheme of every quantized Linear by checkpoint module (what stays in bf16 is not among
    them: it must not become a group of the config); ``commonest`` each role's."""

    def __init__(self, modules: Mapping[str, Scheme], commonest: Mapping[Role, Scheme]) -> None:
        self.modules = {module: scheme for module, scheme in modules.items() if scheme != BF16}
        self._commonest = dict(commonest)

    @classmethod
    def of(cls, chosen: Iterable[tuple[LinearSpec, Scheme]]) -> "MixedPrecision":
        """From every Linear that is quantized and its scheme."""
        modules: dict[str, Scheme] = {}
        weights: dict[Role, dict[Scheme, int]] = {}
        for linear, scheme in chosen:
            modules[linear.module] = scheme
            counts = weights.setdefault(linear.role, {})
            counts[scheme] = counts.get(scheme, 0) + linear.weights
        commonest = {
            role: max(weights[role], key=lambda scheme: (weights[role][scheme], -scheme.bits_per_weight))
            for role in QUANTIZABLE
            if role in weights
        }
        return cls(modules, commonest)

    def __getitem__(self, role: Role) -> Scheme:
        return self._commonest[role]

    def __iter__(self) -> Iterator[Role]:
        return iter(self._commonest)

    def __len__(self) -> int:
        return len(self._commonest)

    @property
    def identity(self) -> str:
        """A hash over every module's scheme: 16 hex digits."""
        listed = "".join(f"{module} {self.modules[module]}\n" for module in sorted(self.modules))
        return hashlib.sha256(listed.encode()).hexdigest()[:16]


def scheme_of(schemes: Mapping[Role, Scheme], linear: "LinearSpec") -> Scheme:
    """The scheme of one Linear: that of its role, or its own where ``schemes`` is a MixedPrecision."""
    if isinstance(schemes, MixedPrecision):
        return schemes.modules.get(linear.module, BF16)
    return schemes.get(linear.role, BF16)


def few_bits(schemes: Mapping[Role, Scheme]) -> list[str]:
    """The packed schemes below 4 bits that some Linear has."""
    used = schemes.modules.values() if isinstance(schemes, MixedPrecision) else schemes.values()
    return sorted({str(scheme) for scheme in used if scheme.is_packed and scheme.bits < 4})


def described(schemes: Mapping[Role, Scheme]) -> dict[str, str]:
    """What two runs of the same schemes share: each role's scheme, and the identity of a MixedPrecision."""
    named = {str(role): str(scheme) for role, scheme in schemes.items()}
    return named | ({"mixture": schemes.identity} if isinstance(schemes, MixedPrecision) else {})


def joined(chosen: Iterable[tuple[LinearSpec, Scheme]]) -> Mapping[Role, Scheme]:
    """Every Linear's scheme as a mapping by role if each role has one only, else as a MixedPrecision."""
    listed = list(chosen)
    kinds: dict[Role, set[Scheme]] = {}
    for linear, scheme in listed:
        kinds.setdefault(linear.role, set()).add(scheme)
    if all(len(schemes) == 1 for schemes in kinds.values()):
        return {role: next(iter(schemes)) for role, schemes in kinds.items()}
    return MixedPrecision.of(listed)
