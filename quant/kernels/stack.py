"""All decoder layers for one token in one native call, with no Python between layers.

Legend: H hidden, E experts, k experts per token, r rotated channels of a head.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
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


class _CRun(ctypes.Structure):
    _fields_ = fields(
        (Pointer, "x cosine sine"),
        (ctypes.POINTER(CKvPool), "pool"),
        (Pointer, "pages"),
        (I64, "blocks position count layer"),
        (I32, "stage exact reason wanted_count"),
        (Pointer, "wanted layer_of"),
        (ctypes.POINTER(CLookahead), "lookahead"),
        (Pointer, "late"),
        (ctypes.c_uint64, "done"),
        (F64, "patience"),
        (I32, "wanted_room"),
        (F32, "eps"),
        (Pointer, "norm"),
        (CWeight, "head"),
        (Pointer, "normed logits"),
        (CWeight, "embeddings"),
        (I64, "guess_token_from"),
        (I32, "guessed_token"),
    )


_TOKEN, _LAYER, _EXPERTS = range(3)  # stages
_MISSING, _WANTED = 1, 2  # of the reasons
_NOTHING_DONE = 2**64 - 1  # of the current layer not even the shared expert
_MOST_CHOSEN = 63  # experts of one token and layer: a bit each
_PATIENCE = 0.1  # seconds in a native call, in which Ctrl-C is not seen


@dataclass(frozen=True)
class Stop:
    """Where a step is and why: ``attended`` layers have their attention done, ``finished`` are through.

    ``missing`` are the chosen experts of layer ``finished`` that are not computed yet, ascending, if one of
    them is not even coming; ``waiting`` are all of them. ``wanted`` are (layer, expert) that coming layers
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

    With a ``head``, ``token_logits`` f32 ``[V]`` are the last token's; they are overwritten by the next.

    ``chosen`` int32 ``[layers, k]``, ``weights`` f32 ``[layers, k]`` and ``logits`` f32 ``[layers, E]`` hold
    what the routers found for the last token; rows of dense layers mean nothing. ``late`` int64 ``[layers]``
    has bit i set where the i-th of the chosen experts was not there when its layer asked for it.
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
        if top_k > _MOST_CHOSEN:
            raise SchemeError(f"{top_k} experts per token: expected {_MOST_CHOSEN} at most")
        experts = max((block.router.out_features for block in blocks if isinstance(block, MoeBlock)), default=0)
        self.normed = torch.empty(count, hidden)
        self.logits, self.weights = torch.empty(count, max(experts, 1)), torch.empty(count, max(top_k, 1))
        self.chosen = torch.zeros(count, max(top_k, 1), dtype=torch.int32)
        self._layers = (_CLayer * count)()
        moe_layers = [index for index, block in enumerate(blocks) if isinstance(block, MoeBlock)]
        self._layer_of = torch.tensor(moe_layers, dtype=torch.int64)
        self._wanted = torch.zeros(2 * DEPTH * max(top_k, 1), 3, dtype=torch.int32)
        self.late = torch.zeros(count, dtype=torch.int64)
        self._run = _CRun(count=count, patience=_PATIENCE, guess_token_from=count)
        self._run.wanted_room = len(self._wanted)
        self._run.wanted, self._run.layer_of = self._wanted.data_ptr(), self._layer_of.data_ptr()
        self._run.late = self.late.data_ptr()
        for index, (attention, block) in enumerate(zip(attentions, blocks, strict=True)):
            layer = self._layers[index]
            if attention.shape.rope != "none":
                attention.native.rope_dim = rotary
            layer.attention, layer.moe = ctypes.pointer(attention.native), ctypes.pointer(block.native)
            found = {name: getattr(self, name)[index] for name in ("normed", "logits", "chosen", "weights")}
            layer.routing = CRouting(**addresses(**found))
            layer.moe_index = moe_layers.index(index) if index in moe_layers else -1
        self.token_logits: Tensor | None = None
        if head is not None:
            self.head, self._norm, self._normed = head, head.norm.float().contiguous(), torch.empty(hidden)
            self.token_logits = torch.empty(head.weight.out_features)
            self._run.norm, self._run.eps, self._run.head = (self._norm.data_ptr(), head.eps, head.weight.native)
            self._run.normed, self._run.logits = self._normed.data_ptr(), self.token_logits.data_ptr()

    def begin(
        self,
        x: Tensor,
        position: int,
        pages: KvPages,
        tables: Tensor,
        cosine: Tensor,
        sine: Tensor,
        exact: bool,
        lookahead: Lookahead | None = None,
    ) -> None:
        """Start a token: x f32 ``[H]`` (contiguous) is worked on in place; cosine and sine f32 ``[r/2]``.

        ``tables`` int32 ``[layers, blocks]`` name for each layer the sequence's ``pages``, that of the new token
        among them.
        """
        run = self._run
        self._held = (x, cosine, sine, pages, tables)
        run.pool, run.pages, run.blocks = ctypes.pointer(pages.native), tables.data_ptr(), tables.shape[1]
        run.x, run.cosine, run.sine = x.data_ptr(), cosine.data_ptr(), sine.data_ptr()
        run.position, run.layer, run.exact = position, 0, int(exact)
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
        """Run on until the token is through (None), or until there is something that the caller must do
        first: begin the reads of what is missing and of what is wanted. Returns at the latest after a tenth
        of a second of waiting."""
        run = self._run
        call("stack", self._layers, run)
        if run.layer == run.count:
            return None
        layer, within = run.layer, run.stage == _EXPERTS
        waiting: list[int] = []
        if within:
            done = 0 if run.done == _NOTHING_DONE else run.done
            chosen = self.chosen[layer, : self.blocks[layer].top_k].tolist()
            waiting = sorted(expert for rank, expert in enumerate(chosen) if not done >> rank & 1)
        rows = self._wanted[: run.wanted_count].tolist() if run.reason & _WANTED else []
        wanted, later = ([(a, b) for a, b, next_token in rows if next_token == which] for which in (0, 1))
        return Stop(layer, layer + int(within), bool(run.reason & _MISSING), waiting, wanted, later)
