"""Source checkpoint → quantized checkpoint: bounded memory, resumable, atomic.

Three things overlap: the next part is read, this one is quantized, the last one is written. At most two
parts' source and two parts' results are in memory, whatever the size of the model.
"""

import json
import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, FiniteFloat, NonNegativeInt
from torch import Tensor

from quant.checkpoint.checkpoint import DTYPES, Checkpoint
from quant.checkpoint.config_groups import check_schemes, quantization_config
from quant.checkpoint.layout import ITEMSIZE
from quant.convert.fidelity import Fidelity, RoleFidelity
from quant.convert.parts import Conversion, Part, Piece, plan_conversion
from quant.destination.journal import Journal, Sums
from quant.destination.sidecars import copy_sidecars, left_out, sidecar_bytes, sidecars, write_config
from quant.destination.staging import Staging
from quant.destination.writer import OutputFiles, check_free
from quant.errors import CheckpointError, NonFiniteError
from quant.input_file import read_object, validated
from quant.model.families import TEXT_ROLES, Role
from quant.model.mixed_precision import described
from quant.output_file import sync_folder, write_file
from quant.progress import Progress, nobody
from quant.rounding.encode import Encoded, check_finite
from quant.rounding.rounding import Rounder, Rounding, make_rounder
from quant.scheme import BF16, Scheme
from quant.sources.checkpoint import SourceCheckpoint
from quant.sources.open import open_source

REPORT = "quantization_report.json"
STATE = "state of the source's files"
_SLACK = 2**20
_SYNC_BYTES = 256 * 2**20


