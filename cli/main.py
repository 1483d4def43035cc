"""The ``coldstream`` command: which commands there are, and the one place where an error becomes a line.

Only the module of the command that was asked for is imported, and each of those imports torch inside its
function, so that ``--help`` answers at once. A command is a function of its module's name.
"""

import _thread
import errno
import io
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module, metadata
from typing import Annotated, Any, NoReturn

import typer

from cli.terminal import interrupt
from cli.terminal.console import Console
from cli.terminal.visible import visible
from cli.terminal.wrong_usage import WRONG_USAGE, usage_line
from quant.errors import ColdstreamError, MachineError
from quant.output_file import check_stdout

COMMANDS: dict[str, str] = {
    "quantize": "Quantize a Hugging Face checkpoint; resumable.",
    "profile": "Run text through a model and save which experts it routes to.",
    "plan": "Where every byte goes, how fast it runs, what limits it.",
    "generate": "Continue a prompt, streaming; ends with the run report.",
    "chat": "Talk with a model; the KV cache is kept across turns.",
    "serve": "Serve a model to OpenAI, Anthropic and browser clients.",
    "eval": "What quantizing cost: perplexity, KL to the original.",
    "bench": "Prefill and decode, beside the floor of the hardware.",
    "check": "Whether vLLM, SGLang or transformers can load a directory.",
    "synth": "Write a random quantized checkpoint in any shape.",
    "probe": "Measure this machine: RAM, disk, PCIe and VRAM bandwidth.",
    "simulate": "Replay a run on a machine that need not be there.",
    "rank-policies": "Replay a routing trace against expert cache policies.",
    "demo": "The whole path, quantize to report, on a small model.",
}
PIPE_CLOSED = 141
_OTHER_THREADS = 16  # those that read, write and compute beside OpenMP's
FEWEST_FILES = 64  # open at once: Python's libraries, a model's shards, pipes


def main() -> None:
    """Run the command line. Exits 0 when done, 1 on failure, 2 on wrong usage, 130 on Ctrl-C."""
    # torch's OpenMP threads otherwise spin, idle, on the cores that the native kernels work on.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # numpy's OpenBLAS, of which nothing is used, otherwise starts threads, and interrupts the process where it cannot.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # of many texts at once; there is only ever one
    _open_streams()
    interrupt.install()
    try:
        run(sys.argv[1:])
    except SystemExit as end:
        if end.code == interrupt.INTERRUPTED:
            interrupt.leave()
        raise


def run(words: list[str]) -> None:
    """``coldstream WORDS`` in this process. Raises SystemExit with its exit code, unless that is 0."""
    with one_line_errors(json="--json" in words):
        _check_files()
        # Of a shell that asks what could come next, the words are not arguments.
        asked = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS", "")
        completing = "_COLDSTREAM_COMPLETE" in os.environ
        app = build_app(_command_in(asked.split()[1:] if completing else words))
        code = app(words or ["--help"], prog_name="coldstream", standalone_mode=False)
    if code:
        raise SystemExit(code)


