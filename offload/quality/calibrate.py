"""Calibrated rounding: GPTQ of every Linear from the activations of a text, layer by layer.

Two streams of hidden states run through the layers: the original model's and that of the model quantized so
far. Each Linear is rounded so that, on the inputs of the second stream, it gives what the original gives on those of
the first. Within a layer a Linear comes after those whose outputs it reads: q, k and v; o; gate and up; down.

An expert is calibrated with the tokens routed to it, and with a sample of all the layer's tokens, which counts most
where few were routed to it. Routers, norms and embeddings are untouched.

In memory: one layer's weights, both streams and both inputs of the MLP (tokens x H x 16 bytes), and the
Hessians of one Linear. Each finished layer is kept in the work folder with both streams, so that a run that was
stopped continues with the next layer.

Legend: T tokens, H hidden, I intermediate, N out features, K in features, k experts per token.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from offload.experts.storage.store import ExpertWeights
from offload.plan.footprint import check_calibration
from offload.quality.hessian import InputHessian
from offload.quality.layerwise import Layerwise, Observer, check_layers
from offload.quality.tune import TRUTH, plain_experts, tune
from offload.quality.windows import Windows
from offload.quality.work_folder import Calibration, CalibrationState
from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import UsageError
from quant.linear import Compute, LinearWeight, QuantLinear
from quant.model.families import PROJECTIONS, Projection, Role
from quant.model.mixed_precision import described, scheme_of
from quant.model.tensors import LinearSpec
from quant.pack import Packed, dequantize, quantize_absmax
from quant.progress import Progress, nobody
from quant.rounding.gptq import DAMPING, Rounded, gptq
from quant.rounding.learned_rounding import TrainableWeight
from quant.rounding.search import search
from quant.scheme import BF16, Scheme

PULL = 0.8  # how far a weight moves towards making up for its inputs' errors
_SAMPLE = 1024  # tokens that stand for all of a layer
_BATCH = 4
_ROWS = 64  # of a Linear, whose outputs tell what rounding did to all


def calibrate(
    checkpoint: Checkpoint,
    schemes: Mapping[Role, Scheme],
    windows: Windows,
    folder: Path,
    *,
    passes: int = 0,
    resume: bool = False,
    progress: Progress = nobody,
) -> Calibration:
    """Round every Linear of the layers that ``schemes`` packs, and keep the results in ``folder``.

    The dense ones of each layer are then tuned together, in so many ``passes`` over the text.
    ``progress`` counts layers. Raises InputError for a
    text too short, UsageError if there is nothing to tune, OutputError if ``folder`` is
    another calibration's or cannot be written, CheckpointError if the source changes meanwhile.
    """
    check_layers(checkpoint.shape, "rounding by a text (--calibrate)")
    check_calibration(checkpoint.shape, windows.tokens)
    if passes and not any(
        spec.layer is not None and scheme_of(schemes, spec).is_packed for spec in checkpoint.shape.dense_linears()
    ):
        raise UsageError(
            "--tune has nothing to tune: it moves attention, shared experts and dense MLPs, and none of them "
            f"is to be packed (int2 to int8; asked for: {described(schemes)}): leave --tune out"
        )
    total = checkpoint.shape.num_layers
    job = {
        "source": checkpoint.identity,
        "state": checkpoint.states.listed(checkpoint.files),
        "text": windows.identity,
        "schemes": described(schemes),
        "passes": passes,
    }
    state = CalibrationState.open(folder, job, resume)
    with Layerwise(checkpoint) as walk, torch.no_grad():
        streams = state.streams(walk.embed(windows.ids))
        progress(state.layer, total, "calibrating")
        for layer in range(state.layer, total):
            results = _LayerRounding(walk, layer, schemes, streams, state.calibration).run(passes, windows.ids)
            checkpoint.check_unchanged()
            state.keep(layer, results, streams)
            progress(layer + 1, total, "calibrating")
    state.calibration.tokens = windows.tokens
    return state.calibration


class _LayerRounding:
    """One decoder layer being rounded: ``stock`` are its original dense Linears by module, ``made`` those that
    are rounded already."""

    def __init__(
        self, walk: Layerwise, layer: int, schemes: Mapping[Role, Scheme], streams: list[Tensor], seen: Calibration
    ) -> None:
        self.walk, self.layer, self.schemes, self.streams, self.seen = walk, layer, schemes, streams, seen
        self.specs = {
            spec.module.rpartition(".")[2]: spec
            for spec in walk.shape.dense_linears()
            if spec.layer == layer and scheme_of(schemes, spec).is_packed
        }
        self.stock: dict[str, Any] = {spec.module: walk.linear(spec.module) for spec in self.specs.values()}
        self.made: dict[str, QuantLinear] = {}
        self.results: dict[str, Tensor] = {}

    def run(self, passes: int, ids: Tensor) -> dict[str, Tensor]:
        """Round everything, tune it, move both streams on, and return the stored tensors by key."""
        for names in (("q_proj", "k_proj", "v_proj"), ("o_proj",)):
            specs = [self.specs[name] for name in names if name in self.specs]
            if specs:
                inputs = InputHessian.summed(self._captured(specs[0]))
                for spec in specs:
                    self._dense(spec, inputs)
        mlp: dict[Projection, LinearSpec] = {name: self.specs[name] for name in PROJECTIONS if name in self.specs}
        moe = self.layer in self.walk.shape.moe_layers
        experts = moe and self.schemes.get("experts", BF16).is_packed
        replaced: dict[int, ExpertWeights] | None = None
        if mlp or experts:
            if moe:
                plain, quantized, chosen, scores = self._routed()
            else:
                pairs = list(self._captured(mlp["gate_proj"]))
                plain, quantized = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            if mlp:
                self._gated(mlp, plain, quantized)
            if experts:
                replaced = self._experts(plain, quantized, chosen, scores)
        self.walk.run(self.layer, self.streams[0], self.streams[0])
        runner = self.walk.runner
        if passes and self.made:
            used = replaced or (plain_experts(self.walk.checkpoint, self.layer) if moe else None)
            with runner.set_to(replaced=used):
                self._tune(passes, ids)
        with runner.set_to(replaced=replaced), self.walk.swapped(self.made):
            self.walk.run(self.layer, self.streams[1], self.streams[1])
        return self.results

    def _tune(self, passes: int, ids: Tensor) -> None:
        """Move the dense Linears towards the layer's output, given what the second stream brings."""
        layer = self.walk.layers[self.layer]
        latents: dict[str, TrainableWeight] = {}
        for module, made in self.made.items():
            latents[module] = TrainableWeight(made.stored.packed, self.stock[module].weight.data, made.bias)
        others = [part for part in layer.modules() if isinstance(part, QuantLinear)]

        def by_predictions(found: Tensor, wanted: Tensor, rows: Tensor) -> Tensor:
            return self.walk.loss(found, wanted, ids[rows], TRUTH)

        with self.walk.swapped(latents):
            for part in others:
                part.compute = Compute(exact=True)  # torch's product: the native one knows no gradients
            before, after = tune(
                list(latents.values()),
                partial(self.walk.step, self.layer),
                self.streams[1],
                self.streams[0],
                passes,
                by_predictions if self.layer == self.walk.shape.num_layers - 1 else None,
            )
            for part in others:
                part.compute = self.walk.compute
        self.seen.tuned[self.layer] = before, min(before, after)
        if not after < before:
            return  # as GPTQ left it
        for module, latent in latents.items():
            self._store(module, latent.packed(), self.stock[module].weight.data)

    def _store(self, module: str, packed: Packed, weight: Tensor) -> None:
        made = self.made[module]
        made.weight_packed.data, made.weight_scale.data = packed.packed, packed.scale
        error = (dequantize(packed) - weight.float()).square().sum(dtype=torch.float64)
        self.results[f"{module}.weight_packed"] = packed.packed
        self.results[f"{module}.weight_scale"] = packed.scale
        self.results[f"{module}.sums"][1] = error

    def _dense(self, spec: LinearSpec, inputs: InputHessian) -> None:
        weight: Tensor = self.stock[spec.module].weight.data
        stored = self._round(spec, weight, inputs)
        self.made[spec.module] = QuantLinear.holding(stored, self.walk.compute, self.stock[spec.module].bias)

    def _round(self, spec: LinearSpec, weight: Tensor, inputs: InputHessian) -> LinearWeight:
        scheme, tokens = scheme_of(self.schemes, spec), max(inputs.tokens, 1)
        hessian, cross = inputs.hessian / tokens, inputs.cross / tokens
        done = gptq(weight, scheme, hessian, hessian + PULL * (cross - hessian))
        if done.damping > DAMPING:
            self.seen.damped[spec.module] = done.damping
        self.seen.add_outputs(spec.role, _output_squares(weight, done, hessian))
        tensors = {"weight_packed": done.packed.packed, "weight_scale": done.packed.scale}
        self.results.update({f"{spec.module}.{suffix}": tensor for suffix, tensor in tensors.items()})
        sums = torch.tensor([done.squared_sum, done.squared_error], dtype=torch.float64)
        self.results[f"{spec.module}.sums"] = sums
        return LinearWeight(scheme, tensors, spec.out_features, spec.in_features)

    def _captured(self, spec: LinearSpec) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs of ``spec`` ``[T, K]`` in both streams, batch by batch; no expert runs for it."""
        for start in range(0, len(self.streams[0]), _BATCH):
            rows = slice(start, start + _BATCH)
            first = self._capture(spec, self.streams[0][rows])
            with self.walk.swapped(self.made):
                second = self._capture(spec, self.streams[1][rows])
            yield first, second

    def _capture(self, spec: LinearSpec, hidden: Tensor) -> Tensor:
        caught: list[Tensor] = []
        with self.walk.watched(spec.module, caught.append):
            self._pass(hidden)
        return torch.cat(caught)

    def _pass(self, hidden: Tensor, observer: Observer | None = None) -> None:
        """Run the layer to see what reaches its parts; no expert is computed."""
        with self.walk.runner.set_to(observer=observer, idle=True):
            self.walk.run(self.layer, hidden)

    def _routed(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs of the MoE block ``[T, H]`` in both streams, and the second's choices and scores ``[T,
        k]``."""
        first: list[Tensor] = []
        second: list[tuple[Tensor, Tensor, Tensor]] = []
        for start in range(0, len(self.streams[0]), _BATCH):
            rows = slice(start, start + _BATCH)
            self._pass(self.streams[0][rows], lambda x, chosen, scores: first.append(x.float()))
            with self.walk.swapped(self.made):
                self._pass(self.streams[1][rows], lambda x, chosen, scores: second.append((x, chosen, scores)))
        x, chosen, scores = (torch.cat(parts) for parts in zip(*second, strict=True))
        return torch.cat(first), x.float(), chosen, scores

    def _gated(self, mlp: Mapping[Projection, LinearSpec], plain: Tensor, quantized: Tensor) -> None:
        """A dense or shared MLP on inputs ``[T, H]``."""
        inputs = InputHessian.of(plain, quantized)
        for spec in (mlp["gate_proj"], mlp["up_proj"]):
            self._dense(spec, inputs)
        modules = [mlp["gate_proj"].module, mlp["up_proj"].module]
        stock, made = [self.stock[name] for name in modules], [self.made[name] for name in modules]
        batches = torch.arange(len(plain)).split(4096)
        between = ((_between(plain[rows], *stock), _between(quantized[rows], *made)) for rows in batches)
        self._dense(mlp["down_proj"], InputHessian.summed(between))

    def _experts(self, first: Tensor, second: Tensor, chosen: Tensor, scores: Tensor) -> dict[int, ExpertWeights]:
        """All routed experts, each on its own tokens; returns their weights."""
        everyone = InputHessian.of(first, second)
        sample = torch.linspace(0, len(first) - 1, min(_SAMPLE, len(first))).long()
        made: dict[int, ExpertWeights] = {}
        counts = torch.bincount(chosen.flatten(), minlength=self.walk.shape.num_experts)
        self.seen.least_used[self.layer] = int(counts.min())
        for expert in range(self.walk.shape.num_experts):
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            factor = scores[rows, place].float()[:, None] if self.walk.runner.scales_input else 1.0
            made[expert] = self._expert(
                expert, first[rows] * factor, second[rows] * factor, everyone, (first[sample], second[sample])
            )
        return made

    def _expert(
        self, expert: int, plain: Tensor, quantized: Tensor, everyone: InputHessian, sample: tuple[Tensor, Tensor]
    ) -> ExpertWeights:
        views = self.walk.checkpoint.expert(self.layer, expert)
        specs = {spec.projection: spec for spec in self.walk.shape.expert_linears(self.layer, expert)}
        dense = {name: view.dense().float() for name, view in views.items()}
        inputs = InputHessian.of(plain, quantized).blended(everyone)
        gate = self._round(specs["gate_proj"], dense["gate_proj"], inputs)
        up = self._round(specs["up_proj"], dense["up_proj"], inputs)

        def middles(a: Tensor, b: Tensor) -> InputHessian:
            rounded = [weight.dense(torch.float32) for weight in (gate, up)]
            first = torch.nn.functional.silu(a @ dense["gate_proj"].t()) * (a @ dense["up_proj"].t())
            second = torch.nn.functional.silu(b @ rounded[0].t()) * (b @ rounded[1].t())
            return InputHessian.of(first, second)

        own = middles(plain, quantized)
        if len(plain) < 8 * len(own.hessian):  # enough of its own otherwise: computing more would be for nothing
            own = own.blended(middles(*sample))
        return ExpertWeights(gate, up, self._round(specs["down_proj"], dense["down_proj"], own))


def _output_squares(weight: Tensor, done: Rounded, hessian: Tensor) -> tuple[float, float, float]:
    """Of a sample of rows, squares summed over the text: of the outputs aimed at, which make up for what the layers
    before changed; of how far from those ``done`` is; and of how far the best scales without the text would be."""
    rows = torch.linspace(0, len(weight) - 1, min(_ROWS, len(weight))).long()
    plain, target, scheme = weight[rows].float(), done.target[rows], done.packed.scheme
    chosen = Packed(scheme, done.packed.packed[rows], done.packed.scale[rows])
    alone = search(plain, scheme) if scheme.is_coarse else quantize_absmax(plain, scheme)

    def square(rows: Tensor) -> float:
        return max(float(((rows @ hessian) * rows).sum(dtype=torch.float64)), 0.0)

    return square(target), square(dequantize(chosen) - target), square(dequantize(alone) - target)


def _between(x: Tensor, gate: nn.Module, up: nn.Module) -> Tensor:
    """What down_proj of a gated MLP takes in."""
    return torch.nn.functional.silu(gate(x)).mul_(up(x))
