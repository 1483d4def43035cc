"""Needles in a long text are found, most of whose keys and values are on disk."""

from pathlib import Path

import pytest

from offload.batch.kv_tiers import KvTiers
from offload.records import RunOptions, Sampling
from quant.convert.convert import convert
from quant.scheme import Scheme
from tests import needles, sessions

TOKENS = 12_000


@pytest.mark.parametrize("kv", ["int8", "bf16"])
def test_every_needle_is_found_though_most_of_the_text_is_on_disk(kv: str, tmp_path: Path) -> None:
    source = needles.make_finder(tmp_path / "source", TOKENS + 64)
    convert(source, tmp_path / "model", {"experts": Scheme("int8", 32)})
    text, values = needles.haystack(TOKENS)
    tiers = KvTiers(0, recent=640)
    tiers = KvTiers(tiers.least_pages(sessions.shape(tmp_path / "model"), TOKENS + 64), recent=640)
    options = RunOptions(context=TOKENS + 64, kv_disk=tmp_path / "kv", kv=kv)  # type: ignore[arg-type]
    with sessions.session(tmp_path / "model", options, ram_slots=8, prompt_chunk=512, kv_tiers=tiers) as session:
        said = []
        for key in range(needles.KEYS):
            records = session.generate([*text, needles.question(key)], Sampling(max_tokens=1, ignore_eos=True))
            said.append(next(iter(records)).token_id)
        assert said == [needles.answer(value) for value in values]
        page = 2 * 128 * 32 * session.kv_pool.dtype.itemsize
        assert session.kv_pool.disk_nbytes["kv_cache"] >= 60 * page, "of 93 pages in the one layer that sees all"
