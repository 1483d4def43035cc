"""A rounder for weights that were rounded beforehand, a file of results per layer."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from quant.checkpoint.tensor_file import opened_tensors
from quant.rounding.encode import Encoded
from quant.rounding.rounding import Rounder
from quant.scheme import Scheme


def gptq_name(text: str, passes: int) -> str:
    """What a report calls rounding by GPTQ on ``text``, tuned in so many passes."""
    return f"gptq {text}" + (f", tuned in {passes} passes" if passes else "")


class Prepared:
    """Serves what ``folder`` holds, and leaves the rest to ``other``. ``name`` says where the results are
    from."""

    def __init__(self, folder: Path, name: str, other: Rounder) -> None:
        self.name, self._other = name, other
        self._files = dict(_modules(folder))

    def encode(self, weight: Tensor, scheme: Scheme, label: str, transposed: bool, module: str, row: int) -> Encoded:
        """See ``Rounder``."""
        file = self._files.get(module)
        if file is None:
            return self._other.encode(weight, scheme, label, transposed, module, row)
        rows = weight.shape[1] if transposed else weight.shape[0]
        with opened_tensors(file) as stored:
            tensors = {
                suffix: stored.get_slice(f"{module}.{suffix}")[row : row + rows].contiguous()
                for suffix in ("weight_packed", "weight_scale")
            }
            sums = stored.get_tensor(f"{module}.sums").tolist()
            whole = stored.get_slice(f"{module}.weight_packed").get_shape()[0]
        return Encoded(tensors, sums[0] * rows / whole, sums[1] * rows / whole)


def _modules(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.glob("layer-*.safetensors")):
        with opened_tensors(file) as stored:
            for key in stored.keys():  # noqa: SIM118 - not a dict
                if key.endswith(".sums"):
                    yield key.removesuffix(".sums"), file
