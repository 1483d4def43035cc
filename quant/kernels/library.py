"""The shared object with the native kernels: found, loaded and asked to use the right instruction set.

It is built by ``pip install`` (or ``python setup.py build_ext --inplace``) and loaded with ctypes, so that
it is bound neither to torch's C++ ABI nor to a Python version. ``COLDSTREAM_ISA`` (``portable``, ``avx2``,
``avxvnni``, ``avx512``, ``neon``) forces an instruction set below the best one.
"""

import ctypes
import os
from functools import cache
from pathlib import Path

from quant.errors import MachineError
from quant.kernels.cores import granted

_MESSAGES = {-1: "bad argument", -2: "no memory for scratch buffers", -3: "not supported by this processor"}


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise MachineError(
            f"native kernels at {path} cannot be loaded ({error}): reinstall coldstream on this machine"
        ) from error


@cache
def library() -> ctypes.CDLL:
    """The loaded kernels. Raises MachineError if they are not built or ``COLDSTREAM_ISA`` cannot be used."""
    folder = Path(__file__).parent
    found = sorted(folder.glob("_native*.so"))
    if not found:
        raise MachineError(
            f"native kernels are missing: no _native*.so in {folder}; install with `pip install .` or "
            "build in place with `python setup.py build_ext --inplace`"
        )
    loaded = _load(found[0])
    loaded.cs_isa.restype = ctypes.c_char_p
    loaded.cs_isa_at.restype = ctypes.c_char_p
    loaded.cs_set_isa.argtypes = [ctypes.c_char_p]
    loaded.cs_read_bandwidth.restype = ctypes.c_double
    forced = os.environ.get("COLDSTREAM_ISA", "")
    if forced:
        choose_isa(loaded, forced)
    most = granted()
    if most is not None and most < loaded.cs_threads():
        check(loaded.cs_set_threads(most), "set_threads")
    return loaded


def choose_isa(loaded: ctypes.CDLL, name: str) -> None:
    """Use instruction set ``name`` (empty: the best). Raises MachineError if this machine lacks it."""
    if loaded.cs_set_isa(name.encode()) != 0:
        usable = ", ".join(usable_isas(loaded))
        raise MachineError(f"instruction set {name!r} cannot be used here: expected one of {usable}")


def usable_isas(loaded: ctypes.CDLL) -> list[str]:
    """Names of the instruction sets that this build holds and this processor runs, best first."""
    names: list[str] = []
    while (name := loaded.cs_isa_at(len(names))) is not None:
        names.append(name.decode())
    return names


def check(status: int, call: str) -> None:
    """Raise MachineError for a native call that did not return 0."""
    if status != 0:
        raise MachineError(f"native {call} failed: {_MESSAGES.get(status, f'status {status}')}")
