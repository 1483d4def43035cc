"""The grouped product equals the reference, however tokens fall on experts and experts on calls."""

import pytest
import torch
from torch.nn.functional import silu

from quant.errors import SchemeError
from quant.kernels.cuda import prefill
from quant.scheme import Scheme
from tests.quant.kernels.cuda.images import assert_near, images

# bf16 activations in, between and out; the interpreter cuts them off instead of rounding, three times 2^-8
# in one direction.
HALVES = 4e-2


def unarranged(rows: torch.Tensor, features: int, bits: int) -> torch.Tensor:
    """Arranged rows in the order of their features."""
    blocks = rows.view(rows.shape[0], -1, 32 if bits == 3 else 32 // bits, 16)
    return blocks.transpose(2, 3).reshape(rows.shape[0], -1)[:, :features]


@pytest.mark.parametrize("scales_input", [True, False])
@pytest.mark.parametrize(
    ("gate_up", "down", "hidden", "inter", "tokens", "top_k"),
    [
        (Scheme("int4", 128), Scheme("int4", 128), 256, 128, 70, 1),
        (Scheme("int8", 32), Scheme("int4", 64), 160, 320, 33, 2),
        (Scheme("int4", 32), Scheme("int8", 64), 96, 192, 5, 3),
        (Scheme("int2", 64), Scheme("int3", 32), 320, 96, 21, 1),
        (Scheme("int3", 128), Scheme("int2", 64), 128, 640, 5, 2),
    ],
)
def test_equals_the_reference_in_any_order_of_calls(
    gate_up: Scheme,
    down: Scheme,
    hidden: int,
    inter: int,
    tokens: int,
    top_k: int,
    scales_input: bool,
    device: torch.device,
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    made = images(5, hidden, inter, gate_up, down, device)
    x = torch.randn(tokens, hidden, generator=generator).bfloat16()
    chosen = torch.randint(0, 4, (tokens, top_k), generator=generator, dtype=torch.int32)  # none takes 4
    chosen[1, 0] = -1
    scores = torch.rand(tokens, top_k, generator=generator) + 0.1
    results = []
    for place, addresses in ((device, made.addresses), (torch.device("cpu"), made.host_addresses)):
        ours = not results
        groups = prefill.group_tokens(chosen.to(place), scores.to(place), 5, scales_input=scales_input)
        scratch = prefill.PrefillScratch.allocate(made.layout, tokens * top_k, place)
        scratch.hidden.fill_(float("nan"))  # nothing is read that was not written
        arrange = prefill.launch_arrange if ours else prefill.arrange_tokens
        compute = prefill.launch_prefill if ours else prefill.moe_prefill
        arrange(x.to(place), groups, made.layout, scratch)
        out = torch.full((tokens * top_k, hidden), 7.0, dtype=torch.bfloat16, device=place)
        for subset in ([3, 0, 4], [1]):
            experts = torch.tensor(subset, dtype=torch.int32, device=place)
            compute(groups, experts, addresses, made.layout, scratch, out)
        results.append(out.cpu())
    untouched = ((chosen == 2) | (chosen == -1)).flatten()
    for out in results:
        assert (out[untouched] == 7).all()
        assert not (out[~untouched] == 7).all(-1).any()
    assert_near(*results, HALVES)
    assert_near(*(prefill.combine(out, top_k) for out in results), HALVES)


def test_each_step_is_exact_but_for_bf16(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(9)
    made = images(1, 288, 160, Scheme("int4", 32), Scheme("int8", 32), device)
    x, scores = torch.randn(18, 288, generator=generator).bfloat16(), torch.rand(18, 1, generator=generator)
    chosen = torch.zeros(18, 1, dtype=torch.int32, device=device)
    groups = prefill.group_tokens(chosen, scores.to(device), 1, scales_input=False)
    scratch = prefill.PrefillScratch.allocate(made.layout, 18, device)
    scratch.hidden.fill_(float("nan"))
    prefill.launch_arrange(x.to(device), groups, made.layout, scratch)
    assert torch.equal(unarranged(scratch.tokens, 288, 4).cpu(), x)
    assert (unarranged(scratch.tokens, 384, 4)[:, 288:] == 0).all()
    out = torch.empty(18, 288, dtype=torch.bfloat16, device=device)
    experts = torch.zeros(1, dtype=torch.int32, device=device)
    prefill.launch_prefill(groups, experts, made.addresses, made.layout, scratch, out)
    gate, up, down = made.dense[0]
    hidden = unarranged(scratch.hidden, 256, 8).cpu().float()
    assert (hidden[:, 160:] == 0).all()
    slack = 2**-7 if device.type == "cpu" else 2e-2  # a card rounds weights of small groups to bf16
    expected = silu(x.float() @ gate.T) * (x.float() @ up.T)
    assert_near(hidden[:, :160], expected, slack)
    assert_near(out, hidden[:, :160] @ down.T * scores, slack)


def test_groups_are_sorted_by_expert_then_token() -> None:
    groups = prefill.group_tokens(torch.tensor([[2, 0], [0, 2], [5, 0]]), torch.ones(3, 2), 6, scales_input=True)
    assert groups.order.tolist() == [1, 2, 5, 0, 3, 4]
    assert groups.starts.tolist() == [0, 3, 3, 5, 5, 5, 6]


def test_an_expert_without_an_address_is_left_out(device: torch.device) -> None:
    made = images(2, 64, 64, Scheme("int4", 64), Scheme("int4", 64), device)
    made.addresses[1] = 0
    chosen = torch.tensor([[0], [1]], dtype=torch.int32, device=device)
    groups = prefill.group_tokens(chosen, torch.ones(2, 1, device=device), 2, scales_input=True)
    scratch = prefill.PrefillScratch.allocate(made.layout, 2, device)
    x = torch.ones(2, 64, dtype=torch.bfloat16, device=device)
    prefill.launch_arrange(x, groups, made.layout, scratch)
    out = torch.full((2, 64), 7.0, dtype=torch.bfloat16, device=device)
    experts = torch.tensor([1, 0], dtype=torch.int32, device=device)
    prefill.launch_prefill(groups, experts, made.addresses, made.layout, scratch, out)
    assert (out[1] == 7).all()
    assert (out[0] != 7).any()


def test_what_does_not_fit_is_refused() -> None:
    made = images(1, 64, 64, Scheme("int4", 64), Scheme("int4", 64), torch.device("cpu"))
    groups = prefill.group_tokens(torch.zeros(3, 1), torch.ones(3, 1), 1, scales_input=True)
    scratch = prefill.PrefillScratch.allocate(made.layout, 2, torch.device("cpu"))
    x, out, experts = torch.ones(3, 64), torch.ones(2, 64), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(SchemeError, match="at most 2 pairs"):
        prefill.arrange_tokens(x, groups, made.layout, scratch)
    wide = prefill.PrefillScratch(torch.zeros(3, 256), torch.zeros(3, 128))
    with pytest.raises(SchemeError, match="scratch for 256 and 128 features"):
        prefill.moe_prefill(groups, experts, made.addresses, made.layout, wide, x)
    with pytest.raises(SchemeError, match=r"expected \(3, 64\)"):
        prefill.moe_prefill(groups, experts, made.addresses, made.layout, scratch, out)
