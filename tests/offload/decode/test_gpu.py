"""A decode step as one launch gives the text of stock transformers, wherever its experts are, and never
hangs.

On a CPU the step runs in a thread that stands for the GPU; the doorbell, its C++ server and the tiers are
the real ones.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from offload.decode.gpu import GraphDecoder, refusal
from offload.decode.plain import PlainDecoder
from offload.experts.storage.store import ExpertStore
from offload.model.kv_cache import KVCache, Storage
from offload.records import RunOptions, Sampling
from offload.run.session import Session
from quant.checkpoint.checkpoint import Checkpoint
from quant.convert.convert import convert
from quant.errors import CheckpointError, MachineError
from quant.kernels.cuda.doorbell import Prefetched
from quant.model.families import Role
from quant.scheme import Scheme
from tests import oracle, sessions

SCHEMES: dict[Role, Scheme] = {
    "experts": Scheme("int4", 32),
    "shared_expert": Scheme("int4"),
    "dense_mlp": Scheme("int8"),
    "attention": Scheme("int8"),
    "lm_head": Scheme("int8"),
}
PROMPT = list(range(5, 100))  # crosses attention chunks, and so does the answer
FAMILIES = ("llama4_text", "llama4_maverick", "mixtral", "qwen3_moe")
INTER = 128
SPLITS: dict[str, dict[str, int]] = {
    "all in vram": {"ram_slots": 3, "vram_slots": 40},
    "misses by the cpu": {"ram_slots": 64, "vram_slots": 6},
    "misses shared": {"ram_slots": 64, "vram_slots": 6, "gpu_rows": INTER // 4},
    "misses by the gpu": {"ram_slots": 64, "vram_slots": 6, "gpu_rows": INTER},
    "mostly on disk": {"ram_slots": 4, "vram_slots": 6, "gpu_rows": INTER // 2, "fills": False},
}
PREFETCHED = 2**22
Models = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def models(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    made: dict[str, tuple[Path, Path]] = {}

    def get(family: str) -> tuple[Path, Path]:
        if family not in made:
            destination = tmp_path_factory.mktemp("graph") / family
            convert(tiny(family), destination, SCHEMES)
            made[family] = tiny(family), destination
        return made[family]

    return get


@pytest.fixture(scope="module")
def expected(models: Models) -> Callable[[str], tuple[list[int], torch.Tensor]]:
    """Greedy tokens of stock transformers, and the logits that each was picked from."""
    made: dict[str, tuple[list[int], torch.Tensor]] = {}

    def get(family: str) -> tuple[list[int], torch.Tensor]:
        if family not in made:
            model: Any = oracle.stock(*models(family))
            with torch.inference_mode():
                ids = torch.tensor([PROMPT])
                whole = model.generate(input_ids=ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
                logits = model(input_ids=whole).logits[0, len(PROMPT) - 1 : -1]
            made[family] = whole[0, len(PROMPT) :].tolist(), logits
        return made[family]

    return get


def _session(path: Path, placed: dict[str, int]) -> Session:
    return sessions.session(path, RunOptions(context=400, exact=True), **placed)


def _greedy(session: Session, count: int = 20) -> tuple[list[int], torch.Tensor]:
    """Tokens, and the logits that each was picked from."""
    seen: list[torch.Tensor] = []
    forward = session.runner._forward
    session.runner._forward = lambda ids, keep=1: (seen.append(forward(ids, keep).clone()), seen[-1])[1]  # type: ignore[method-assign, func-returns-value]
    records = list(session.generate(PROMPT, Sampling(max_tokens=count, ignore_eos=True)))
    session.runner._forward = forward  # type: ignore[method-assign]
    return [record.token_id for record in records], torch.cat(seen)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_and_logits_equal_stock_transformers(
    family: str, split: str, models: Models, expected: Callable[[str], tuple[list[int], torch.Tensor]]
) -> None:
    tokens, logits = expected(family)
    with _session(models(family)[1], SPLITS[split]) as session:
        assert isinstance(session.decoder, GraphDecoder)
        ours, found = _greedy(session)
        misses = session.decoder.worker.bell.buffers.sequence
        assert (int(misses) == 0) == (split in ("all in vram", "misses by the gpu"))
    assert ours == tokens
    assert torch.allclose(found, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", ["llama4_maverick", "mixtral"])
def test_reading_ahead_changes_no_token_and_is_done_only_where_the_cpu_computes(
    family: str, split: str, models: Models, expected: Callable[[str], tuple[list[int], torch.Tensor]]
) -> None:
    tokens, logits = expected(family)
    with _session(models(family)[1], SPLITS[split] | {"prefetch_bytes": PREFETCHED}) as session:
        assert isinstance(session.decoder, GraphDecoder)
        ours, found = _greedy(session)
        bell, idle = session.decoder.worker.bell, split in ("all in vram", "misses by the gpu")
        assert (session.decoder.prefetch_bytes == 0) == idle == ("caches" not in session.kernel)
        assert bell.buffers.hint.tolist() == [0] * session.shape.top_k  # a token's end knows of no layer
        counted = bell.prefetched
        if idle:
            assert counted == Prefetched(0, 0, 0, 0)
        else:
            assert counted.asked > 0
        if split in ("misses by the cpu", "misses shared"):
            assert 0 < counted.foreseen <= counted.asked
            assert 0 < counted.nbytes <= counted.hints * PREFETCHED
    assert ours == tokens
    assert torch.allclose(found, logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("storage", ["bf16", "int8"])
@pytest.mark.parametrize("family", ["llama4_text", "mixtral"])
def test_with_a_small_kv_cache_the_simple_path_agrees(family: str, storage: Storage, models: Models) -> None:
    found = []
    for graph in (True, False):
        with _session(models(family)[1], SPLITS["all in vram"]) as session:
            kv = KVCache(session.shape, 400, storage)
            decoder: Any
            if graph:
                decoder = GraphDecoder(
                    session.model,
                    session.experts,
                    kv,
                    session.routing,
                    gpu_rows=0,
                    dtype=torch.float32,
                    device=torch.device("cpu"),
                    exact=True,
                )
            else:
                decoder = PlainDecoder(session.model, session.experts, session.device, "plain")
            session.runner.cache, session.runner.decoder = kv, decoder
            found.append(_greedy(session))
            decoder.close()
    assert found[0][0] == found[1][0]
    # A difference of 1e-6 before rounding is one of a whole step after it, now and then.
    assert torch.allclose(found[0][1], found[1][1], atol=1e-2, rtol=0)


@pytest.fixture
def session(models: Models) -> Iterator[Session]:
    with _session(models("llama4_text")[1], SPLITS["mostly on disk"]) as opened:
        yield opened


def test_a_second_turn_runs_only_what_is_new(session: Session) -> None:
    first = [r.token_id for r in session.generate(PROMPT, Sampling(max_tokens=5, ignore_eos=True))]
    whole = [*PROMPT, *first, 7, 8, 9]
    second = list(session.generate(whole, Sampling(max_tokens=4, ignore_eos=True)))
    assert second[0].tokens_in == 4
    session.reset()
    again = list(session.generate(whole, Sampling(max_tokens=4, ignore_eos=True)))
    assert [r.token_id for r in second] == [r.token_id for r in again]


def test_what_each_tier_served_is_counted(session: Session) -> None:
    records = list(session.generate(PROMPT, Sampling(max_tokens=6, ignore_eos=True)))
    layers = len(session.shape.moe_layers)
    assert all(record.hits + record.misses == layers for record in records[1:])
    assert sum(record.misses for record in records[1:]) > 0
    assert session.routing.tokens == len(PROMPT) + 5


def _still_right(session: Session, tokens: list[int]) -> None:
    session.reset()
    assert _greedy(session, len(tokens))[0] == tokens


def test_an_error_of_the_step_is_one_error_and_the_next_token_is_right(session: Session) -> None:
    tokens, _ = _greedy(session, 6)
    decoder: Any = session.decoder
    head, calls = decoder.step._lm_head, []

    def fail(h: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        raise MachineError("the device is gone")

    decoder.step._lm_head = fail
    session.reset()
    with pytest.raises(MachineError, match="the device is gone"):
        _greedy(session, 6)
    decoder.step._lm_head = head
    assert calls == [1]
    _still_right(session, tokens)


@pytest.mark.parametrize("error", [CheckpointError("the disk is gone"), KeyboardInterrupt()])
def test_an_error_of_the_host_ends_the_step_that_waits_for_it(
    session: Session, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, _ = _greedy(session, 6)
    fetch, calls = session.experts.fetch, []  # type: ignore[attr-defined]

    def fail(layer: int, experts: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return fetch(layer, experts)

    monkeypatch.setattr(session.experts, "fetch", fail)
    session.reset()
    with pytest.raises(type(error)):
        _greedy(session, 6)
    assert len(calls) == 2
    _still_right(session, tokens)


def test_a_step_that_nobody_answers_ends_when_told(session: Session) -> None:
    """What Ctrl-C does while the step waits: nobody serves, and the step still ends."""
    tokens, _ = _greedy(session, 6)
    decoder: Any = session.decoder
    table = decoder.worker.bell.table
    there = table.clone()
    with torch.inference_mode():
        session.experts.begin_token()  # type: ignore[attr-defined]
        table.zero_()
        ended = threading.Event()
        decoder.thread.launch(ended.set)
        while decoder.worker.bell.serve(100) != "missing":
            assert not ended.is_set()
        decoder.worker.bell.stop()
        decoder.thread.result()
        decoder.worker.bell.rearm()
    assert ended.is_set()
    table.copy_(there)
    _still_right(session, tokens)


class NoSync(TorchDispatchMode):
    """Fails on what would make a GPU's stream wait for the host, outside of kernels' references."""

    SYNCS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        frame: Any = sys._getframe()
        while frame is not None and not frame.f_globals["__name__"].startswith("quant.kernels.cuda"):
            frame = frame.f_back
        if frame is None:
            assert name not in self.SYNCS, f"{name} waits for the device"
            assert name != "index" or all(i is None or i.dtype != torch.bool for i in args[1]), "a mask's size"
            self.seen.add(name)
        return func(*args, **(kwargs or {}))

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_in_a_step_waits_for_the_host(family: str, models: Models) -> None:
    with _session(models(family)[1], SPLITS["all in vram"]) as session:
        decoder: Any = session.decoder
        _greedy(session, 2)
        with torch.inference_mode(), NoSync() as seen:
            decoder.step.inputs.upload()
            decoder.step()
            decoder.step.fetch()
            assert "copy_" in seen.seen
            with pytest.raises(AssertionError, match="waits for the device"):
                decoder.step.logits.argmax().item()


def test_a_step_writes_only_to_buffers_that_stay(models: Models) -> None:
    """A graph keeps addresses: two tokens of different chunks and lengths must find all at the same
    places."""
    with _session(models("llama4_text")[1], SPLITS["all in vram"]) as session:
        decoder: Any = session.decoder
        step = decoder.step

        def places() -> list[int]:
            kv = [t for kept in decoder.kv.pieces for t in (kept.key_buffer, kept.value_buffer)]
            kept = [step.residual, step.logits, step.chosen, step.inputs.x, step.inputs.place.position, step.gpu_rows]
            tables = session.experts.vram.address_table  # type: ignore[attr-defined]
            kept += [buffer.data for buffer in kv] + [tables.addresses, tables.places]
            return [tensor.data_ptr() for tensor in kept]

        before = places()
        _greedy(session, 12)
        assert places() == before


def test_experts_that_the_kernels_do_not_read_are_left_to_the_simple_path_with_a_note(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    convert(tiny("llama4_text"), tmp_path / "model", {"attention": Scheme("int8")})
    with _session(tmp_path / "model", SPLITS["misses by the cpu"]) as session:
        assert isinstance(session.decoder, PlainDecoder) and not isinstance(session.decoder, GraphDecoder)
        assert any("experts of layer 0 are not packed" in note for note in session.notes)
        assert len(list(session.generate(PROMPT, Sampling(max_tokens=2, ignore_eos=True)))) == 2


def test_attention_over_a_window_is_left_to_the_simple_path(models: Models) -> None:
    store = ExpertStore(Checkpoint.open(models("mixtral")[1]))
    with _session(models("mixtral")[1], SPLITS["all in vram"]) as session:
        config = session.model.config
        assert refusal(config, store) is None
        config.sliding_window = 64
        assert "window" in (refusal(config, store) or "")
