"""``coldstream probe``: what this machine has, and how fast its memories really are."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options.output import takes_console
from cli.options.typed import typed_path
from cli.terminal.console import Console

if TYPE_CHECKING:
    from offload.hardware.probe import Machine

Directory = Annotated[
    Path, typer.Argument(metavar="[DIR]", parser=typed_path, help="Measure the disk that this directory lies on.")
]
Refresh = Annotated[bool, typer.Option("--refresh", help="Measure again, even if it was done before.")]


@takes_console
def probe(console: Console, directory: Directory = Path(), refresh: Refresh = False) -> None:
    """Measure this machine: RAM read bandwidth, sequential direct reads from disk, PCIe and VRAM of a GPU.

    Takes about three seconds and is kept for later runs; --refresh measures again.
    """
    from offload.hardware.probe import probe as measure
    from quant.errors import InputError

    if not directory.is_dir():
        raise InputError(f"{directory} is no directory: name the one that the model lies in, or none")
    machine = measure(directory, refresh=refresh, say=console.step)
    show_machine(machine, console)
    console.notes(machine.notes)
    console.result(machine.to_json())


def show_machine(machine: "Machine", console: Console) -> None:
    """The machine as a table of memories: what holds how much, and how fast it is read."""
    from cli.terminal.plain_table import plain_table
    from cli.terminal.words import number, size

    cores = f"{machine.cores} core{'s' if machine.cores != 1 else ''}"
    console.prose(f"{machine.cpu}, {cores}, {machine.isa}: {number(machine.int8_gops)} Gop/s in int8")
    table = plain_table("memory", "size", "read")
    table.add_column("")
    gpu = machine.gpu
    if gpu:
        console.say(f"{gpu.name}: {number(gpu.bf16_tflops)} Top/s in bf16")
        table.add_row("VRAM", size(gpu.vram_bytes), f"{number(gpu.vram_gb_s)} GB/s", "")
        back = f"{number(gpu.d2h_gb_s)} GB/s back"
        table.add_row("PCIe", "", f"{number(gpu.h2d_gb_s)} GB/s", back)
    free = f"{size(machine.ram_available_bytes)} free now"
    table.add_row("RAM", size(machine.ram_bytes), f"{number(machine.ram_gb_s)} GB/s", free)
    table.add_row("Disk", "", f"{number(machine.disk_gb_s)} GB/s", "sequential, direct I/O")
    console.show(table)
    if gpu is None:
        console.say("no GPU: RAM is the fast tier, disk the cold one")
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(machine.measured_at))
    console.say(f"measured {when} and kept; --refresh measures again")
