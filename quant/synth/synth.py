"""A checkpoint of random weights in the output format: any shape, written at disk speed, never dense on the
way.

Speed and memory do not depend on what the weights are, so a machine can be tried before a download of
hundreds of gigabytes. Packed values are random bytes, scales are such that activations stay of order 1
through every layer.

The embeddings are the output head's rows, one further: the most likely next token is the next id, so that
even greedy text runs through the whole vocabulary and routing sees a new hidden state at every step.

Legend: N out features, K in features, E experts, L layers.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.architecture.shape import shape_of
from quant.checkpoint.config_groups import check_schemes, quantization_config, stores_fused_experts
from quant.checkpoint.layout import CheckpointLayout, StoredTensor, lay_out_checkpoint
from quant.destination.sidecars import write_config
from quant.destination.staging import Staging
from quant.destination.writer import OutputFiles, check_free
from quant.errors import UsageError
from quant.model.families import Role
from quant.model.shape import ModelShape
from quant.model.tensors import LinearSpec, TensorSpec
from quant.output_file import write_file
from quant.pack import unpack
from quant.progress import Progress, nobody
from quant.scheme import BF16, Scheme
from quant.synth.config import untrained_config
from quant.synth.noise import Noise
from quant.synth.skew import constant_for, router_rows, zipf_biases
from quant.synth.tokenizer import MIN_VOCAB, write_tokenizer

# Root mean square of a random stored value, in units of its scale; of int4 and int8 the lowest does not occur.
_SPREAD = {
    "int2": math.sqrt(1.5),
    "int3": math.sqrt(5.5),
    "int4": math.sqrt(17.5),
    "int8": math.sqrt(5397.5),
    "nf4": 0.55,
}
_ROWS = 4096
_OUTPUTS = (".o_proj", ".out_proj", ".down_proj")  # Linears that add to the hidden state
# By how much the hidden state's energy grows from the first layer to the last, measured on small shapes.
_GROWTH = 0.34


@dataclass(frozen=True)
class SynthReport:
    """What was written, and how fast; ``seconds`` ends when the last byte is on disk."""

    path: Path
    output_bytes: int
    seconds: float
    notes: tuple[str, ...]

    @property
    def mb_per_s(self) -> float:
        """Megabytes (10^6) written per second."""
        return self.output_bytes / self.seconds / 1e6

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "output_bytes": self.output_bytes,
            "seconds": self.seconds,
            "mb_per_s": self.mb_per_s,
            "notes": list(self.notes),
        }


def synthesize(
    config: Mapping[str, Any],
    destination: Path | str,
    schemes: Mapping[Role, Scheme],
    *,
    zipf: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> SynthReport:
    """Write a random checkpoint of the model that ``config`` (a config.json's dict) describes to
    ``destination``.

    ``zipf`` is the exponent of the experts' use, 0 for uniform. ``progress`` is called with bytes done, bytes
    in all, and the file at hand. Raises UsageError, RecipeError, SchemeError or OutputError.
    """
    started = time.monotonic()
    config = untrained_config(config)
    shape = shape_of(config)
    if shape.vocab_size < MIN_VOCAB:
        raise UsageError(f"a vocabulary of {shape.vocab_size} cannot hold every byte: use {MIN_VOCAB} or more")
    if zipf < 0:
        raise UsageError(f"--zipf {zipf} is negative: expected 0 (uniform) or more")
    notes = check_schemes(shape, schemes)
    if stores_fused_experts(shape, schemes):
        raise UsageError("synth has no fused bf16 experts: quantize the experts too, for example --experts int8")
    stored = [StoredTensor(spec.key, "BF16", spec.shape) for spec in shape.plain_tensors()]
    layout = lay_out_checkpoint(shape, schemes, stored)
    weights = _Weights(shape, schemes, Noise(seed), zipf)
    with Staging(destination) as staging:
        staging.check_new()
        check_free(staging.nearest, layout.nbytes + 2**24)
        staging.create()
        files = OutputFiles(staging.model, layout)
        try:
            files.create()
            _write(weights, layout, files, progress)
            write_tokenizer(staging.model, shape.vocab_size)
            index = json.dumps(layout.index(), indent=2).encode() + b"\n"
            write_file(staging.model / "model.safetensors.index.json", index)
            write_config(staging.model, config, quantization_config(shape, schemes))
        finally:
            files.close()
        staging.publish()
    return SynthReport(staging.destination, layout.nbytes, time.monotonic() - started, tuple(notes))


def _write(weights: "_Weights", layout: CheckpointLayout, files: OutputFiles, progress: Progress | None) -> None:
    """Write everything; while one file is being filled, the one before it is brought to the disk."""
    done, progress = 0, progress or nobody
    with ThreadPoolExecutor(1) as pool:
        syncing: Future[None] | None = None
        previous = ""
        for key, pieces in weights.tensors():
            name, offset = layout.place(key)
            if name != previous and previous:
                if syncing is not None:
                    syncing.result()
                syncing = pool.submit(files.sync, previous)
            previous = name
            for piece in pieces:
                array: Any = piece.contiguous().view(torch.uint8).numpy()
                files.write(name, offset, memoryview(array).cast("B"))
                offset += array.nbytes
                done += array.nbytes
            progress(done, layout.tensor_bytes, "writing")
        if syncing is not None:
            syncing.result()
    files.sync()


class _Weights:
    """The contents of every tensor, in pieces."""

    def __init__(self, shape: ModelShape, schemes: Mapping[Role, Scheme], noise: Noise, zipf: float) -> None:
        self._shape = shape
        self._schemes = schemes
        self._noise = noise
        self._constant = constant_for(shape.hidden_size) if zipf else 0.0
        self._biases = zipf_biases(shape.num_experts, shape.top_k, zipf) if zipf else None

    def tensors(self) -> Iterator[tuple[str, Iterator[Tensor]]]:
        """(key, contents) of all tensors that are not constant, file by file."""
        for spec in self._shape.plain_tensors():
            yield spec.key, self._plain(spec)
        for linear in self._shape.linears():
            yield from self._linear(linear)

    def _plain(self, spec: TensorSpec) -> Iterator[Tensor]:
        if spec.role == "embeddings":
            yield from self._embeddings()
        elif spec.role == "router" and spec.shape == (self._shape.num_experts, self._shape.hidden_size):
            yield self._router(spec)
        elif spec.role == "norm" and spec.key.endswith(".weight"):
            yield torch.ones(spec.shape, dtype=torch.bfloat16)
        elif len(spec.shape) > 1:  # a gate of a shared expert, a convolution
            yield from self._noise.normal(spec.key, 1 / math.sqrt(spec.shape[-1]), 0, spec.elements)
        else:  # biases, sinks, states' rates
            yield torch.zeros(spec.shape, dtype=torch.bfloat16)

    def _router(self, spec: TensorSpec) -> Tensor:
        generator = self._noise.generator(spec.key)
        rows = router_rows(self._shape.num_experts, self._shape.hidden_size, generator)
        if self._biases is not None:
            # Another order in each layer: the hot experts of a model are not the same everywhere.
            order = torch.randperm(self._shape.num_experts, generator=generator)
            assert spec.layer is not None
            rows[:, 0] = self._biases[order] / self._normed_constant(spec.layer)
        return rows.bfloat16()

    def _normed_constant(self, layer: int) -> float:
        """What the constant coordinate is after the norm: the hidden state grows a little each layer."""
        shape = self._shape
        energy = 1 + self._constant**2 / shape.hidden_size + _GROWTH * layer / shape.num_layers
        return self._constant / math.sqrt(energy)

    def _embeddings(self) -> Iterator[Tensor]:
        shape = self._shape
        named = next((linear for linear in shape.dense_linears() if linear.role == "lm_head"), None)
        head = named or LinearSpec(f"{shape.prefix}lm_head", "lm_head", shape.vocab_size, shape.hidden_size)
        for row in range(0, shape.vocab_size, _ROWS):
            count = min(_ROWS, shape.vocab_size - row)
            if shape.tie_word_embeddings:
                values = self._normal(head, 1.0, row, count)
            else:
                last = min(count, shape.vocab_size - row - 1)
                values = torch.cat([self._head(head, row + 1, last), self._head(head, 0, count - last)])
            values = values.reshape(count, shape.hidden_size)
            if self._constant:
                values[:, 0] = self._constant
            yield values

    def _head(self, head: LinearSpec, row: int, count: int) -> Tensor:
        """Rows of the output head, scaled to variance 1."""
        scheme = self._schemes.get("lm_head", BF16)
        if not count:
            return torch.empty(0, head.in_features, dtype=torch.bfloat16)
        if not scheme.is_packed:
            return self._normal(head, 1.0, row, count)
        width = head.in_features * scheme.bits // 8
        octets = torch.cat(list(self._noise.octets(head.module, scheme.kind, row * width, count * width)))
        values = unpack(octets.view(torch.int32).reshape(count, -1), scheme.bits)
        return (values.float() / _SPREAD[scheme.kind]).bfloat16()

    def _normal(self, linear: LinearSpec, std: float, row: int, count: int) -> Tensor:
        width = linear.in_features
        pieces = self._noise.normal(f"{linear.module}.weight", std, row * width, count * width)
        return torch.cat(list(pieces)).reshape(count, width)

    def _linear(self, linear: LinearSpec) -> Iterator[tuple[str, Iterator[Tensor]]]:
        scheme = self._schemes.get(linear.role, BF16)
        columns, weights = linear.in_features, linear.weights
        std = 1 / math.sqrt(columns)
        # What is added to the hidden state shrinks with depth, or the last layers would see only noise.
        is_output = linear.projection == "down_proj" or linear.module.endswith(_OUTPUTS)
        if is_output:
            std /= math.sqrt(2 * self._shape.num_layers)
        # The constant coordinate is left alone by every layer: the row that would write to it is zero.
        spared = is_output and self._constant != 0
        module = linear.module
        if linear.bias:
            yield f"{module}.bias", iter([torch.zeros(linear.out_features, dtype=torch.bfloat16)])
        if scheme.is_packed:
            yield f"{module}.weight_packed", self._noise.octets(module, scheme.kind, 0, weights * scheme.bits // 8)
            count = weights // scheme.group_size
            mean = std / _SPREAD[scheme.kind]
            low, high = 0.75 * mean, 1.25 * mean
            if scheme.bits < 4:  # as with nf4: scales of both signs, because the levels have no mean of zero
                low, high = -math.sqrt(3) * mean, math.sqrt(3) * mean
            scales = self._noise.uniform(f"{module}.scale", low, high, torch.bfloat16, count)
            yield f"{module}.weight_scale", _zeroed(scales, columns // scheme.group_size if spared else 0)
        elif scheme.kind == "nf4":
            yield f"{module}.weight", self._noise.octets(module, scheme.kind, 0, weights // 2)
            count = weights // scheme.group_size
            # Scales of both signs: nf4's levels have no mean of zero, as those of int4 and int8 are made to.
            width = math.sqrt(3) * std / _SPREAD["nf4"]
            scales = self._noise.uniform(f"{module}.scale", -width, width, torch.float32, count)
            yield f"{module}.weight.absmax", _zeroed(scales, columns // scheme.group_size if spared else 0)
        else:
            values = self._noise.normal(f"{module}.weight", std, 0, weights)
            yield f"{module}.weight", _zeroed(values, columns if spared else 0)


def _zeroed(pieces: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    """``pieces`` with the first ``count`` numbers zero."""
    for piece in pieces:
        if count:
            piece = piece.clone()
            piece[:count] = 0
            count -= min(count, piece.numel())
        yield piece
