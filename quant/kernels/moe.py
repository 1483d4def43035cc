"""Gated feed-forward blocks and whole MoE blocks, one native call each.

Legend: T tokens, H hidden, E experts, k experts per token.

``mlp`` runs a list of jobs (an expert and the tokens it works for). ``MoeBlock`` routes as well, and runs the
whole block if every chosen expert is resident; otherwise it returns the routing at once, so that the missing
experts can be fetched while ``mlp`` already runs the others.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quant.errors import SchemeError
from quant.kernels.library import F32, I32, I64, Pointer, addresses, call, fields, library
from quant.kernels.product import linear
from quant.kernels.routing import CSelection, RouterKind, Selection
from quant.kernels.rows import float_rows, output_rows
from quant.kernels.swiglu import SILU, SwiGlu
from quant.kernels.weight import CODES, CWeight, Weight

_ENTRY = 14  # per expert: six addresses of weights, three of biases, three forms, the biases' kind, the state
_STATE = 13
_BIAS_KINDS = {torch.float32: CODES["f32"], torch.bfloat16: CODES["bf16"]}
READY, COMING, ABSENT, FAILED = 1, 2, 0, 3


@dataclass(frozen=True)
class GatedMlp:
    """down_proj(join(gate_proj(x), up_proj(x))): H → I → H; ``join`` is silu(g) · u by default.

    ``biases``, ``[I]`` twice and ``[H]``, all f32 or all bf16, are added to what the three weights give. Raises
    SchemeError if shapes do not chain.
    """

    gate_proj: Weight
    up_proj: Weight
    down_proj: Weight
    biases: tuple[Tensor, Tensor, Tensor] | None = None
    join: SwiGlu = SILU

    def __post_init__(self) -> None:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        wide = (gate.out_features, gate.in_features)
        if (up.out_features, up.in_features) != wide or (down.in_features, down.out_features) != wide:
            raise SchemeError(
                f"gate_proj {wide}, up_proj {(up.out_features, up.in_features)} and down_proj "
                f"{(down.out_features, down.in_features)} do not chain: expected [I, H], [I, H], [H, I]"
            )
        for bias, weight in zip(self.biases or (), self.weights, strict=False):
            if bias.shape != (weight.out_features,) or not reads_bias(bias) or bias.dtype != self.biases[0].dtype:  # type: ignore[index]
                raise SchemeError(
                    f"a bias {tuple(bias.shape)} {bias.dtype}: expected [{weight.out_features}], all f32 or all bf16"
                )

    @property
    def weights(self) -> tuple[Weight, Weight, Weight]:
        """gate_proj, up_proj and down_proj."""
        return self.gate_proj, self.up_proj, self.down_proj

    @property
    def native(self) -> tuple[CWeight, ...]:
        """The structures of the three weights."""
        return tuple(weight.native for weight in self.weights)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The shapes of the three weights: what experts of one block have in common."""
        return tuple((w.out_features, w.in_features) for w in self.weights)

    @property
    def pointers(self) -> list[int]:
        """Six addresses: packed words and scales of gate_proj, up_proj and down_proj."""
        return [pointer for w in self.weights for pointer in (w.packed_ptr, w.scale_ptr)]

    @cached_property
    def entry(self) -> list[int]:
        """A row of ``MoeBlock.table`` but for its state: the addresses, and how weights and biases are stored."""
        forms = (n.kind | n.group << 32 for n in self.native)
        return [*self.pointers, *self.bias_pointers, *forms, self.bias_kind]

    @property
    def bias_pointers(self) -> list[int]:
        """Addresses of the biases of gate_proj, up_proj and down_proj, 0 for none."""
        return [0, 0, 0] if self.biases is None else [bias.data_ptr() for bias in self.biases]

    @property
    def bias_kind(self) -> int:
        """What the biases are stored in, as the native code numbers it."""
        return _BIAS_KINDS[torch.float32 if self.biases is None else self.biases[0].dtype]


