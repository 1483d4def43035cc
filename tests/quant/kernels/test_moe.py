"""Fused MoE blocks equal the blocks that transformers runs, and say which experts they miss."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, Llama4TextConfig, OlmoeConfig, Qwen2MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from quant.errors import SchemeError
from quant.kernels import native
from quant.kernels.moe import GatedMlp, Job, MoeBlock, mlp
from quant.kernels.native import Weight
from quant.kernels.routing import RouterKind
from quant.kernels.swiglu import SwiGlu
from quant.pack import dequantize, quantize_absmax
from quant.scheme import Scheme

H, INNER, E = 128, 256, 6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packed(weight: torch.Tensor) -> tuple[Weight, torch.Tensor]:
    """The weight in int4 and what it dequantizes to."""
    stored = quantize_absmax(weight, Scheme("int4", 64))
    return Weight.from_tensors("int4", stored.packed, stored.scale), dequantize(stored)


def random_mlp(seed: int) -> tuple[GatedMlp, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    g = generator(seed)
    shapes = ((INNER, H), (INNER, H), (H, INNER))
    pairs = [packed(torch.randn(shape, generator=g) / shape[1] ** 0.5) for shape in shapes]
    return GatedMlp(*(weight for weight, _ in pairs)), tuple(dense for _, dense in pairs)  # type: ignore[return-value]


def reference(dense: tuple[torch.Tensor, torch.Tensor, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    gate, up, down = (matrix.double() for matrix in dense)
    x = x.double()
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize("tokens", [1, 2, 7, 65, 300])
def test_jobs_add_up_to_the_sum_of_their_experts(isa: str, tokens: int) -> None:
    x = torch.randn(tokens, H, generator=generator(0))
    experts = [random_mlp(seed) for seed in range(1, 4)]
    chosen = torch.randperm(tokens, generator=generator(9))[: (tokens + 1) // 2]
    factor = torch.rand(len(chosen), generator=generator(8))
    jobs = [
        Job(experts[0][0]),
        Job(experts[1][0], chosen, in_scale=factor),
        Job(experts[2][0], chosen, out_weight=factor),
        Job(experts[2][0], chosen[:0]),
    ]
    start = torch.randn(tokens, H, generator=generator(7))
    expected = start.double() + reference(experts[0][1], x)
    expected[chosen] += reference(experts[1][1], x[chosen] * factor[:, None])
    expected[chosen] += reference(experts[2][1], x[chosen]) * factor[:, None]
    exact = native.mlp(jobs, x, start.clone(), exact=True)
    torch.testing.assert_close(exact.double(), expected, rtol=1e-5, atol=1e-5)
    rounded = native.mlp(jobs, x, start.clone())
    assert (rounded.double() - expected).norm() < 0.025 * (expected - start).norm()


def test_llama4_block_equals_the_stock_module(isa: str) -> None:
    config = Llama4TextConfig(
        hidden_size=H, intermediate_size=INNER, num_local_experts=E, num_experts_per_tok=2, pad_token_id=0
    )
    stock = Llama4TextMoe(config).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(parameter.numel())) * 0.1)
    block = MoeBlock(
        Weight.from_tensors("f32", stock.router.weight.detach()),
        2,
        "sigmoid_input",
        shared=pack_mlp(stock.shared_expert),
    )
    for e in range(E):
        gate, gate_dense = packed(stock.experts.gate_up_proj[e, :, :INNER].detach().T.contiguous())
        up, up_dense = packed(stock.experts.gate_up_proj[e, :, INNER:].detach().T.contiguous())
        down, down_dense = packed(stock.experts.down_proj[e].detach().T.contiguous())
        block.set_expert(e, GatedMlp(gate, up, down))
        with torch.no_grad():
            stock.experts.gate_up_proj[e] = torch.cat((gate_dense.T, up_dense.T), 1)
            stock.experts.down_proj[e] = down_dense.T
    check_block(block, stock)


@pytest.mark.parametrize("normalized", [False, True])
def test_softmax_block_equals_the_stock_module(isa: str, normalized: bool) -> None:
    config = OlmoeConfig(
        hidden_size=H, intermediate_size=INNER, num_experts=E, num_experts_per_tok=3, norm_topk_prob=normalized
    )
    stock = OlmoeSparseMoeBlock(config).eval()
    kind: RouterKind = "softmax_normalized" if normalized else "softmax"
    check_block(shared_interface_block(stock, 3, kind), stock)


def test_shared_expert_with_a_gate_of_its_own_equals_the_stock_module() -> None:
    config = Qwen2MoeConfig(
        hidden_size=H,
        moe_intermediate_size=INNER,
        shared_expert_intermediate_size=INNER,
        num_experts=E,
        num_experts_per_tok=2,
        norm_topk_prob=False,
    )
    stock = Qwen2MoeSparseMoeBlock(config).eval()
    check_block(shared_interface_block(stock, 2, "softmax", shared=True), stock)


def pack_mlp(module: Any) -> GatedMlp:
    """A dense MLP's weights in int4; the module is left with what they dequantize to."""
    weights = []
    for name in ("gate_proj", "up_proj", "down_proj"):
        parameter = getattr(module, name).weight
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(len(name))) * 0.1)
        weight, dense = packed(parameter.detach())
        with torch.no_grad():
            parameter.copy_(dense)
        weights.append(weight)
    return GatedMlp(*weights)


