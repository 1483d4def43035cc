"""How a dense weight becomes stored values: the interface of a rounder, and the two rounders that need no text.

A conversion asks its rounder for every block of rows. The rounder's name goes into the journal and the
report: a run is only ever continued by the same.
"""

from typing import Literal, Protocol

from torch import Tensor

from quant.checkpoint.checkpoint import Checkpoint
from quant.rounding.encode import Encoded, encode_by, encode_weight
from quant.rounding.inputs import InputMeans
from quant.rounding.synthetic_inputs import SyntheticInputs
from quant.scheme import Scheme

Rounding = Literal["search", "rtn"]


class Rounder(Protocol):
    """Stores rows ``[row, row + N)`` of checkpoint module ``module`` under ``scheme``."""

    name: str

    def encode(self, weight: Tensor, scheme: Scheme, label: str, transposed: bool, module: str, row: int) -> Encoded:
        """``weight`` is ``[N, K]``, or ``[K, N]`` where ``transposed``; ``label`` is what an error calls
        it."""


class Nearest:
    """To nearest, by the largest magnitude of each group: compressed-tensors' own rule."""

    name = "rtn"

    def encode(self, weight: Tensor, scheme: Scheme, label: str, transposed: bool, module: str, row: int) -> Encoded:
        """See ``Rounder``."""
        return encode_weight(weight, scheme, label, transposed)


class Search:
    """Without data, and better than ``Nearest``. Dense Linears are rounded with feedback, for inputs made up from the
    weights (``quant.rounding.synthetic_inputs``). Experts, down_proj and the head: int2 to int4 take the best scale of
    each group, balanced against the mean input (``quant.rounding.search``), int8 goes to nearest. nf4 is as
    bitsandbytes rounds."""

    name = "search"

    def __init__(self, checkpoint: Checkpoint, imagine: bool = True) -> None:
        self._checkpoint, self._means = checkpoint, InputMeans(checkpoint)
        self._prior = SyntheticInputs(checkpoint) if imagine and checkpoint.shape.is_native else None

    def encode(self, weight: Tensor, scheme: Scheme, label: str, transposed: bool, module: str, row: int) -> Encoded:
        """See ``Rounder``."""
        curvature = self._prior.of(module) if self._prior and scheme.is_packed else None
        if curvature is not None:
            return encode_by(weight, scheme, label, transposed, curvature)
        if not scheme.is_coarse:
            return encode_weight(weight, scheme, label, transposed)
        return encode_weight(weight, scheme, label, transposed, search=True, means=self._means.of(module))

    def unimagined(self) -> "Search":
        """The same with dense Linears rounded as experts are, for comparing errors of weights: feedback makes those
        larger to make errors of outputs smaller."""
        return Search(self._checkpoint, imagine=False)


def make_rounder(rounding: Rounding, checkpoint: Checkpoint) -> Rounder:
    """The rounder that needs no text of that name."""
    return Search(checkpoint) if rounding == "search" else Nearest()
