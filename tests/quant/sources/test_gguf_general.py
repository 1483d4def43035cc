"""GGUF files of families without a table: names and forms as llama.cpp's converter writes them."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from torch import Tensor

from quant.convert.convert import convert
from quant.errors import CheckpointError
from quant.scheme import Scheme
from quant.sources.open import open_source
from tests.family_checkpoints import make_family
from tests.quant.sources.foreign import Tensors, tensors_of

Kind = GGMLQuantizationType
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# llama.cpp's names within a layer, written down by hand.
NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.kv_b_proj.weight": "attn_kv_b.weight",
    "self_attn.sinks": "attn_sinks.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.router.weight": "ffn_gate_inp.weight",
    "mlp.router.bias": "ffn_gate_inp.bias",
}
for _theirs, _ours in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o")):
    NAMES |= {f"self_attn.{_ours}_proj.{kind}": f"attn_{_theirs}.{kind}" for kind in ("weight", "bias")}
for _name in ("gate", "up", "down"):
    NAMES[f"mlp.{_name}_proj.weight"] = f"ffn_{_name}.weight"
    NAMES[f"mlp.shared_experts.{_name}_proj.weight"] = f"ffn_{_name}_shexp.weight"
    NAMES |= {f"mlp.experts.{_name}_proj.{kind}": f"ffn_{_name}_exps.{kind}" for kind in ("weight", "bias")}
ARCHITECTURE = {"deepseek_v2": "deepseek2", "deepseek_v3": "deepseek2", "gpt_oss": "gpt-oss", "glm4_moe": "glm4moe"}
LATER = {"gpt_oss": "post_attention_norm.weight", "glm4_moe": "post_attention_norm.weight"}


def one_by_one(tensors: Tensors) -> Tensors:
    """The experts of gpt-oss as Linears of their own."""
    made: Tensors = {}
    for key, value in tensors.items():
        found = re.match(r"(.*experts)\.(gate_up_proj|down_proj)(_bias)?$", key)
        if found is None:
            made[key] = value
            continue
        suffix = "bias" if found[3] else "weight"
        turned = value if found[3] else value.transpose(1, 2)
        parts = {"down_proj": turned}
        if found[2] == "gate_up_proj":
            parts = {"gate_proj": turned[:, ::2], "up_proj": turned[:, 1::2]}
        for name, part in parts.items():
            made |= {f"{found[1]}.{e}.{name}.{suffix}": part[e].contiguous() for e in range(len(part))}
    return made


def stacked(tensors: Tensors) -> Tensors:
    made: dict[str, dict[int, Tensor]] = {}
    for key, value in tensors.items():
        found = re.match(r"(.*experts)\.(\d+)\.(.*)", key)
        made.setdefault(f"{found[1]}.{found[3]}" if found else key, {})[int(found[2]) if found else -1] = value
    return {
        key: value[-1] if -1 in value else torch.stack([value[e] for e in range(len(value))])
        for key, value in made.items()
    }


def gguf_name(family: str, key: str) -> str:
    if key in OUTER:
        return OUTER[key]
    found = re.match(r"model\.layers\.(\d+)\.(.*)", key)
    assert found is not None
    name = NAMES[found[2]]
    return f"blk.{found[1]}.{LATER.get(family, name) if name == 'ffn_norm.weight' else name}"


def write(source: Path, path: Path, family: str, kind: Kind, *, split: int = 0, extra: str = "") -> Tensors:
    """Write ``source`` to ``path``, matrices in ``kind``, and return what each tensor stands for. With ``split`` heads
    kv_b_proj is in two, as newer converters write it."""
    writer = GGUFWriter(path, ARCHITECTURE[family])
    writer.add_block_count(3)
    meant: Tensors = {}

    def add(name: str, value: Tensor, used: Kind) -> Tensor:
        stored = quantize(np.ascontiguousarray(value.float().numpy()), used)
        writer.add_tensor(name, stored, raw_dtype=used)
        return torch.from_numpy(np.asarray(dequantize(stored, used), np.float32)).view(value.shape)

    for key, value in stacked(one_by_one(tensors_of(source))).items():
        name = gguf_name(family, key)
        if split and name.endswith("attn_kv_b.weight"):
            keys, values = value.view(split, 64, -1).split(32, 1)
            turned = add(name.replace("kv_b", "k_b"), keys.transpose(1, 2), kind).transpose(1, 2)
            found = torch.cat((turned, add(name.replace("kv_b", "v_b"), values, kind)), 1).reshape(value.shape)
        else:
            plain = value.dim() == 1 or "ffn_gate_inp" in name or key.endswith("bias")
            found = add(name, value, Kind.F32 if plain else kind)
        experts = re.match(r"(.*experts)\.(\w+\.\w+)$", key) if "shared" not in key else None
        meant |= {f"{experts[1]}.{e}.{experts[2]}": found[e] for e in range(len(found))} if experts else {key: found}
    if extra:
        writer.add_tensor(extra, np.ones(128, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.mark.parametrize(
    ("family", "kind", "split"),
    [
        ("deepseek_v2", Kind.Q8_0, 0),
        ("deepseek_v3", Kind.Q4_0, 4),
        ("gpt_oss", Kind.Q8_0, 0),
        ("gpt_oss", Kind.BF16, 0),
        ("glm4_moe", Kind.Q8_0, 0),
    ],
)
def test_every_weight_is_what_the_package_makes_of_it(tmp_path: Path, family: str, kind: Kind, split: int) -> None:
    source, path = make_family(family, tmp_path / "source"), tmp_path / "model.gguf"
    meant = write(source, path, family, kind, split=split)
    found = open_source(path, source)
    for key, expected in meant.items():
        assert torch.equal(found.read(found.alias(key)).float(), expected), key
        if expected.dim() == 2 and len(expected) > 40:
            columns = expected.shape[1]
            assert torch.equal(found.read(key, 30 * columns * 4, (9, columns)).float(), expected[30:39]), key
    assert len(found.entries) == len(meant)


def test_a_conversion_is_that_of_the_original(tmp_path: Path) -> None:
    source = make_family("deepseek_v3", tmp_path / "source")
    write(source, tmp_path / "model.gguf", "deepseek_v3", Kind.BF16, split=4)
    schemes = {"experts": Scheme("int4", 32), "attention": Scheme("int8", 32)}
    convert(open_source(tmp_path / "model.gguf", source), tmp_path / "out", schemes, rounding="rtn")  # type: ignore[arg-type]
    convert(source, tmp_path / "expected", schemes, rounding="rtn")  # type: ignore[arg-type]
    found, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].to(expected[key].dtype), expected[key]) for key in expected)


def test_layers_that_draft_tokens_are_left_out_and_others_refused(tmp_path: Path) -> None:
    source = make_family("glm4_moe", tmp_path / "source")
    write(source, tmp_path / "drafts.gguf", "glm4_moe", Kind.Q8_0, extra="blk.46.nextn.enorm.weight")
    assert not any("46" in key for key in open_source(tmp_path / "drafts.gguf", source).entries)
    write(source, tmp_path / "more.gguf", "glm4_moe", Kind.Q8_0, extra="blk.9.attn_norm.weight")
    with pytest.raises(CheckpointError, match=r"blk\.9\.attn_norm\.weight"):
        open_source(tmp_path / "more.gguf", source)


def test_a_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    source, other = make_family("glm4_moe", tmp_path / "a"), make_family("flex_olmo", tmp_path / "b")
    write(source, tmp_path / "model.gguf", "glm4_moe", Kind.Q8_0)
    with pytest.raises(CheckpointError, match="architecture 'glm4moe': expected no GGUF file for a flex_olmo model"):
        open_source(tmp_path / "model.gguf", other)
