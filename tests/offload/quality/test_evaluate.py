"""Evaluation against stock transformers, and against what the numbers must be where they are known."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from offload.model.kv_cache import Storage
from offload.quality import reference
from offload.quality.divergence import Divergence, TokenMeasures
from offload.quality.evaluate import evaluate
from offload.quality.layerwise import Layerwise
from quant.checkpoint.checkpoint import Checkpoint
from quant.convert.convert import convert
from quant.errors import CheckpointError, InputError, NonFiniteError
from quant.scheme import Scheme
from tests.checkpoints import FAMILIES

STORAGES: tuple[Storage | None, ...] = (None, "plain", "int8")
TEXT = "It rained on the fourth day, and nobody had brought a tent. " * 20
IDS = torch.arange(150).view(2, 75)


@pytest.fixture(scope="module")
def pair(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama 4 and what int4 made of it."""
    source, destination = tiny("llama4_text"), tmp_path_factory.mktemp("eval") / "int4"
    convert(source, destination, {"experts": Scheme("int4"), "attention": Scheme("int4")})
    return source, destination


@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.endswith("_fused")])
def test_a_walk_layer_by_layer_gives_stock_predictions(family: str, tiny: Callable[..., Path]) -> None:
    with Layerwise(Checkpoint.open(tiny(family)), expert_slots=2) as walk:
        hidden = walk.embed(IDS)
        for layer in range(walk.shape.num_layers):
            walk.run(layer, hidden, hidden)
        ours = torch.stack([walk.log_probs(window) for window in hidden])
        stock = _stock(tiny(family), family)
    assert torch.allclose(ours, torch.log_softmax(stock, -1), atol=2e-4, rtol=0)


