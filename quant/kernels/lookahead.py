"""Lookahead: which experts the coming layers will probably ask for.

The residual stream changes slowly from layer to layer, so a coming layer's router, applied to the hidden
state as it is now, mostly picks what it will pick when its turn comes. A guess is worth a read if it is right
often enough; how far the best logits stand out says how likely that is, and what margin is needed at which
distance is learned while the model runs: every guess is compared with the choice that follows. For one token
all of that is native, between the layers of a decode step; ``lookahead.cpp`` has the arithmetic.

Legend: T tokens, H hidden, E experts, L MoE layers, k experts per token.
"""

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from quant.kernels.library import F32, I32, Pointer, addresses, call, fields, library
from quant.kernels.product import linear
from quant.kernels.routing import CSelection, Selection
from quant.kernels.rows import float_rows
from quant.kernels.weight import CWeight, Weight

DEPTH = 6
BY_LOGITS = Selection("softmax")  # the largest logits are chosen
# Read for guesses that have been right this often: a wrong one costs the disk as much as a right one.
TRUST = 0.75
_MEMORY = 0.98  # what one guess leaves of the past
_MARGINS = (0.05, 0.15, 0.3, 0.6)  # in standard deviations of a layer's logits: the bins that are learned

# What a guess is made from, each judged apart: a token's embedding; a layer's output without the experts that
# it waits for; a whole output; the embedding of a token that is itself a guess.
FROM_EMBEDDING, FROM_PARTIAL, FROM_OUTPUT, FROM_GUESSED_TOKEN = range(4)


class CLookahead(ctypes.Structure):
    """``coldstream::Lookahead`` of lookahead.h."""

    _fields_ = fields(
        (CWeight, "routers"),
        (I32, "layers experts top_k depth bins slots"),
        (F32, "trust memory"),
        (Pointer, "edges right guesses counts bias correction"),
        (CSelection, "selection"),
    )


class Lookahead:
    """Guesses for a model's MoE layers, numbered from 0; ``routers`` ``[E, H]``, ``norms`` ``[H]`` and, where routers
    have them, ``biases`` and ``corrections`` ``[E]``, one of each per layer, for steps of up to ``rows`` tokens;
    ``selection`` is what they choose by.

    ``right`` f32 ``[4, DEPTH, bins]`` is how often guesses were right, by what they were made from, how many
    layers ahead (less one), and margin.
    """

    def __init__(
        self,
        routers: Sequence[Tensor],
        norms: Sequence[Tensor],
        top_k: int,
        rows: int = 1,
        biases: Sequence[Tensor] = (),
        corrections: Sequence[Tensor] = (),
        selection: Selection = BY_LOGITS,
    ) -> None:
        self.layers, self.experts, self.top_k = len(routers), routers[0].shape[0], top_k
        # A token's norm is one positive factor on all logits of a layer: without biases it does not change which
        # are largest.
        weighted = [router.float() * norm.float() for router, norm in zip(routers, norms, strict=True)]
        self._routers = torch.cat(weighted)  # [L · E, H]
        self._edges = torch.tensor(_MARGINS)
        self.right = torch.full((4, DEPTH, len(_MARGINS) + 1), TRUST)
        slots = rows * (2 * DEPTH + 2)  # two guesses by each of the layers before, two from embeddings
        self._guesses = torch.zeros(self.layers, slots, 2 + top_k, dtype=torch.int32)
        self._counts = torch.zeros(self.layers, dtype=torch.int32)
        self._bias = torch.cat([bias.float() for bias in biases]) if biases else None  # [L · E]
        self._correction = torch.cat([one.float() for one in corrections]) if corrections else None  # [L · E]
        self._selection = selection
        tensors = addresses(
            correction=self._correction,
            bias=self._bias,
            edges=self._edges,
            right=self.right,
            guesses=self._guesses,
            counts=self._counts,
        )
        self.native = CLookahead(depth=DEPTH, bins=len(_MARGINS) + 1, trust=TRUST, memory=_MEMORY, **tensors)
        self.native.routers, self.native.slots = Weight.from_tensors("f32", self._routers).native, slots
        self.native.selection = selection.native
        self.native.layers, self.native.experts, self.native.top_k = self.layers, self.experts, top_k

    def guess(self, kind: int, here: int, x: Tensor) -> list[tuple[int, int]]:
        """(layer, expert) that the layers after ``here`` (-1: from the first on) will probably want for one
        token's x ``[1, H]``, nearest first, as far as guesses of this ``kind`` are trusted."""
        x = float_rows(x, self._routers.shape[1], "x")
        pairs, count = torch.empty(DEPTH * self.top_k, 2, dtype=torch.int32), I32(0)
        call("guess", self.native, I32(kind), I32(here), x, pairs, ctypes.byref(count))
        return [(layer, expert) for layer, expert in pairs[: count.value].tolist()]

    def learn(self, layer: int, chosen: Sequence[int]) -> None:
        """Compare what was guessed for ``layer`` with the k experts that one token then chose."""
        library().cs_learn(ctypes.byref(self.native), layer, (I32 * self.top_k)(*chosen))

    def forget(self) -> None:
        """Drop what was guessed for a next step: its rows are other sequences."""
        self._counts.zero_()

    def for_prompt(self, here: int, x: Tensor) -> list[tuple[int, int]]:
        """Of a prompt's many tokens x ``[T, H]`` the layer after ``here`` wants nearly all experts: the most
        wanted first."""
        if here + 1 >= self.layers:
            return []
        rows = self._routers[(here + 1) * self.experts : (here + 2) * self.experts]
        logits = linear(x, Weight.from_tensors("f32", rows))
        logits = logits / x.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-10)
        bias, correction = (
            None if one is None else one[(here + 1) * self.experts : (here + 2) * self.experts]
            for one in (self._bias, self._correction)
        )
        logits = logits if bias is None else logits + bias
        scores = self._selection.choice_scores(logits, correction).numpy()
        chosen = np.argpartition(-scores, self.top_k - 1, -1)[:, : self.top_k]
        wanted = np.bincount(chosen.ravel(), minlength=self.experts)
        order = np.argsort(-wanted, kind="stable").tolist()
        return [(here + 1, expert) for expert in order if wanted[expert]]
