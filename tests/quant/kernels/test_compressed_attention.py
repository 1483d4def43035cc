"""Attention over compressed keys and values equals that of transformers, which expands them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, DynamicCache

from quant.errors import SchemeError
from quant.kernels.attention import Attention, AttentionShape, KvPages
from quant.kernels.native import set_threads, threads
from quant.kernels.weight import Weight
from quant.pack import dequantize, quantize_absmax
from quant.scheme import Scheme
from quant.sizes import KV_PAGE_TOKENS
from tests.family_checkpoints import COMMON, FAMILIES

HEADS, LATENT, ROTATED, NOPE, VALUE, HIDDEN = 4, 128, 16, 32, 32, 128
REAL = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 96}  # as DeepSeek's
SHAPE = AttentionShape(
    HEADS, 1, (LATENT + ROTATED) // 2, "interleaved", qk_eps=1e-6, latent=LATENT, nope=NOPE, value_dim=VALUE
)


def stock_layer(family: str, **given: Any) -> tuple[Any, Any]:
    """transformers' attention module with random weights, and its rotary module."""
    from quant.architecture.meta_model import model_class

    config = CONFIG_MAPPING[family](**{**COMMON, **FAMILIES[family], **given})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = model_class(config)(config).eval().model
        attention = model.layers[0].self_attn
        for name, values in attention.named_parameters():
            values.data.normal_(1.0 if "norm" in name else 0.0, 0.1)
    return attention, model.rotary_emb


def kept(linear: Any, kind: str) -> Weight:
    """Its weight in this form; the module is left with what that says."""
    if kind == "f32":
        return Weight.from_tensors("f32", linear.weight.detach())
    name, group = kind.split("-g")
    stored = quantize_absmax(linear.weight.detach(), Scheme(name, int(group)))
    linear.weight.data.copy_(dequantize(stored))
    return Weight.from_tensors(name, stored.packed, stored.scale)


def native(stock: Any, kind: str) -> Attention:
    down = getattr(stock, "q_a_proj", None)
    query = stock.q_proj if down is None else stock.q_b_proj
    weights = [kept(one, kind) for one in (query, stock.kv_a_proj_with_mqa, stock.kv_b_proj, stock.o_proj)]
    biases = ((query if down is None else down).bias, stock.kv_a_proj_with_mqa.bias, None, stock.o_proj.bias)
    norm = None if down is None else stock.q_a_layernorm.weight.detach()
    sizes = {
        "heads": stock.num_heads,
        "latent": stock.kv_lora_rank,
        "nope": stock.qk_nope_head_dim,
        "value_dim": stock.v_head_dim,
    }
    half = (stock.kv_lora_rank + stock.qk_rope_head_dim) // 2
    return Attention(
        AttentionShape(**{**vars(SHAPE), "scaling": stock.scaling, "head_dim": half, **sizes}),
        *weights,
        None,
        norm,
        stock.kv_a_layernorm.weight.detach(),
        tuple(None if bias is None else bias.detach() for bias in biases),  # type: ignore[arg-type]
        None,
        None if down is None else kept(down, kind),
    )


def angles(rotary: Any, count: int) -> tuple[Tensor, Tensor]:
    found = rotary(torch.zeros(1, 1, 1), torch.arange(count)[None])
    if isinstance(found, tuple):
        half = rotary.inv_freq.numel()
        return found[0][0, :, :half], found[1][0, :, :half]
    return found[0].real, found[0].imag


def expected(stock: Any, rotary: Any, x: Tensor) -> Tensor:
    count = len(x)
    mask = torch.full((count, count), -torch.inf).triu(1)[None, None]
    embeddings = rotary(torch.zeros(1, 1, 1), torch.arange(count)[None])
    with torch.inference_mode():
        cache: Any = DynamicCache()
        out: Tensor = stock(x[None], position_embeddings=embeddings, attention_mask=mask, past_key_values=cache)[0][0]
    return out


