"""Needles in a long text are found, most of whose keys and values are on disk, even where few of these are read."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offload.batch.kv_tiers import KvTiers
from offload.model.paged_cache import PagedCache
from offload.records import RunOptions, Sampling
from offload.run.session import Session
from quant.convert.convert import convert
from quant.scheme import Scheme
from tests import needles, sessions

TOKENS = 12_000


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Session]:
    """A session of the finder; with a ``folder``, as little as can be of its KV cache is in RAM."""
    made = tmp_path_factory.mktemp("finder")
    source = needles.make_finder(made / "source", TOKENS + 64, chunk=4096)
    convert(source, made / "model", {"experts": Scheme("int8", 32)})

    def session(folder: Path | None, **asked: object) -> Session:
        options = RunOptions(context=TOKENS + 64, kv_disk=folder, **asked)  # type: ignore[arg-type]
        tiers = KvTiers(0, recent=640, stretch=4, staged=2)
        tiers = replace(tiers, pages=tiers.least_pages(sessions.shape(made / "model"), TOKENS + 64))
        placed = {} if folder is None else {"kv_tiers": tiers}
        return sessions.session(made / "model", options, ram_slots=8, prompt_chunk=512, **placed)

    return session


@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
@pytest.mark.parametrize("kv", ["int8", "bf16"])
def test_every_needle_is_found_though_most_of_the_text_is_on_disk(
    opened: Callable[..., Session], kv: str, epsilon: float, tmp_path: Path
) -> None:
    """With an epsilon a question reads a fraction of what lies there."""
    text, values = needles.haystack(TOKENS)
    with opened(tmp_path, kv=kv, kv_epsilon=epsilon) as session:
        said, read = [], []
        for key in range(needles.KEYS):
            records = session.generate([*text, needles.question(key)], Sampling(max_tokens=1, ignore_eos=True))
            record = next(iter(records))
            said.append(record.token_id)
            read.append(record.bytes_read.get("disk", 0))
        assert said == [needles.answer(value) for value in values]
        everything = session.kv_pool.disk_nbytes["kv_cache"]
        assert everything >= 60 * 2 * 128 * 32 * session.kv_pool.dtype.itemsize, (
            "of 93 pages in the layer that sees all"
        )
        assert all(3 * size < everything if epsilon else size >= everything // 2 for size in read[2:]), read
        found = session.report().left_out
        assert (found is None) == (not epsilon)
        assert found is None or (found.left_out > found.pages // 2 and found.greatest_share <= epsilon)


def test_what_is_left_out_is_the_same_to_the_bit_wherever_pages_are(
    opened: Callable[..., Session], tmp_path: Path
) -> None:
    """After rewinds and forks into what is on disk, too."""
    text, _ = needles.haystack(TOKENS)

    def run(session: Session) -> list[torch.Tensor]:
        cache, found = PagedCache(session.kv_pool), []

        def ask(of: PagedCache) -> None:
            for key in (0, 1, 9, 1, 19):
                found.append(session.decoder.forward([needles.question(key)], of)[-1].clone())

        with torch.inference_mode():
            for first in range(0, 9500, 500):
                session.decoder.forward(text[first : first + 500], cache)
            ask(cache)
            for length in (9400, 8300, 8193):
                fork = cache.fork(length)
                assert fork is not None
                ask(fork)
                fork.free()
                cache.rewind(length)
                session.decoder.forward(text[length : length + 700], cache)
                ask(cache)
        cache.free()
        return found

    asked = {"kv": "int8", "kv_epsilon": 1e-3}
    with opened(None, **asked) as whole, opened(tmp_path, **asked) as tiered, opened(None, kv="int8") as exact:
        expected = run(whole)
        assert all(torch.equal(one, other) for one, other in zip(run(tiered), expected, strict=True))
        bounds, others = whole.kv_pool.bounds, tiered.kv_pool.bounds
        assert bounds is not None and others is not None and others.left_out == bounds.left_out
        assert bounds.left_out.left_out > bounds.left_out.pages // 2
        differences = [(one - other).abs().max() for one, other in zip(run(exact), expected, strict=True)]
        assert 0 < max(differences) < 0.01
