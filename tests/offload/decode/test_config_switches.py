"""Every key of a config.json that changes what stock transformers computes changes ours alike, or is refused.

Keys come from transformers' own config classes, so that one which a new release adds is tested from then on.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from offload.records import RunOptions, Sampling
from offload.run.session import Session
from quant.errors import CheckpointError
from tests import sessions
from tests.checkpoints import BASES, Family, make

PROMPT = list(range(5, 105))  # past every window, chunk and original length below
STEPS = 3
WINDOW = 16
REFUSED = ("hidden_act",)
# What says nothing about logits, and sizes that change the tensors themselves (other tests have those).
SILENT = {
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "head_dim",
    "hidden_size",
    "id2label",
    "initializer_range",
    "intermediate_size",
    "intermediate_size_mlp",
    "is_encoder_decoder",
    "label2id",
    "max_position_embeddings",
    "model_type",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_experts",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_local_experts",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "tie_word_embeddings",
    "torchscript",
    "transformers_version",
    "use_cache",
    "vocab_size",
    "_name_or_path",
}
LISTS: dict[str, list[Any]] = {
    "hidden_act": ["gelu"],
    "layer_types": [["full_attention"] * 4, ["chunked_attention"] * 4],
    "moe_layers": [[0, 2]],
    "mlp_only_layers": [[], [0, 2]],
    "no_rope_layers": [[1, 1, 0, 1]],
    "sliding_window": [WINDOW],
    "attention_chunk_size": [WINDOW],
    "max_window_layers": [0],
    "clip_qkv": [0.3],
    "rope_parameters": [
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    ],
}
TOGETHER: dict[Family, list[dict[str, Any]]] = {
    "qwen3_moe": [
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ],
    "olmoe": [{"sliding_window": WINDOW}],  # a key that the family does not have says nothing
    "llama4_text": [],
    "mixtral": [],
}


def alternatives(key: str, value: Any) -> list[Any]:
    if key in SILENT:
        return []
    if key in LISTS:
        return LISTS[key]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [max(1, value // 2)]
    return [2 * value + 0.05] if isinstance(value, float) else []


def cases() -> Iterator[tuple[Family, dict[str, Any]]]:
    for family, base in BASES.items():
        for key, value in AutoConfig.for_model(family, **base).to_dict().items():
            yield from ((family, {key: other}) for other in alternatives(key, value) if other != value)
        yield from ((family, overrides) for overrides in TOGETHER[family])


def saved(family: Family, overrides: dict[str, Any], path: Path) -> PreTrainedModel:
    """A tiny model of ``family`` at ``path``, and as stock transformers loads it."""
    make(family, path, **overrides)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize(("family", "overrides"), list(cases()), ids=str)
def test_a_key_that_changes_stock_logits_changes_ours_or_is_refused(
    family: Family, overrides: dict[str, Any], tmp_path: Path
) -> None:
    model = saved(family, overrides, tmp_path)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([PROMPT])).logits[0, -1]
        text = model.generate(
            torch.tensor([PROMPT]), max_new_tokens=STEPS, do_sample=False, use_cache=False, pad_token_id=0
        )
    options = RunOptions(context=200, exact=True, device="cpu", prompt_chunk=64)
    if next(iter(overrides)) in REFUSED:
        with pytest.raises(CheckpointError, match=next(iter(overrides))):
            Session.open(tmp_path, options)
        return
    with Session.open(tmp_path, options) as session:
        ours = sessions.prompt_logits(session, PROMPT)
        session.reset()
        tokens = [r.token_id for r in session.generate(PROMPT, Sampling(max_tokens=STEPS, ignore_eos=True))]
    assert torch.allclose(ours, logits, atol=1e-4, rtol=0)
    assert tokens == text[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("family", BASES)
def test_rope_that_changes_within_the_context_is_refused_and_below_that_exact(
    family: Family, kind: str, tmp_path: Path
) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4}
    if kind == "longrope":
        rope |= {"short_factor": [1.5] * 16, "long_factor": [3.0] * 16, "original_max_position_embeddings": 120}
    length = 120 if kind == "dynamic" else 512
    model = saved(family, {"rope_parameters": rope, "max_position_embeddings": length}, tmp_path)
    with pytest.raises(CheckpointError, match=f"{kind}.* at most .*--context 120"):
        Session.open(tmp_path, RunOptions(context=121, device="cpu"))
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    with Session.open(tmp_path, RunOptions(context=120, exact=True, device="cpu", prompt_chunk=64)) as session:
        assert torch.allclose(sessions.prompt_logits(session, PROMPT), logits, atol=1e-4, rtol=0)