def shared_interface_block(stock: Any, top_k: int, kind: RouterKind, shared: bool = False) -> MoeBlock:
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(parameter.numel())) * 0.1)
    block = MoeBlock(
        Weight.from_tensors("f32", stock.gate.weight.detach()),
        top_k,
        kind,
        shared=pack_mlp(stock.shared_expert) if shared else None,
        shared_router=Weight.from_tensors("f32", stock.shared_expert_gate.weight.detach()) if shared else None,
    )
    for e in range(E):
        gate, gate_dense = packed(stock.experts.gate_up_proj[e, :INNER].detach().contiguous())
        up, up_dense = packed(stock.experts.gate_up_proj[e, INNER:].detach().contiguous())
        down, down_dense = packed(stock.experts.down_proj[e].detach().contiguous())
        block.set_expert(e, GatedMlp(gate, up, down))
        with torch.no_grad():
            stock.experts.gate_up_proj[e] = torch.cat((gate_dense, up_dense))
            stock.experts.down_proj[e] = down_dense
    return block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_of_router_and_experts_and_a_clamped_gate_equal_the_stock_module(isa: str, dtype: torch.dtype) -> None:
    config = GptOssConfig(hidden_size=H, intermediate_size=INNER, num_local_experts=E, num_experts_per_tok=3)
    stock = GptOssMLP(config).eval()
    experts = stock.experts
    with torch.no_grad():
        for parameter in stock.parameters():
            values = torch.randn(parameter.shape, generator=generator(parameter.numel()))
            parameter.copy_((values * 0.3).to(dtype) if parameter.dim() < 3 else values * 0.1)
    block = MoeBlock(
        Weight.from_tensors("f32", stock.router.weight.detach()),
        3,
        "softmax_normalized",
        router_bias=stock.router.bias.detach(),
        join=SwiGlu(experts.alpha, experts.limit, 1.0),
    )
    for e in range(E):
        gate, gate_dense = packed(experts.gate_up_proj[e, :, ::2].detach().T.contiguous())
        up, up_dense = packed(experts.gate_up_proj[e, :, 1::2].detach().T.contiguous())
        down, down_dense = packed(experts.down_proj[e].detach().T.contiguous())
        both, last = experts.gate_up_proj_bias[e].detach().to(dtype), experts.down_proj_bias[e].detach().to(dtype)
        biases = (both[::2].contiguous(), both[1::2].contiguous(), last)
        block.set_expert(e, GatedMlp(gate, up, down, biases, block.join))
        with torch.no_grad():
            experts.gate_up_proj[e] = torch.stack((gate_dense, up_dense), 1).flatten(0, 1).T
            experts.down_proj[e] = down_dense.T
    check_block(block, stock)


def check_block(block: MoeBlock, stock: Any) -> None:
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, H, generator=generator(tokens))
        with torch.no_grad():
            out = stock(x[None])
        expected = (out[0] if isinstance(out, tuple) else out).reshape(tokens, H)
        result = block.run(x, exact=True)
        assert result.out is not None
        torch.testing.assert_close(result.out, expected, rtol=1e-4, atol=1e-4)
        top = torch.topk(result.logits, block.top_k, dim=1)
        assert torch.equal(result.chosen.long(), top.indices)
        rounded = block.run(x).out
        assert rounded is not None
        assert (rounded - expected).norm() < 0.02 * expected.norm()


def test_a_missing_expert_leaves_the_routing_and_can_be_made_up_for() -> None:
    experts = [random_mlp(seed)[0] for seed in range(E)]
    shared = random_mlp(99)[0]
    norm = torch.rand(H, generator=generator(5))
    router = torch.randn(E, H, generator=generator(6))
    block = MoeBlock(Weight.from_tensors("f32", router), 2, "sigmoid_input", shared=shared, norm=norm)
    for e, expert in enumerate(experts):
        block.set_expert(e, expert)
    x = torch.randn(5, H, generator=generator(4))
    whole = block.run(x)
    assert whole.out is not None
    block.clear_expert(int(whole.chosen[2, 1]))
    result = block.run(x)
    assert result.out is None
    assert torch.equal(result.chosen, whole.chosen) and torch.equal(result.weights, whole.weights)
    needed = {int(e): experts[int(e)] for e in result.chosen.unique()}
    out = native.mlp(block.shared_job(result) + block.routed_jobs(result, needed), result.normed, x.clone())
    torch.testing.assert_close(out, whole.out, rtol=1e-5, atol=1e-5)


