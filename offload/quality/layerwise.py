"""A model run one layer at a time over many windows of text: each layer's weights are read once.

Evaluation and calibration need the same walk. Hidden states of all windows are in memory (tokens x H x
4 bytes), and of the experts one layer at most. Products are exact: activations stay in floating point.

Legend: B windows, T tokens of a window, H hidden, E experts, k experts per token, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpoint_

from offload.experts.cache.expert_cache import ExpertCache
from offload.experts.storage.reader import Reader
from offload.experts.storage.store import ExpertStore, ExpertWeights
from offload.model.gate import Gate
from offload.model.kv_cache import KVCache, Storage
from offload.model.load import load_model, runtime_name
from offload.model.moe import ExpertRunner, expert_mlp
from offload.routing.eviction import LeastRecent
from offload.routing.frequency import Ids
from offload.routing.stats import RoutingStats
from offload.text.tokenizer import check_ids
from quant.architecture.meta_model import decoder_of
from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import UsageError
from quant.linear import Compute, QuantLinear
from quant.model.shape import ModelShape

_BATCH_TOKENS = 2048
Observer = Callable[[Tensor, Tensor, Tensor], None]


class RoutingLog(RoutingStats):
    """Counts nothing: a layer is run many times over, in batches, which statistics do not expect."""

    def record(self, layer: int, chosen: Ids) -> None:
        """Nothing to do: the choices are to be had from the runner's observer."""


