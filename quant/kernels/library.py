"""The shared object with the native kernels: found, loaded, asked to use the right instruction set, called.

It is built by ``pip install`` (or ``python setup.py build_ext --inplace``) and loaded with ctypes, so that
it is bound neither to torch's C++ ABI nor to a Python version. ``COLDSTREAM_ISA`` (``portable``, ``avx2``,
``avxvnni``, ``avx512``, ``avx512bf16``, ``neon``) forces an instruction set below the best one.
"""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from quant.errors import MachineError
from quant.kernels.cores import granted
from quant.kernels.sources import sources_digest

_MESSAGES = {
    -1: "bad argument",
    -2: "no memory is left (free some, or raise the limit: ulimit -v)",
    -3: "not supported by this processor",
    -4: "pages of the KV cache could not be had",
}

# C types of the fields of structures.
Pointer, I32, I64, F32, F64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_double


def fields(*groups: tuple[Any, str]) -> list[tuple[str, Any]]:
    """The ``_fields_`` of a structure: each group is a C type and the names that have it, in the C++ order."""
    return [(name, kind) for kind, names in groups for name in names.split()]


def addresses(**tensors: Tensor | None) -> dict[str, int | None]:
    """Where each tensor begins, as values of a structure's pointers: null for None."""
    return {name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise MachineError(
            f"native kernels at {path} cannot be loaded ({error}): reinstall coldstream on this machine"
        ) from error


def _check_sources(loaded: ctypes.CDLL, path: Path) -> None:
    """Raise MachineError if ``loaded`` takes other structures than this package passes."""
    try:
        loaded.cs_sources.restype = ctypes.c_char_p
        built_from = loaded.cs_sources().decode()
    except AttributeError:  # from before it said
        built_from = "unknown"
    beside = sources_digest(path.parent / "cpp")
    if built_from != (beside or built_from) or built_from == "unknown":
        raise MachineError(
            f"native kernels at {path} were built from other sources than this version's ({built_from}, expected "
            f"{beside or 'a later version'}): install again with `pip install .`, or build in place with "
            "`python setup.py build_ext --inplace`"
        )


@cache
def library() -> ctypes.CDLL:
    """The loaded kernels. Raises MachineError if they are not built, or from other sources than those beside them, or
    ``COLDSTREAM_ISA`` cannot be used."""
    folder = Path(__file__).parent
    found = sorted(folder.glob("_native*.so"))
    if not found:
        raise MachineError(
            f"native kernels are missing: no _native*.so in {folder}; install with `pip install .` or "
            "build in place with `python setup.py build_ext --inplace`"
        )
    loaded = _load(found[0])
    _check_sources(loaded, found[0])
    loaded.cs_isa.restype = ctypes.c_char_p
    loaded.cs_isa_at.restype = ctypes.c_char_p
    loaded.cs_set_isa.argtypes = [ctypes.c_char_p]
    for rate in (loaded.cs_read_bandwidth, loaded.cs_read_rate, loaded.cs_dot_rate):
        rate.restype = ctypes.c_double
    forced = os.environ.get("COLDSTREAM_ISA", "")
    if forced:
        choose_isa(loaded, forced)
    most = granted()
    if most is not None and most < counted(loaded.cs_threads()):
        check(loaded.cs_set_threads(most), "set_threads")
    return loaded


def isa() -> str:
    """The instruction set in use."""
    name: bytes = library().cs_isa()
    return name.decode()


def counted(threads: int) -> int:
    """What ``cs_threads`` said. Raises MachineError if there was no memory to start any."""
    check(min(threads, 0), "threads")
    return threads


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


def call(name: str, *arguments: Any) -> None:
    """Call the native function ``cs_<name>``, which returns a status; raises MachineError if that is not 0.

    Tensors and structures are passed by address, bool as int32, other int as int64, float as double; what
    ctypes knows already (an array, an ``I32``) and None are passed as they are.
    """
    check(getattr(library(), f"cs_{name}")(*map(_as_argument, arguments)), name)


def check(status: int, name: str) -> None:
    """Raise MachineError for the status of a native call unless it is 0."""
    if status != 0:
        raise MachineError(f"native {name} failed: {_MESSAGES.get(status, f'status {status}')}")


def _as_argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Pointer(value.data_ptr())
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    convert: Callable[[Any], Any] | None = {bool: I32, int: I64, float: F64}.get(type(value))
    return value if convert is None else convert(value)
