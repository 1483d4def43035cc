"""A prompt's experts by grouped products, computed as they land, equal the same experts one by one."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from offload.experts.cache.expert_cache import ExpertCache
from offload.experts.cache.tiered_cache import TieredCache
from offload.experts.storage.reader import Reader
from offload.experts.storage.store import ExpertStore
from offload.model.moe import ExpertRunner
from offload.routing.eviction import LeastRecent
from offload.routing.frequency import ExpertFrequency
from offload.routing.stats import RoutingStats
from offload.tiers import Key
from quant.checkpoint.checkpoint import Checkpoint
from quant.convert.convert import convert
from quant.linear import Compute
from quant.scheme import Scheme
from tests.offload.lagging import LaggingTransfer, Ticket

PLAIN = Compute(native=False, exact=True)


class Awaited(LaggingTransfer):
    """Compute runs in the calling thread, so what it must wait for is waited for here."""

    def landed(self, ticket: Ticket) -> None:
        self.done(ticket)


@pytest.fixture(scope="module", params=["llama4_text", "qwen3_moe"])
def stored(
    request: pytest.FixtureRequest, tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ExpertStore, Reader]]:
    destination = tmp_path_factory.mktemp("prefill") / "model"
    convert(tiny(request.param), destination, {"experts": Scheme("int4")})
    store = ExpertStore(Checkpoint.open(destination))
    reader = Reader([entry.file for entry in store.checkpoint.entries.values()])
    yield store, reader
    reader.close()


def runner(store: ExpertStore, cache: ExpertCache) -> ExpertRunner:
    return ExpertRunner(cache, RoutingStats("x", store.shape), PLAIN, store.shape.family.scales_input)


def tiered_cache(
    store: ExpertStore, reader: Reader, ram: int, vram: int, transfer: LaggingTransfer, seeds: Sequence[Key] = ()
) -> TieredCache:
    frequency = ExpertFrequency(store.shape.moe_layers, store.shape.num_experts)
    return TieredCache(
        store,
        reader,
        LeastRecent(),
        ram_slots=ram,
        vram_slots=vram,
        transfer=transfer,
        frequency=frequency,
        seeds=seeds,
    )


@pytest.mark.parametrize(("ram", "vram"), [(2, 2), (8, 5), (30, 12)])
def test_equals_experts_one_by_one_and_copies_each_once(
    stored: tuple[ExpertStore, Reader], ram: int, vram: int
) -> None:
    store, reader = stored
    shape, transfer = store.shape, Awaited(ram)
    tiered = tiered_cache(store, reader, ram, vram, transfer, store.experts()[3:])
    near = runner(store, tiered)
    alone = runner(store, ExpertCache(store, reader, LeastRecent(), ram_slots=store.count))
    generator = torch.Generator().manual_seed(0)
    tokens = 96
    chosen = torch.stack([torch.randperm(shape.num_experts, generator=generator) for _ in range(tokens)])
    chosen = chosen[:, : shape.top_k]
    scores = torch.rand(tokens, shape.top_k, generator=generator) + 0.1
    for _ in range(2):
        held = {key for key in store.experts() if tiered.vram.resident(key)}
        begun = len(transfer.copies)
        for layer in shape.moe_layers:
            x = torch.randn(tokens, shape.hidden_size, generator=generator).bfloat16()
            found, expected = near.run(layer, x, chosen, scores), alone.run(layer, x.float(), chosen, scores)
            assert found.dtype == torch.bfloat16
            error = (found.float() - expected).abs().max() / expected.abs().max()
            assert error < 2e-2, "three roundings to bf16"
        copied = len(transfer.copies) - begun
        dropped = sum(not tiered.vram.resident(key) for key in held)
        assert store.count - len(held) <= copied <= store.count - len(held) + dropped
        tiered.rebalance()


def test_a_single_token_goes_expert_by_expert(stored: tuple[ExpertStore, Reader]) -> None:
    """The simple path, which the step that is one launch is compared with."""
    store, reader = stored
    tiered = tiered_cache(store, reader, 4, 4, Awaited(1))
    near = runner(store, tiered)
    near._grouped = None  # it would fail if asked
    layer, k = store.shape.moe_layers[0], store.shape.top_k
    x = torch.randn(1, store.shape.hidden_size).bfloat16()
    chosen, scores = torch.arange(k)[None], torch.ones(1, k)
    alone = runner(store, ExpertCache(store, reader, LeastRecent(), ram_slots=store.count))
    torch.testing.assert_close(
        near.run(layer, x, chosen, scores).float(), alone.run(layer, x.float(), chosen, scores), rtol=0.05, atol=0.05
    )
    assert tiered.frequency.score((layer, 0)) == pytest.approx(1)
    assert np.isclose(tiered.frequency.score((layer, store.shape.num_experts - 1)), 0)
