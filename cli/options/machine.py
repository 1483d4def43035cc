"""The options that say which machine is planned for: this one, or one around a card that is not there."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options.groups import complete, expands
from offload.hardware.gpu_catalog import CARDS, OWN_CARD, card_names

if TYPE_CHECKING:
    from offload.hardware.probe import Machine

Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        metavar="CARD",
        help=f'Plan for a desktop with this card. Known: {card_names()}. Any other by its figures: "{OWN_CARD}".',
        autocompletion=complete([word.replace(" ", "-") for card in CARDS for word in card.spellings]),
    ),
]
RamBandwidth = Annotated[
    float | None,
    typer.Option("--ram-bandwidth", metavar="GB/S", min=0.1, max=1e5, help="Take this for the RAM's read bandwidth."),
]
DiskBandwidth = Annotated[
    float | None,
    typer.Option(
        "--disk-bandwidth", metavar="GB/S", min=0.01, max=1e5, help="Take this for the disk's sequential rate."
    ),
]
Refresh = Annotated[bool, typer.Option("--refresh", help="Measure this machine again first.")]


@dataclass(frozen=True)
class AskedMachine:
    """A machine as the command line asks for it: ``gpu`` None is the one at hand; rates that are given hold."""

    gpu: str | None = None
    ram_bandwidth: float | None = None
    disk_bandwidth: float | None = None
    refresh: bool = False

    def find(self, model: str | Path, ram: int | None, say: Callable[[str], None] | None = None) -> "Machine":
        """The machine, with the disk that ``model`` lies on; an assumed one has room for a budget of ``ram``.

        Raises UsageError for a card that nobody knows, MachineError if this machine cannot be measured.
        """
        from offload.plan.planned_run import planned_machine

        rates = {"ram_gb_s": self.ram_bandwidth, "disk_gb_s": self.disk_bandwidth}
        return planned_machine(model, self.gpu, ram=ram, refresh=self.refresh, say=say, **rates)


takes_machine = expands(
    "target",
    {
        "gpu": (Gpu, None),
        "ram_bandwidth": (RamBandwidth, None),
        "disk_bandwidth": (DiskBandwidth, None),
        "refresh": (Refresh, False),
    },
    AskedMachine,
)
