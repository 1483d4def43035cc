"""StockBenchmark: the same directory run as a Python user tries first, transformers with accelerate's map over GPU, RAM
and disk, beside what was measured here.

It is a process of its own, so that memory is apart. Its budgets are accelerate's ``max_memory``, which bound what it
puts where and nothing else: what loading, unpacking and activations take comes on top, and is measured.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import psutil

from quant.checkpoint.engines import ENGINES, obstacles
from quant.checkpoint.inventory import open_headers, schemes_of_tensors
from quant.errors import MachineError
from quant.sizes import format_size

SECONDS = 900.0
_ROOM = 2**30  # bytes that the machine keeps free beside it
_LOOK = 0.1  # seconds


@dataclass(frozen=True)
class StockSpeed:
    """What ``engine`` made of a directory: speeds in tokens per second, ``placed`` bytes by tier, the largest resident
    memory, ``ram_bytes`` what it was to keep within (None: whatever there is). ``failed`` says why there is no more;
    what was measured until then stands."""

    engine: str
    ram_bytes: int | None
    vram_bytes: int | None
    load_seconds: float | None = None
    placed: Mapping[str, int] | None = None
    prefill_tokens_per_s: float | None = None
    tokens_per_s: float | None = None
    ms_per_token_p50: float | None = None
    peak_rss_bytes: int = 0
    failed: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass(frozen=True)
class StockBenchmark:
    """``prompt`` and ``tokens`` more, decoded greedily by the model in ``path``.

    ``ram`` and ``vram`` are budgets in bytes (None: what there is; ``vram`` 0: no GPU); after ``seconds`` it is ended.
    """

    path: Path
    prompt: Sequence[int]
    tokens: int
    ram: int | None = None
    vram: int | None = None
    seconds: float = SECONDS

    def run(self) -> StockSpeed:
        """Measure. Raises MachineError if no process can be started; whatever else fails is part of what is found."""
        headers = open_headers(self.path)
        reasons = obstacles(headers.shape, schemes_of_tensors(headers), ENGINES["transformers"])
        engine = f"transformers {version('transformers')}, accelerate {version('accelerate')}"
        if reasons:
            return StockSpeed(engine, self.ram, self.vram, failed=f"it does not load this directory: {reasons[0]}")
        with (
            tempfile.TemporaryDirectory(prefix="coldstream-against-") as folder,
            tempfile.TemporaryFile("w+") as said,
            tempfile.TemporaryFile("w+") as complaints,
        ):
            failed, peak = self._watch(self._start(folder, said, complaints), complaints)
            said.seek(0)
            lines = [json.loads(line) for line in said.read().splitlines() if line.startswith("{")]
        return self._summed(engine, lines, failed, peak)

    def _start(self, folder: str, said: IO[str], complaints: IO[str]) -> "subprocess.Popen[str]":
        memory = {} if self.ram is None else {"cpu": self.ram}
        if self.vram and self.ram is not None:
            memory["0"] = self.vram
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if self.vram == 0 else {})}
        asked = {"path": str(self.path), "prompt": list(self.prompt), "tokens": self.tokens, "folder": folder}
        script = str(Path(__file__).with_name("stock_process.py"))
        try:
            child = subprocess.Popen(
                [sys.executable, script],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=complaints,
                text=True,
                env=environment,
            )
        except OSError as error:
            raise MachineError(f"no process can be started for transformers: {error.strerror}") from None
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps({**asked, "memory": memory}))
            child.stdin.close()
        except BrokenPipeError:
            pass  # it has ended already, and says why
        return child

    def _watch(self, child: "subprocess.Popen[str]", complaints: IO[str]) -> tuple[str | None, int]:
        """Wait until ``child`` has ended: why it did so early, and the most memory that was seen."""
        limit, peak = psutil.virtual_memory().available - _ROOM, 0
        end, failed = time.monotonic() + self.seconds, None
        try:
            process = psutil.Process(child.pid)
            while failed is None and child.poll() is None:
                try:
                    peak = max(peak, int(process.memory_info().rss))
                except psutil.Error:
                    break
                if time.monotonic() > end:
                    failed = f"ended after {self.seconds:,.0f} s"
                elif peak > limit:
                    failed = f"ended at {format_size(peak)} of resident memory: the machine has no more"
                else:
                    time.sleep(_LOOK)
            if failed is not None:
                child.kill()
        finally:
            if child.poll() is None and failed is None and sys.exc_info()[0] is not None:
                child.kill()
            code = child.wait()
        if failed is None and code:
            complaints.seek(0)
            last = [line.strip() for line in complaints.read().splitlines() if line.strip()][-1:]
            failed = f"it fails: {last[0]}" if last else f"it was ended by signal {-code}"
        return failed, peak

    def _summed(self, engine: str, lines: Sequence[Mapping[str, Any]], failed: str | None, peak: int) -> StockSpeed:
        loaded = next((line for line in lines if "loaded" in line), None)
        prefill = next((line["prefill"] for line in lines if "prefill" in line), None)
        steps = [line["token"] for line in lines if "token" in line]
        return StockSpeed(
            engine,
            self.ram,
            self.vram,
            load_seconds=loaded["loaded"] if loaded else None,
            placed=loaded["placed"] if loaded else None,
            prefill_tokens_per_s=len(self.prompt) / prefill if prefill else None,
            tokens_per_s=len(steps) / sum(steps) if steps else None,
            ms_per_token_p50=1e3 * statistics.median(steps) if steps else None,
            peak_rss_bytes=max([peak, *(line["peak_rss_bytes"] for line in lines)]),
            failed=failed,
        )