def test_the_norm_and_the_residual_are_part_of_the_block() -> None:
    expert, dense = random_mlp(1)
    norm = torch.rand(H, generator=generator(5))
    block = MoeBlock(Weight.from_tensors("f32", torch.zeros(1, H)), 1, "softmax", norm=norm, eps=1e-5)
    block.set_expert(0, expert)
    x = torch.randn(3, H, generator=generator(4))
    normed = torch.nn.functional.rms_norm(x, (H,), norm, 1e-5)
    result = block.run(x, exact=True)
    assert result.out is not None
    torch.testing.assert_close(result.normed, normed)
    torch.testing.assert_close(result.out.double(), x + reference(dense, normed), rtol=1e-5, atol=1e-5)


def test_router_logits_that_are_no_numbers_still_choose_experts_that_exist() -> None:
    block = MoeBlock(Weight.from_tensors("f32", torch.full((E, H), float("nan"))), 3, "softmax")
    result = block.run(torch.ones(2, H))
    assert result.out is None  # no expert is there
    assert result.chosen.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_experts_and_jobs_that_do_not_fit_are_refused() -> None:
    block = MoeBlock(Weight.from_tensors("f32", torch.zeros(E, H)), 1, "softmax")
    expert = random_mlp(1)[0]
    block.set_expert(0, expert)
    plain = Weight.from_tensors("f32", torch.zeros(H, H))
    with pytest.raises(SchemeError, match=r"expected .* as the others"):
        block.set_expert(1, GatedMlp(plain, plain, plain))
    with pytest.raises(SchemeError, match="joins gate and up by"):
        block.set_expert(1, replace(expert, join=SwiGlu(1.702, 7.0, 1.0)))
    with pytest.raises(SchemeError, match="all f32 or all bf16"):
        replace(expert, biases=(torch.zeros(INNER), torch.zeros(INNER), torch.zeros(H).half()))
    with pytest.raises(SchemeError, match=r"a router bias \(5,\): expected \[6\]"):
        MoeBlock(Weight.from_tensors("f32", torch.zeros(E, H)), 1, "softmax", router_bias=torch.zeros(5))
    with pytest.raises(SchemeError, match="do not chain"):
        GatedMlp(expert.gate_proj, expert.up_proj, expert.gate_proj)
    with pytest.raises(SchemeError, match=r"outside 0\.\.2"):
        native.mlp([Job(expert, torch.tensor([0, 3]))], torch.zeros(3, H))
    five = torch.zeros(5, H)
    for rows in (torch.tensor([0, 1]), torch.tensor([5])):
        with pytest.raises(SchemeError, match=r"rows to write: expected as many in 0\.\.4"):
            native.mlp([Job(expert, torch.tensor([0]), out_rows=rows)], torch.zeros(3, H), five)
    with pytest.raises(SchemeError, match="5 rows for 3 tokens"):
        native.mlp([Job(expert, torch.tensor([0]))], torch.zeros(3, H), five)
    with pytest.raises(SchemeError, match="expected one per token"):
        native.mlp([Job(expert, out_weight=torch.ones(2))], torch.zeros(3, H))


def test_jobs_write_to_rows_of_their_own_what_they_give_alone() -> None:
    x, expert = torch.randn(3, H, generator=generator(0)), random_mlp(1)[0]
    rows = torch.tensor([4, 1, 0, 6])
    jobs = [Job(expert, torch.tensor([2, 0]), out_rows=rows[:2]), Job(expert, torch.tensor([1, 2]), out_rows=rows[2:])]
    found = native.mlp(jobs, x, torch.zeros(7, H))
    alone = torch.cat([native.mlp([Job(expert)], x[token : token + 1]) for token in (2, 0, 1, 2)])
    assert torch.equal(found[rows], alone)
    assert not found[[2, 3, 5]].any()


@pytest.mark.parametrize("join", [SwiGlu(), SwiGlu(1.702, 7.0, 1.0), SwiGlu(1.0, 2.0, 0.0)])
@pytest.mark.parametrize("biased", [False, True])
def test_biases_and_gates_of_an_experts_own_equal_the_reference(join: SwiGlu, biased: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    dense = [torch.randn(*dims, generator=generator) * 0.3 for dims in ((96, 64), (96, 64), (64, 96))]
    biases = [torch.randn(len(weight), generator=generator) for weight in dense] if biased else None
    weights = [Weight.from_tensors("f32", weight) for weight in dense]
    expert = GatedMlp(*weights, None if biases is None else (biases[0], biases[1], biases[2]), join)
    x = torch.randn(5, 64, generator=generator) * 4
    factor = torch.rand(5, generator=generator)
    added = biases or [torch.zeros(len(weight)) for weight in dense]
    gate, up = (x @ weight.t() + bias for weight, bias in zip(dense[:2], added[:2], strict=True))
    expected = (join(gate, up) @ dense[2].t() + added[2]) * factor[:, None]
    found = mlp([Job(expert, out_weight=factor)], x, exact=True)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