def reads_bias(bias: Tensor) -> bool:
    """Whether the native kernels read ``bias`` where it lies."""
    return bias.dtype in _BIAS_KINDS and bias.is_contiguous()


class _CJob(ctypes.Structure):
    _fields_ = fields(
        (CWeight, "gate up down"), (Pointer, "tokens"), (I64, "count"), (Pointer, "in_scale out_weight out_rows")
    )
    _fields_ += fields((Pointer, "gate_bias up_bias down_bias"), (I32, "bias_kind"), (F32, "alpha limit offset"))


@dataclass(frozen=True)
class Job:
    """One expert and the tokens it works for: rows ``tokens`` of x, or all of them.

    ``in_scale`` and ``out_weight``, one value per token of the job, scale the expert's input (Llama 4) or
    output (every other family). ``out_rows`` are the rows of the output, one per token of the job, where those are
    not the tokens.
    """

    expert: GatedMlp
    tokens: Tensor | None = None
    in_scale: Tensor | None = None
    out_weight: Tensor | None = None
    out_rows: Tensor | None = None


def _job(job: Job, x: Tensor, kept: list[Tensor], rows: int) -> _CJob:
    tokens = job.tokens
    count = x.shape[0]
    if tokens is not None:
        tokens = tokens.to(torch.int32).contiguous()
        count = tokens.numel()
        if count and not 0 <= int(tokens.min()) <= int(tokens.max()) < x.shape[0]:
            raise SchemeError(f"a job names tokens outside 0..{x.shape[0] - 1}")
        kept.append(tokens)
    factors: list[int | None] = []
    for factor in (job.in_scale, job.out_weight):
        if factor is None:
            factors.append(None)
            continue
        factor = factor.float().contiguous()
        if factor.numel() != count:
            raise SchemeError(f"a job of {count} tokens has {factor.numel()} factors: expected one per token")
        kept.append(factor)
        factors.append(factor.data_ptr())
    places = None
    if job.out_rows is not None:
        places = job.out_rows.to(torch.int32).contiguous()
        if places.numel() != count or (count and not 0 <= int(places.min()) <= int(places.max()) < rows):
            raise SchemeError(
                f"a job of {count} tokens has {places.numel()} rows to write: expected as many in 0..{rows - 1}"
            )
        kept.append(places)
    elif rows != x.shape[0]:
        raise SchemeError(f"out has {rows} rows for {x.shape[0]} tokens: expected jobs that say which are theirs")
    expert, join = job.expert, job.expert.join
    biases = (*(pointer or None for pointer in expert.bias_pointers), expert.bias_kind)
    place = None if tokens is None else tokens.data_ptr()
    into = None if places is None else places.data_ptr()
    return _CJob(*expert.native, place, count, *factors, into, *biases, join.alpha, join.limit, join.offset)


def mlp(jobs: Sequence[Job], x: Tensor, out: Tensor | None = None, *, exact: bool = False) -> Tensor:
    """out[t] += out_weight · down(silu(gate(in_scale · x[t])) · up(in_scale · x[t])), all jobs in one call.

    x ``[T, H]``; ``out`` f32 ``[T, H]`` (or more rows, where all jobs have ``out_rows``) is added to, or starts at
    zero. The sum is taken in the order of the jobs. Raises SchemeError if something does not fit.
    """
    for job in jobs:
        if job.expert.gate_proj.in_features != x.shape[-1]:
            raise SchemeError(f"x is {tuple(x.shape)}: the expert expects {job.expert.gate_proj.in_features} columns")
    x = float_rows(x, x.shape[-1], "x")
    out = torch.zeros(x.shape) if out is None else output_rows(out, out.shape[0], x.shape[1])
    kept: list[Tensor] = []
    native = (_CJob * len(jobs))(*(_job(job, x, kept, out.shape[0]) for job in jobs))
    call("mlp", native, len(jobs), x, x.stride(0), out, out.stride(0), exact)
    return out


