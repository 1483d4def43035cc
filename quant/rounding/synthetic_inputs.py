"""Inputs of a model's dense Linears, imagined from its weights: no text, and no forward pass of the model.

A few hundred tokens are taken from the vocabulary, the first ones more often (a vocabulary made by merging
has frequent tokens first; Zipf's law), and walked through the layers without their experts. Attention is
replaced by what it does on average: each head adds up its token's value and those of some others, with
random weights. Norms, v_proj, o_proj, the shared expert and dense MLPs are the model's own. For the first
layer's q, k and v this is what inputs are, but for frequencies; deeper it is a guess that keeps the mean and
the main directions of the residual stream, and rounding damps it strongly
(``quant.rounding.curvature``). Inputs of down_proj are guessed too poorly to be of use.

Legend: S samples, H hidden size, K in features.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from quant.checkpoint.checkpoint import Checkpoint
from quant.model.tensors import LinearSpec
from quant.rounding.curvature import Curvature

SAMPLES = 512
FIRST_SAMPLES = 8 * SAMPLES  # for what the first layer's q, k and v are given: they need no walk
_ZIPF_OFFSET = 10
_OTHERS, _SPREAD, _OWN = 16, 2.0, 0.3
_ROW_BYTES = 32 * 2**20  # of a weight, read at once
_EPSILON = 1e-5


class SyntheticInputs:
    """Curvatures for one source checkpoint, a layer at a time: asked for in the order of the layers it reads
    the dense weights once; an earlier layer than the last starts again."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._specs = {spec.module: spec for spec in checkpoint.shape.dense_linears() if spec.layer is not None}
        self._layer = -1
        self._stream = torch.empty(0)
        self._inputs: Mapping[str, Tensor] = {}
        self._known: dict[str, Curvature | None] = {}

    def of(self, module: str) -> Curvature | None:
        """The curvature of checkpoint module ``module``; None for experts, down_proj and head, and where the
        imagined inputs are zero or overflow."""
        spec = self._specs.get(module)
        if spec is None or spec.layer is None or spec.projection == "down_proj":
            return None
        if spec.layer < self._layer:
            self._layer = -1
        while self._layer < spec.layer:
            self._step()
        kind = _kind(spec)
        if kind not in self._known:
            self._known[kind] = Curvature.of(self._inputs[kind])
        return self._known[kind]

    def _step(self) -> None:
        """Walk through the next layer, keeping what its Linears are given."""
        first = self._layer < 0
        if first:
            self._stream = self._embedded()
        self._layer += 1
        shape, layer = self._checkpoint.shape, self._layer
        base = f"{shape.layer_prefix(layer)}self_attn."
        inputs = {"attention": self._normed("input_layernorm")}
        if first:
            self._stream = self._stream[:SAMPLES].clone()
        values = self._product(f"{base}v_proj", inputs["attention"][:SAMPLES])
        inputs["o_proj"] = self._mixed(values)
        self._stream = self._stream + self._product(f"{base}o_proj", inputs["o_proj"])
        modules = [m for m, spec in self._specs.items() if spec.layer == layer and spec.projection]
        if modules:
            gate, up, down = modules
            inputs["mlp"] = self._normed("post_attention_layernorm")
            gated = functional.silu(self._product(gate, inputs["mlp"]))
            self._stream = self._stream + self._product(down, gated.mul_(self._product(up, inputs["mlp"])))
        self._inputs, self._known = inputs, {}

    def _embedded(self) -> Tensor:
        """Embeddings ``[8 S, H]`` of tokens evenly spread over Zipf's distribution, in random order."""
        entry = self._checkpoint.find(f"{self._checkpoint.shape.embedding_module}.weight")
        rows, width = entry.shape
        share = (torch.arange(rows, dtype=torch.float64) + _ZIPF_OFFSET).reciprocal().cumsum(0)
        places = (torch.arange(FIRST_SAMPLES, dtype=torch.float64) + 0.5) / FIRST_SAMPLES * share[-1]
        tokens = torch.searchsorted(share, places).clamp_max(rows - 1)
        order = torch.randperm(FIRST_SAMPLES, generator=torch.Generator().manual_seed(0))
        row_bytes = entry.nbytes // rows
        found = {
            token: self._checkpoint.read(entry.key, token * row_bytes, (1, width)).float()
            for token in dict.fromkeys(tokens.tolist())
        }
        return torch.cat([found[token] for token in tokens[order].tolist()])

    def _normed(self, norm: str) -> Tensor:
        key = f"{self._checkpoint.shape.layer_prefix(self._layer)}{norm}.weight"
        weight = self._checkpoint.read(self._checkpoint.find(key).key).float()
        power = self._stream.square().mean(1, keepdim=True)
        return self._stream * torch.rsqrt(power + _EPSILON) * weight

    def _mixed(self, values: Tensor) -> Tensor:
        """What heads make of ``values`` ``[S, kv_heads * head_dim]``: ``[S, heads * head_dim]``."""
        shape = self._checkpoint.shape
        heads = values.view(SAMPLES, shape.num_kv_heads, shape.head_dim)
        generator = torch.Generator().manual_seed(self._layer)
        mixed = torch.empty(SAMPLES, shape.num_heads, shape.head_dim)
        for head in range(shape.num_heads):
            own = heads[:, head * shape.num_kv_heads // shape.num_heads]
            others = torch.randint(SAMPLES, (SAMPLES, _OTHERS), generator=generator)
            scores = torch.randn(SAMPLES, _OTHERS, generator=generator) * _SPREAD
            mixing = torch.zeros(SAMPLES, SAMPLES)
            mixing.scatter_add_(1, others, scores.softmax(1) * (1 - _OWN))
            mixed[:, head] = mixing @ own + _OWN * own
        return mixed.flatten(1)

    def _product(self, module: str, x: Tensor) -> Tensor:
        """x · Wᵀ of checkpoint module ``module``, some rows of its weight in memory at a time."""
        entry = self._checkpoint.find(f"{module}.weight")
        rows, width = entry.shape
        row_bytes = entry.nbytes // rows
        step = max(1, _ROW_BYTES // row_bytes)
        result = torch.empty(len(x), rows)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            weight = self._checkpoint.read(entry.key, row * row_bytes, (count, width)).float()
            result[:, row : row + count] = x @ weight.t()
        return result


def _kind(spec: LinearSpec) -> str:
    """Which of a layer's inputs a Linear is given."""
    if spec.projection:
        return "mlp"
    return "o_proj" if spec.module.endswith(".o_proj") else "attention"
