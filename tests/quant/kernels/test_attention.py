"""The fused attention block equals transformers' attention, step by step and in one prompt."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, Llama4TextConfig, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding
from transformers.models.llama4.modeling_llama4 import Llama4TextAttention, Llama4TextRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, MixtralRotaryEmbedding
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeAttention
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

from quant.errors import SchemeError
from quant.kernels import native
from quant.kernels.attention import PAGE_TOKENS, Attention, AttentionShape, KvPages
from quant.kernels.native import Weight
from quant.pack import dequantize, quantize_absmax
from quant.scheme import Scheme

H, HEADS, KV, D = 128, 4, 2, 32
EPS = 1e-5


def randomize(module: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)


def int4(linear: Any) -> Weight:
    """A Linear's weight in int4; the Linear is left with what that dequantizes to."""
    stored = quantize_absmax(linear.weight.detach(), Scheme("int4", 64))
    with torch.no_grad():
        linear.weight.copy_(dequantize(stored))
    return Weight.from_tensors("int4", stored.packed, stored.scale)


def plain(linear: Any) -> Weight:
    return Weight.from_tensors("f32", linear.weight.detach())


def block_of(stock: Any, shape: AttentionShape, norm: torch.Tensor, kind: Any = plain) -> Attention:
    projections = [stock.q_proj, stock.k_proj, stock.v_proj, stock.o_proj]
    biases = tuple(None if p.bias is None else p.bias.detach() for p in projections)
    norms = [getattr(stock, name).weight.detach() if shape.qk_norm != "none" else None for name in ("q_norm", "k_norm")]
    return Attention(shape, *(kind(p) for p in projections), norm, *norms, biases)  # type: ignore[call-arg]


