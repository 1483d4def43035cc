"""A converted checkpoint is what it says: to transformers, to compressed-tensors, to bitsandbytes, to the
byte.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from quant.checkpoint.checkpoint import Checkpoint
from quant.convert.convert import REPORT, ConversionReport, convert
from quant.pack import dequantize, dequantize_nf4, quantize_absmax, quantize_nf4
from quant.rounding.inputs import InputMeans
from quant.rounding.rounding import Rounding
from quant.rounding.search import search
from quant.scheme import Scheme
from tests.checkpoints import FAMILIES, make
from tests.quant.dequantized import dequantized_twin, packed_weights, random_tokens, tensors_of

Tiny = Callable[..., Path]

INT4 = {"experts": "int4"}
INT8 = {"experts": "int8-g64", "shared_expert": "int8-g64"}
MIXED = {"experts": "int4", "shared_expert": "int4-g32", "dense_mlp": "int8", "attention": "int8", "lm_head": "int8"}
FEW = {"experts": "int3-g64", "shared_expert": "int2-g32", "attention": "int3-g32", "lm_head": "int8"}
DENSE = {"attention": "int8-g32", "dense_mlp": "int4"}


def run(source: Path, destination: Path, roles: Mapping[str, str]) -> ConversionReport:
    return convert(source, destination, {role: Scheme.parse(text) for role, text in roles.items()})  # type: ignore[misc]


def logits(folder: Path) -> torch.Tensor:
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not info["missing_keys"] and not info["mismatched_keys"]
    unexpected = [key for key in info["unexpected_keys"] if "vision_model" not in key and "projector" not in key]
    assert not unexpected
    for parameter in model.parameters():  # the experts that were fused while loading are bf16 all the same
        if parameter.dtype is torch.bfloat16:
            parameter.data = parameter.data.float()
    with torch.no_grad():
        result: torch.Tensor = model.eval()(random_tokens()).logits
    return result


@pytest.mark.parametrize("roles", [INT4, INT8, MIXED, FEW, DENSE], ids=["int4", "int8", "mixed", "few", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_alone_computes_what_the_dequantized_model_computes(
    tiny: Tiny, tmp_path: Path, family: str, roles: dict[str, str]
) -> None:
    run(tiny(family), tmp_path / "quantized", roles)
    twin = dequantized_twin(tiny(family), tmp_path / "quantized", tmp_path / "twin")
    found, expected = logits(tmp_path / "quantized"), logits(twin)
    assert (found - expected).abs().max() < 1e-5
    assert (found - logits(tiny(family))).abs().max() > 1e-3  # it is quantized indeed


@pytest.mark.parametrize("tower", ["bf16", "int8-g32"])
def test_multimodal_llama4_loads_whole_and_sees_the_same_image(tiny: Tiny, tmp_path: Path, tower: str) -> None:
    report = run(tiny("llama4"), tmp_path / "quantized", {**MIXED, "vision": tower})
    assert ("vision" in [role.role for role in report.roles]) == (tower != "bf16")
    twin = dequantized_twin(tiny("llama4"), tmp_path / "quantized", tmp_path / "twin")
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    tokens, outputs = random_tokens(12), []
    for folder in (tmp_path / "quantized", twin):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        model, info = loaded
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        with torch.no_grad():
            model(tokens)  # what is packed is made dense when the whole model first runs
            count = model.vision_model(pixels).last_hidden_state.flatten(0, -2).shape[0]
            image = torch.full((1, count), model.config.image_token_index)
            seen = torch.cat([tokens[:, :4], image, tokens[:, 4:]], 1)
            outputs.append(model(seen, pixel_values=pixels).logits)
            assert (model(seen, pixel_values=-pixels).logits - outputs[-1]).abs().max() > 1e-4
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5


@pytest.mark.parametrize("roles", [MIXED, FEW], ids=["mixed", "few"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_tensors_unpacks_the_same_weights_bit_for_bit(
    tiny: Tiny, tmp_path: Path, family: str, roles: dict[str, str]
) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    run(tiny(family), tmp_path / "out", roles)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(config).config_groups.values()
    unpacker = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = tensors_of(tmp_path / "out")
    for module, packed in packed_weights(tmp_path / "out").items():
        wanted = (packed.scheme.bits, packed.scheme.group_size)
        group = next(g for g in groups if (g.weights.num_bits, g.weights.group_size) == wanted)
        stored = {name: tensors[f"{module}.{name}"] for name in ("weight_packed", "weight_scale", "weight_shape")}
        theirs = unpacker.decompress(stored, group)["weight"]
        assert torch.equal(theirs, dequantize(packed, torch.bfloat16)), module


@pytest.mark.parametrize("rounding", ["rtn", "search"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_is_the_reference_quantization_of_its_source(
    tiny: Tiny, tmp_path: Path, family: str, rounding: Rounding
) -> None:
    convert(tiny(family), tmp_path / "out", {"experts": Scheme("int4")}, rounding=rounding)
    source, packed = Checkpoint.open(tiny(family)), packed_weights(tmp_path / "out")
    means = InputMeans(source)
    for layer in source.shape.moe_layers:
        for expert in range(source.shape.num_experts):
            views = source.expert(layer, expert)
            for linear in source.shape.expert_linears(layer, expert):
                assert linear.projection is not None
                dense = views[linear.projection].dense()
                mean = means.of(linear.module)
                assert (mean is None) == (linear.projection == "down_proj"), "down_proj follows no norm"
                searched = rounding == "search"
                expected = search(dense, Scheme("int4"), mean) if searched else quantize_absmax(dense, Scheme("int4"))
                found = packed.pop(linear.module)
                assert torch.equal(found.packed, expected.packed) and torch.equal(found.scale, expected.scale)
    assert not packed


@pytest.mark.parametrize("family", ["llama4", "llama4_maverick", "mixtral", "qwen3_moe_fused", "olmoe"])
def test_an_nf4_expert_loads_through_bitsandbytes_own_quant_state(tiny: Tiny, tmp_path: Path, family: str) -> None:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    run(tiny(family), tmp_path / "out", {"experts": "nf4", "attention": "nf4"})
    source, tensors = Checkpoint.open(tiny(family)), tensors_of(tmp_path / "out")
    layer = source.shape.moe_layers[-1]
    views = source.expert(layer, 5)
    for linear in source.shape.expert_linears(layer, 5):
        assert linear.projection is not None
        dense = views[linear.projection].dense().contiguous()
        key = f"{linear.module}.weight"
        parts = {name.removeprefix(f"{key}."): value for name, value in tensors.items() if name.startswith(f"{key}.")}
        state = QuantState.from_dict(dict(parts), device=torch.device("cpu"))
        assert state.shape == dense.shape and state.dtype == torch.bfloat16
        assert torch.equal(dequantize_4bit(tensors[key], state), dequantize_nf4(quantize_nf4(dense)))


@pytest.mark.parametrize("family", ["llama4_text", "llama4_maverick"])
def test_an_nf4_llama4_runs_in_transformers_alone(tiny: Tiny, tmp_path: Path, family: str) -> None:
    run(tiny(family), tmp_path / "out", {"experts": "nf4", "shared_expert": "nf4"})
    found, exact = logits(tmp_path / "out"), logits(tiny(family))
    assert 1e-3 < (found - exact).abs().mean() < 0.3 * exact.std()


def test_what_is_not_named_is_carried_through_untouched(tiny: Tiny, tmp_path: Path) -> None:
    run(tiny("llama4"), tmp_path / "out", INT4)
    source, found = tensors_of(tiny("llama4")), tensors_of(tmp_path / "out")
    kept = [key for key in source if "experts" not in key]
    assert any(key.startswith("vision_model.") for key in kept) and any("projector" in key for key in kept)
    assert all(source[key].dtype == found[key].dtype and torch.equal(source[key], found[key]) for key in kept)


def test_a_tensor_of_another_dtype_keeps_it(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny("llama4_text"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].half()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    run(source, tmp_path / "out", INT4)
    found = tensors_of(tmp_path / "out")
    assert found["model.norm.weight"].dtype == torch.float32 and found["lm_head.weight"].dtype == torch.float16


def test_f32_and_f16_sources_are_quantized_too(tmp_path: Path) -> None:
    for name, dtype in (("f32", torch.float32), ("f16", torch.float16)):
        source = make("olmoe", tmp_path / name, dtype=dtype)
        run(source, tmp_path / f"{name}-out", MIXED)
        weight = load_file(source / "model.safetensors")["lm_head.weight"]
        assert torch.equal(
            packed_weights(tmp_path / f"{name}-out")["lm_head"].packed, quantize_absmax(weight, Scheme("int8")).packed
        )


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    source = make("llama4_text", tmp_path / "source", tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors_of(source)
    report = run(source, tmp_path / "out", {**INT4, "lm_head": "int8"})
    assert any("lm_head is tied" in note for note in report.notes)
    twin = dequantized_twin(source, tmp_path / "out", tmp_path / "twin")
    assert (logits(tmp_path / "out") - logits(twin)).abs().max() < 1e-5


@pytest.mark.parametrize("shards", [1, 3])
def test_sharding_of_the_source_does_not_show_in_the_result(tiny: Tiny, tmp_path: Path, shards: int) -> None:
    run(tiny("qwen3_moe"), tmp_path / "one", MIXED)
    run(tiny("qwen3_moe", shards=shards), tmp_path / "other", MIXED)
    for file in sorted((tmp_path / "one").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_fused_and_per_expert_sources_become_the_same_bytes(tiny: Tiny, tmp_path: Path, family: str) -> None:
    run(tiny(family), tmp_path / "one", MIXED)
    run(tiny(f"{family}_fused"), tmp_path / "other", MIXED)
    for file in sorted((tmp_path / "one").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()


def test_tokenizer_chat_template_and_other_files_travel_along_but_no_weights(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny("llama4_text"), source)
    (source / "LICENSE").write_text("terms")
    (source / "pytorch_model.bin").write_bytes(b"old")
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("{}")
    (source / "original" / "consolidated.00.pth").write_bytes(b"old")
    for stranger in ("model-q4.gguf", "consolidated.00.pth", "plot.png", "training.parquet"):
        (source / stranger).write_bytes(b"no part of it")
    with (source / "corpus.txt").open("wb") as stream:
        stream.truncate(9 * 2**20)  # data, for its size
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    for belongs in ("README.md", "preprocessor_config.json", "chat_template.jinja", "tokenizer.model"):
        (source / belongs).write_text("{}")
    (source / ".cache").mkdir()
    (source / ".cache" / "x").write_text("hidden")
    report = run(source, tmp_path / "out", INT4)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"} <= names
    assert {"README.md", "preprocessor_config.json", "chat_template.jinja", "tokenizer.model"} <= names
    assert (tmp_path / "out" / "additional_chat_templates" / "rag.jinja").is_file()
    strangers = {"pytorch_model.bin", "original", "model-q4.gguf", "consolidated.00.pth", "plot.png"}
    assert not {*strangers, "training.parquet", "corpus.txt", ".cache"} & names
    [note] = [note for note in report.notes if note.startswith("not copied, 9.00 MiB")]
    assert "original/ (2 files)" in note and "pytorch_model.bin" in note and "and 1 more" in note
    assert ".cache" not in note and "safetensors" not in note
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("héllo")) == "héllo"
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(source).chat_template


def test_published_config_quirks_are_put_right(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny("llama4"), source)
    config = json.loads((source / "config.json").read_text())
    config["text_config"] |= {"attn_temperature_tuning": 4, "attention_chunk_size": None}
    (source / "config.json").write_text(json.dumps(config))
    run(source, tmp_path / "out", INT4)
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert text["attn_temperature_tuning"] is True and set(text["layer_types"]) == {"full_attention"}
    logits(tmp_path / "out")


def test_the_report_names_every_quantized_tensor_and_the_worst_of_each_role(tiny: Tiny, tmp_path: Path) -> None:
    report = run(tiny("llama4_text"), tmp_path / "out", MIXED)
    stored = json.loads((tmp_path / "out" / REPORT).read_text())
    packed = packed_weights(tmp_path / "out")
    assert set(stored["tensors"]) == set(packed)
    weight = load_file(tiny("llama4_text") / "model.safetensors")["lm_head.weight"].float()
    error = (dequantize(packed["lm_head"]) - weight).norm() / weight.norm()
    assert stored["tensors"]["lm_head"][0] == pytest.approx(float(error), rel=1e-4)
    assert stored["roles"]["experts"]["tensors"] == 4 * 8 * 3
    worst = max((m for m in packed if ".experts." in m), key=lambda module: stored["tensors"][module][0])
    assert stored["roles"]["experts"]["worst"]["tensor"] == worst
    assert 17 < next(role.sqnr_db or 0 for role in report.roles if role.role == "experts") < 22
    assert report.to_json()["roles"] == stored["roles"]


def test_progress_ends_at_the_size_of_the_source(tiny: Tiny, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    convert(tiny("mixtral"), tmp_path / "out", {"experts": Scheme("int4")}, progress=lambda *call: calls.append(call))
    assert calls[-1][0] == calls[-1][1] == sum(e.nbytes for e in Checkpoint.open(tiny("mixtral")).entries.values())
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
