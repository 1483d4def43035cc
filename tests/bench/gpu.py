"""Everything about the GPU path that needs a card, verified and measured in one go: within ten minutes.

    python -m tests.bench.gpu                   all of it, on the first CUDA device
    python -m tests.bench.gpu --only tests      sections: machine, tests, agreement, scout, kernels, no-graph
    python -m tests.bench.gpu --model DIR       a full-size model that is there (else one is synthesized)

It runs from a checkout, installed or not: the native kernels are built first if they are not there. Each
section is a process of its own with a time limit, so that a failure, a hang or a lost GPU costs that section
only: it is recorded, and the others go on. Scout is synthesized at full size where a disk (or RAM) can take
it in time, else as many of its layers as fit, while the sections run whose times do not matter. Written after
every section, so that a run that is cut off leaves what it found: ``docs/gpu-CARD.json`` and
``docs/gpu-CARD.md``. The last line of stdout is the JSON document.

Exit code: 0 if every section ran and every bar was met, 1 if not, 2 without a CUDA device (nothing is
measured, nothing written).
"""

import argparse
import contextlib
import faulthandler
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant.sizes import parse_size
from tests.bench.gpu_checks import card_name, gpu_tests, grown, prepared, versions
from tests.bench.gpu_report import bars, markdown, slug

ROOT = Path(__file__).resolve().parent.parent.parent
MINUTES = 9.5
VRAM = "24GiB"
_SYNTH_S, _LEAST_S, _LAST_WORDS_S = 200.0, 20.0, 1.0
_TAIL = 30  # lines of a log that are kept of a section that failed


@dataclass(frozen=True)
class Section:
    """A part of the bench: the seconds it may take at most, and what it is about."""

    name: str
    seconds: float
    about: str


SECTIONS = (
    Section("machine", 60, "the card, the host, their bandwidths"),
    Section("tests", 210, "pytest -m gpu"),
    Section("agreement", 150, "greedy tokens of every path on the demo model"),
    Section("scout", 240, "Scout: decode, prefill, VRAM, floor, simulator"),
    Section("kernels", 120, "each kernel against bandwidth or arithmetic"),
    Section("no-graph", 150, "the same decode with a host round trip per layer"),
)


@dataclass
class Runner:
    """Runs sections until ``deadline`` (monotonic seconds), results by name in ``found``; ``keep`` is called
    after each."""

    folder: Path
    deadline: float
    found: dict[str, Any]
    keep: Callable[[], None] = lambda: None

    def run(self, section: Section, *arguments: str) -> Any:
        """Run ``section`` in a process of its own; what it found, or why it did not."""
        left = self.deadline - time.monotonic()
        if left < _LEAST_S:
            self.found[section.name] = {"skipped": "no time left"}
        else:
            say(f"{section.name}: {section.about} (at most {min(left, section.seconds):.0f} s)")
            process = self.begin(section.name, *arguments)
            try:
                self.found[section.name] = self.end(section.name, process, min(left, section.seconds))
            finally:  # Ctrl-C and SIGTERM end it, too
                stop(process)
        said = self.found[section.name]
        trouble = next((f"{key}: {said[key]}" for key in ("failed", "skipped") if key in said), "done")
        say(f"{section.name}: {trouble}")
        self.keep()
        return said

    def begin(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        """Start a section; its result goes to a file of its name."""
        command = [sys.executable, "-m", "tests.bench.gpu", "--section", name, "--folder", str(self.folder)]
        with (self.folder / f"{name}.log").open("w") as log:
            return subprocess.Popen(
                [*command, *arguments],
                cwd=ROOT,
                text=True,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what it has started can be ended with it
            )

    def end(self, name: str, process: subprocess.Popen[str], seconds: float) -> Any:
        """Wait for a section, ``seconds`` at most; its result or the end of what it said."""
        try:
            code = process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGUSR1)  # say where you are
            time.sleep(_LAST_WORDS_S)
            stop(process)
            return {"failed": f"not done after {seconds:.0f} s", "said": self._tail(name)}
        result = self.folder / f"{name}.json"
        if result.is_file():
            return json.loads(result.read_text())
        return {"failed": f"exit code {code}", "said": self._tail(name)}

    def _tail(self, name: str) -> list[str]:
        return (self.folder / f"{name}.log").read_text(errors="replace").splitlines()[-_TAIL:]


def section_result(name: str, folder: Path, model: Path | None, vram: int, in_ram: bool) -> Any:
    """What section ``name`` finds; called in its own process, which may import torch."""
    if name == "machine":
        return machine(folder)
    if name == "tests":
        return gpu_tests()
    import torch

    from tests.bench import gpu_kernels, gpu_run

    if name == "agreement":
        return gpu_run.agreement(folder)
    if name == "kernels":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        sizes = gpu_kernels.Sizes() if device.type == "cuda" else gpu_kernels.Sizes.small()
        return gpu_kernels.Bench(device, sizes).all()
    if name == "synth":
        return gpu_run.synth(places(folder), f"{folder.name}-scout-", 0.6 * _SYNTH_S)
    assert model is not None
    graph = name == "scout"
    return gpu_run.run(model, vram, graph=graph, in_ram=in_ram, rounds=2 if graph else 1)


def machine(folder: Path) -> dict[str, Any]:
    """The machine as `coldstream probe` sees it, and versions."""
    import platform

    import torch

    from offload.hardware.probe import probe
    from tests.bench import warming

    found = probe(folder, refresh=True).to_json()
    card: dict[str, Any] = {}
    if torch.cuda.is_available():
        properties: Any = torch.cuda.get_device_properties(0)
        card = {"compute_capability": f"{properties.major}.{properties.minor}", "sms": properties.multi_processor_count}
    return {**found, "warming": warming.measure(), **card, "versions": versions(), "system": platform.platform()}


