"""What was measured and chosen for a run, kept beside its other work: a resumed run has no need to do it
again, and could come to other bits on another day."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quant.allocation.allocate import Allocation, Choices, Option
from quant.allocation.units import Unit
from quant.errors import OutputError
from quant.kept_file import keep, kept
from quant.output_file import writing
from quant.scheme import Scheme

_Job = Mapping[str, Any]


def keep_losses(file: Path, job: _Job, choices: Sequence[Choices]) -> None:
    """Write what was measured for ``job``. Raises OutputError."""
    _keep(file, {"job": job, "losses": _losses(choices)})


def kept_losses(file: Path, job: _Job, units: Sequence[Unit]) -> list[Choices] | None:
    """What ``keep_losses`` wrote for the same ``job``; None if there is nothing of it."""
    found = _kept(file, job, units)
    return None if found is None else _choices(found["losses"], units)


def keep_allocation(file: Path, job: _Job, allocation: Allocation) -> None:
    """Write what was chosen for ``job``. Raises OutputError."""
    picked = {"picked": allocation.picked, "how": allocation.how}
    _keep(file, {"job": job, "losses": _losses(allocation.choices), **picked})


def kept_allocation(file: Path, job: _Job, units: Sequence[Unit]) -> Allocation | None:
    """What ``keep_allocation`` wrote for the same ``job``; None if there is nothing of it."""
    found = _kept(file, job, units)
    if found is None:
        return None
    return Allocation(tuple(_choices(found["losses"], units)), tuple(found["picked"]), found["how"])


def _keep(file: Path, found: Mapping[str, Any]) -> None:
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    keep(file, found)


def _kept(file: Path, job: _Job, units: Sequence[Unit]) -> dict[str, Any] | None:
    try:
        found = kept(file)
    except OutputError:  # not there, or spoiled: measured again
        return None
    same = found.get("job") == json.loads(json.dumps(job))
    return found if same and len(found["losses"]) == len(units) else None


def _losses(choices: Sequence[Choices]) -> list[list[tuple[str, float]]]:
    return [[(str(option.scheme), option.loss) for option in choice.options] for choice in choices]


def _choices(kept: Sequence[Sequence[tuple[str, float]]], units: Sequence[Unit]) -> list[Choices]:
    made = []
    for unit, losses in zip(units, kept, strict=True):
        schemes = [(Scheme.parse(text), loss) for text, loss in losses]
        made.append(Choices(unit, tuple(Option(s, unit.nbytes(s), loss) for s, loss in schemes)))
    return made