class _Sizes(BaseModel):
    """What the report of a complete checkpoint says at the least."""

    source_bytes: NonNegativeInt
    output_bytes: NonNegativeInt
    bits_per_weight: FiniteFloat


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion read, wrote and lost. ``seconds`` and ``bytes_read`` are this run's, without what it
    resumed. ``details`` is what else was put into the checkpoint's report.
    """

    path: Path
    source_bytes: int
    output_bytes: int
    bytes_read: int
    seconds: float
    bits_per_weight: float
    roles: tuple[RoleFidelity, ...]
    notes: tuple[str, ...]
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mb_per_s(self) -> float:
        """Source megabytes (10^6) per second."""
        return self.bytes_read / self.seconds / 1e6 if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "bytes_read": self.bytes_read,
            "seconds": self.seconds,
            "mb_per_s": self.mb_per_s,
            "bits_per_weight": self.bits_per_weight,
            "roles": {role.role: role.to_json() for role in self.roles},
            "notes": list(self.notes),
        }


def convert(
    source: Path | str | Checkpoint,
    destination: Path | str | Staging,
    schemes: Mapping[Role, Scheme],
    *,
    resume: bool = False,
    progress: Progress | None = None,
    sync_bytes: int = _SYNC_BYTES,
    rounding: Rounding = "search",
    rounder: Rounder | None = None,
    details: Mapping[str, Any] | None = None,
) -> ConversionReport:
    """Quantize the checkpoint ``source``, opened or not, by ``schemes`` (a role not named is kept) into
    ``destination``, a path or the staging that the caller has claimed.

    With ``resume`` a run that was stopped is continued, and the result is the same to the byte. ``progress``
    is called with source bytes done, source bytes in all, and the tensor at hand. What is done is made safe
    on disk every ``sync_bytes`` of output. ``rounding`` says how values are found (``rounder``, if given,
    does it instead). ``details`` go into the checkpoint's report as they are. Raises CheckpointError,
    SchemeError, RecipeError or OutputError; the destination then is as it was.
    """
    started = time.monotonic()
    checkpoint = source if isinstance(source, Checkpoint) else open_source(source)
    notes = check_schemes(checkpoint.shape, schemes)
    conversion = plan_conversion(checkpoint, schemes)
    rounder = rounder or make_rounder(rounding, checkpoint)
    job = job_of(checkpoint, rounder.name, schemes)
    claimed = nullcontext(destination) if isinstance(destination, Staging) else Staging(destination)
    with claimed as staging:
        if not isinstance(destination, Staging):
            if resume and (made := made_before(staging, job)):
                return made
            staging.check(checkpoint.path, resume)
            staging.claim()
        check_space(checkpoint, conversion, staging)
        about = {**job, **(details or {})}
        small = _SmallFiles(checkpoint, conversion, schemes, about, list(sidecars(checkpoint.sidecar_folder)))
        journal = staging.open(job)
        journal.check_parts([len(part.pieces) for part in conversion.parts])
        resumed = len(journal.done)
        if not journal.complete:
            files = OutputFiles(staging.model, conversion.layout)
            try:
                files.create()
                _Run(checkpoint, conversion.parts, files, journal, sync_bytes, rounder).go(progress)
                small.write(staging.model, journal.done)
            except NonFiniteError:  # weights that cannot be used: nothing to go on from
                staging.discard()
                raise
            finally:
                files.close()
            journal.finish()
        fidelity = Fidelity.measure(conversion.parts, journal.done)
        staging.publish()
    if conversion.rounded:
        count = len(conversion.rounded)
        notes.append(
            f"{count} tensors that are kept are f64 in the source: stored as f32, because nothing here computes in f64"
        )
    if isinstance(checkpoint, SourceCheckpoint):
        notes += [f"made from {checkpoint.forms}, not from the original weights"]
    unused = left_out(checkpoint.path, set(checkpoint.files))
    notes += [unused] if unused else []
    read = sum(part.nbytes for part in conversion.parts[resumed:])
    return ConversionReport(
        path=staging.destination,
        source_bytes=conversion.source_bytes,
        output_bytes=conversion.layout.nbytes,
        bytes_read=read,
        seconds=time.monotonic() - started,
        bits_per_weight=_bits_per_weight(checkpoint, conversion),
        roles=fidelity.roles,
        notes=tuple(notes),
        details=details or {},
    )


class _Run:
    """The parts not yet done, in order: read ahead, quantize, write behind."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        parts: tuple[Part, ...],
        files: OutputFiles,
        journal: Journal,
        sync_bytes: int,
        rounder: Rounder,
    ) -> None:
        self._rounder = rounder
        self._checkpoint = checkpoint
        self._parts = parts
        self._files = files
        self._journal = journal
        self._sync_bytes = sync_bytes
        self._unsafe: list[Sums] = []
        self._unsafe_bytes = 0

    def go(self, progress: Progress | None) -> None:
        first = len(self._journal.done)
        total = sum(part.nbytes for part in self._parts)
        done = sum(part.nbytes for part in self._parts[:first])
        left = self._parts[first:]
        progress = progress or nobody
        progress(done, total, "quantizing")
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
            reading = reader.submit(self._read, left[0]) if left else None
            writing: Future[None] | None = None
            for part, following in zip_longest(left, left[1:]):
                assert reading is not None
                tensor = reading.result()
                reading = reader.submit(self._read, following) if following else None
                results = [self._encode(part, piece, tensor) for piece in part.pieces]
                del tensor  # or it would live until the next one has been read
                if writing is not None:
                    writing.result()
                writing = writer.submit(self._write, part, results)
                done += part.nbytes
                progress(done, total, "quantizing")
            if writing is not None:
                writing.result()
            self._make_safe()

    def _read(self, part: Part) -> Tensor:
        tensor = self._checkpoint.read(part.key, part.start, part.shape)
        self._checkpoint.states.check([self._checkpoint.entry(part.key).file])
        return tensor

    def _encode(self, part: Part, piece: Piece, tensor: Tensor) -> Encoded:
        name = f"{self._checkpoint.entry(part.key).file.name}: tensor {part.key}"
        if piece.role == "experts":
            name += f", expert {piece.expert}"
        if piece.scheme == BF16:
            tensor = tensor.to(DTYPES[piece.dtype])
        if piece.window != slice(None):
            tensor = tensor[:, piece.window] if part.transposed else tensor[piece.window]
        if part.transposed and tensor.stride(-1) != 1:  # features that lay in turn
            tensor = tensor.contiguous()
        if "" in piece.places:
            check_finite(tensor, name)
            return Encoded({"": tensor.contiguous()})
        row = 0 if part.transposed else _first_row(part, self._checkpoint, piece)
        return self._rounder.encode(tensor, piece.scheme, name, part.transposed, piece.target, row)

    def _write(self, part: Part, results: list[Encoded]) -> None:
        for piece, result in zip(part.pieces, results, strict=True):
            for suffix, (file, offset) in piece.places.items():
                data = _bytes_of(result.tensors[suffix])
                self._files.write(file, offset, data)
                self._unsafe_bytes += len(data)
        self._unsafe.append([[result.squared_sum, result.squared_error] for result in results])
        if self._unsafe_bytes >= self._sync_bytes:
            self._make_safe()

    def _make_safe(self) -> None:
        """Wait until what was written is on disk, then say so in the journal."""
        self._files.sync()
        self._journal.append(self._unsafe)
        self._unsafe, self._unsafe_bytes = [], 0


