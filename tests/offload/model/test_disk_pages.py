"""A KV cache whose older pages are on disk gives what one in RAM does, to the bit, and says when the disk fails."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from offload.batch.kv_tiers import KvTiers
from offload.model.paged_cache import PagedCache
from offload.records import RunOptions, Sampling
from offload.run.session import Session
from quant.convert.convert import convert
from quant.errors import ColdstreamError, InputError, OutputError
from quant.kernels.attention import PAGE_ON_DISK
from quant.model.families import Role
from quant.scheme import Scheme
from tests import sessions
from tests.family_checkpoints import make_family

CHUNK, CONTEXT = 256, 4096
SCHEMES: dict[Role, Scheme] = {"experts": Scheme("int4", 32), "attention": Scheme("int8", 32)}
FAMILIES: dict[str, dict[str, int]] = {
    "llama4_text": {"attention_chunk_size": CHUNK, "floor_scale": 100},
    "mixtral": {},
    "gpt_oss": {},
}
TIERS = KvTiers(pages=0, recent=384, stretch=4, staged=3)
Models = Callable[..., Path]


@pytest.fixture(scope="module")
def models(tiny: Models, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            if family == "gpt_oss":  # with windows
                source = make_family(family, folder / "source", max_position_embeddings=CONTEXT)
            else:
                source = tiny(family, max_position_embeddings=CONTEXT, **FAMILIES[family])
            made[family] = folder / "model"
            convert(source, made[family], SCHEMES)
        return made[family]

    return of


def opened(model: Path, folder: Path | None, room: float = 0.0, **options: object) -> Session:
    """A session of ``model``; with a ``folder``, as little as can be of its KV cache is in RAM, and ``room`` more of
    it."""
    asked = RunOptions(**{"context": CONTEXT, "kv_disk": folder, **options})  # type: ignore[arg-type]
    if folder is None:
        return sessions.session(model, asked, ram_slots=64, prompt_chunk=256)
    shape = sessions.shape(model)
    least, most = TIERS.least_pages(shape, CONTEXT), shape.kv_pages(CONTEXT)
    tiers = KvTiers(least + int(room * (most - least)), TIERS.recent, TIERS.stretch, TIERS.staged)
    return sessions.session(model, asked, ram_slots=64, prompt_chunk=256, kv_tiers=tiers)


def text(length: int, seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(1, 250) for _ in range(length)]


def parts(length: int, seed: int) -> list[list[int]]:
    """A text cut at random into what is run at once."""
    chance, ids = random.Random(seed), text(length, seed)
    found = []
    while ids:
        count = chance.choice([1, 1, 2, 7, 100, 128, 255, 256])
        found.append(ids[:count])
        ids = ids[count:]
    return found


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama4_text", {"kv": "bf16"}),
        ("llama4_text", {"exact": True}),
        ("mixtral", {"kv": "int8"}),
        ("gpt_oss", {"kv": "bf16"}),
    ],
    ids=str,
)
def test_logits_are_those_of_a_cache_in_ram_to_the_bit(
    models: Callable[[str], Path], family: str, options: dict[str, object], tmp_path: Path
) -> None:
    model = models(family)
    with opened(model, None, **options) as whole, opened(model, tmp_path, **options) as tiered:
        cut = parts(3300, len(family))
        assert torch.equal(sessions.prompt_logits(tiered, *cut), sessions.prompt_logits(whole, *cut))
        disk = tiered.kv_pool.disk
        assert disk is not None and disk.file.used_nbytes == 0 and disk.take_read_nbytes() > 0
        assert tiered.kv_pool.counts.free == tiered.kv_pool.counts.count, "nothing is left of a sequence that is over"


@pytest.mark.parametrize("room", [0.0, 0.5, 1.0])
def test_answers_are_those_of_a_cache_in_ram_after_rewinds_and_forks_into_what_is_on_disk(
    models: Callable[[str], Path], room: float, tmp_path: Path
) -> None:
    sampling, ids = Sampling(max_tokens=6, ignore_eos=True), text(3600, 5)
    prompts = [ids[:3000], ids, [*ids[:1900], 3, 4, 5], [*ids[:600], *ids[2000:3300]], [7], ids[:3590], ids[:2049]]
    with opened(models("mixtral"), None) as whole, opened(models("mixtral"), tmp_path, room) as tiered:
        for prompt in prompts:
            expected = [record.token_id for record in whole.generate(prompt, sampling)]
            records = list(tiered.generate(prompt, sampling))
            assert [record.token_id for record in records] == expected
        disk = tiered.kv_pool.disk
        assert disk is not None and (disk.file.used_nbytes > 0) == (room < 1)
        tiered.reset()
        assert disk.file.used_nbytes == 0 and tiered.kv_pool.counts.free == tiered.kv_pool.counts.count
    assert not list(tmp_path.iterdir()), "the file has no name"


def test_a_fork_and_a_rewind_take_from_disk_what_they_go_on_in(models: Callable[[str], Path], tmp_path: Path) -> None:
    with opened(models("mixtral"), None) as whole, opened(models("mixtral"), tmp_path) as tiered:
        ids = text(3000, 8)

        def run(session: Session) -> list[torch.Tensor]:
            cache, found = PagedCache(session.kv_pool), []
            with torch.inference_mode():
                for first in range(0, 3000, 250):
                    session.decoder.forward(ids[first : first + 250], cache)
                for length in (2900, 1537, 1536, 1100):
                    fork = cache.fork(length)
                    assert fork is not None and fork.get_seq_length() == length
                    found.append(session.decoder.forward(ids[:7], fork).clone())
                    fork.free()
                    cache.rewind(length)
                    found.append(session.decoder.forward(ids[:7], cache).clone())
                    found.append(session.decoder.forward(ids[7:8], cache).clone())
            cache.free()
            return found

        for one, other in zip(run(tiered), run(whole), strict=True):
            assert torch.equal(one, other)


def test_several_texts_at_once_wait_for_one_another(models: Callable[[str], Path], tmp_path: Path) -> None:
    sampling = Sampling(max_tokens=5, ignore_eos=True)
    with opened(models("mixtral"), None) as whole, opened(models("mixtral"), tmp_path) as tiered:
        prompts = [text(length, length) for length in (2000, 30, 2600)]
        expected = [[record.token_id for record in whole.generate(prompt, sampling)] for prompt in prompts]
        streams = [tiered.submit(prompt, sampling) for prompt in prompts]
        assert [[record.token_id for record in stream] for stream in streams] == expected


def filled(session: Session, tokens: int) -> PagedCache:
    cache = PagedCache(session.kv_pool)
    with torch.inference_mode():
        for first in range(0, tokens, 256):
            session.decoder.forward(text(min(256, tokens - first), first), cache)
    assert (cache.tables == PAGE_ON_DISK).any()
    return cache


def steps(session: Session, cache: PagedCache) -> None:
    """Two, for what the first asks for may have been read before."""
    for _ in range(2):
        session.decoder.forward([1], cache)


def test_what_the_disk_gives_otherwise_than_it_was_written_ends_the_run_in_one_line(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    with opened(models("mixtral"), tmp_path) as session:
        cache, disk = filled(session, 3000), session.kv_pool.disk
        assert disk is not None
        with open(f"/proc/self/fd/{disk.file._file}", "r+b") as file:
            file.seek(cache.paged[1].on_disk[0].place * disk.file.nbytes + 100)
            file.write(b"\1\2\3")
        with pytest.raises(InputError, match=r"not as it was written.*--kv-disk"), torch.inference_mode():
            steps(session, cache)


def test_a_disk_that_ends_early_or_is_full_is_said_in_one_line(
    models: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(models("mixtral"), tmp_path) as session:
        cache, disk = filled(session, 3000), session.kv_pool.disk
        assert disk is not None
        os.ftruncate(disk.file._file, 0)
        with pytest.raises(InputError, match="cannot be read"), torch.inference_mode():
            steps(session, cache)
        cache.free()
        full = os.open("/dev/full", os.O_WRONLY)
        before, disk.file._file = disk.file._file, full
        with pytest.raises(OutputError, match=r"No space left on device.*--kv-ram"):
            list(session.generate(text(3000, 1), Sampling(max_tokens=2)))
        disk.file._file = before
        os.close(full)
        assert len(list(session.generate(text(3000, 1), Sampling(max_tokens=2, ignore_eos=True)))) == 2


def test_a_folder_that_cannot_be_written_is_refused(models: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ColdstreamError, match="no KV cache can be kept in"):
        opened(models("mixtral"), tmp_path / "file")


def test_a_long_prompt_that_was_broken_off_goes_on_from_the_prompt_cache(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    model, ids, sampling = models("llama4_text"), text(3500, 11), Sampling(max_tokens=6, ignore_eos=True)
    with opened(model, None) as whole:
        expected = [record.token_id for record in whole.generate(ids, sampling)]
    kept: dict[str, object] = {"prompt_cache": tmp_path / "prompts"}
    with opened(model, tmp_path / "kv", **kept) as session:
        session.prefill(ids[:2900])
    with opened(model, tmp_path / "kv", **kept) as session:
        records = list(session.generate(ids, sampling))
        assert [record.token_id for record in records] == expected
        assert records[0].reused.disk >= 2900 // 128 * 128, "stretch after stretch, though RAM has room for few"
        assert session.kv_pool.disk_nbytes["kv_cache"] > 0
    with opened(model, None, **kept) as session:
        records = list(session.generate(ids, sampling))
        assert [record.token_id for record in records] == expected
        assert records[0].reused.disk >= 3499 // 128 * 128, "what is on disk was kept before it went there"