def _stock(path: Path, family: str) -> torch.Tensor:
    from transformers import Llama4ForConditionalGeneration

    kind = Llama4ForConditionalGeneration if family == "llama4" else AutoModelForCausalLM
    model = kind.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def test_a_model_beside_itself_is_the_same(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = evaluate(pair[0], pair[0], TEXT, cache=tmp_path, windows=3, length=64)
    assert found.divergence.kl_mean < 1e-6 and found.divergence.same_top > 0.99
    assert found.divergence.perplexity.value == pytest.approx(found.divergence.reference_perplexity.value)
    assert set(found.router_agreement.values()) == {1.0}


def test_divergence_equals_its_definition(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, quantized = pair
    found = evaluate(quantized, source, TEXT, cache=tmp_path, windows=2, length=64).divergence
    p, q = (_log_probs(path, 2, 64) for path in (source, quantized))
    kl = (p.exp() * (p - q)).sum(-1)
    assert found.tokens == 128
    assert found.kl_mean == pytest.approx(kl.mean().item(), rel=1e-3)
    assert found.kl_max == pytest.approx(kl.max().item(), rel=1e-3)
    assert found.same_top == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item(), abs=0.02)


def _log_probs(path: Path, windows: int, length: int) -> torch.Tensor:
    from offload.quality.windows import Windows
    from offload.text.tokenizer import load_tokenizer

    cut = Windows.cut(TEXT, load_tokenizer(path), length, windows)
    with Layerwise(Checkpoint.open(path)) as walk:
        hidden = walk.embed(cut.ids)
        for layer in range(walk.shape.num_layers):
            hidden = walk.run(layer, hidden)
        return torch.stack([walk.log_probs(window) for window in hidden])


def test_of_a_large_vocabulary_the_head_is_kept_and_kl_is_a_lower_bound(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, quantized = pair
    whole = evaluate(quantized, source, TEXT, cache=tmp_path / "a", windows=2, length=64).divergence
    monkeypatch.setattr(reference, "MAX_STORED", 100)
    part = evaluate(quantized, source, TEXT, cache=tmp_path / "b", windows=2, length=64).divergence
    assert 0.5 * whole.kl_mean < part.kl_mean <= whole.kl_mean * 1.001
    assert part.same_top == pytest.approx(whole.same_top, abs=0.02)
    assert part.perplexity == whole.perplexity


def test_a_model_that_predicts_no_numbers_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    spoiled = tmp_path / "model"
    shutil.copytree(pair[0], spoiled)
    tensors = load_file(spoiled / "model.safetensors")
    tensors["lm_head.weight"][3, 5] = torch.nan
    save_file(tensors, spoiled / "model.safetensors", {"format": "pt"})
    for model, beside in ((spoiled, pair[0]), (pair[0], spoiled)):
        with pytest.raises(NonFiniteError, match="predicts NaN or infinity"):
            evaluate(model, beside, TEXT, cache=tmp_path / "cache", windows=2, length=64)
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_an_int8_cache_is_measured_by_the_same_ruler(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source = pair[0]
    plain, int8 = (
        evaluate(source, source, TEXT, cache=tmp_path, windows=2, length=64, kv=kv).divergence.kl_mean
        for kv in (None, "int8")
    )
    assert plain < int8 < 0.01


def test_chunked_layers_see_stored_keys_in_windows_longer_than_a_chunk(tiny: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(tiny("llama4_text"))
    [layer, *_] = checkpoint.shape.chunked_layers
    length = 2 * checkpoint.shape.attention_chunk_size
    ids = torch.arange(length)[None] % checkpoint.shape.vocab_size
    after = {}
    for kv in STORAGES:
        with Layerwise(checkpoint, kv=kv) as walk:
            after[kv] = walk.run(layer, walk.embed(ids))
    assert torch.allclose(after["plain"], after[None], atol=1e-5)
    first = slice(0, length // 2)
    for part in (first, slice(length // 2, None)):
        assert not torch.allclose(after["int8"][:, part], after[None][:, part], atol=1e-5)


def test_a_reference_of_another_shape_or_tokenizer_is_refused(
    pair: tuple[Path, Path], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"no reference for .*architecture"):
        evaluate(pair[1], tiny("mixtral"), TEXT, cache=tmp_path)
    with pytest.raises(CheckpointError, match="a vocabulary of 320"):
        evaluate(pair[1], tiny("llama4_text", vocab_size=320), TEXT, cache=tmp_path)
    import shutil

    other = tmp_path / "other"
    shutil.copytree(pair[0], other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"a": ', '"\u4e00": '))
    with pytest.raises(CheckpointError, match="different vocabularies"):
        evaluate(pair[1], other, TEXT, cache=tmp_path)


def test_a_text_too_short_is_refused_with_its_length(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the text has 5 tokens, 0 windows of 512: expected at least 32"):
        evaluate(pair[1], pair[0], "Hello", cache=tmp_path)


def test_buckets_and_bars_hold_every_token_once() -> None:
    generator = np.random.default_rng(0)
    kl = generator.exponential(0.1, 500)
    nll = generator.exponential(1.0, 490)
    measures = TokenMeasures(kl, np.ones(500), generator.uniform(0, 1, 500), nll, nll + 0.1)
    found = Divergence.of(measures)
    assert sum(bucket.tokens for bucket in found.buckets) == 500
    assert sum(found.histogram.values()) == 500
    assert found.log_ratio == pytest.approx(-0.1)
    assert found.delta_p_mean > 0


def test_a_token_is_counted_in_the_half_decade_of_its_divergence() -> None:
    kl = np.array([0.0, 2e-6, 2e-3, 4e-3, 0.02, 0.5, 200.0])
    measures = TokenMeasures(kl, *(np.ones(7) for _ in range(4)))
    counted = {edge: count for edge, count in Divergence.of(measures).histogram.items() if count}
    assert counted == {"1e-6": 2, "1e-3": 1, "3e-3": 1, "1e-2": 1, "3e-1": 1, "3e1": 1}


def test_divergence_by_position_is_the_mean_over_windows() -> None:
    kl = np.concatenate([np.arange(32.0), 2 * np.arange(32.0)])
    measures = TokenMeasures(kl, *(np.ones(64) for _ in range(4)))
    found = Divergence.of(measures, 32).by_position
    assert found == pytest.approx([1.5 * (2 * index + 0.5) for index in range(16)])
