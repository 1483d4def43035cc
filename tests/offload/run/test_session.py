"""The runtime against its oracle, stock transformers on the dequantized weights, for every split over
tiers."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.decode.cpu import NativeDecoder
from offload.records import RunOptions, Sampling
from offload.run.session import Session
from quant.convert.convert import convert
from quant.model.families import Role
from quant.scheme import Scheme
from tests import oracle, sessions
from tests.checkpoints import FAMILIES

INT4, INT8 = Scheme("int4"), Scheme("int8")
MIXED = {"experts": INT4, "shared_expert": INT4, "dense_mlp": INT8, "attention": INT8, "lm_head": INT8}
PROMPT = list(range(5, 200))  # crosses several attention chunks of the tiny models
SPLITS: dict[str, dict[str, Any]] = {
    "all in ram": {"ram_slots": 64, "prompt_chunk": 64},
    "three slots, the rest on disk": {"ram_slots": 3, "prompt_chunk": 64, "fills": False},
    "device window": {"ram_slots": 4, "vram_slots": 5, "prompt_chunk": 64, "fills": False},
    "seeded on the device": {
        "ram_slots": 3,
        "vram_slots": 14,
        "vram_seeds": tuple((3, e) for e in range(8)),
        "prompt_chunk": 64,
    },
}


@pytest.fixture(scope="module")
def quantized(
    tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path]]:
    made: dict[str, tuple[Path, Path]] = {}

    def get(family: str) -> tuple[Path, Path]:
        if family not in made:
            destination = tmp_path_factory.mktemp("quantized") / family
            convert(tiny(family), destination, MIXED)
            made[family] = tiny(family.removesuffix("_fused")), destination
        return made[family]

    return get


def _session(path: Path, placed: dict[str, Any], **options: Any) -> Session:
    return sessions.session(path, RunOptions(**{"context": 400, "exact": True, **options}), **placed)


@pytest.fixture(scope="module")
def expected(quantized: Callable[[str], tuple[Path, Path]]) -> Callable[[str], tuple[torch.Tensor, list[int]]]:
    made: dict[str, tuple[torch.Tensor, list[int]]] = {}

    def get(family: str) -> tuple[torch.Tensor, list[int]]:
        if family not in made:
            model = oracle.stock(*quantized(family))
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([PROMPT])).logits[0, -1]
                tokens = model.generate(
                    input_ids=torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, eos_token_id=None
                )
            made[family] = logits, tokens[0, len(PROMPT) :].tolist()
        return made[family]

    return get


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_text_equal_stock_transformers(
    family: str,
    split: str,
    quantized: Callable[..., tuple[Path, Path]],
    expected: Callable[..., tuple[torch.Tensor, list[int]]],
) -> None:
    logits, tokens = expected(family)
    with _session(quantized(family)[1], SPLITS[split]) as session:
        records = list(session.generate(PROMPT, Sampling(max_tokens=24, ignore_eos=True)))
        session.reset()
        ours = sessions.prompt_logits(session, PROMPT)
    assert [record.token_id for record in records] == tokens
    assert torch.allclose(ours, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("split", ["all in ram", "three slots, the rest on disk", "device window"])
@pytest.mark.parametrize("experts", ["nf4", "bf16", "int3"])
def test_experts_in_other_forms_equal_stock_transformers(
    experts: str, split: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    schemes: dict[str, dict[Role, Scheme]] = {
        "nf4": {"experts": Scheme("nf4")},
        "bf16": {"attention": INT8},
        "int3": {"experts": Scheme("int3", 32), "shared_expert": Scheme("int2", 32), "attention": Scheme("int3", 64)},
    }
    convert(tiny("llama4_maverick"), tmp_path / "model", schemes[experts])
    model = oracle.stock(tiny("llama4_maverick"), tmp_path / "model")
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([PROMPT])).logits[0, -1]
    with _session(tmp_path / "model", SPLITS[split]) as session:
        assert torch.allclose(sessions.prompt_logits(session, PROMPT), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("placed", [{"ram_slots": 64}, {"ram_slots": 9, "fills": False}])
def test_int8_activations_cost_little_on_a_trained_model(
    placed: dict[str, Any], demo_model: Path, tmp_path: Path
) -> None:
    convert(demo_model, tmp_path / "demo", {"experts": INT4, "shared_expert": INT4, "attention": INT8, "lm_head": INT8})
    text = (demo_model / "held_out.txt").read_text()[5000:8000]
    logits = []
    for exact in (True, False):
        with _session(tmp_path / "demo", placed, exact=exact, context=600) as session:
            ids = torch.tensor([session.encode(text)[:500]])
            with torch.inference_mode():
                logits.append(session.model(input_ids=ids).logits[0].log_softmax(-1))
    divergence = (logits[0].exp() * (logits[0] - logits[1])).sum(-1)
    assert divergence.mean() < 0.01  # rounding the weights themselves to int4 costs about 0.05


@pytest.fixture
def session(quantized: Callable[..., tuple[Path, Path]]) -> Iterator[Session]:
    with _session(quantized("llama4_text")[1], SPLITS["three slots, the rest on disk"]) as opened:
        yield opened


def test_a_second_turn_runs_only_what_is_new(session: Session) -> None:
    first = list(session.generate(PROMPT, Sampling(max_tokens=5, ignore_eos=True)))
    answer = [record.token_id for record in first]
    second = list(session.generate([*PROMPT, *answer, 7, 8, 9], Sampling(max_tokens=3, ignore_eos=True)))
    assert second[0].tokens_in == 4  # the last answer token was never run
    session.reset()
    again = list(session.generate([*PROMPT, *answer, 7, 8, 9], Sampling(max_tokens=3, ignore_eos=True)))
    assert [r.token_id for r in second] == [r.token_id for r in again]


def test_an_interrupted_answer_leaves_the_session_usable(session: Session) -> None:
    expected = [r.token_id for r in session.generate(PROMPT, Sampling(max_tokens=6, ignore_eos=True))]
    stream = session.generate(PROMPT, Sampling(max_tokens=6, ignore_eos=True))
    next(stream)
    stream.close()
    native = session.decoder
    assert isinstance(native, NativeDecoder)
    stock, calls = native.mlps[2], []

    def interrupt(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        raise KeyboardInterrupt

    native.mlps[2] = interrupt
    with pytest.raises(KeyboardInterrupt):
        list(session.generate([*PROMPT, 3, 4, 5], Sampling(max_tokens=6)))
    native.mlps[2] = stock
    assert calls
    assert [r.token_id for r in session.generate(PROMPT, Sampling(max_tokens=6, ignore_eos=True))] == expected


def test_hits_misses_and_bytes_are_counted(session: Session) -> None:
    records = list(session.generate(PROMPT, Sampling(max_tokens=4, ignore_eos=True)))
    expert = session.store.record(0, 0).nbytes
    assert all(record.hits + record.misses == 4 for record in records[1:])
    # Guesses read, too: no fewer bytes than the misses needed, and whole experts only.
    read = [record.bytes_read.get("disk", 0) for record in records]
    assert sum(read) >= sum(record.misses for record in records) * expert
    assert all(count % expert == 0 for count in read)
    assert session.routing.tokens == len(PROMPT) + 3
    # Three slots, of which some may hold a guess that is still being read.
    assert 1 <= sum(tier != "disk" for tier in session.expert_tiers().values()) <= 3


def test_evicted_experts_are_never_written_back(quantized: Callable[..., tuple[Path, Path]], session: Session) -> None:
    files = sorted(quantized("llama4_text")[1].glob("*.safetensors"))
    before = [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    list(session.generate(PROMPT, Sampling(max_tokens=4, ignore_eos=True)))
    assert before == [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]


def test_a_shard_that_shrinks_under_the_run_is_one_clear_error(
    quantized: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    import shutil

    from quant.errors import CheckpointError

    copy = tmp_path / "model"
    shutil.copytree(quantized("llama4_text")[1], copy)
    with _session(copy, SPLITS["three slots, the rest on disk"]) as session:
        for file in sorted(copy.glob("*.safetensors"))[1:]:
            with file.open("r+b") as stream:
                stream.truncate(8192)
        with pytest.raises(CheckpointError, match="was changed while the model ran"):
            list(session.generate(PROMPT, Sampling(max_tokens=4)))


def test_a_seed_makes_sampling_repeatable(session: Session) -> None:
    sampling = Sampling(max_tokens=8, temperature=1.0, top_p=0.9, seed=7, ignore_eos=True)
    runs = [[r.token_id for r in session.generate(PROMPT, sampling)] for _ in range(2)]
    assert runs[0] == runs[1]
    other = Sampling(max_tokens=8, temperature=1.0, top_p=0.9, seed=8, ignore_eos=True)
    assert [r.token_id for r in session.generate(PROMPT, other)] != runs[0]


def test_a_disk_that_slows_down_makes_no_other_text(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [r.token_id for r in session.generate(PROMPT, Sampling(max_tokens=6, ignore_eos=True))]
    preadv = os.preadv

    def slowly(*args: object) -> int:
        time.sleep(0.01)
        return preadv(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", slowly)
    session.reset()
    assert [r.token_id for r in session.generate(PROMPT, Sampling(max_tokens=6, ignore_eos=True))] == expected
