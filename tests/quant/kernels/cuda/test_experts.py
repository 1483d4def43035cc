"""The experts' kernels for few tokens equal the reference, wherever experts are and whoever chooses them."""

import pytest
import torch
from torch.nn.functional import silu

from quant.errors import SchemeError
from quant.kernels.cuda import experts
from quant.kernels.cuda.experts import ChosenExperts, DecodeScratch
from quant.kernels.cuda.layout import ExpertLayout
from quant.pack import dequantize
from quant.scheme import Scheme
from tests.quant.kernels.cuda.images import Images, assert_near, images, packed

HALVES = 1e-2  # bf16 activations between the two kernels; the interpreter cuts them off instead of rounding
SUMS = 2e-6  # f32 sums in another order
SUMS_ON_A_CARD = 1e-5  # and its exponential

CASES = {
    "int4-g128": (Scheme("int4", 128), Scheme("int4", 128), 128, 256),
    "int4-g32, hidden no multiple of the tile": (Scheme("int4", 32), Scheme("int4", 32), 1120, 96),
    "int8-g64 and int4-g64": (Scheme("int8", 64), Scheme("int4", 64), 192, 64),
    "int4-g32 and int8-g32": (Scheme("int4", 32), Scheme("int8", 32), 32, 608),
    "int3-g128 and int2-g64": (Scheme("int3", 128), Scheme("int2", 64), 128, 192),
    "int2-g32 and int3-g32": (Scheme("int2", 32), Scheme("int3", 32), 544, 96),
}


