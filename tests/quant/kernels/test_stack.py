"""A run of layers in one call equals the same layers one by one, and stops where an expert is missing."""

import pytest
import torch

from quant.errors import SchemeError
from quant.kernels.attention import Attention, AttentionShape, KvBuffers
from quant.kernels.moe import GatedMlp, Job, MoeBlock, mlp
from quant.kernels.stack import DenseBlock, Stack
from quant.kernels.weight import Weight

HIDDEN, INTER, EXPERTS, LAYERS = 64, 96, 4, 3


def _weight(rows: int, columns: int) -> Weight:
    return Weight.from_tensors("f32", torch.randn(rows, columns) / columns**0.5)


def _gated() -> GatedMlp:
    return GatedMlp(_weight(INTER, HIDDEN), _weight(INTER, HIDDEN), _weight(HIDDEN, INTER))


def _layers() -> tuple[list[Attention], list[MoeBlock | DenseBlock], list[KvBuffers]]:
    torch.manual_seed(1)
    shape = AttentionShape(heads=4, kv_heads=2, head_dim=16, rope="interleaved")
    attentions, blocks = [], []
    for index in range(LAYERS):
        q, k, v, o = _weight(64, HIDDEN), _weight(32, HIDDEN), _weight(32, HIDDEN), _weight(HIDDEN, 64)
        attentions.append(Attention(shape, q, k, v, o, torch.rand(HIDDEN)))
        if index == 1:
            blocks.append(DenseBlock(_gated(), torch.rand(HIDDEN), 1e-5))
            continue
        block = MoeBlock(_weight(EXPERTS, HIDDEN), 1, "sigmoid_input", _gated(), None, torch.rand(HIDDEN))
        for expert in range(EXPERTS):
            block.set_expert(expert, _gated())
        blocks.append(block)
    return (
        attentions,
        blocks,
        [KvBuffers(torch.zeros(2, 8, 16), torch.zeros(2, 8, 16)) for _ in range(LAYERS)],
    )


def test_a_stack_equals_its_layers_one_by_one() -> None:
    attentions, blocks, caches = _layers()
    stack = Stack(attentions, blocks, 16)
    stack.attach(caches, 0)
    own = [KvBuffers(torch.zeros(2, 8, 16), torch.zeros(2, 8, 16)) for _ in range(LAYERS)]
    for position in range(5):
        x, cosine, sine = torch.randn(1, HIDDEN), torch.rand(1, 8), torch.rand(1, 8)
        expected = x.clone()
        for attention, block, cache in zip(attentions, blocks, own, strict=True):
            expected = attention.run(expected, position, cache, cosine, sine, exact=True)
            if isinstance(block, DenseBlock):
                normed = torch.nn.functional.rms_norm(expected, (HIDDEN,), block.norm, 1e-5)
                expected = mlp([Job(block.mlp)], normed, expected.clone(), exact=True)
            else:
                result = block.run(expected, exact=True)
                assert result.out is not None
                expected = result.out
        assert stack.run(x, position, cosine[0], sine[0], 0, True) == LAYERS
        assert torch.allclose(x, expected, atol=1e-5)
    for mine, theirs in zip(caches, own, strict=True):
        assert torch.allclose(mine.keys, theirs.keys, atol=1e-5)


def test_a_stack_stops_where_an_expert_is_missing_and_goes_on_after_it() -> None:
    attentions, blocks, caches = _layers()
    stack = Stack(attentions, blocks, 16)
    stack.attach(caches, 0)
    x, cosine, sine = torch.randn(1, HIDDEN), torch.rand(8), torch.rand(8)
    whole = x.clone()
    assert stack.run(whole, 0, cosine, sine, 0, True) == LAYERS
    last = blocks[2]
    assert isinstance(last, MoeBlock)
    chosen = int(stack.result(2).chosen[0, 0])
    kept = last._resident[chosen]
    last.clear_expert(chosen)
    assert stack.run(x, 0, cosine, sine, 0, True) == 2
    result = stack.result(2)
    assert int(result.chosen[0, 0]) == chosen
    jobs = [*last.shared_job(result), *last.routed_jobs(result, {chosen: kept})]
    assert torch.allclose(mlp(jobs, result.normed, x.clone(), exact=True), whole, atol=1e-5)


def test_a_stack_wants_a_block_for_each_attention() -> None:
    attentions, blocks, _ = _layers()
    with pytest.raises(SchemeError, match="3 attentions and 2 blocks"):
        Stack(attentions, blocks[:2], 16)
