"""Every family that transformers has, from its own files: quantized, read by stock transformers, and run with its
experts where a test wants them. None of them is named in the sources."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.decode.cpu import NativeDecoder
from offload.generate.generator import Generator
from offload.records import RunOptions, Sampling
from offload.run.session import Session
from quant.architecture.meta_model import model_class, model_config
from quant.checkpoint.checkpoint import Checkpoint
from quant.convert.convert import ConversionReport, convert
from quant.model.families import CPU_LAYERS, Role
from quant.scheme import Scheme
from tests import oracle, sessions
from tests.drafting import Recorded, draft_by
from tests.family_checkpoints import DENSE, FAMILIES, make_family

EXPERTS = [family for family in FAMILIES if family not in DENSE]
FUSED = ("gpt_oss", "granitemoe", "qwen3_vl_moe")  # transformers has no place for their experts one by one
PROMPT = [(i * 37 + 11) % 256 for i in range(40)]
INT4, INT8 = Scheme("int4", 32), Scheme("int8", 32)
SCHEMES: dict[Role, Scheme] = {"experts": INT4, "attention": INT8, "shared_expert": INT8, "dense_mlp": INT4}
GREEDY = Sampling(max_tokens=12, ignore_eos=True)


@dataclass(frozen=True)
class Made:
    """A checkpoint, what became of it, and what stock transformers makes of its dequantized weights."""

    source: Path
    path: Path
    report: ConversionReport
    model: Any
    logits: torch.Tensor
    tokens: list[int]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    kept: dict[str, Made] = {}

    def get(family: str) -> Made:
        if family not in kept:
            kept.clear()  # the families come one after another
            source, path = (tmp_path_factory.mktemp(family) / name for name in ("source", "quantized"))
            make_family(family, source)
            report = convert(source, path, SCHEMES)
            model = oracle.stock(source, path)
            ids = torch.tensor([PROMPT])
            with torch.inference_mode():
                logits = model(input_ids=ids).logits[0, -1]
                tokens = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=None)  # type: ignore[operator]
            kept[family] = Made(source, path, report, model, logits, tokens[0, len(PROMPT) :].tolist())
        return kept[family]

    return get


def _session(path: Path, **placed: Any) -> Session:
    return sessions.session(path, RunOptions(context=400, exact=True), **placed)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_greedy_text_and_a_second_turn_equal_stock_transformers(
    family: str, made: Callable[[str], Made]
) -> None:
    one = made(family)
    with _session(one.path, ram_slots=64) as session:
        # Where its one cache is transformers' own, one sequence is run at a time.
        assert isinstance(session.runner, Generator) == (session.decoder.bound is not None)
        assert isinstance(session.decoder, NativeDecoder) == (family in CPU_LAYERS)
        logits = sessions.prompt_logits(session, PROMPT)
        in_chunks = sessions.prompt_logits(session, PROMPT[:15], PROMPT[15:30], PROMPT[30:])
        answer = [record.token_id for record in session.generate(PROMPT, GREEDY)]
        turn = [*PROMPT, *answer, 7, 8, 9]
        second = [record.token_id for record in session.generate(turn, GREEDY)]
        edited = [record.token_id for record in session.generate([*PROMPT[:20], 5, 6, 7], GREEDY)]
        session.reset()
        draft_by(session, partial(Recorded, [*PROMPT, *answer], 0.3, seed=2))
        drafted = list(session.generate(PROMPT, GREEDY))
        after = [record.token_id for record in session.generate(turn, GREEDY)]
    assert [record.token_id for record in drafted] == answer
    tried, right = sum(record.drafted for record in drafted), sum(record.place > 0 for record in drafted)
    assert 0 < right < tried if session.decoder.continues else tried == 0 and "no drafts" in session.notes[-1]
    assert after == second
    assert torch.allclose(logits, one.logits, atol=1e-4, rtol=0)
    assert torch.allclose(in_chunks, one.logits, atol=1e-4, rtol=0)
    assert answer == one.tokens
    assert second == _greedy(one.model, turn)
    assert edited == _greedy(one.model, [*PROMPT[:20], 5, 6, 7])


def _greedy(model: Any, ids: list[int]) -> list[int]:
    with torch.inference_mode():
        found = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    tokens: list[int] = found[0, len(ids) :].tolist()
    return tokens


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_on_disk_give_the_same_text(family: str, made: Callable[[str], Made]) -> None:
    one = made(family)
    for slots in (4, 13) if family in CPU_LAYERS else (4,):
        with _session(one.path, ram_slots=slots, fills=False) as session:
            records = list(session.generate(PROMPT, GREEDY))
            assert any("transformers' own modules" in note for note in session.notes) == (family not in CPU_LAYERS)
        assert [record.token_id for record in records] == one.tokens
        assert sum(record.misses for record in records) > 0


@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe", "deepseek_v2"])
def test_keys_and_values_in_int8_cost_their_rounding_and_no_more(family: str, made: Callable[[str], Made]) -> None:
    one = made(family)
    with sessions.session(one.path, RunOptions(context=400, kv="int8"), ram_slots=64) as session:
        assert session.kv_pool.dtype == torch.int8
        logits = sessions.prompt_logits(session, PROMPT)
    with sessions.session(one.path, RunOptions(context=400, kv="bf16"), ram_slots=64) as session:
        wide = sessions.prompt_logits(session, PROMPT)
    assert 0 < (logits - wide).norm() < 0.05 * wide.norm()
    assert (logits - one.logits).norm() < 0.1 * one.logits.norm()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in FUSED])
def test_stock_transformers_loads_the_directory(family: str, made: Callable[[str], Made]) -> None:
    one = made(family)
    checkpoint = Checkpoint.open(one.path)
    kind = model_class(model_config(checkpoint.config))
    loaded, info = kind.from_pretrained(one.path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    rounded = dict(one.model.named_parameters())
    for name, parameter in loaded.named_parameters():
        if parameter.dtype is torch.bfloat16:  # transformers keeps experts that it merges in bf16
            parameter.data = parameter.data.float()
            rounded[name].data = rounded[name].data.bfloat16().float()
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        assert torch.allclose(loaded(input_ids=ids).logits, one.model(input_ids=ids).logits, atol=1e-4, rtol=0)