class Step:
    """Inputs and outputs of one call on ``device``."""

    def __init__(self, made: Images, chosen: list[list[int]], places: list[int], gpu_rows: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.made, layout, device = made, made.layout, made.addresses.device
        self.chosen = torch.tensor(chosen, dtype=torch.int32)
        tokens, top_k = self.chosen.shape
        self.x = torch.randn(tokens, layout.hidden, generator=generator).bfloat16()
        self.scores = torch.rand(tokens, top_k, generator=generator) + 0.1
        self.places = torch.tensor(places, dtype=torch.uint8)
        self.gpu_rows = torch.tensor([gpu_rows], dtype=torch.int32)
        self.out = torch.randn(tokens, layout.hidden, generator=generator)
        self.scratch = DecodeScratch.allocate(layout, tokens, tokens * top_k, device)

    def ours(self, scales_input: bool) -> torch.Tensor:
        device = self.made.addresses.device
        out = self.out.clone().to(device)
        asked = self._asked(self.made.addresses, scales_input)
        experts.launch_experts(self.x.to(device), asked, self.made.layout, self.scratch, out)
        return out

    def theirs(self, scales_input: bool) -> torch.Tensor:
        addresses = torch.where(self.made.addresses.cpu() == 0, 0, self.made.host_addresses)
        out, layout = self.out.clone(), self.made.layout
        scratch = DecodeScratch.allocate(layout, self.chosen.shape[0], self.chosen.numel(), torch.device("cpu"))
        experts.moe_decode(self.x, self._asked(addresses, scales_input), layout, scratch, out)
        return out

    def _asked(self, addresses: torch.Tensor, scales_input: bool) -> ChosenExperts:
        place = addresses.device
        chosen, scores, places, rows = (t.to(place) for t in (self.chosen, self.scores, self.places, self.gpu_rows))
        return ChosenExperts(chosen, scores, addresses, places, rows, scales_input)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scales_input", [True, False])
def test_one_token_equals_the_reference(name: str, scales_input: bool, device: torch.device) -> None:
    gate_up, down, hidden, inter = CASES[name]
    step = Step(images(2, hidden, inter, gate_up, down, device), [[1]], [0, 0], 0)
    assert_near(step.ours(scales_input), step.theirs(scales_input), HALVES)


def test_each_half_is_exact_but_for_the_order_of_sums(device: torch.device) -> None:
    made = images(1, 1120, 96, Scheme("int4", 32), Scheme("int8", 32), device)
    step = Step(made, [[0]], [0], 0)
    step.scores[:] = 1
    out = step.ours(scales_input=True).cpu()
    gate, up, down = made.dense[0]
    x = step.x.float()
    hidden = silu(x @ gate.T) * (x @ up.T)
    found = step.scratch.hidden[:1].cpu()
    sums = SUMS if device.type == "cpu" else SUMS_ON_A_CARD
    assert ((found.float() - hidden).abs() <= hidden.abs() * 2**-7 + sums / 2).all()
    assert_near(out, step.out + found.float() @ down.T, sums)


def test_places_shares_absent_experts_and_several_choices(device: torch.device) -> None:
    made = images(5, 128, 128, Scheme("int4", 64), Scheme("int4", 32), device)
    made.addresses[4] = 0  # in VRAM, says the table, but the card has no address for it: not its business
    step = Step(made, [[0, 1, 4], [2, -1, 1]], [0, 1, 2, 0, 0], 96)
    for scales_input in (True, False):
        assert_near(step.ours(scales_input), step.theirs(scales_input), HALVES)


@pytest.mark.parametrize("gpu_rows", [0, 128])
def test_a_share_of_nothing_and_of_all(gpu_rows: int, device: torch.device) -> None:
    made = images(1, 64, 128, Scheme("int8", 32), Scheme("int4", 128), device)
    step = Step(made, [[0]], [1], gpu_rows)
    out = step.ours(scales_input=True)
    assert_near(out, step.theirs(scales_input=True), HALVES)
    assert torch.equal(out.cpu(), step.out) == (gpu_rows == 0)


def test_no_expert_leaves_the_output_as_it_is(device: torch.device) -> None:
    step = Step(images(1, 64, 64, Scheme("int4", 64), Scheme("int4", 64), device), [[-1], [-1]], [0], 0)
    assert torch.equal(step.ours(scales_input=False).cpu(), step.out)


@pytest.mark.parametrize("alignment", [4, 8])
def test_narrow_alignment_costs_width_not_correctness(alignment: int, device: torch.device) -> None:
    made = images(1, 96, 64, Scheme("int4", 32), Scheme("int4", 64), device, alignment)
    assert made.layout.alignment == alignment
    step = Step(made, [[0]], [0], 0)
    assert_near(step.ours(scales_input=True), step.theirs(scales_input=True), HALVES)


def test_two_runs_agree_to_the_bit(device: torch.device) -> None:
    made = images(2, 64, 64, Scheme("int4", 32), Scheme("int4", 32), device)
    step = Step(made, [[0, 1]], [0, 0], 0)
    assert torch.equal(step.ours(scales_input=False), step.ours(scales_input=False))


def test_the_reference_equals_the_oracle_on_dequantized_weights() -> None:
    made = images(2, 96, 64, Scheme("int4", 32), Scheme("int8", 64), torch.device("cpu"))
    step = Step(made, [[1, 0]], [0, 0], 0)
    step.x = step.x.float()  # the reference keeps the precision it is given
    x, total = step.x, step.out.clone()
    for choice, expert in enumerate((1, 0)):
        gate, up, down = made.dense[expert]
        total += (silu(x @ gate.T) * (x @ up.T)) @ down.T * step.scores[:, choice, None]
    assert_near(step.theirs(scales_input=False), total, SUMS)


def test_what_does_not_fit_is_refused() -> None:
    made = images(1, 64, 64, Scheme("int4", 64), Scheme("int4", 64), torch.device("cpu"))
    step = Step(made, [[0]], [0], 0)
    step.x = step.x[:, :32]
    with pytest.raises(SchemeError, match=r"x is .*expected"):
        step.theirs(scales_input=True)
    with pytest.raises(SchemeError, match="1 to 8"):
        DecodeScratch.allocate(made.layout, 9, 9, torch.device("cpu"))
    offsets = dict.fromkeys(
        [(n, s) for n in ("gate_proj", "up_proj", "down_proj") for s in ("weight_packed", "weight_scale")], 0
    )
    int4, int8 = Scheme("int4", 64), Scheme("int8", 64)
    mixed = {"gate_proj": int4, "up_proj": int8, "down_proj": int4}
    nf4 = dict.fromkeys(mixed, Scheme("nf4"))
    with pytest.raises(SchemeError, match="in one scheme"):
        ExpertLayout.from_offsets(64, 64, mixed, offsets)
    with pytest.raises(SchemeError, match="read int2 to int8"):
        ExpertLayout.from_offsets(64, 64, nf4, offsets)


def test_a_shared_expert_is_an_expert_with_an_address_of_its_own() -> None:
    generator = torch.Generator().manual_seed(3)
    weights = [packed(64, 96, Scheme("int8", 32), generator) for _ in range(2)]
    weights.append(packed(96, 64, Scheme("int4", 64), generator))
    tensors = [tensor for weight in weights for tensor in (weight.packed, weight.scale)]
    layout, address = ExpertLayout.of_weights(*tensors)
    assert (layout.hidden, layout.inter) == (96, 64)
    assert (str(layout.gate_up), str(layout.down)) == ("int8-g32", "int4-g64")
    found = layout.dense(address, torch.float32)
    assert all(torch.equal(a, dequantize(b)) for a, b in zip(found, weights, strict=True))
