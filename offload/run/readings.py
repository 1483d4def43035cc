"""What a run is judged by: the bandwidths that were probed before it, read again after it where they are in doubt.

Memory that others use, or that changes its speed, gives too little while it is measured. A run then seems
faster than its floor. So the better of both readings counts, and where they disagree that is said.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from offload.hardware.probe import keep_better, read_again
from offload.run.speed import Bandwidth, DecodeSpeed
from offload.tiers import Tier
from quant.sizes import format_size

_NAMES: dict[Tier, str] = {"vram": "VRAM", "ram": "RAM", "disk": "the disk"}
_AGREE = 0.05  # of each other: what two readings of an undisturbed memory differ by
_DECIDES = 0.5  # of the floor: a tier with a smaller part may be misjudged and hardly move it
_MORE = 1.02  # of a bandwidth: a run that reads so much more has disproved it
_CACHES = 64 * 2**20  # bytes per token that a processor's caches may hold


def exceeded(speed: DecodeSpeed, bandwidth: Bandwidth) -> list[Tier]:
    """Tiers that a run read faster than ``bandwidth``. What caches may hold tells nothing."""
    return [
        tier
        for tier, got in speed.achieved().items()
        if speed.bytes_per_token[tier] > _CACHES and got > _MORE * (bandwidth.of(tier) or got)
    ]


def read_after(directory: Path, tiers: Collection[Tier]) -> Bandwidth:
    """``tiers`` read again now, on the disk of ``directory``; None for what was not. The better figures are kept
    for later runs. VRAM is not read again: the model fills it. Raises MachineError if the disk cannot be read."""
    ram, disk = read_again(directory, ram="ram" in tiers, disk="disk" in tiers)
    keep_better(directory, ram_gb_s=ram, disk_gb_s=disk)
    return Bandwidth(ram_gb_s=ram, disk_gb_s=disk)


def better(before: Bandwidth, after: Bandwidth) -> Bandwidth:
    """The higher of both, tier by tier."""
    return replace(
        before,
        ram_gb_s=max(filter(None, (before.ram_gb_s, after.ram_gb_s)), default=None),
        disk_gb_s=max(filter(None, (before.disk_gb_s, after.disk_gb_s)), default=None),
    )


def doubts(before: Bandwidth, after: Bandwidth, speed: DecodeSpeed) -> list[str]:
    """What makes the floor of ``speed`` unreliable, which was judged by the better of ``before`` and ``after``."""
    found = []
    for tier, floor in speed.floor_ms_by_tier.items():
        first, second = before.of(tier), after.of(tier)
        decides = floor >= _DECIDES * (speed.floor_ms_per_token or 0.0)
        if decides and first and second and abs(second / first - 1) > _AGREE:
            found.append(
                f"{_NAMES[tier]} gave {first:.3g} GB/s before the run and {second:.3g} after it: the floor, by the "
                "better of both, is unreliable"
            )
    best, got = better(before, after), speed.achieved()
    for tier in exceeded(speed, best):
        found.append(
            f"the run read {_NAMES[tier]} at {got[tier]:.3g} GB/s, more than the {best.of(tier):.3g} that were "
            "measured: something disturbed the measurement, and the floor is unreliable"
        )
    if not found and (speed.fraction_of_floor or 0.0) > 1:
        nbytes = format_size(sum(count for tier, count in speed.bytes_per_token.items() if tier != "disk"))
        found.append(
            f"decode was faster than its floor: bandwidths vary, or some of the {nbytes} of a token were in the "
            "processor's caches"
        )
    return found
