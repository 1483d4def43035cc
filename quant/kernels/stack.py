"""All decoder layers for a few rows in one native call, with no Python between layers.

A row is a token: the next one of each of some sequences, or some of one sequence. Each weight is read once for all
rows, each expert once for all rows that chose it. What a row gets does not depend on the rows beside it.

Legend: T rows, H hidden, E experts, k experts per token, r rotated channels of a head, V vocabulary.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant.errors import SchemeError
from quant.kernels.attention import Attention, CAttention, CKvPool, KvPages
from quant.kernels.library import F32, F64, I32, I64, Pointer, addresses, call, fields
from quant.kernels.lookahead import DEPTH, CLookahead, Lookahead
from quant.kernels.moe import CMoeBlock, CRouting, GatedMlp, MoeBlock
from quant.kernels.weight import CWeight, NativeKind, Weight


class DenseBlock:
    """x + mlp(norm(x)): a layer without experts, in the form of a MoE block with a shared expert only."""

    def __init__(self, mlp: GatedMlp, norm: Tensor, eps: float) -> None:
        self.mlp, self.norm, self.top_k = mlp, norm.float().contiguous(), 0
        block = CMoeBlock(eps=eps, shared=1)
        block.norm = self.norm.data_ptr()
        block.router.k = mlp.gate_proj.in_features
        block.shared_gate, block.shared_up, block.shared_down = mlp.native
        self.native = block


class _CLayer(ctypes.Structure):
    _fields_ = fields(
        (ctypes.POINTER(CAttention), "attention"),
        (ctypes.POINTER(CMoeBlock), "moe"),
        (CRouting, "routing"),
        (I64, "moe_index"),
    )


class _CSegment(ctypes.Structure):
    _fields_ = fields((Pointer, "pages"), (I64, "position tokens"))


class _CRun(ctypes.Structure):
    _fields_ = fields(
        (Pointer, "x cosine sine"),
        (ctypes.POINTER(CKvPool), "pool"),
        (Pointer, "segments"),
        (I64, "segment_count rows blocks count layer"),
        (I32, "stage exact reason wanted_count"),
        (Pointer, "wanted layer_of"),
        (ctypes.POINTER(CLookahead), "lookahead"),
        (Pointer, "late computed parts"),
        (F64, "patience"),
        (I32, "shared_pending wanted_room"),
        (F32, "eps"),
        (Pointer, "norm"),
        (CWeight, "head"),
        (Pointer, "normed logits"),
        (CWeight, "embeddings"),
        (I64, "guess_token_from"),
        (I32, "guessed_token"),
    )


Ids = NDArray[np.int32]
_TOKEN, _LAYER, _EXPERTS = range(3)  # stages
_MISSING, _WANTED = 1, 2  # of the reasons
MAX_ROWS = 16
_PATIENCE = 0.1  # seconds in a native call, in which Ctrl-C is not seen


@dataclass(frozen=True)
class Segment:
    """``tokens`` rows of one sequence, at ``position`` and after. ``tables`` int32 ``[layers, blocks]`` name its pages
    layer by layer, those of the new tokens among them."""

    tables: Tensor
    position: int
    tokens: int = 1


@dataclass(frozen=True)
class Stop:
    """Where a step is and why: ``attended`` layers have their attention done, ``finished`` are through.

    ``waiting`` are the chosen experts of layer ``finished`` that are not computed yet, ascending; ``missing``: one of
    them is not even coming. ``wanted`` are (layer, expert) that coming layers
    will probably choose, nearest first, ``wanted_next`` what the next token's first layers will, as far as it
    can be told already.
    """

    finished: int
    attended: int
    missing: bool
    waiting: list[int]
    wanted: list[tuple[int, int]]
    wanted_next: list[tuple[int, int]]


@dataclass(frozen=True)
class Head:
    """What follows the layers: RMSNorm with ``norm`` ``[H]``, then the logits of ``weight`` ``[V, H]``."""

    norm: Tensor
    eps: float
    weight: Weight


class Stack:
    """All layers of a decoder. ``rotary`` is r, 0 if no layer uses RoPE.

    With a ``head``, ``token_logits`` f32 ``[T, V]`` are the last step's; they are overwritten by the next.

    Every router chooses as many experts.
    """

    def __init__(
        self,
        attentions: Sequence[Attention],
        blocks: Sequence[MoeBlock | DenseBlock],
        rotary: int,
        head: Head | None = None,
    ) -> None:
        if not attentions or len(attentions) != len(blocks):
            raise SchemeError(f"{len(attentions)} attentions and {len(blocks)} blocks: expected as many of each")
        self.attentions, self.blocks, self.rotary = list(attentions), list(blocks), rotary
        count, hidden = len(blocks), attentions[0].hidden
        top_k = max(block.top_k for block in blocks)
        experts = max((block.router.out_features for block in blocks if isinstance(block, MoeBlock)), default=0)
        rows = MAX_ROWS
        self.normed = torch.empty(count, rows, hidden)
        self.logits, self.weights = torch.empty(count, rows, max(experts, 1)), torch.empty(count, rows, max(top_k, 1))
        self._chosen = torch.zeros(count, rows * max(top_k, 1), dtype=torch.int32)
        self._choices, self._most = self._chosen.numpy(), max(top_k, 1)
        self._computed = torch.zeros(max(experts, 1), dtype=torch.uint8)
        self._parts = torch.empty(rows * max(top_k, 1), hidden)
        self._layers = (_CLayer * count)()
        moe_layers = [index for index, block in enumerate(blocks) if isinstance(block, MoeBlock)]
        self._moe_layers = np.array(moe_layers, np.int64)
        self._layer_of = torch.tensor(moe_layers, dtype=torch.int64)
        self._wanted = torch.zeros(2 * DEPTH * rows * max(top_k, 1), 3, dtype=torch.int32)
        self._late = np.zeros(count, np.int64)
        self._run = _CRun(count=count, patience=_PATIENCE, guess_token_from=count)
        self._run.wanted_room = len(self._wanted)
        self._run.wanted, self._run.layer_of = self._wanted.data_ptr(), self._layer_of.data_ptr()
        self._run.late, self._run.computed = self._late.ctypes.data, self._computed.data_ptr()
        self._run.parts = self._parts.data_ptr()
        for index, (attention, block) in enumerate(zip(attentions, blocks, strict=True)):
            layer = self._layers[index]
            if attention.shape.rope != "none":
                attention.native.rope_dim = rotary
            layer.attention, layer.moe = ctypes.pointer(attention.native), ctypes.pointer(block.native)
            found = {name: getattr(self, name)[index] for name in ("normed", "logits", "weights")}
            layer.routing = CRouting(**addresses(**found, chosen=self._chosen[index]))
            layer.moe_index = moe_layers.index(index) if index in moe_layers else -1
        self._logits: Tensor | None = None
        if head is not None:
            self.head, self._norm, self._normed = head, head.norm.float().contiguous(), torch.empty(rows, hidden)
            self._logits = torch.empty(rows, head.weight.out_features)
            self._run.norm, self._run.eps, self._run.head = (self._norm.data_ptr(), head.eps, head.weight.native)
            self._run.normed, self._run.logits = self._normed.data_ptr(), self._logits.data_ptr()

    @property
    def token_logits(self) -> Tensor | None:
        """The last step's logits f32 ``[T, V]``."""
        return None if self._logits is None else self._logits[: self._run.rows]

    def chosen(self, layer: int) -> Tensor:
        """What the router of ``layer`` chose in the last step, int32 ``[T, k]``, best first."""
        top_k = self.blocks[layer].top_k
        return self._chosen[layer, : self._run.rows * top_k].view(-1, top_k)

    def chosen_by_all(self) -> Ids:
        """What the router of each MoE layer chose in the last step, int32 ``[L, T, k]``, best first."""
        rows, top_k = self._run.rows, self._most
        return self._choices[self._moe_layers, : rows * top_k].reshape(len(self._moe_layers), rows, top_k)

    def late_by_layer(self) -> list[int]:
        """Of the experts that each MoE layer's rows chose, how many were not there when it asked, ``[L]``."""
        late: list[int] = self._late[self._moe_layers].tolist()
        return late

    def begin(
        self,
        x: Tensor,
        segments: Sequence[Segment],
        pages: KvPages,
        cosine: Tensor,
        sine: Tensor,
        exact: bool,
        lookahead: Lookahead | None = None,
    ) -> None:
        """Start a step: x f32 ``[T, H]`` (contiguous) is worked on in place; cosine and sine f32 ``[T, r/2]``, the rows
        of one segment after those of another, MAX_ROWS of them at most."""
        run, rows = self._run, sum(segment.tokens for segment in segments)
        if not 1 <= rows <= MAX_ROWS or x.shape[0] != rows:
            raise SchemeError(f"x is {tuple(x.shape)} for {rows} rows: expected 1 to {MAX_ROWS} in both")
        of_rows = [_CSegment(s.tables.data_ptr(), s.position, s.tokens) for s in segments]
        native = (_CSegment * len(segments))(*of_rows)
        self._held = (x, cosine, sine, pages, native, segments)
        run.segments, run.segment_count, run.rows = ctypes.addressof(native), len(segments), rows
        run.pool, run.blocks = ctypes.pointer(pages.native), segments[0].tables.shape[1]
        run.x, run.cosine, run.sine = x.data_ptr(), cosine.data_ptr(), sine.data_ptr()
        run.layer, run.exact = 0, int(exact)
        run.stage = _LAYER if lookahead is None else _TOKEN
        run.lookahead = None if lookahead is None else ctypes.pointer(lookahead.native)

    def guess_tokens(self, embeddings: Tensor, layers: int) -> None:
        """While one of the last ``layers`` waits, guess the next token, whose ``embeddings`` ``[V, H]`` (bf16
        or f32) tell what its first layers will want. Only with a head."""
        kind: NativeKind = "f32" if embeddings.dtype == torch.float32 else "bf16"
        self._embeddings = Weight.from_tensors(kind, embeddings)
        self._run.embeddings = self._embeddings.native
        self._run.guess_token_from = max(0, len(self.blocks) - layers)

    def go(self) -> Stop | None:
        """Run on until the step is through (None), or until there is something that the caller must do
        first: begin the reads of what is missing and of what is wanted. Returns at the latest after a tenth
        of a second of waiting."""
        run = self._run
        call("stack", self._layers, run)
        if run.layer == run.count:
            return None
        layer, within = run.layer, run.stage == _EXPERTS
        waiting: list[int] = []
        if within:
            chosen = set(self.chosen(layer).flatten().tolist())
            waiting = sorted(expert for expert in chosen if not self._computed[expert])
        rows = self._wanted[: run.wanted_count].tolist() if run.reason & _WANTED else []
        wanted, later = ([(a, b) for a, b, next_token in rows if next_token == which] for which in (0, 1))
        return Stop(layer, layer + int(within), bool(run.reason & _MISSING), waiting, wanted, later)
