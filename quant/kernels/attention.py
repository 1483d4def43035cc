"""A whole attention block in one native call: norm, projections, RoPE, KV cache, softmax, output, residual.

Legend: T tokens, H hidden, h query heads, g KV heads, d head_dim.

Families differ in a handful of switches, all of ``AttentionShape``. Positions count from the start of the
sequence; the caller owns the pages of keys and values and says which of them the sequence's tokens are in.
"""

import ctypes
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from quant.errors import SchemeError
from quant.kernels.library import F32, I32, I64, Pointer, addresses, call, fields, isa
from quant.kernels.rows import float_rows, output_rows
from quant.kernels.weight import CWeight, Weight
from quant.sizes import KV_PAGE_TOKENS as PAGE_TOKENS

RopeKind = Literal["none", "interleaved", "halves"]
QkNorm = Literal["none", "per_head", "full_width", "per_head_after_rope"]
ROPES: dict[RopeKind, int] = {"none": 0, "interleaved": 1, "halves": 2}
QK_NORMS: dict[QkNorm, int] = {"none": 0, "per_head": 1, "full_width": 2, "per_head_after_rope": 3}
_STORAGES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_INT8_BLOCKS = 3
_BLOCK = 64  # keys, in pages in blocks
_BYTE_ISAS = ("avx512bf16", "avx512")  # whose int8 dot products read pages in blocks where they lie
_VECTORS = ("norm", "q_norm", "k_norm", "q_bias", "k_bias", "v_bias", "o_bias", "sinks")
MAX_HEAD_DIM = 256
_MAX_COMPRESSED = 640  # channels of a latent and of what RoPE rotates beside it
PAGE_ON_DISK = -2  # in a table: a page that is not in the pool, but can be brought there


