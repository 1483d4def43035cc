"""Every tensor is one that the model is made of, in the dtype of its form, or the checkpoint is refused by its
name; whatever was changed in headers or config, opening is right or one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quant.checkpoint.inventory import open_headers, schemes_of_tensors
from quant.checkpoint.stored import stored_schemes
from quant.convert.convert import convert
from quant.errors import CheckpointError
from quant.model.families import Role
from quant.scheme import Scheme
from tests import hostile

Tiny = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2"
QUERY = "model.layers.0.self_attn.q_proj"
SCHEMES: dict[Role, Scheme] = {"experts": Scheme("int4"), "attention": Scheme("int8", 64)}


@pytest.fixture(scope="module")
def packed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("packed") / "model"
    convert(tiny("mixtral"), destination, SCHEMES)
    return destination


@pytest.fixture(scope="module")
def nf4(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("nf4") / "model"
    convert(tiny("mixtral"), destination, {"experts": Scheme("nf4")})
    return destination


def single(source: Path, folder: Path, edit: Callable[[Tensors], object]) -> Path:
    """A copy of ``source`` in one file, its tensors changed by ``edit``."""
    folder.mkdir()
    tensors = {key: value for file in source.glob("*.safetensors") for key, value in load_file(file).items()}
    edit(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    shutil.copy(source / "config.json", folder)
    return folder


def fp8(key: str, scale: str) -> Callable[[Tensors], object]:
    def edit(tensors: Tensors) -> None:
        weight = tensors[f"{key}.weight"]
        tensors[f"{key}.weight"] = weight.to(torch.float8_e4m3fn)
        tensors[f"{key}.{scale}"] = torch.ones(len(weight), 1, dtype=torch.bfloat16)

    return edit


def int8(key: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update(
        {f"{key}.weight": tensors[f"{key}.weight"].to(torch.int8), f"{key}.weight_scale": torch.ones(128, 1)}
    )


def also(key: str, value: torch.Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({key: value})


def without(key: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(key)


def as_dtype(key: str, dtype: torch.dtype) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({key: tensors[key].to(dtype)})


INT32 = torch.int32
ROUTER = "model.layers.2.block_sparse_moe.gate.weight"
NORM = "model.layers.2.input_layernorm.weight"
EXTRA = EXPERT.replace("3", "9") + ".weight"
DENSE = {
    "fp8 beside weight_scale": (fp8(EXPERT, "weight_scale"), f"{EXPERT}.weight has dtype F8_E4M3"),
    "fp8 attention": (fp8(QUERY, "weight_scale"), f"{QUERY}.weight has dtype F8_E4M3"),
    "fp8 as DeepSeek has it": (fp8(EXPERT, "weight_scale_inv"), f"{EXPERT}.weight has dtype F8_E4M3"),
    "int8 beside weight_scale": (int8(QUERY), f"{QUERY}.weight has dtype I8"),
    "a scale too many": (also(f"{QUERY}.weight_scale", torch.ones(128, 1)), f"{QUERY}.weight_scale belongs to a form"),
    "a scale of activations": (also(f"{QUERY}.input_scale", torch.ones(1)), f"{QUERY}.input_scale has no place"),
    "a KV cache's scale": (also("model.layers.0.self_attn.k_scale", torch.ones(1)), "self_attn.k_scale has no place"),
    "a bias that the config has not": (also(f"{QUERY}.bias", torch.ones(128)), f"{QUERY}.bias has no place"),
    "a LoRA": (also(f"{QUERY}.lora_A.weight", torch.ones(8, 128)), f"{QUERY}.lora_A.weight has no place"),
    "a layer too many": (also("model.layers.4.input_layernorm.weight", torch.ones(128)), "layers.4.input_layernorm"),
    "an expert too many": (also(EXTRA, torch.ones(128, 128)), "experts.9.w2.weight has no place"),
    "a head beside another": (also("model.lm_head.weight", torch.ones(256, 128)), "model.lm_head.weight has no place"),
    "another model's tensor": (also("tok_embeddings.weight", torch.ones(4)), "tok_embeddings.weight is not part of"),
    "a norm in integers": (as_dtype("model.norm.weight", INT32), "model.norm.weight has dtype I32"),
    "a router in fp8": (as_dtype(ROUTER, torch.float8_e5m2), "gate.weight has dtype F8_E5M2"),
    "no router": (without(ROUTER), f"has no tensor {ROUTER}"),
    "no norm": (without(NORM), f"has no tensor {NORM}"),
    "packed, no scales": (also(f"{QUERY}.weight_packed", torch.ones(1, dtype=INT32)), "weight_packed has no scales"),
}
WORDS, SCALES = f"{EXPERT}.weight_packed", f"{EXPERT}.weight_scale"
ZEROS = torch.zeros(16, 2, dtype=INT32)
PACKED = {
    "no scales": (without(SCALES), f"{WORDS} has no scales"),
    "no weights": (without(WORDS), f"{SCALES} is a scale without"),
    "g_idx": (
        also(f"{EXPERT}.weight_g_idx", torch.zeros(128, dtype=INT32)),
        f"{EXPERT}.weight_g_idx belongs to a form",
    ),
    "zero points": (also(f"{QUERY}.weight_zero_point", ZEROS), f"{QUERY}.weight_zero_point belongs to a form"),
    "words in F32": (as_dtype(WORDS, torch.float32), f"{WORDS} has dtype F32: expected I32"),
    "words in I64": (as_dtype(WORDS, torch.int64), "has dtype I64: expected I32"),
    "words in I16": (as_dtype(WORDS, torch.int16), "has dtype I16: expected I32"),
    "scales in F16": (as_dtype(SCALES, torch.float16), "has dtype F16: expected BF16"),
    "scales in fp8": (as_dtype(SCALES, torch.float8_e4m3fn), "has dtype F8_E4M3: expected BF16"),
    "three scales per row": (also(SCALES, torch.ones(128, 3).bfloat16()), r"scales \[128, 3\]"),
    "one word too many": (also(WORDS, torch.ones(128, 17, dtype=INT32)), r"is packed as \[128, 17\]"),
    "fewer rows": (also(WORDS, torch.ones(64, 16, dtype=INT32)), r"is packed as \[64, 16\]"),
    "other groups than the config": (also(SCALES, torch.ones(128, 2).bfloat16()), "already quantized, to int4-g64"),
    "weight_shape of three": (also(f"{EXPERT}.weight_shape", torch.ones(3).long()), r"expected I64 \[2\]"),
    "dense weights beside": (also(f"{EXPERT}.weight", torch.ones(128, 128)), f"{EXPERT}.weight has no place"),
}
NF4 = {
    "no absmax": (without(f"{EXPERT}.weight.absmax"), f"has no tensor {EXPERT}.weight.absmax"),
    "absmax quantized as well": (also(f"{EXPERT}.weight.nested_absmax", torch.ones(8)), "weight.nested_absmax belongs"),
    "absmax in F16": (as_dtype(f"{EXPERT}.weight.absmax", torch.float16), "has dtype F16: expected F32"),
    "no description": (without(f"{EXPERT}.weight.quant_state.bitsandbytes__nf4"), f"{EXPERT}.weight has dtype U8"),
}


@pytest.mark.parametrize("case", DENSE)
def test_a_dense_checkpoint_is_refused_by_the_tensor(tiny: Tiny, tmp_path: Path, case: str) -> None:
    edit, said = DENSE[case]
    with pytest.raises(CheckpointError, match=said):
        open_headers(single(tiny("mixtral"), tmp_path / "model", edit))


@pytest.mark.parametrize("case", PACKED)
def test_a_packed_checkpoint_is_refused_by_the_tensor(packed: Path, tmp_path: Path, case: str) -> None:
    edit, said = PACKED[case]
    with pytest.raises(CheckpointError, match=said):
        open_headers(single(packed, tmp_path / "model", edit))


@pytest.mark.parametrize("case", NF4)
def test_an_nf4_checkpoint_is_refused_by_the_tensor(nf4: Path, tmp_path: Path, case: str) -> None:
    edit, said = NF4[case]
    with pytest.raises(CheckpointError, match=said):
        open_headers(single(nf4, tmp_path / "model", edit))


@pytest.mark.parametrize(
    "key", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "rotary_emb.cos_cached"]
)
def test_what_every_loader_makes_anew_is_left_aside(tiny: Tiny, packed: Path, tmp_path: Path, key: str) -> None:
    for number, source in enumerate((tiny("mixtral"), packed)):
        open_headers(single(source, tmp_path / str(number), also(key, torch.ones(16))))


def test_biases_are_read_where_the_config_has_them(tiny: Tiny, tmp_path: Path) -> None:
    open_headers(tiny("olmoe", attention_bias=True))
    folder = single(tiny("olmoe", attention_bias=True), tmp_path / "model", without(f"{QUERY}.bias"))
    with pytest.raises(CheckpointError, match=rf"has no tensor {QUERY}.bias"):
        open_headers(folder)


def test_a_head_of_its_own_beside_tied_embeddings_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    folder = single(tiny("olmoe"), tmp_path / "model", lambda tensors: None)
    hostile.edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    with pytest.raises(CheckpointError, match=r"lm_head.weight has no place.*ties the output head"):
        open_headers(folder)


def test_config_and_tensors_must_say_the_same_form(packed: Path, nf4: Path, tmp_path: Path) -> None:
    said = {folder: json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (packed, nf4)}
    cases = {
        "already quantized, to int8-g64, but config.json has no quantization_config": (packed, None),
        "but config.json knows nf4": (packed, said[nf4]),
        "but config.json knows int4-g128 and int8-g64": (nf4, said[packed]),
    }
    for number, (refused, (source, quantization)) in enumerate(cases.items()):
        folder = single(source, tmp_path / str(number), lambda tensors: None)
        hostile.edit_json(folder / "config.json", lambda config, q=quantization: config.update(quantization_config=q))
        with pytest.raises(CheckpointError, match=refused):
            open_headers(folder)


def test_tensors_and_config_tell_the_same_schemes(packed: Path, nf4: Path, tiny: Tiny) -> None:
    for folder in (packed, nf4):
        headers = open_headers(folder)
        assert schemes_of_tensors(headers) == stored_schemes(headers.config, headers.shape)
    assert set(schemes_of_tensors(open_headers(tiny("mixtral_fused"))).values()) == {Scheme("bf16")}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_header_may_be_anything(packed: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(packed, folder)
    file = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
    header, body = hostile.read_safetensors(file)
    some = data.draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=3, unique=True))
    changed = data.draw(hostile.mutations({key: header[key] for key in some}))
    hostile.write_safetensors(file, {**{k: v for k, v in header.items() if k not in some}, **changed}, body)
    hostile.refusal(lambda: open_headers(folder))


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_quantization_may_be_anything(packed: Path, nf4: Path, data: st.DataObject) -> None:
    headers = open_headers(data.draw(st.sampled_from([packed, nf4])))
    changed = data.draw(hostile.mutations({"quantization_config": headers.config["quantization_config"]}))
    hostile.refusal(lambda: stored_schemes({**headers.config, **changed}, headers.shape))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("re:(", "no regular expression"),
        ("re:" + "(a" * 2000, "no regular expression"),
        (r"re:(.+)+(.+)+(.+)+\1\2\3[!?]", "take too long to match"),
    ],
)
def test_an_expression_that_no_loader_could_use_is_refused(
    packed: Path, monkeypatch: pytest.MonkeyPatch, target: str, said: str
) -> None:
    monkeypatch.setattr("quant.checkpoint.quantization._SECONDS", 1e-4)
    headers = open_headers(packed)
    config: dict[str, Any] = json.loads(json.dumps(headers.config))
    config["quantization_config"]["ignore"].append(target)
    with pytest.raises(CheckpointError, match=said):
        stored_schemes(config, headers.shape)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "a quantized KV cache"),
        ({"transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, "rotated weights"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
        ({"format": "int-quantized"}, "format 'int-quantized'"),
        ({"quant_method": "awq"}, "quantized by 'awq'"),
        ({"quant_method": None}, "quantized by None"),
        ({"ignore": "lm_head"}, "ignore is 'lm_head': expected a valid list"),
    ],
)
def test_what_a_quantization_asks_for_beside_weights_is_refused(
    packed: Path, change: dict[str, Any], said: str
) -> None:
    headers = open_headers(packed)
    config = {**headers.config, "quantization_config": {**headers.config["quantization_config"], **change}}
    with pytest.raises(CheckpointError, match=said):
        stored_schemes(config, headers.shape)
    for group in (quantized := json.loads(json.dumps(headers.config["quantization_config"])))["config_groups"].values():
        group["input_activations"] = {"num_bits": 8}
    with pytest.raises(CheckpointError, match="quantized activations"):
        stored_schemes({**headers.config, "quantization_config": quantized}, headers.shape)