def pages_for(tokens: int, storage: torch.dtype = torch.float32, head_dim: int = D) -> tuple[KvPages, torch.Tensor]:
    """Pages for one sequence and its table, which names them in no order."""
    count = -(-tokens // PAGE_TOKENS)
    table = torch.randperm(count + 2, generator=torch.Generator().manual_seed(5))[:count].int()
    return KvPages.allocate(count + 2, KV, head_dim, storage), table


def mask(tokens: int, chunk: int = 0, window: int = 0) -> torch.Tensor:
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    allowed = j <= i
    if chunk:
        allowed &= i // chunk == j // chunk
    if window:
        allowed &= i - j < window
    return torch.zeros(tokens, tokens).masked_fill(~allowed, float("-inf"))[None, None]


def angles(position_embeddings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """cosine and sine [T, r/2] from either form that transformers uses."""
    if isinstance(position_embeddings, tuple):
        cosine, sine = position_embeddings
        half = cosine.shape[-1] // 2
        return cosine[0, :, :half], sine[0, :, :half]
    return position_embeddings[0].real, position_embeddings[0].imag


def check_block(
    stock: Any,
    block: Attention,
    norm: torch.Tensor,
    positions: Any,
    x: torch.Tensor,
    keep: torch.Tensor,
    storage: torch.dtype = torch.float32,
    tolerance: float = 1e-4,
    exact: bool = True,
) -> None:
    """A prompt of 11 tokens, one of 5, then one token at a time: all rows equal the stock attention's."""
    tokens = x.shape[0]
    with torch.no_grad():
        normed = torch.nn.functional.rms_norm(x, (H,), norm, EPS)
        expected = x + stock(normed[None], position_embeddings=positions, attention_mask=keep)[0][0]
    cosine, sine = angles(positions)
    cache = pages_for(tokens, storage)
    start = 0
    while start < tokens:
        end = min(tokens, start + (11 if start == 0 else 5 if start == 11 else 1))
        out = block.run(x[start:end], start, *cache, cosine[start:end], sine[start:end], exact=exact)
        difference = (out - expected[start:end]).abs().max()
        assert difference < tolerance * (1 + expected.abs().max()), (start, difference)
        start = end


LLAMA4: dict[str, Any] = {
    "hidden_size": H,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": D,
    "rms_norm_eps": EPS,
    "num_hidden_layers": 2,
    "no_rope_layers": [1, 0],
    "floor_scale": 8,
    "attn_scale": 0.1,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}


def llama4(layer: int, use_qk_norm: bool = True, chunk: int = 0) -> tuple[Any, AttentionShape, Any]:
    config = Llama4TextConfig(**LLAMA4, use_qk_norm=use_qk_norm, attn_temperature_tuning=True)
    stock = Llama4TextAttention(config, layer).eval()
    randomize(stock)
    roped = layer == 0
    shape = AttentionShape(
        HEADS,
        KV,
        D,
        "interleaved" if roped else "none",
        l2_norm=use_qk_norm and roped,
        eps=EPS,
        qk_eps=EPS,
        temperature_floor=0.0 if roped else 8.0,
        temperature_scale=0.1,
        chunk=chunk,
    )
    return stock, shape, Llama4TextRotaryEmbedding(config)


def inputs(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, H, generator=generator), torch.rand(H, generator=generator) + 0.5


@pytest.mark.parametrize(("layer", "chunk"), [(0, 0), (0, 8), (1, 0)])
def test_llama4_attention_with_rope_without_and_in_chunks(isa: str, layer: int, chunk: int) -> None:
    stock, shape, rotary = llama4(layer, chunk=chunk)
    x, norm = inputs(23)
    positions = rotary(x, torch.arange(23)[None])
    check_block(stock, block_of(stock, shape, norm), norm, positions, x, mask(23, chunk))


def test_llama4_without_qk_norm() -> None:
    stock, shape, rotary = llama4(0, use_qk_norm=False)
    x, norm = inputs(20)
    check_block(stock, block_of(stock, shape, norm), norm, rotary(x, torch.arange(20)[None]), x, mask(20))


def halves(attention: Any, config: Any, **switches: Any) -> tuple[Any, AttentionShape, Any]:
    config._attn_implementation = "eager"
    stock = attention(config, 0).eval()
    randomize(stock)
    return (
        stock,
        AttentionShape(HEADS, KV, D, "halves", eps=EPS, qk_eps=EPS, **switches),
        MixtralRotaryEmbedding(config),
    )


COMMON: dict[str, Any] = {
    "hidden_size": H,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": D,
    "rms_norm_eps": EPS,
}


@pytest.mark.parametrize("family", ["mixtral", "mixtral-window", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_other_families(isa: str, family: str) -> None:
    window = 6 if family == "mixtral-window" else 0
    if family.startswith("mixtral"):
        parts = halves(MixtralAttention, MixtralConfig(**COMMON, sliding_window=window or None), window=window)
    elif family == "qwen2_moe":
        parts = halves(Qwen2MoeAttention, Qwen2MoeConfig(**COMMON, qkv_bias=True))
    elif family == "qwen3_moe":
        parts = halves(Qwen3MoeAttention, Qwen3MoeConfig(**COMMON), qk_norm="per_head")
    else:
        parts = halves(OlmoeAttention, OlmoeConfig(**COMMON), qk_norm="full_width")
    stock, shape, rotary = parts
    x, norm = inputs(20)
    positions = rotary(x, torch.arange(20)[None])
    check_block(stock, block_of(stock, shape, norm), norm, positions, x, mask(20, window=window))


def test_packed_projections_and_rounded_activations(isa: str) -> None:
    stock, shape, rotary = llama4(0)
    x, norm = inputs(20)
    block = block_of(stock, shape, norm, int4)
    positions = rotary(x, torch.arange(20)[None])
    check_block(stock, block, norm, positions, x, mask(20))
    check_block(stock, block, norm, positions, x, mask(20), tolerance=0.03, exact=False)


def gpt_oss(kind: str) -> tuple[Any, AttentionShape, Any, int]:
    yarn = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    config = GptOssConfig(**COMMON, layer_types=[kind], num_hidden_layers=1, sliding_window=9, rope_parameters=yarn)
    config._attn_implementation = "eager"
    stock = GptOssAttention(config, 0).eval()
    randomize(stock)
    with torch.no_grad():
        stock.sinks.copy_(torch.tensor([-40.0, -1.0, 2.0, 30.0]))  # one that is nothing, one that is nearly all
    window = 9 if kind == "sliding_attention" else 0
    return stock, AttentionShape(HEADS, KV, D, "halves", eps=EPS, window=window), GptOssRotaryEmbedding(config), window


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_sinks_windows_biases_and_yarn_of_gpt_oss(isa: str, kind: str) -> None:
    stock, shape, rotary, window = gpt_oss(kind)
    x, norm = inputs(40)
    cosine, sine = rotary(x, torch.arange(40)[None])
    projections = [stock.q_proj, stock.k_proj, stock.v_proj, stock.o_proj]
    biases: Any = tuple(p.bias.detach() for p in projections)
    block = Attention(shape, *map(plain, projections), norm, biases=biases, sinks=stock.sinks.detach())  # type: ignore[arg-type]
    with torch.no_grad():
        normed = torch.nn.functional.rms_norm(x, (H,), norm, EPS)
        expected = x + stock(normed[None], (cosine, sine), mask(40, window=window))[0][0]
    cache = pages_for(40)
    for start, end in ((0, 17), (17, 39), (39, 40)):
        found = block.run(x[start:end], start, *cache, cosine[0, start:end], sine[0, start:end], exact=True)
        torch.testing.assert_close(found, expected[start:end], rtol=1e-4, atol=1e-4)


def test_sinks_take_their_part_once_however_many_runs_the_keys_are_in(isa: str) -> None:
    generator = torch.Generator().manual_seed(4)
    sizes = ((HEADS * D, H), (KV * D, H), (KV * D, H), (H, HEADS * D))
    weights = [Weight.from_tensors("f32", torch.randn(*size, generator=generator) / size[1] ** 0.5) for size in sizes]
    sinks = torch.tensor([6.0, -2.0, 0.5, 9.0])
    block = Attention(AttentionShape(HEADS, KV, D), *weights, sinks=sinks)
    x = torch.randn(1500, H, generator=generator)
    found = block.run(x, 0, *pages_for(1500), exact=True)
    q, k, v, o = (weight.owner for weight in weights)
    heads = ((x @ w.T).view(1500, -1, D).transpose(0, 1) for w in (q, k, v))  # type: ignore[union-attr]
    queries, keys, values = (part.repeat_interleave(HEADS // len(part), 0) for part in heads)
    scores = queries @ keys.transpose(1, 2) * D**-0.5 + mask(1500)[0]
    weighed = torch.cat((scores, sinks[:, None, None].expand(-1, 1500, 1)), 2).softmax(2)[..., :-1]
    expected = (weighed @ values).transpose(0, 1).reshape(1500, -1) @ o.T  # type: ignore[union-attr]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("storage", "tolerance"), [(torch.bfloat16, 5e-3), (torch.int8, 1e-2)])
def test_smaller_kv_storage_costs_its_rounding_and_no_more(isa: str, storage: torch.dtype, tolerance: float) -> None:
    stock, shape, rotary = llama4(0)
    x, norm = inputs(20)
    positions = rotary(x, torch.arange(20)[None])
    check_block(stock, block_of(stock, shape, norm), norm, positions, x, mask(20), storage, tolerance)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("head_dim", [32, 40, 64, 96, 128, 256])
def test_rounding_queries_and_weights_to_bf16_costs_its_rounding_and_no_more(
    isa: str, head_dim: int, storage: torch.dtype
) -> None:
    """Without ``exact``, where the processor multiplies bf16: many rows and one, pages that are not full."""
    generator = torch.Generator().manual_seed(head_dim)
    heads = 6
    widths = ((heads * head_dim, H), (KV * head_dim, H), (KV * head_dim, H), (H, heads * head_dim))
    weights = [Weight.from_tensors("f32", torch.randn(n, k, generator=generator) / k**0.5) for n, k in widths]
    block = Attention(AttentionShape(heads, KV, head_dim, window=170), *weights)  # type: ignore[arg-type]
    x = torch.randn(333, H, generator=generator)
    exact, rounded = pages_for(333, storage, head_dim), pages_for(333, storage, head_dim)
    for start, end in ((0, 201), (201, 332), (332, 333)):
        expected = block.run(x[start:end], start, *exact, exact=True)
        found = block.run(x[start:end], start, *rounded)
        assert (found - expected).abs().max() < 1e-2 * expected.abs().max(), (start, end)


@pytest.mark.parametrize("head_dim", [40, 64, 96, 128, 256])
def test_int8_dot_products_are_finer_than_bf16_ones(head_dim: int) -> None:
    """16 bits of a query and of a weight: what is lost is a tenth of what bf16 loses, also where one key has all of a
    page's weight."""
    isas = set(native.isas()) & {"avx512", "avx512bf16"}
    if not isas:
        pytest.skip("this processor has no AVX-512 VNNI")
    generator = torch.Generator().manual_seed(head_dim)
    widths = ((6 * head_dim, H), (KV * head_dim, H), (KV * head_dim, H), (H, 6 * head_dim))
    weights = [Weight.from_tensors("f32", torch.randn(n, k, generator=generator) / k**0.5) for n, k in widths]
    for scaling in (head_dim**-0.5, 3.0):  # flat, and one key above all
        block = Attention(AttentionShape(6, KV, head_dim, scaling=scaling), *weights)  # type: ignore[arg-type]
        x = torch.randn(700, H, generator=generator)
        exact, rounded = pages_for(700, torch.int8, head_dim), pages_for(700, torch.int8, head_dim)
        for start, end in ((0, 690), (690, 699), (699, 700)):
            expected = block.run(x[start:end], start, *exact, exact=True)
            found = block.run(x[start:end], start, *rounded)
            assert (found - expected).norm() < (3e-4 if scaling < 1 else 3e-3) * expected.norm(), (scaling, start)


@pytest.mark.parametrize("head_dim", [64, 128, 192])
def test_pages_in_blocks_hold_the_same_and_give_the_same_bits(isa: str, head_dim: int) -> None:
    """Every instruction set reads pages that lie as dot products want them, and torch what was written natively."""
    generator = torch.Generator().manual_seed(head_dim)
    sizes = ((HEADS * head_dim, H), (KV * head_dim, H), (KV * head_dim, H), (H, HEADS * head_dim))
    matrices = [torch.randn(*size, generator=generator) / size[1] ** 0.5 for size in sizes]
    block = Attention(AttentionShape(HEADS, KV, head_dim), *(Weight.from_tensors("f32", m) for m in matrices))
    x = torch.randn(300, H, generator=generator)
    pages, table = pages_for(300, torch.int8, head_dim)
    place = torch.arange(300)
    page, row = table[place // PAGE_TOKENS].long(), place % PAGE_TOKENS
    found, stored = [], []
    for blocks in (False, True):
        laid = replace(pages, blocks=blocks)
        found.append([block.run(x[:299], 0, laid, table), block.run(x[299:], 299, laid, table)])
        stored.append(laid.read(page, row))
        copy = replace(laid, keys=torch.zeros_like(laid.keys), values=torch.zeros_like(laid.values))
        copy.write(page, row, *stored[-1])
        assert all(torch.equal(a, b) for a, b in zip(copy.read(page, row), stored[-1], strict=True))
        again = block.run(x[299:], 299, copy, table)
        assert torch.equal(again, found[-1][1])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*stored, strict=True))
    with pytest.raises(SchemeError, match="cannot lie in blocks"):
        KvPages(torch.zeros(1, KV, PAGE_TOKENS, 64), torch.zeros(1, KV, PAGE_TOKENS, 64), blocks=True)


@pytest.mark.parametrize("poison", ["query", "key", "value"])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.int8])
def test_what_is_not_finite_is_never_hidden(isa: str, storage: torch.dtype, poison: str) -> None:
    generator = torch.Generator().manual_seed(4)
    sizes = ((HEADS * 64, H), (KV * 64, H), (KV * 64, H), (H, HEADS * 64))
    matrices = [torch.randn(*size, generator=generator) / size[1] ** 0.5 for size in sizes]
    block = Attention(AttentionShape(HEADS, KV, 64), *(Weight.from_tensors("f32", m) for m in matrices))
    pages, table = pages_for(200, storage, 64)
    x = torch.randn(200, H, generator=generator)
    block.run(x[:199], 0, pages, table)
    page = int(table[0])
    if poison == "query":
        x[199] = float("nan")
    elif storage == torch.int8:
        scale = pages.key_scale if poison == "key" else pages.value_scale
        assert scale is not None
        scale[page, :, 5] = float("nan")
    else:
        (pages.keys if poison == "key" else pages.values)[page, :, 5, 3] = float("nan")
    assert block.run(x[199:], 199, pages, table).isnan().any()


def test_long_contexts_are_cut_into_runs_and_merged(isa: str) -> None:
    stock, shape, rotary = llama4(1)
    x, norm = inputs(1100)
    positions = rotary(x, torch.arange(1100)[None])
    with torch.no_grad():
        normed = torch.nn.functional.rms_norm(x, (H,), norm, EPS)
        expected = x + stock(normed[None], position_embeddings=positions, attention_mask=mask(1100))[0][0]
    block = block_of(stock, shape, norm)
    cache = pages_for(1100)
    prompt = block.run(x[:1099], 0, *cache, exact=True)
    torch.testing.assert_close(prompt, expected[:1099], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(block.run(x[1099:], 1099, *cache, exact=True), expected[1099:], rtol=1e-4, atol=1e-4)


def test_pages_of_chunks_that_are_over_may_be_gone(isa: str) -> None:
    stock, shape, rotary = llama4(0, chunk=96)
    x, norm = inputs(300)
    cosine, sine = angles(rotary(x, torch.arange(300)[None]))
    block = block_of(stock, shape, norm)
    pages, table = pages_for(300)
    expected = block.run(x, 0, pages, table, cosine, sine, exact=True)
    kept, table = pages_for(300)
    for start, end in ((0, 192), (192, 288), (288, 300)):
        table[: start // PAGE_TOKENS] = -1
        out = block.run(x[start:end], start, kept, table, cosine[start:end], sine[start:end], exact=True)
        torch.testing.assert_close(out, expected[start:end], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("limit", [{}, {"chunk": 96}, {"window": 200}])
@pytest.mark.parametrize("kind", [plain, int4])
def test_a_row_is_the_same_to_the_bit_whatever_is_computed_beside_it(
    isa: str, kind: Any, limit: dict[str, int], storage: torch.dtype
) -> None:
    """One token at a time or some together, on one thread or two: the softmax is merged in one order."""
    stock, shape, rotary = llama4(0)
    x, norm = inputs(1300)
    cosine, sine = angles(rotary(x, torch.arange(1300)[None]))
    block = block_of(stock, replace(shape, **limit), norm, kind)
    rows = []
    threads = native.threads()
    for step, count in ((1, 1), (3, 2), (4, 1)):
        native.set_threads(count)
        cache = pages_for(1300, storage)
        block.run(x[:1280], 0, *cache, cosine[:1280], sine[:1280])
        places = range(1280, 1300, step)
        runs = [(slice(i, min(i + step, 1300)), i) for i in places]
        rows.append(torch.cat([block.run(x[span], i, *cache, cosine[span], sine[span]) for span, i in runs]))
    native.set_threads(threads)
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.int8])
def test_more_runs_than_wait_at_once_and_few_rows_give_the_same_bits(isa: str, storage: torch.dtype) -> None:
    """Threads share what one token sees of 21,000 others; from 9 rows on keys and values are packed in memory."""
    generator = torch.Generator().manual_seed(2)
    wide, context = 64, 21_000
    sizes = ((HEADS * wide, H), (KV * wide, H), (KV * wide, H), (H, HEADS * wide))
    weights = [Weight.from_tensors("f32", torch.randn(*size, generator=generator) / size[1] ** 0.5) for size in sizes]
    block = Attention(AttentionShape(HEADS, KV, wide), *weights)
    pages, table = pages_for(context + 8, storage, wide)
    for tensor in (pages.keys, pages.values):
        tensor.copy_(torch.randint(-9, 9, tensor.shape, generator=generator))
    for scale in (pages.key_scale, pages.value_scale):
        if scale is not None:
            scale.fill_(0.1)
    x = torch.randn(8, H, generator=generator)
    threads, found = native.threads(), []
    for step, count in ((1, 2), (8, 2), (1, 1)):
        native.set_threads(count)
        found.append(torch.cat([block.run(x[i : i + step], context + i, pages, table) for i in range(0, 8, step)]))
    native.set_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert found[0].abs().max() > 0.01 and found[0].isfinite().all()


def test_tokens_without_room_and_shapes_that_do_not_fit_are_refused() -> None:
    stock, shape, _ = llama4(1)
    x, norm = inputs(4)
    block = block_of(stock, shape, norm)
    pages, table = pages_for(130)
    for bad in (table[:1], torch.tensor([0, -1]), torch.tensor([0, 4])):
        with pytest.raises(SchemeError, match="tokens 126 to 129 have no place in 4 KV pages"):
            block.run(x, 126, pages, bad)
    with pytest.raises(SchemeError, match=r"expected \[P, 2, 128, 32\]"):
        block.run(x, 0, *pages_for(5, head_dim=16))
    zeros = torch.zeros(1, KV, PAGE_TOKENS, D, dtype=torch.int8)
    with pytest.raises(SchemeError, match="int8 KV pages need"):
        KvPages(zeros, zeros)
    with pytest.raises(SchemeError, match="expected f32, bf16 or int8"):
        KvPages(zeros.half(), zeros.half())
    with pytest.raises(SchemeError, match="keys and values alike"):
        KvPages(zeros[:, :, 1:], zeros[:, :, 1:])
    with pytest.raises(SchemeError, match="projections are"):
        Attention(shape, *[native.Weight.from_tensors("f32", torch.zeros(H, H))] * 4)  # type: ignore[arg-type]