@pytest.mark.parametrize("kind", ["f32", "int8-g32"])
@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("deepseek_v2", {}),
        ("deepseek_v3", {}),
        ("deepseek_v3", {"attention_bias": True, "q_lora_rank": 64}),
        ("deepseek_v2", REAL),
        ("deepseek_v3", REAL),
    ],
)
def test_a_prompt_and_single_tokens_equal_the_stock_module(
    isa: str, family: str, given: dict[str, Any], kind: str
) -> None:
    stock, rotary = stock_layer(family, **given)
    attention = native(stock, kind)
    tokens, first = 300, 280  # across pages
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1))
    cosine, sine = angles(rotary, tokens)
    pages = KvPages.allocate(4, 1, attention.shape.head_dim, torch.float32)
    table = torch.tensor([2, 0, 3], dtype=torch.int32)
    parts = [attention.run(x[:first], 0, pages, table, cosine[:first], sine[:first], exact=True)]
    for i in range(first, tokens):
        span = slice(i, i + 1)
        parts.append(attention.run(x[span], i, pages, table, cosine[span], sine[span], exact=True))
    torch.testing.assert_close(torch.cat(parts), expected(stock, rotary, x), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "dtype", "most"),
    [
        ("f32", torch.float32, 1e-5),
        ("f32", torch.bfloat16, 0.005),
        ("f32", torch.int8, 0.015),
        ("int4-g64", torch.bfloat16, 0.02),  # activations as bytes
        ("int8-g128", torch.float32, 0.02),
        ("int4-g32", torch.int8, 0.025),
    ],
)
@pytest.mark.parametrize("given", [{}, REAL])
def test_rounded_caches_and_activations_cost_their_rounding(
    isa: str, given: dict[str, int], kind: str, dtype: torch.dtype, most: float
) -> None:
    stock, rotary = stock_layer("deepseek_v3", **given)
    attention = native(stock, kind)
    x = torch.randn(KV_PAGE_TOKENS + 9, HIDDEN, generator=torch.Generator().manual_seed(2))
    pages = KvPages.allocate(2, 1, attention.shape.head_dim, dtype, native=False)
    table = torch.tensor([1, 0], dtype=torch.int32)
    found = attention.run(x, 0, pages, table, *angles(rotary, len(x)))
    right = expected(stock, rotary, x)
    assert 0 < (found - right).norm() < most * right.norm()


@pytest.mark.parametrize("kind", ["int4-g64", "int4-g32", "int8-g128", "f32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_row_is_the_same_to_the_bit_whatever_is_computed_beside_it(isa: str, kind: str, dtype: torch.dtype) -> None:
    """One token at a time or some together, all heads on one thread or shared out over two or three, over two runs of
    keys."""
    stock, rotary = stock_layer("deepseek_v3", **REAL, num_attention_heads=12, num_key_value_heads=12)
    attention, usual = native(stock, kind), threads()
    tokens, first = 530, 506
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens - first, HIDDEN, generator=generator)
    cosine, sine = (angle[first:] for angle in angles(rotary, tokens))
    table, found = torch.tensor([3, 0, 2, 4, 1], dtype=torch.int32), []
    before = [torch.randint(-9, 9, (5, 1, KV_PAGE_TOKENS, attention.shape.head_dim), generator=generator) for _ in "kv"]
    # Plain weights sum up otherwise from 17 rows on.
    for step, count in ((1, 1), (1, 2), (1, 3), (7, 2), (7 if kind == "f32" else 24, 1)):
        set_threads(count)
        pages = KvPages.allocate(5, 1, attention.shape.head_dim, dtype, native=False)
        pages.keys.copy_(before[0])
        pages.values.copy_(before[1])
        for scale in (pages.key_scale, pages.value_scale):
            if scale is not None:
                scale.fill_(0.1)
        spans = [slice(i, min(i + step, len(x))) for i in range(0, len(x), step)]
        rows = [attention.run(x[one], first + one.start, pages, table, cosine[one], sine[one]) for one in spans]
        found.append(torch.cat(rows))
    set_threads(usual)
    assert all(torch.equal(one, found[0]) for one in found)
    assert found[0].isfinite().all() and found[0].abs().max() > 0.01


def test_projections_that_do_not_fit_are_refused() -> None:
    def weight(rows: int, columns: int) -> Weight:
        return Weight.from_tensors("f32", torch.zeros(rows, columns))

    query, kv = weight(HEADS * (NOPE + ROTATED), HIDDEN), weight(LATENT + ROTATED, HIDDEN)
    up, out = weight(HEADS * (NOPE + VALUE), LATENT), weight(HIDDEN, HEADS * VALUE)
    Attention(SHAPE, query, kv, up, out, k_norm=torch.ones(LATENT))
    with pytest.raises(SchemeError, match="projections are"):
        Attention(SHAPE, query, kv, weight(HEADS * NOPE, LATENT), out, k_norm=torch.ones(LATENT))
    with pytest.raises(SchemeError, match="without weights"):
        Attention(SHAPE, weight(HEADS * (NOPE + ROTATED), 64), kv, up, out, q_down=weight(64, HIDDEN))
    with pytest.raises(SchemeError, match="expected one"):
        AttentionShape(4, 2, 72, latent=128, nope=32, value_dim=32)
    with pytest.raises(SchemeError, match="a head_dim up to 320"):
        AttentionShape(4, 1, 400, latent=512, nope=32, value_dim=32)
