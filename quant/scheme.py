"""How one Linear's weight is stored: the scheme, and the tensors and bytes it makes.

Legend: N out features, K in features, G groups along K (G = K / group_size).

Packed formats, byte for byte:

* ``int4``: compressed-tensors ``pack-quantized``, symmetric. ``weight_packed`` int32 ``[N, K/8]``: value
  q in -8..7 stored as q + 8, element i of a word at bits 4·i (low nibble first). ``weight_scale`` bf16
  ``[N, G]``. ``weight_shape`` int64 ``[2]`` = (N, K). W = q · scale.
* ``int8``: the same with four per int32 (``[N, K/4]``), q in -128..127 stored as q + 128.
* ``int3``: the same with 32 in three int32 (``[N, K·3/32]``), q in -4..3 stored as q + 4, element i of the 32 at bits
  3·i of the 96: the 11th and the 22nd lie across two words, and no bit is left over.
* ``int2``: the same with sixteen per int32 (``[N, K/16]``), q in -2..1 stored as q + 2.
* ``nf4``: bitsandbytes' own serialized form: ``weight`` uint8 ``[N·K/2, 1]`` (first element of a pair in
  the *high* nibble), ``weight.absmax`` f32 ``[N·K/64]``, ``weight.quant_map`` f32 ``[16]`` and
  ``weight.quant_state.bitsandbytes__nf4`` uint8 (JSON).
* ``bf16``: ``weight`` bf16 ``[N, K]``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from quant.errors import SchemeError

Kind = Literal["int4", "int8", "int3", "int2", "nf4", "bf16"]
KINDS: tuple[Kind, ...] = get_args(Kind)
GROUP_SIZES = (32, 64, 128, 256)
NF4_BLOCK = 64
LEAST_BITS = 4  # of what is chosen where nobody asks for fewer: every kernel reads them

_BITS: dict[Kind, int] = {"int4": 4, "int8": 8, "int3": 3, "int2": 2, "nf4": 4, "bf16": 16}
PACKED: Mapping[int, Kind] = {bits: kind for kind, bits in _BITS.items() if kind.startswith("int")}


@dataclass(frozen=True)
class Scheme:
    """What one Linear's weight is stored as.

    ``group_size`` counts the weights along K that share a scale; it is 64 for nf4 (bitsandbytes' block,
    which runs over the flattened weight) and 0 for bf16, which has none.
    """

    kind: Kind
    group_size: int = 128

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SchemeError(f"unknown scheme {self.kind!r}: expected one of {', '.join(KINDS)}")
        if self.kind == "bf16":
            object.__setattr__(self, "group_size", 0)
        elif self.kind == "nf4":
            object.__setattr__(self, "group_size", NF4_BLOCK)
        elif self.group_size not in GROUP_SIZES:
            raise SchemeError(
                f"group size {self.group_size} is not supported: expected one of {', '.join(map(str, GROUP_SIZES))}"
            )

    @classmethod
    def parse(cls, text: str, group_size: int = 128) -> "Scheme":
        """``"int4"`` or, with a group size of its own, ``"int4-g32"``. Raises SchemeError."""
        kind, mark, group = text.strip().lower().partition("-g")
        if mark and not group.isdigit():
            raise SchemeError(f"bad scheme {text!r}: expected for example 'int4' or 'int4-g32'")
        own = {"nf4": str(NF4_BLOCK)}.get(kind)
        if mark and kind in ("nf4", "bf16") and group != own:
            has = f"has blocks of {NF4_BLOCK}" if own else "has no groups"
            raise SchemeError(f"bad scheme {text!r}: {kind} {has}: expected {kind!r}")
        return cls(cast(Kind, kind), int(group) if group else group_size)

    def __str__(self) -> str:
        return f"{self.kind}-g{self.group_size}" if self.is_packed else self.kind

    @property
    def bits(self) -> int:
        """Bits of one stored weight, scales not counted."""
        return _BITS[self.kind]

    @property
    def is_packed(self) -> bool:
        """True for the compressed-tensors ``pack-quantized`` kinds, int2 to int8."""
        return self.kind in PACKED.values()

    @property
    def is_coarse(self) -> bool:
        """True for packed kinds of so few levels that looking for a group's best scale pays: all but int8."""
        return self.is_packed and self.bits <= 4

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales counted: 4.125 for int4 with groups of 128."""
        if self.is_packed:
            return self.bits + 16 / self.group_size
        return 4.5 if self.kind == "nf4" else 16.0

    def check(self, name: str, out_features: int, in_features: int) -> None:
        """Raise SchemeError, naming the tensor and the group sizes that fit, if the scheme cannot hold it."""
        if self.is_packed and in_features % self.group_size:
            fits = [str(size) for size in GROUP_SIZES if in_features % size == 0]
            remedy = f"use --group-size {' or '.join(fits)}" if fits else "keep this role in bf16"
            raise SchemeError(
                f"{name} has {in_features} input features, which groups of {self.group_size} do not divide: {remedy}"
            )
        if self.kind == "nf4" and (out_features * in_features) % NF4_BLOCK:
            raise SchemeError(
                f"{name} has {out_features}x{in_features} weights, which blocks of {NF4_BLOCK} do not "
                "divide: "
                "keep this role in bf16"
            )

    def nbytes(self, out_features: int, in_features: int) -> int:
        """Bytes of the tensors that a forward pass reads: packed weights and scales, or the plain weight."""
        weights = out_features * in_features
        if self.is_packed:
            return weights * self.bits // 8 + out_features * (in_features // self.group_size) * 2
        if self.kind == "nf4":
            return weights // 2 + weights // NF4_BLOCK * 4
        return weights * 2


BF16 = Scheme("bf16")
