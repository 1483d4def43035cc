"""Where a run computes, and with which kernels."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from offload.hardware.ledger import forget_peak
from offload.hardware.probe import Machine, probe
from offload.records import RunOptions
from quant.errors import BudgetError, MachineError
from quant.kernels import native
from quant.linear import Compute

_AMPERE = (8, 0)  # compute capability


def choose_device(options: RunOptions) -> torch.device:
    """The GPU if there is one and the options do not say otherwise. Raises MachineError if one is asked for
    that is not there, or is too old."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise MachineError("no CUDA device was found: expected one for --device cuda; leave it out to run on the CPU")
    wanted = options.device == "auto" and options.vram != 0  # --vram 0 leaves the GPU alone
    use = options.device == "cuda" or (wanted and torch.cuda.is_available())
    if use and torch.cuda.get_device_capability() < _AMPERE:
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        raise MachineError(
            f"{torch.cuda.get_device_name()} has compute capability {found}: expected 8.0 (Ampere) or newer, "
            "which the kernels need; run with --device cpu"
        )
    # With its number: not all that torch does with a device guesses which one is meant.
    return torch.device("cuda", torch.cuda.current_device()) if use else torch.device("cpu")


def choose_compute(options: RunOptions, device: torch.device) -> Compute:
    """The kernels for ``device``, with as many threads as the options say."""
    if options.threads:
        native.set_threads(options.threads)  # which refuses what cannot be; torch would crash at its exit
        torch.set_num_threads(options.threads)
    cuda = device.type == "cuda"
    if cuda and not options.threads:
        _leave_a_core()
    return Compute(native=not cuda, exact=options.exact, triton=cuda)


def _leave_a_core() -> None:
    """Have the kernels' threads, which look for work all the time beside a GPU, leave a core to the thread
    that launches steps, where hyper-threads do not."""
    threads = native.threads()
    if threads > 2 and threads >= len(os.sched_getaffinity(0)):
        native.set_threads(threads - 1)


def measured_machine(directory: Path, options: RunOptions, device: torch.device, say: Callable[[str], None]) -> Machine:
    """This machine, by its figures that are kept or measured now, ``directory`` telling which disk.

    Measuring takes memory that the run does not: peaks count from here. Raises BudgetError if the GPU has too little.
    """
    try:
        machine = probe(directory, say=say)
    except torch.OutOfMemoryError:
        raise BudgetError(
            "the GPU's memory, or the budget of it, is too little to measure the GPU with: run `coldstream probe` "
            "first, which keeps what it finds"
        ) from None
    forget_peak()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return machine