@dataclass(frozen=True)
class AttentionShape:
    """What one layer's attention computes.

    ``rope`` rotates pairs of neighbours (``interleaved``, Llama 4) or of halves (most others), or nothing
    (NoPE layers). ``qk_norm`` is an RMSNorm of q and k, before RoPE unless it says after, ``l2_norm``
    the weightless one per head after it (Llama 4), both with ``qk_eps``. ``temperature_floor`` and
    ``temperature_scale`` scale q on NoPE layers by log1p(floor((position + 1) / floor)) · scale + 1; floor 0 turns
    that off. ``chunk`` and ``window`` limit what a token sees to its own chunk or the last ``window`` tokens; 0 is no
    limit. ``scaling`` 0 is 1/√d.

    With ``latent`` keys and values are compressed (MLA): of a token so many channels are kept and after them what RoPE
    rotates, for all heads together, one half as its keys, one as its values, ``head_dim`` each. A head's query has
    ``nope`` channels that RoPE leaves alone, then those that it rotates; its value has ``value_dim``.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeKind = "none"
    qk_norm: QkNorm = "none"
    l2_norm: bool = False
    eps: float = 1e-5
    qk_eps: float = 1e-5
    scaling: float = 0.0
    temperature_floor: float = 0.0
    temperature_scale: float = 0.0
    chunk: int = 0
    window: int = 0
    latent: int = 0
    nope: int = 0
    value_dim: int = 0

    def __post_init__(self) -> None:
        most = _MAX_COMPRESSED // 2 if self.latent else MAX_HEAD_DIM
        if self.kv_heads < 1 or self.heads % self.kv_heads or not 1 <= self.head_dim <= most:
            raise SchemeError(
                f"{self.heads} heads on {self.kv_heads} KV heads of {self.head_dim}: expected a multiple and "
                f"a head_dim up to {most}"
            )
        if self.latent and not (self.kv_heads == 1 and self.rotated > 0 and self.nope > 0 and self.value_dim > 0):
            raise SchemeError(
                f"a latent of {self.latent} channels in {self.kv_heads} heads of {self.head_dim}: expected one"
            )

    @property
    def rotated(self) -> int:
        """Of compressed keys the channels that RoPE rotates."""
        return 2 * self.head_dim - self.latent


_Bring = ctypes.CFUNCTYPE(I64, Pointer, I64, ctypes.POINTER(I32))


class CKvPool(ctypes.Structure):
    """``coldstream::KvPool`` of kernels.h."""

    _fields_ = fields(
        (Pointer, "keys values key_scale value_scale"), (I32, "storage"), (_Bring, "bring"), (Pointer, "bounds")
    )


@dataclass(frozen=True)
class KvPages:
    """Keys and values in pages ``[P, g, PAGE_TOKENS, d]``, f32, bf16 or int8 (then with f32 scales
    ``[P, g, PAGE_TOKENS]``). A page holds what one layer keeps of PAGE_TOKENS tokens of a sequence; entry i of a
    table int32 names the page of tokens i · PAGE_TOKENS and after. In ``blocks`` an int8 page of a head lies as dot
    products want it: keys ``[2, d/4, 64 tokens, 4]`` with 128 added, values ``[32, d, 4 tokens]``.

    Raises SchemeError for tensors that do not fit together.
    """

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    blocks: bool = False

    def __post_init__(self) -> None:
        keys, values, scales = self.keys, self.values, (self.key_scale, self.value_scale)
        if keys.shape != values.shape or keys.dim() != 4 or keys.shape[2] != PAGE_TOKENS:
            raise SchemeError(f"KV pages {tuple(keys.shape)}: expected [P, g, {PAGE_TOKENS}, d], keys and values alike")
        if keys.dtype != values.dtype or keys.dtype not in _STORAGES:
            raise SchemeError(f"KV pages in {keys.dtype} and {values.dtype}: expected f32, bf16 or int8")
        if keys.dtype == torch.int8 and any(s is None or s.shape != keys.shape[:3] for s in scales):
            raise SchemeError("int8 KV pages need f32 scales, one per head and token")
        if self.blocks and (keys.dtype != torch.int8 or keys.shape[3] % 4):
            raise SchemeError(f"KV pages in {keys.dtype} of {keys.shape[3]} channels cannot lie in blocks")
        if any(t is not None and not t.is_contiguous() for t in (keys, values, *scales)):
            raise SchemeError("KV pages must be contiguous")

    @classmethod
    def allocate(
        cls,
        pages: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str = "cpu",
        memory: Callable[[int], Tensor] | None = None,
        native: bool = True,
    ) -> "KvPages":
        """``pages`` pages, in blocks where the processor reads those fastest and ``native`` kernels do; memory that no
        token has reached costs nothing on a CPU. ``memory`` gives so many bytes of it, by default torch does."""
        shape = (pages, kv_heads, PAGE_TOKENS)

        def empty(size: tuple[int, ...], kind: torch.dtype) -> Tensor:
            if memory is None:
                return torch.empty(size, dtype=kind, device=device)
            return memory(math.prod(size) * kind.itemsize).view(kind).view(size)

        keys, values = (empty((*shape, head_dim), dtype) for _ in range(2))
        if dtype != torch.int8:
            return cls(keys, values)
        blocks = native and device == "cpu" and head_dim % _BLOCK == 0 and isa() in _BYTE_ISAS
        return cls(keys, values, empty(shape, torch.float32), empty(shape, torch.float32), blocks)

    def write(self, page: Tensor, row: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values ``[T, g, d]`` as they are stored, without scales, at these pages and rows ``[T]``."""
        if self.blocks:
            of_keys, of_values = self._blocks()
            # The dimension of heads stays where it is, so indexed ones come first: [T, g, d/4, 4] and [T, g, d].
            of_keys[page, :, row // _BLOCK, :, row % _BLOCK] = (keys.to(torch.int8) ^ -128).unflatten(-1, (-1, 4))
            of_values[page, :, row // 4, :, row % 4] = values.to(torch.int8)
        else:
            self.keys[page, :, row] = keys.to(self.keys.dtype)
            self.values[page, :, row] = values.to(self.values.dtype)

    def read(self, page: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[T, g, d]`` as they are stored, without scales, of these pages and rows ``[T]``."""
        if not self.blocks:
            return self.keys[page, :, row], self.values[page, :, row]
        of_keys, of_values = self._blocks()
        keys = of_keys[page, :, row // _BLOCK, :, row % _BLOCK].flatten(-2) ^ -128
        return keys, of_values[page, :, row // 4, :, row % 4]

    def _blocks(self) -> tuple[Tensor, Tensor]:
        pages, heads, tokens, width = self.keys.shape
        keys = self.keys.view(pages, heads, tokens // _BLOCK, width // 4, _BLOCK, 4)
        return keys, self.values.view(pages, heads, tokens // 4, width, 4)

    @cached_property
    def native(self) -> CKvPool:
        """The pages for native calls."""
        tensors = addresses(**{name: getattr(self, name) for name in ("keys", "values", "key_scale", "value_scale")})
        return CKvPool(**tensors, storage=_INT8_BLOCKS if self.blocks else _STORAGES[self.keys.dtype])

    def bring_by(self, bring: Callable[[int, int, Any], int]) -> None:
        """Have native calls ask for pages that are elsewhere: see kernels.h."""
        self.native.bring = _Bring(bring)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(t.nbytes for t in (self.keys, self.values, self.key_scale, self.value_scale) if t is not None)


class CAttention(ctypes.Structure):
    """``coldstream::AttentionBlock`` of attention.h."""

    _fields_ = fields(
        (Pointer, "norm"),
        (F32, "eps"),
        (I32, "heads kv_heads head_dim rope rope_dim qk_norm l2_norm"),
        (Pointer, "q_norm k_norm"),
        (F32, "qk_eps scaling temperature_floor temperature_scale"),
        (I64, "chunk window"),
        (CWeight, "q k v o"),
        (Pointer, "q_bias k_bias v_bias o_bias sinks"),
        (I32, "latent nope value_dim"),
        (CWeight, "q_down"),
    )


def _sizes(shape: AttentionShape, hidden: int, rank: int) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """What the projections q, k, v and o of a block must be ``[N, K]``, and how long its ``_VECTORS``."""
    if shape.latent:
        query, kept = shape.heads * (shape.nope + shape.rotated), shape.latent + shape.rotated
        expanded, value = shape.heads * (shape.nope + shape.value_dim), shape.heads * shape.value_dim
        projections = ((query, rank or hidden), (kept, hidden), (expanded, shape.latent), (hidden, value))
        return projections, (hidden, rank, shape.latent, rank or query, kept, 0, hidden, shape.heads)
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = {"none": (0, 0), "full_width": (query, key)}.get(shape.qk_norm, (shape.head_dim, shape.head_dim))
    projections = ((query, hidden), (key, hidden), (key, hidden), (hidden, query))
    return projections, (hidden, *norms, query, key, key, hidden, shape.heads)


class Attention:
    """One layer's attention block on weights that lie anywhere.

    With ``norm`` (RMSNorm weight ``[H]``) it computes x + attention(norm(x)), else attention(x). ``q_norm``
    and ``k_norm`` are ``[d]`` (per head) or full width; ``biases`` f32 of q, k, v and o, each optional. ``sinks``
    ``[h]`` are scores that take part in each head's softmax and have no value (gpt-oss).

    Compressed, k_proj makes a token's latent and rotated channels, v_proj ``[h · (nope + value_dim), latent]`` expands
    the latent, and q_proj takes what ``q_down`` ``[rank, H]`` makes of the input, if there is one: then q's bias is
    its. q_norm ``[rank]`` and k_norm ``[latent]`` are of these.
    """

    def __init__(
        self,
        shape: AttentionShape,
        q_proj: Weight,
        k_proj: Weight,
        v_proj: Weight,
        o_proj: Weight,
        norm: Tensor | None = None,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        biases: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] = (None, None, None, None),
        sinks: Tensor | None = None,
        q_down: Weight | None = None,
    ) -> None:
        self.shape, self.weights, self._down = shape, (q_proj, k_proj, v_proj, o_proj), q_down
        self.hidden = k_proj.in_features
        rank = 0 if q_down is None else q_down.out_features
        found = tuple((w.out_features, w.in_features) for w in self.weights)
        expected, wanted = _sizes(shape, self.hidden, rank)
        if found != expected or (q_down is not None and q_down.in_features != self.hidden):
            raise SchemeError(f"projections are {found}: expected {expected}")
        vectors = [None if v is None else v.float().contiguous() for v in (norm, q_norm, k_norm, *biases, sinks)]
        if any(v is not None and v.numel() != size for v, size in zip(vectors, wanted, strict=True)):
            raise SchemeError(f"norms, biases or sinks do not fit: expected sizes {wanted}")
        if (shape.qk_norm != "none" or q_down is not None) and (vectors[1] is None or vectors[2] is None):
            raise SchemeError("a q and k norm without weights: expected q_norm and k_norm")
        self._vectors = dict(zip(_VECTORS, vectors, strict=True))  # kept alive for the native block
        switches = asdict(shape) | {"rope": ROPES[shape.rope], "qk_norm": QK_NORMS[shape.qk_norm]}
        switches["scaling"] = shape.scaling or shape.head_dim**-0.5
        weights = {name: weight.native for name, weight in zip("qkvo", self.weights, strict=True)}
        weights |= {} if q_down is None else {"q_down": q_down.native}
        self.native = CAttention(**switches, **weights, **addresses(**self._vectors))

    def run(
        self,
        x: Tensor,
        position: int,
        pages: KvPages,
        table: Tensor,
        cosine: Tensor | None = None,
        sine: Tensor | None = None,
        *,
        exact: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """x ``[T, H]`` at positions ``position`` … → f32 ``[T, H]``; keys and values go to the
        pages that ``table`` int32 names, which hold those of the tokens before.

        ``cosine`` and ``sine`` f32 ``[T, r/2]`` are RoPE's factors for these positions; the first r channels
        of a head are rotated. Raises SchemeError if a page is missing or something does not fit.
        """
        x = float_rows(x, self.hidden, "x")
        tokens = x.shape[0]
        out = torch.empty(tokens, self.hidden) if out is None else output_rows(out, tokens, self.hidden)
        rotary = 0
        if self.shape.rope != "none":
            if cosine is None or sine is None or cosine.shape != sine.shape or cosine.shape[0] != tokens:
                raise SchemeError(f"RoPE of {tokens} tokens needs cosine and sine [{tokens}, r/2]")
            cosine, sine = cosine.float().contiguous(), sine.float().contiguous()
            rotary = 2 * cosine.shape[1]
            most = self.shape.rotated if self.shape.latent else self.shape.head_dim
            if rotary > most:
                raise SchemeError(f"RoPE rotates {rotary} of {most} channels")
        self.native.rope_dim = rotary
        angles = (cosine, sine) if rotary else (None, None)
        table = self.check_pages(pages, table, position, tokens)
        call(
            "attention",
            self.native,
            x,
            x.stride(0),
            tokens,
            position,
            *angles,
            pages.native,
            table,
            out,
            out.stride(0),
            exact,
        )
        return out

    def check_pages(self, pages: KvPages, table: Tensor, position: int, tokens: int) -> Tensor:
        """``table`` for native calls. Raises SchemeError if it names no page for one of ``tokens`` at ``position``,
        or for what they look at."""
        shape = self.shape
        if (pages.keys.shape[1], pages.keys.shape[3]) != (shape.kv_heads, shape.head_dim):
            raise SchemeError(
                f"KV pages {tuple(pages.keys.shape)}: expected [P, {shape.kv_heads}, {PAGE_TOKENS}, {shape.head_dim}]"
            )
        first = position // shape.chunk * shape.chunk if shape.chunk else 0
        if shape.window:
            first = max(first, position - shape.window + 1)
        used = table[first // PAGE_TOKENS : -(-(position + tokens) // PAGE_TOKENS)]
        there = (used >= 0) & (used < len(pages.keys))
        if pages.native.bring:
            there |= used == PAGE_ON_DISK
        if len(used) * PAGE_TOKENS < position + tokens - first // PAGE_TOKENS * PAGE_TOKENS or not there.all():
            raise SchemeError(
                f"tokens {position} to {position + tokens - 1} have no place in {len(pages.keys)} KV pages"
            )
        return table if table.dtype == torch.int32 and table.is_contiguous() else table.int().contiguous()