def scaled(vram: int, layers: int) -> int:
    """The budget that puts ``layers`` of Scout's 48 into the place that ``vram`` puts all of it."""
    return int(vram * (0.1 + 0.9 * layers / 48)) if layers < 48 else vram


def everything(arguments: argparse.Namespace, folder: Path, card: str) -> dict[str, Any]:
    """All sections that were asked for, and what the bars make of them."""
    deadline = time.monotonic() + 60 * arguments.minutes
    found: dict[str, Any] = {**earlier(arguments, card), "card": {"name": card}, "prepared": prepared()}
    if arguments.touch:
        found["grown"] = grown(parse_size(arguments.touch))
    runner = Runner(folder, deadline, found, lambda: write(arguments.out, found))
    runner.keep()
    wanted = [section for section in SECTIONS if not arguments.only or section.name in arguments.only]
    names = [section.name for section in wanted]
    vram = parse_size(arguments.vram)
    synthesizes = arguments.model is None and not {"scout", "no-graph"}.isdisjoint(names)
    writing, began = None, time.monotonic()
    where: Mapping[str, Any] = {"model": str(arguments.model), "layers": 48, "in_ram": False}
    try:
        for section in wanted:
            if synthesizes and writing is None and section.name != "machine":
                writing, began = runner.begin("synth"), time.monotonic()  # beside what is not timed
            if section.name not in ("kernels", "scout", "no-graph"):
                runner.run(section)
                continue
            if writing is not None and "synth" not in found:
                left = min(_SYNTH_S - (time.monotonic() - began), runner.deadline - time.monotonic())
                say(f"synth: waiting for the model (at most {max(0.0, left):.0f} s)")
                where = found["synth"] = runner.end("synth", writing, left)
            if section.name == "kernels":
                runner.run(section)
            elif "model" not in where:
                found[section.name] = {"skipped": f"there is no model: {where.get('failed') or where.get('skipped')}"}
            else:
                more = ["--in-ram"] if where["in_ram"] else []
                budget = scaled(vram, where["layers"])
                runner.run(section, "--model", where["model"], "--vram", str(budget), *more)
    finally:
        if writing is not None:
            stop(writing)
        for place in places(folder):
            for left_over in place.glob(f"{folder.name}-scout-*"):
                shutil.rmtree(left_over, ignore_errors=True)
    write(arguments.out, found)
    return found


def earlier(arguments: argparse.Namespace, card: str) -> dict[str, Any]:
    """With ``--only``: what an earlier run on ``card`` has found of the other sections, to be kept."""
    file = arguments.out / f"gpu-{slug({'card': {'name': card}})}.json"
    if not arguments.only or not file.is_file():
        return {}
    found = json.loads(file.read_text())
    names = [section.name for section in SECTIONS if section.name not in arguments.only]
    return {name: found[name] for name in names if name in found}


def write(out: Path, found: dict[str, Any]) -> Path:
    """Write what was found so far to ``out``, judged; returns the page."""
    found["bars"] = bars(found)
    out.mkdir(parents=True, exist_ok=True)
    page = out / f"gpu-{slug(found)}.md"
    page.write_text(markdown(found))
    page.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    return page


def stop(process: subprocess.Popen[str]) -> None:
    """End a section and whatever it has started, if it still runs."""
    with contextlib.suppress(ProcessLookupError):  # it was alone, and has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def places(folder: Path) -> list[Path]:
    """Where a model may be written."""
    return [folder.parent, Path("/dev/shm")]


def say(text: str) -> None:
    """One line for whoever watches."""
    print(f"gpu bench: {text}", file=sys.stderr, flush=True)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [section.name for section in SECTIONS]
    parser.add_argument("--only", nargs="+", choices=names, help="run these sections only")
    parser.add_argument("--model", type=Path, help="a model that is there (default: synthesize Scout)")
    parser.add_argument("--vram", default=VRAM, help="the budget of Scout's runs")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all of it")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="where the results go")
    parser.add_argument("--folder", type=Path, help="a folder with room for the model (default: temporary)")
    parser.add_argument("--touch", help="RAM to touch first, where a virtual machine is given it as it is used")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--in-ram", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.section:
        faulthandler.register(signal.SIGUSR1)
        file = arguments.folder / f"{arguments.section}.json"
        vram = parse_size(arguments.vram)
        found = section_result(arguments.section, arguments.folder, arguments.model, vram, arguments.in_ram)
        file.write_text(json.dumps(found))
        return 0
    card = card_name()
    if card is None:
        for section in SECTIONS:
            say(f"{section.name}: skipped, torch sees no CUDA device ({section.about})")
        print(json.dumps({"skipped": "torch sees no CUDA device", "sections": names}))
        return 2
    # What ends it in good order ends what it has started, too, and removes the model.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="coldstream-gpu-", dir=arguments.folder) as folder:
        found = everything(arguments, Path(folder), card)
    page = write(arguments.out, found)
    say(f"written: {page} and .json")
    print(markdown(found), file=sys.stderr)
    print(json.dumps(found))
    troubled = any({"failed", "skipped"} & part.keys() for part in found.values() if isinstance(part, dict))
    return 1 if troubled or any(bar["met"] is False for bar in found["bars"]) else 0


if __name__ == "__main__":
    sys.exit(main())
