"""Tuning: a latent multiplies by what it stores, gradients reach everything, and outputs come nearer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from offload.quality import calibrate as calibrate_module
from offload.quality import tune as tuning
from offload.quality.calibrate import calibrate
from offload.quality.layerwise import Layerwise
from offload.quality.tune import tune
from offload.quality.windows import Windows
from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import OutputError, UsageError
from quant.model.families import Role
from quant.pack import dequantize, quantize_absmax, unpack
from quant.rounding.learned_rounding import TrainableWeight
from quant.scheme import Scheme

INT4 = Scheme("int4", 32)


def made(rows: int = 48, columns: int = 64, seed: int = 0) -> tuple[torch.Tensor, TrainableWeight]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return weight, TrainableWeight(quantize_absmax(weight, INT4), weight)


def test_a_latent_begins_as_what_was_stored_and_stores_what_it_multiplies_by() -> None:
    weight, latent = made()
    stored = quantize_absmax(weight, INT4)
    assert torch.equal(latent.packed().packed, stored.packed)
    assert torch.equal(latent.packed().scale, stored.scale)
    with torch.no_grad():
        latent.values += torch.randn(latent.values.shape, generator=torch.Generator().manual_seed(1))
        latent.factors *= 1.1
    packed = latent.packed()
    assert not torch.equal(packed.packed, stored.packed) and not torch.equal(packed.scale, stored.scale)
    assert int(unpack(packed.packed, 4).min()) >= -8 and int(unpack(packed.packed, 4).max()) <= 7
    torch.testing.assert_close(latent.dense().detach(), dequantize(packed), rtol=0, atol=0)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(latent(x).detach(), x @ dequantize(packed).t())


def test_gradients_pass_the_rounding() -> None:
    _, latent = made()
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(3))
    pull = torch.randn(7, 48, generator=torch.Generator().manual_seed(4))
    (latent(x) * pull).sum().backward()
    packed = latent.packed()
    scale = packed.scale.float().repeat_interleave(INT4.group_size, 1)
    outer = pull.t() @ x
    torch.testing.assert_close(latent.values.grad, outer * scale)
    by_group = (outer * unpack(packed.packed, 4).float() * scale).view(48, -1, INT4.group_size).sum(-1)
    torch.testing.assert_close(latent.factors.grad, by_group)


def test_tuning_brings_a_product_nearer_than_rounding_left_it() -> None:
    """Inputs that lie along few directions: there is room to make up for errors."""
    weight, latent = made()
    random = torch.Generator().manual_seed(5)
    inputs = torch.randn(16, 32, 6, generator=random) @ torch.randn(6, 64, generator=random)
    target = inputs @ weight.t()

    def error() -> float:
        return float((latent(inputs) - target).square().mean().detach())

    before = error()
    tune([latent], latent, inputs, target, passes=20)
    assert error() < 0.5 * before
    again = made()[1]
    tune([again], again, inputs, target, passes=20)
    assert torch.equal(again.packed().packed, latent.packed().packed), "the same input gives the same bytes"


def test_what_came_no_nearer_is_left_as_it_was(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Checkpoint.open(tiny("llama4_text"))
    schemes: dict[Role, Scheme] = {"attention": Scheme("int4")}
    text = Windows(torch.randint(0, 256, (12, 64), generator=torch.Generator().manual_seed(0)))
    calibrate(source, schemes, text, tmp_path / "plain")
    monkeypatch.setattr(tuning, "_VALUE_RATE", 10.0)
    seen = calibrate(source, schemes, text, tmp_path / "tuned", passes=1)
    assert all(after == before > 0 for before, after in seen.tuned.values())
    for file in sorted((tmp_path / "plain").glob("layer-*.safetensors")):
        theirs, ours = load_file(file), load_file(tmp_path / "tuned" / file.name)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("family", "plain"), [("llama4_maverick", ("attention",)), ("qwen3_moe", ()), ("llama4_text", ("experts",))]
)
def test_gradients_reach_every_dense_linear_of_every_layer(
    family: str, plain: tuple[Role, ...], tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``plain`` roles stay in bf16: gradients pass them all the same."""
    reached: list[int] = []

    def watched(latents: Sequence[TrainableWeight], *others: Any) -> tuple[float, float]:
        found = tune(latents, *others)
        for latent in latents:
            assert latent.values.grad is not None and latent.values.grad.abs().max() > 0
        reached.append(len(latents))
        return found

    monkeypatch.setattr(calibrate_module, "tune", watched)
    source = Checkpoint.open(tiny(family))
    roles: tuple[Role, ...] = ("experts", "shared_expert", "dense_mlp", "attention")
    schemes = {role: Scheme("int4") for role in roles if role not in plain}
    ids = torch.randint(0, 256, (12, 64), generator=torch.Generator().manual_seed(0))
    seen = calibrate(source, schemes, Windows(ids), tmp_path / "work", passes=1)
    layers = {spec.layer for spec in source.shape.dense_linears() if spec.role in schemes}
    assert len(reached) == len(seen.tuned) == len(layers)
    assert sum(reached) == sum(spec.role in schemes for spec in source.shape.dense_linears())
    assert all(after <= before for before, after in seen.tuned.values())
    assert any("tuning lowered the error" in note or "tuning gained nothing" in note for note in seen.notes())


def test_the_last_layer_is_tuned_by_predictions(tiny: Callable[..., Path]) -> None:
    source = Checkpoint.open(tiny("qwen3_moe"))
    random = torch.Generator().manual_seed(7)
    with Layerwise(source) as walk:
        ids = torch.randint(0, 256, (3, 16), generator=random)
        wanted = torch.randn(3, 16, source.shape.hidden_size, generator=random)
        found = (wanted + 0.1 * torch.randn(wanted.shape, generator=random)).requires_grad_()
        assert float(walk.loss(wanted, wanted, ids, 0)) == pytest.approx(0, abs=1e-6)
        loss = walk.loss(found, wanted, ids, 0.5)
        ours, theirs = (walk.log_probs(hidden.detach().flatten(0, 1)) for hidden in (found, wanted))
        expected = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
        unlikely = -ours.view(3, 16, -1)[:, :-1].gather(2, ids[:, 1:, None]).mean()
        torch.testing.assert_close(loss.detach(), expected + 0.5 * unlikely, rtol=1e-4, atol=1e-6)
        (towards,) = torch.autograd.grad(loss, found)
        nearer = found.detach() - 0.1 * towards / towards.norm()
        assert float(walk.loss(nearer, wanted, ids, 0.5)) < loss.item()


def test_tuning_without_a_dense_linear_to_tune_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    text = Windows(torch.randint(0, 256, (12, 64), generator=torch.Generator().manual_seed(0)))
    with pytest.raises(UsageError, match="nothing to tune"):
        calibrate(Checkpoint.open(tiny("mixtral")), {"experts": INT4}, text, tmp_path / "work", passes=1)
    assert not (tmp_path / "work").exists()


def test_a_tuned_calibration_is_not_continued_untuned(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = Checkpoint.open(tiny("llama4_text"))
    schemes: dict[Role, Scheme] = {"attention": Scheme("int4")}
    text = Windows(torch.randint(0, 256, (12, 64), generator=torch.Generator().manual_seed(0)))
    calibrate(source, schemes, text, tmp_path / "work", passes=1)
    with pytest.raises(OutputError, match="was begun with another"):
        calibrate(source, schemes, text, tmp_path / "work", resume=True)