class CMoeBlock(ctypes.Structure):
    """``coldstream::MoeBlock`` of moe.h."""

    _fields_ = fields(
        (Pointer, "norm"),
        (F32, "eps"),
        (I32, "experts top_k"),
        (CSelection, "selection"),
        (CWeight, "router"),
        (Pointer, "router_bias correction"),
        (CWeight, "gate up down"),
        (Pointer, "table"),
        (F32, "alpha limit offset"),
        (I32, "shared"),
        (CWeight, "shared_gate shared_up shared_down shared_router"),
    )


class CRouting(ctypes.Structure):
    """``coldstream::Routing`` of moe.h."""

    _fields_ = fields((Pointer, "normed logits chosen weights"))


@dataclass(frozen=True)
class MoeResult:
    """What one call of a MoE block found: router logits f32 ``[T, E]``, chosen int32 ``[T, k]`` (best first),
    weights f32 ``[T, k]``, the normed input f32 ``[T, H]``, and the output f32 ``[T, H]``, which is None if a
    chosen expert is not resident."""

    out: Tensor | None
    logits: Tensor
    chosen: Tensor
    weights: Tensor
    normed: Tensor


class MoeBlock:
    """Router, shared expert and routed experts of one layer.

    ``router`` is a plain weight ``[E, H]``; ``selection`` says what its logits choose (a kind alone stands for a
    Selection of it), and ``correction`` ``[E]`` is added to what they are chosen by. ``shared`` runs on every
    token, weighed by sigmoid(``shared_router``) if given. With ``norm`` (RMSNorm weight
    ``[H]``) the block computes x + moe(norm(x)), else moe(x). ``router_bias`` ``[E]`` is added to the logits; ``join``
    joins gate and up of the routed experts.

    ``table`` int64 ``[E, 14]`` holds where each expert is and whether its bytes are there; ``set_expert`` and
    ``clear_expert`` fill it and hold on to the weights.
    """

    def __init__(
        self,
        router: Weight,
        top_k: int,
        selection: Selection | RouterKind,
        shared: GatedMlp | None = None,
        shared_router: Weight | None = None,
        norm: Tensor | None = None,
        eps: float = 1e-5,
        router_bias: Tensor | None = None,
        join: SwiGlu = SILU,
        correction: Tensor | None = None,
    ) -> None:
        if router.kind not in ("bf16", "f32"):
            raise SchemeError(f"a router in {router.kind}: expected bf16 or f32")
        if not 1 <= top_k <= router.out_features:
            raise SchemeError(f"top_k {top_k} of {router.out_features} experts: expected 1 to {router.out_features}")
        self.router, self.top_k = router, top_k
        self.selection = selection if isinstance(selection, Selection) else Selection(selection)
        self.shared, self.shared_router = shared, shared_router
        self.norm = None if norm is None else norm.float().contiguous()
        self.router_bias = None if router_bias is None else router_bias.float().contiguous()
        self.correction = None if correction is None else correction.float().contiguous()
        for vector in (self.router_bias, self.correction):
            if vector is not None and vector.shape != (router.out_features,):
                raise SchemeError(f"a router bias {tuple(vector.shape)}: expected [{router.out_features}]")
        if router.out_features % self.selection.groups:
            raise SchemeError(f"{router.out_features} experts in {self.selection.groups} groups: expected a multiple")
        self.join = join
        self.table = torch.zeros(router.out_features, _ENTRY, dtype=torch.int64)
        self._rows: npt.NDArray[np.int64] = self.table.numpy()
        self._resident: dict[int, GatedMlp] = {}
        self._shapes: tuple[tuple[int, int], ...] | None = None
        hidden = router.in_features
        if any(h != hidden for h in self._hidden_sizes()):
            raise SchemeError(f"router, norm and shared expert disagree about the hidden size {hidden}")
        block = CMoeBlock(eps=eps, experts=router.out_features, top_k=top_k, selection=self.selection.native)
        for name, address in addresses(
            norm=self.norm, router_bias=self.router_bias, correction=self.correction
        ).items():
            setattr(block, name, address)
        block.router, block.table = router.native, self.table.data_ptr()
        block.alpha, block.limit, block.offset = join.alpha, join.limit, join.offset
        if shared is not None:
            block.shared = 1
            block.shared_gate, block.shared_up, block.shared_down = shared.native
            if shared_router is not None:
                block.shared_router = shared_router.native
        self.native = block

    def _hidden_sizes(self) -> list[int]:
        sizes = [] if self.norm is None else [self.norm.numel()]
        sizes += [] if self.shared is None else [self.shared.gate_proj.in_features]
        return sizes + ([] if self.shared_router is None else [self.shared_router.in_features])

    def set_expert(self, expert: int, weights: GatedMlp, *, ready: bool = True) -> None:
        """Say where ``expert`` is; unless ``ready`` its bytes are still coming, and ``publish`` ends that.
        Raises SchemeError if it has not the shapes of the experts before it."""
        if self._shapes is None:
            if weights.gate_proj.in_features != self.router.in_features:
                raise SchemeError(f"an expert of hidden size {weights.gate_proj.in_features}, not the router's")
            self._shapes = weights.shapes
            self.native.gate, self.native.up, self.native.down = weights.native
        if weights.shapes != self._shapes:
            raise SchemeError(f"expert {expert} is of shapes {weights.shapes}: expected {self._shapes} as the others")
        if weights.join != self.join:
            raise SchemeError(f"expert {expert} joins gate and up by {weights.join}: expected {self.join}")
        self._resident[expert] = weights
        self._rows[expert, :_STATE] = weights.entry
        self.publish(expert, READY if ready else COMING)

    def publish(self, expert: int, state: int) -> None:
        """Set the state of ``expert`` (READY, COMING, ABSENT, FAILED) from any thread and wake who waits."""
        place = self.table.data_ptr() + 8 * (expert * _ENTRY + _STATE)
        library().cs_publish(Pointer(place), I64(state))

    def clear_expert(self, expert: int) -> None:
        """Forget ``expert``: from now on a token that needs it finds it missing."""
        self.publish(expert, ABSENT)
        self._resident.pop(expert, None)

    def run(self, x: Tensor, *, exact: bool = False) -> MoeResult:
        """Route x ``[T, H]``, and compute the block unless a chosen expert is missing."""
        hidden, experts = self.router.in_features, self.router.out_features
        x = float_rows(x, hidden, "x")
        tokens = x.shape[0]
        normed, logits = torch.empty(tokens, hidden), torch.empty(tokens, experts)
        chosen = torch.empty(tokens, self.top_k, dtype=torch.int32)
        weights = torch.empty(tokens, self.top_k)
        out, complete = torch.empty(tokens, hidden), I32(0)
        routing = CRouting(**addresses(normed=normed, logits=logits, chosen=chosen, weights=weights))
        call("moe", self.native, x, x.stride(0), tokens, out, hidden, routing, exact, ctypes.byref(complete))
        return MoeResult(out if complete.value else None, logits, chosen, weights, normed)

    def shared_job(self, result: MoeResult) -> list[Job]:
        """The shared expert's job for ``mlp``, if there is one, on ``result.normed``."""
        if self.shared is None:
            return []
        if self.shared_router is None:
            return [Job(self.shared)]

        return [Job(self.shared, out_weight=linear(result.normed, self.shared_router).sigmoid())]

    def routed_jobs(self, result: MoeResult, experts: Mapping[int, GatedMlp]) -> list[Job]:
        """Jobs of ``experts`` for ``mlp`` on ``result.normed``, each with the tokens that chose it."""
        jobs, scales_input = [], self.selection.scales_input
        for expert, weights in experts.items():
            if len(result.chosen) == 1:  # one token: nothing to gather
                tokens, factor = None, result.weights[0, result.chosen[0] == expert]
            else:
                tokens, rank = (result.chosen == expert).nonzero(as_tuple=True)
                factor = result.weights[tokens, rank]
            scale = {"in_scale": factor} if scales_input else {"out_weight": factor}
            jobs.append(Job(weights, tokens, **scale))
        return jobs