def build_app(wanted: str | None = None) -> typer.Typer:
    """The application, with the module of command ``wanted`` imported and all others only named."""
    app = typer.Typer(
        name="coldstream",
        help="Quantize the experts of a Mixture-of-Experts model and stream them over VRAM, RAM and disk.",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    for name, summary in COMMANDS.items():
        function = _guarded(load_command(name)) if name == wanted else _elsewhere
        app.command(name, short_help=summary)(function)
    return app


def load_command(name: str) -> Callable[..., None]:
    """The function of command ``name``, called like its module."""
    module = name.replace("-", "_")
    command: Callable[..., None] = getattr(import_module(f"cli.commands.{module}"), module)
    return command


def version() -> str:
    """The installed distribution's version; a source tree that is not installed has none."""
    try:
        return metadata.version("coldstream")
    except metadata.PackageNotFoundError:
        return "(not installed)"


@contextmanager
def one_line_errors(*, json: bool = False) -> Iterator[None]:
    """Turn a user's error into one line on stderr, and it, Ctrl-C and a closed pipe into exit codes; with
    ``json`` the error is a document on stdout, too."""
    try:
        yield
    except ColdstreamError as error:
        _say_and_fail(type(error).__name__, str(error), error.exit_code, json)
    except WRONG_USAGE as error:
        _say_and_fail("UsageError", usage_line(error), error.exit_code, json)
    except (KeyboardInterrupt, typer.Abort):
        print("\ncoldstream: interrupted", file=sys.stderr)
        _fail("Interrupted", "interrupted", interrupt.INTERRUPTED, json)
    except BrokenPipeError:
        _drop_output()
        raise SystemExit(PIPE_CLOSED) from None
    except OSError as error:  # of the machine, where nobody knew better what to do about it
        try:
            sys.stdout.flush()
        except OSError:  # what could not be written is the error: a full disk
            _drop_output()
        few = error.errno in (errno.EMFILE, errno.ENFILE)
        remedy = f"; {_FEW_FILES}" if few else ""
        _say_and_fail("MachineError", f"{_named(error)}{remedy}", MachineError.exit_code, json)
    except MemoryError:
        _say_and_fail("MachineError", _NO_MEMORY, MachineError.exit_code, json)
    except SystemError as error:
        if "error return without exception set" not in str(error):  # what Python makes of an error it has no room for
            raise
        _say_and_fail("MachineError", _NO_MEMORY, MachineError.exit_code, json)
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # torch's word for MemoryError
            said = _NO_MEMORY
        elif "can't start new thread" in str(error):
            said = "no thread can be started: expected room for some dozens; raise `ulimit -u` or the container's limit"
        else:
            raise
        _say_and_fail("MachineError", said, MachineError.exit_code, json)


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails again


def _named(error: OSError) -> str:
    said = error.strerror or str(error)
    return said if error.filename is None else f"{error.filename}: {said}"


def _say_and_fail(kind: str, message: str, code: int, json: bool) -> NoReturn:
    message = " ".join(message.split())
    print(f"coldstream: error: {visible(message)}", file=sys.stderr)
    _fail(kind, message, code, json)


def _fail(kind: str, message: str, code: int, json: bool) -> NoReturn:
    try:
        Console(json=json).result({"error": {"kind": kind, "message": message, "exit_code": code}})
    except OSError:  # where stdout cannot be written, the line on stderr is all there is
        _drop_output()
    raise SystemExit(code) from None


def _open_streams() -> None:
    """UTF-8 in and out whatever the locale says; what is closed reads as empty and writes nowhere."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed: a file that is opened later would take its place, and what is said go there
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape" if name == "stdin" else "backslashreplace")


_NO_MEMORY = "there is not enough memory"
_FEW_FILES = f"expected to have {FEWEST_FILES} files and more open at once; raise `ulimit -n`"


def _check_files() -> None:
    """As many open files as are allowed. Raises MachineError if that is too few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft != resource.RLIM_INFINITY and soft < FEWEST_FILES:
        raise MachineError(f"this process may open {soft} files: {_FEW_FILES}")


def _starts_threads(count: int) -> bool:
    """Whether the system lets this process have ``count`` more threads."""
    # Not threading.Thread: where memory is short, that waits for ever for a thread that ended before it could say so.
    held = list[Any]()
    try:
        for _ in range(count):
            lock = _thread.allocate_lock()
            lock.acquire()
            _thread.start_new_thread(lock.acquire, ())
            held.append(lock)
    except (RuntimeError, MemoryError):
        return False
    finally:
        for lock in held:
            lock.release()
    return True


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    # Inside typer too: it has its own idea of Ctrl-C and of a closed pipe, which differs between versions.
    @wraps(command)
    def guarded(*args: object, **kwargs: object) -> None:
        with one_line_errors(json=bool(kwargs.get("json"))):
            if sys.platform != "linux":
                raise MachineError(f"coldstream runs on Linux and in WSL2, found {sys.platform}: run it there")
            if kwargs.get("json"):
                check_stdout()
            if not _starts_threads((os.cpu_count() or 1) + _OTHER_THREADS):
                os.environ["OMP_NUM_THREADS"] = "1"  # OpenMP ends the process where it cannot have as many as it wants
            command(*args, **kwargs)
            sys.stdout.flush()

    return guarded


def _print_version(asked: bool) -> None:
    if asked:
        print(f"coldstream {version()}")
        raise typer.Exit()


def _root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """What ``coldstream`` itself takes, before a command."""


def _elsewhere() -> None:
    """Listed in the help of the whole; its module is imported when it is the command asked for."""


def _command_in(arguments: list[str]) -> str | None:
    name = next((word for word in arguments if not word.startswith("-")), None)
    return name if name in COMMANDS else None


if __name__ == "__main__":
    main()