class LayerRunner(ExpertRunner):
    """An expert runner that can be watched, and whose experts can be replaced for the layer at hand.

    ``observer`` is called with x ``[T, H]``, chosen ``[T, k]`` and scores ``[T, k]``; ``replaced`` maps an
    expert of the layer being run to the weights to use. ``idle`` computes no expert (the block gives zeros):
    enough to see what reaches them. Where gradients are enabled they reach x and scores; an expert is then
    computed twice, so that only one is dequantized at a time.
    """

    observer: Observer | None = None
    replaced: Mapping[int, ExpertWeights] | None = None
    idle = False

    def run(self, layer: int, x: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        """See ``ExpertRunner.run``."""
        if self.observer is not None:
            self.observer(x, chosen, scores)
        if self.idle:
            return torch.zeros_like(x)
        if self.replaced is None:
            return super().run(layer, x, chosen, scores)
        mlp = partial(_with_gradients, gate=self.gate) if torch.is_grad_enabled() else self.compute_expert
        experts = ((expert, self.replaced[expert]) for expert in chosen.unique().tolist())
        return self.sum_experts(x, chosen, scores, experts, mlp)

    @contextmanager
    def set_to(
        self,
        *,
        observer: Observer | None = None,
        replaced: Mapping[int, ExpertWeights] | None = None,
        idle: bool = False,
    ) -> Iterator[None]:
        """Run like this inside the ``with`` block, and as before after it."""
        before = self.observer, self.replaced, self.idle
        self.observer, self.replaced, self.idle = observer, replaced, idle
        try:
            yield
        finally:
            self.observer, self.replaced, self.idle = before


def _with_gradients(x: Tensor, weights: ExpertWeights, gate: Gate) -> Tensor:
    made: Tensor = checkpoint_(expert_mlp, x, weights, Compute(exact=True), gate, use_reentrant=False)
    return made


class Layerwise:
    """One checkpoint, walked layer by layer. Use as a context manager.

    ``expert_slots`` bounds the experts in memory (at least 2; all of a layer by default). ``kv`` stores keys
    and values as a run would. Raises CheckpointError if the checkpoint cannot be loaded, UsageError
    for ``kv`` where transformers' own attention keeps them.
    """

    def __init__(self, checkpoint: Checkpoint, *, expert_slots: int | None = None, kv: Storage | None = None) -> None:
        self.checkpoint, self.shape, self.kv = checkpoint, checkpoint.shape, kv
        if kv is not None and not self.shape.is_native:
            raise UsageError(
                f"--kv {kv} is for families whose attention is computed here, and {self.shape.family.name} is none: "
                "leave it out"
            )
        self.store = ExpertStore(checkpoint)
        self.reader = Reader(checkpoint.files, checkpoint.states, direct=True)
        slots = max(2, min(expert_slots or self.shape.num_experts, self.shape.num_experts))
        self.cache = ExpertCache(self.store, self.reader, LeastRecent(), ram_slots=slots)
        self.compute = Compute(native=True, exact=True)
        routing = RoutingLog("", self.shape)
        self.runner = LayerRunner(self.cache, routing, self.compute, self.shape.family.scales_input)
        self.model: Any = load_model(checkpoint, self.runner, self.compute, torch.float32, torch.device("cpu"))
        checkpoint.check_unchanged()
        self.model.requires_grad_(False)
        self.layers = list(decoder_of(self.model).layers)
        self._arguments: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Hidden states ``[B, T, H]`` f32 of token ids ``[B, T]``, as the first layer takes them.

        Raises CheckpointError for an id that the model does not know.
        """
        embedding = self.model.get_input_embeddings()
        check_ids(ids.flatten().tolist(), len(embedding.weight))
        if not self.shape.is_native:  # what a family makes of embeddings before its first layer is its own
            return torch.cat([self._record(ids[i : i + 1])[1] for i in range(len(ids))])
        hidden: Tensor = embedding(ids)
        return hidden

    @torch.no_grad()
    def run(self, layer: int, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """``hidden`` ``[B, T, H]`` after ``layer``, written to ``out`` (which may be ``hidden``) if given."""
        result = torch.empty_like(hidden) if out is None else out
        size = 1 if self.kv else max(1, _BATCH_TOKENS // hidden.shape[1])
        for start in range(0, len(hidden), size):
            result[start : start + size] = self.step(layer, hidden[start : start + size])
        return result

    def run_routed(self, layer: int, hidden: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``run``, and the experts that ``layer`` chose, int64 ``[B·T, k]``: none if it is dense."""
        routes: list[Tensor] = [torch.empty(0, self.shape.top_k, dtype=torch.int64)]
        with self.runner.set_to(observer=lambda x, chosen, scores: routes.append(chosen)):
            result = self.run(layer, hidden, out)
        return result, torch.cat(routes)

    def linear(self, module: str) -> Any:
        """The model's Linear for checkpoint module ``module``."""
        return self.model.get_submodule(runtime_name(self.checkpoint, module))

    @contextmanager
    def swapped(self, linears: Mapping[str, nn.Module]) -> Iterator[None]:
        """``linears``, by checkpoint module, in place of the model's own inside the ``with`` block."""
        own = {module: self.linear(module) for module in linears}
        try:
            self._put(linears)
            yield
        finally:
            self._put(own)

    def _put(self, linears: Mapping[str, nn.Module]) -> None:
        for module, linear in linears.items():
            self.model.set_submodule(runtime_name(self.checkpoint, module), linear)

    @contextmanager
    def watched(self, module: str, see: Callable[[Tensor], None]) -> Iterator[None]:
        """Call ``see`` with every input f32 ``[T, K]`` of Linear ``module`` inside the ``with`` block."""
        handle = self.linear(module).register_forward_pre_hook(
            lambda _, inputs: see(inputs[0].reshape(-1, inputs[0].shape[-1]).float())
        )
        try:
            yield
        finally:
            handle.remove()

    def step(self, layer: int, batch: Tensor) -> Tensor:
        """``batch`` ``[B, T, H]`` after ``layer``, at once; with gradients where they are enabled."""
        args, kwargs = self._layer_arguments(layer, batch)
        made = self.layers[layer](batch, *args, **kwargs)
        return made if isinstance(made, Tensor) else made[0]

    @torch.no_grad()
    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities ``[T, V]`` of what follows each of ``hidden`` ``[T, H]``, the last layer's."""
        if self.shape.is_native:
            logits: Tensor = self.model.lm_head(self.model.model.norm(hidden))
        else:
            ids = torch.zeros(1, len(hidden), dtype=torch.int64)
            with self._layers_replaced(lambda states, *args, **kwargs: hidden[None]):
                logits = self.model(input_ids=ids, use_cache=False).logits[0]
        return torch.log_softmax(logits.float(), -1)

    def loss(self, found: Tensor, wanted: Tensor, ids: Tensor, truth: float) -> Tensor:
        """Mean KL divergence of what the last layer's ``found`` ``[B, T, H]`` predicts from what ``wanted``
        does, and ``truth`` times the mean loss of ``found`` on the text ``ids`` ``[B, T]`` itself; a window
        at a time, with gradients where they are enabled."""
        parts = [
            checkpoint_(self._window_loss, *window, truth, use_reentrant=False)
            if torch.is_grad_enabled()
            else self._window_loss(*window, truth)
            for window in zip(found, wanted, ids, strict=True)
        ]
        return torch.stack(parts).mean()

    def _window_loss(self, found: Tensor, wanted: Tensor, ids: Tensor, truth: float) -> Tensor:
        with torch.no_grad():
            theirs = self.log_probs(wanted)
        head = self.model.lm_head
        weight = head.stored.dense(torch.float32) if isinstance(head, QuantLinear) else head.weight
        logits = torch.nn.functional.linear(self.model.model.norm(found), weight)
        ours = torch.log_softmax(logits.float(), -1)
        divergence = (theirs.exp() * (theirs - ours)).sum(-1).mean()
        return divergence + truth * torch.nn.functional.nll_loss(ours[:-1], ids[1:])

    def _layer_arguments(self, layer: int, batch: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model passes to ``layer`` for a batch of this shape: it depends on no token."""
        if len(batch) not in self._arguments:
            self._arguments[len(batch)] = self._record(torch.zeros(batch.shape[:2], dtype=torch.int64))[0]
        args, kwargs = self._arguments[len(batch)][layer]
        if self.kv:
            kwargs = {**kwargs, "past_key_values": self._kv_cache(batch.shape[1])}
        return args, kwargs

    def _kv_cache(self, tokens: int) -> KVCache:
        """A cache that hands every token's keys and values back as they are stored.

        The cache of a run keeps the current chunk only, and within one step gives the others as they come:
        then a window longer than a chunk would show nothing of what storing them costs.
        """
        assert self.kv is not None
        return KVCache(replace(self.shape, attention_chunk_size=0), tokens, self.kv)

    def _record(self, ids: Tensor) -> tuple[list[tuple[tuple[Any, ...], dict[str, Any]]], Tensor]:
        """Run the model on ``ids`` around its layers, which only note how they are called: that, and what the first
        of them is given."""
        noted: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        given: list[Tensor] = []

        def note(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            noted.append((args, kwargs))
            given.append(hidden_states)
            return hidden_states

        cache = self._kv_cache(ids.shape[1]) if self.kv else None
        with torch.no_grad(), self._layers_replaced(note):
            decoder_of(self.model)(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
        return noted, given[0]

    @contextmanager
    def _layers_replaced(self, forward: Callable[..., Tensor]) -> Iterator[None]:
        """Every layer does ``forward`` instead inside the ``with`` block."""
        forwards = [layer.forward for layer in self.layers]
        try:
            for layer in self.layers:
                layer.forward = forward
            yield
        finally:
            for layer, own in zip(self.layers, forwards, strict=True):
                layer.forward = own

    def __enter__(self) -> "Layerwise":
        return self

    def __exit__(self, *exception: object) -> None:
        self.reader.close()


def check_layers(shape: ModelShape, what: str) -> None:
    """Raise UsageError unless ``what``, which knows what every Linear of a layer is given, can be done."""
    if not shape.is_native:
        raise UsageError(
            f"{what} is not supported for {shape.family.name}, whose layers are transformers' own: leave it out; int4 "
            "is then rounded by searched scales, without a text"
        )