def _first_row(part: Part, checkpoint: Checkpoint, piece: Piece) -> int:
    """Which row of its Linear the block that ``part`` reads begins with."""
    entry = checkpoint.entry(part.key)
    if len(entry.shape) != 2:
        return 0  # one whole expert of a fused tensor
    return part.start // (entry.shape[1] * ITEMSIZE[entry.dtype])


def _bytes_of(tensor: Tensor) -> memoryview:
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def job_of(checkpoint: Checkpoint, rounding: str, schemes: Mapping[Role, Scheme] | None = None) -> dict[str, Any]:
    """What two runs must share for one to continue the other; without ``schemes``, what is known before they are."""
    # Conversions that were begun before towers could be quantized name none.
    recipe = {} if schemes is None else {"recipe": dict.fromkeys(TEXT_ROLES, str(BF16)) | described(schemes)}
    return {
        "format": "coldstream quantization 1",
        **recipe,
        "rounding": rounding,
        "source": checkpoint.identity,
        STATE: checkpoint.states.listed(checkpoint.files),
    }


def made_before(staging: Staging, job: Mapping[str, Any]) -> ConversionReport | None:
    """What an earlier run for the same ``job`` reported, if it left the destination complete: every file is there
    in full. What else it left is removed then. Raises OutputError if that cannot be."""
    try:
        found = read_object(staging.target / REPORT, "the report of a conversion")
        validated(_Sizes, found, REPORT)
        same = all(found.get(key) == value for key, value in job.items() if key != STATE)
        if not same or not Checkpoint.open(staging.target).entries:
            return None
    except CheckpointError:
        return None
    if staging.is_begun:
        staging.claim()
        staging.discard()
    sizes = {key: found[key] for key in ("source_bytes", "output_bytes", "bits_per_weight")}
    kept = ("roles", "allocation", "output_errors")
    details: dict[str, Any] = {key: found[key] for key in kept if key in found}
    notes = ("the destination was already complete: nothing was left to do",)
    nothing: dict[str, Any] = {"bytes_read": 0, "seconds": 0.0, "roles": (), "notes": notes}
    return ConversionReport(staging.destination, **sizes, **nothing, details=details)


def check_space(checkpoint: Checkpoint, conversion: Conversion, staging: Staging, beside: int = 0) -> None:
    """Raise OutputError if the destination's file system lacks room for the output and ``beside`` more bytes."""
    needed = conversion.layout.nbytes + sidecar_bytes(checkpoint.sidecar_folder) + _SLACK + beside
    check_free(staging.nearest, needed - staging.nbytes)


@dataclass(frozen=True)
class _SmallFiles:
    """Everything but the weights; ``about`` goes into the report, ``others`` are the source's sidecars."""

    checkpoint: Checkpoint
    conversion: Conversion
    schemes: Mapping[Role, Scheme]
    about: Mapping[str, Any]
    others: list[Path]

    def write(self, folder: Path, done: list[Sums]) -> None:
        """Write them, those that an earlier run wrote again, and check that the source is what it was."""
        checkpoint, conversion = self.checkpoint, self.conversion
        copy_sidecars(checkpoint.sidecar_folder, folder, self.others)
        checkpoint.check_unchanged(*(checkpoint.path / path for path in self.others if not path.parent.name))
        index = json.dumps(conversion.layout.index(), indent=2).encode() + b"\n"
        write_file(folder / "model.safetensors.index.json", index)
        report = {
            **{key: value for key, value in self.about.items() if key != STATE},
            "source_bytes": conversion.source_bytes,
            "output_bytes": conversion.layout.nbytes,
            "bits_per_weight": _bits_per_weight(checkpoint, conversion),
            **Fidelity.measure(conversion.parts, done).to_json(),
        }
        write_file(folder / REPORT, json.dumps(report, indent=1).encode() + b"\n")
        write_config(folder, checkpoint.config, quantization_config(checkpoint.shape, self.schemes))
        sync_folder(folder)


def _bits_per_weight(checkpoint: Checkpoint, conversion: Conversion) -> float:
    weights = sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
    return round(conversion.layout.tensor_bytes * 8 / weights, 4)
