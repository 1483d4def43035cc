"""A random checkpoint runs everywhere a quantized one does, and routes as evenly, or unevenly, as asked."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from offload.records import RunOptions
from quant.checkpoint.checkpoint import Checkpoint
from quant.errors import OutputError, SchemeError, UsageError
from quant.model.families import QUANTIZABLE, Role
from quant.model.known_shapes import load_shape
from quant.scheme import Scheme
from quant.synth.config import llama4_config, untrained_config
from quant.synth.noise import Noise
from quant.synth.skew import zipf_biases, zipf_shares
from quant.synth.synth import synthesize
from quant.synth.tokenizer import write_tokenizer
from tests.family_checkpoints import COMMON, FAMILIES
from tests.quant.convert.test_convert_resume import contents
from tests.sessions import prompt_logits, session

TEXT = [role for role in QUANTIZABLE if role != "vision"]
FAST: dict[Role, Scheme] = {**dict.fromkeys(TEXT, Scheme("int4")), "lm_head": Scheme("int8")}


def tiny_config(**changes: Any) -> dict[str, Any]:
    numbers = {
        "hidden": 256,
        "layers": 4,
        "experts_per_layer": 8,
        "top_k": 1,
        "intermediate": 256,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 64,
        "vocab": 1024,
    }
    return llama4_config(**numbers | changes)


def load(folder: Path) -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def routed(model: Any, num_experts: int) -> list[torch.Tensor]:
    """The share of tokens that each expert gets, per layer, on random tokens."""
    shares: list[torch.Tensor] = []

    def count(_module: Any, _inputs: Any, output: Any) -> None:
        scores = output[1] if isinstance(output, tuple) else output
        chosen = scores.reshape(-1, num_experts).argmax(-1)
        shares.append(torch.bincount(chosen, minlength=num_experts) / chosen.numel())

    for name, module in model.named_modules():
        if name.endswith(".router"):
            module.register_forward_hook(count)
    tokens = torch.randint(1024, (8, 256), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = model(tokens).logits
    assert 0.3 < logits.std() < 3
    return shares


@pytest.mark.parametrize("kind", ["int2", "int3", "int4", "int8", "nf4"])
def test_routing_is_uniform_by_construction(tmp_path: Path, kind: str) -> None:
    schemes = dict.fromkeys(TEXT, Scheme.parse(kind))
    del schemes["lm_head"]
    synthesize(tiny_config(), tmp_path / "out", schemes)
    for share in routed(load(tmp_path / "out"), 8):
        entropy = -float((share * share.log2()).sum())
        assert entropy > 2.97 and share.max() < 0.17


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_routing_follows_zipfs_law(tmp_path: Path, exponent: float) -> None:
    synthesize(tiny_config(), tmp_path / "out", FAST, zipf=exponent)
    shares = routed(load(tmp_path / "out"), 8)
    for share in shares:
        assert (share.sort(descending=True).values - zipf_shares(8, exponent)).abs().max() < 0.06
    hottest = {int(share.argmax()) for share in shares}
    assert len(hottest) > 1  # the layers do not agree on which


@pytest.mark.parametrize(("experts", "top_k", "exponent"), [(16, 1, 1.0), (128, 1, 1.0), (16, 4, 0.5), (8, 2, 0.3)])
def test_biases_give_zipfs_shares_on_independent_scores(experts: int, top_k: int, exponent: float) -> None:
    scores = torch.randn(50_000, experts, generator=torch.Generator().manual_seed(9))
    chosen = (scores + zipf_biases(experts, top_k, exponent)).topk(top_k, dim=1).indices.flatten()
    found = torch.bincount(chosen, minlength=experts) / chosen.numel()
    assert (found - zipf_shares(experts, exponent)).abs().max() < 0.01


def test_a_share_that_no_router_can_reach_is_refused() -> None:
    with pytest.raises(UsageError, match="at most 25%: use a smaller exponent"):
        zipf_biases(16, 4, 1.5)


def test_greedy_text_walks_through_the_vocabulary(tmp_path: Path) -> None:
    synthesize(tiny_config(), tmp_path / "out", FAST)
    model, tokenizer = load(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("abc", return_tensors="pt").input_ids
    tokens = model.generate(prompt, max_new_tokens=12, do_sample=False)[0].tolist()
    assert tokens[2:] == list(range(tokens[2], tokens[2] + 13))


@pytest.mark.parametrize("family", ["llama4_maverick", "mixtral", "qwen3_moe", "olmoe"])
def test_other_families_are_synthesized_from_their_configs(tiny: Any, tmp_path: Path, family: str) -> None:
    config = Checkpoint.open(tiny(family)).config
    synthesize(config, tmp_path / "out", FAST)
    with torch.no_grad():
        logits = load(tmp_path / "out")(torch.arange(64).unsqueeze(0)).logits
    assert torch.isfinite(logits).all() and 0.3 < logits.std() < 3


def test_tied_embeddings_and_dense_roles_are_synthesized(tmp_path: Path) -> None:
    config = tiny_config(dense_every=2) | {"tie_word_embeddings": True}
    report = synthesize(config, tmp_path / "out", {"experts": Scheme("int4"), "lm_head": Scheme("int8")})
    assert report.notes
    with torch.no_grad():
        assert torch.isfinite(load(tmp_path / "out")(torch.arange(64).unsqueeze(0)).logits).all()


def test_the_same_seed_makes_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        synthesize(tiny_config(), tmp_path / name, FAST, seed=seed)
    one, two, three = (contents(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two and one != three


def test_no_two_experts_are_alike(tmp_path: Path) -> None:
    synthesize(tiny_config(), tmp_path / "out", FAST)
    checkpoint = Checkpoint.open(tmp_path / "out")
    keys = [key for key in checkpoint.entries if key.endswith("experts.0.gate_proj.weight_packed")]
    keys += [key for key in checkpoint.entries if key.endswith("experts.1.gate_proj.weight_packed")]
    assert len({checkpoint.read(key).numpy().tobytes() for key in keys}) == len(keys) == 8


def test_a_tokenizer_of_the_models_size_encodes_any_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 5000)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 5000
    text = "def f(x):\n    return x  # é ☃\x00"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    words = [str(tokenizer.decode([token])) for token in range(256, 5000)]
    assert len(set(words)) == len(words) and all(word.strip().isalpha() for word in words)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[user] hi\n"


def test_a_multimodal_shape_becomes_its_language_model() -> None:
    config = untrained_config(load_shape("scout"))
    assert config["model_type"] == "llama4_text" and config["eos_token_id"] is None
    assert config["architectures"] == ["Llama4ForCausalLM"] and "vision_config" not in config


def noise(pieces: Iterator[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(pieces))


def test_noise_is_a_function_of_key_and_place() -> None:
    source = Noise(3)
    whole = noise(source.octets("a", "int8", 0, 1 << 20))
    assert torch.equal(noise(source.octets("a", "int8", 640, 1000)), whole[640:1640])
    assert not torch.equal(noise(source.octets("b", "int8", 0, 1 << 20)), whole)
    far = noise(source.octets("a", "int8", 10**9, 4096))  # a window goes round its block
    assert far.numel() == 4096


@pytest.mark.parametrize(("kind", "spread"), [("int4", 17.5), ("int8", 5397.5)])
def test_stored_values_have_no_mean(kind: Any, spread: float) -> None:
    octets = noise(Noise(0).octets("a", kind, 0, 1 << 22))
    values = torch.cat([octets & 15, octets >> 4]).float() - 8 if kind == "int4" else octets.float() - 128
    assert abs(float(values.mean())) < 4 * math.sqrt(spread / values.numel())
    assert float(values.square().mean()) == pytest.approx(spread, rel=0.01)


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot hold every byte"):
        synthesize(tiny_config(vocab=100), tmp_path / "out", FAST)
    with pytest.raises(SchemeError, match="groups of 128 do not divide"):
        synthesize(tiny_config(hidden=192), tmp_path / "out", FAST)
    with pytest.raises(UsageError, match="is negative"):
        synthesize(tiny_config(), tmp_path / "out", FAST, zipf=-1)
    with pytest.raises(OutputError, match="free, but the output needs"):
        synthesize(untrained_config(load_shape("behemoth")), tmp_path / "out", FAST)
    assert not list(tmp_path.iterdir())


def test_a_destination_that_is_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        synthesize(tiny_config(), tmp_path / "out", FAST)


@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe", "deepseek_v2", "qwen3_next"])
def test_a_family_without_a_table_runs_on_random_weights(family: str, tmp_path: Path) -> None:
    config = untrained_config({"model_type": family, **COMMON, **FAMILIES[family]})
    synthesize(config, tmp_path / "out", {"experts": Scheme("int4", 32), "attention": Scheme("int8", 32)})
    with session(tmp_path / "out", RunOptions(context=64), ram_slots=64) as running:
        logits = prompt_logits(running, list(range(40)))
    assert torch.isfinite(logits).all() and 0.2 < logits.std() < 4


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def stop(*_call: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tiny_config(), tmp_path / "out", FAST, progress=stop)
    assert not list(tmp_path.iterdir())
