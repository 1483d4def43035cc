"""Reading expert records: whole, in order of urgency, and loud when the disk does not give them."""

import errno
import os
from pathlib import Path

import pytest

from offload.experts.storage.arena import Arena
from offload.experts.storage.reader import Priority, Reader
from offload.experts.storage.store import ByteRange, ExpertRecord
from quant.checkpoint.layout import PAGE
from quant.errors import CheckpointError, MachineError


def _record(file: Path, offset: int, length: int, needed: int | None = None) -> ExpertRecord:
    return ExpertRecord((ByteRange(file, offset, length, 0, needed or length),), {}, length)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(9 * 2**20 + 123))
    return path


@pytest.mark.parametrize("direct", [True, False])
def test_a_record_larger_than_one_piece_arrives_whole(file: Path, direct: bool) -> None:
    reader, arena = Reader([file], direct=direct), Arena(1, 9 * 2**20)
    request = reader.submit(_record(file, PAGE, 8 * 2**20), arena.buffer(0), Priority.DEMAND)
    request.wait()
    assert bytes(arena.buffer(0)[: 8 * 2**20]) == file.read_bytes()[PAGE : PAGE + 8 * 2**20]
    reader.close()


def test_the_last_pages_may_reach_past_the_end_of_the_file(file: Path) -> None:
    size = file.stat().st_size
    start = size // PAGE * PAGE - PAGE
    reader, arena = Reader([file]), Arena(1, 2 * PAGE)
    reader.submit(_record(file, start, 2 * PAGE, size - start), arena.buffer(0), Priority.DEMAND).wait()
    assert bytes(arena.buffer(0)[: size - start]) == file.read_bytes()[start:]
    reader.close()


def test_a_cold_file_read_directly_leaves_nothing_in_the_page_cache(file: Path) -> None:
    from offload.experts.storage.page_cache import PageCacheView

    os.sync()
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    view = PageCacheView(file, descriptor)
    if view.holds(0, PAGE):
        pytest.skip("this filesystem keeps its pages (tmpfs): nothing to show")
    reader, arena = Reader([file]), Arena(1, 8 * 2**20)
    reader.submit(_record(file, 0, 8 * 2**20), arena.buffer(0), Priority.DEMAND).wait()
    assert not view.holds(0, PAGE)
    assert bytes(arena.buffer(0)) == file.read_bytes()[: 8 * 2**20]
    reader.close()
    os.close(descriptor)


def test_a_file_that_shrank_is_one_clear_error_not_a_wrong_token(file: Path) -> None:
    reader, arena = Reader([file]), Arena(1, 8 * 2**20)
    os.truncate(file, 2 * 2**20)
    with pytest.raises(CheckpointError, match="was changed while the model ran"):
        reader.submit(_record(file, 0, 8 * 2**20), arena.buffer(0), Priority.DEMAND).wait()
    reader.close()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone.*cannot be opened"):
        Reader([tmp_path / "gone"])


def test_a_demand_overtakes_waiting_prefetches(file: Path) -> None:
    reader, arena = Reader([file], threads=1), Arena(40, 2**20)
    fills = [reader.submit(_record(file, 0, 2**20), arena.buffer(i), Priority.FILL) for i in range(39)]
    demand = reader.submit(_record(file, 0, 2**20), arena.buffer(39), Priority.DEMAND)
    demand.wait()
    assert not fills[-1].done.is_set()
    reader.promote(fills[-1], Priority.DEMAND)
    fills[-1].wait()
    assert not fills[-2].done.is_set()
    reader.close()


def test_a_cancelled_read_never_touches_its_buffer(file: Path) -> None:
    reader, arena = Reader([file], threads=1), Arena(30, 2**20)
    requests = [reader.submit(_record(file, 0, 2**20), arena.buffer(i), Priority.FILL) for i in range(30)]
    assert reader.cancel(requests[-1])
    with pytest.raises(CheckpointError, match="cancelled"):
        requests[-1].wait()
    requests[-2].wait()
    assert bytes(arena.buffer(29)) == bytes(2**20)
    reader.close()


def test_a_file_written_to_under_the_run_is_refused_a_file_replaced_whole_is_not(file: Path, tmp_path: Path) -> None:
    reader, arena = Reader([file]), Arena(1, PAGE)
    before = file.read_bytes()[:PAGE]
    (tmp_path / "new").write_bytes(bytes(file.stat().st_size))
    (tmp_path / "new").replace(file)
    reader.submit(_record(file, 0, PAGE), arena.buffer(0), Priority.DEMAND).wait()
    assert bytes(arena.buffer(0)) == before
    reader.close()
    reader = Reader([file])
    with file.open("r+b") as stream:
        stream.write(b"other weights")
    os.utime(file, ns=(1, 1))  # whatever the clock's resolution
    with pytest.raises(CheckpointError, match="was changed while the model ran"):
        reader.submit(_record(file, 0, PAGE), arena.buffer(0), Priority.DEMAND).wait()
    reader.close()


@pytest.mark.parametrize("page_cached", [True, False])
def test_only_a_run_that_reads_once_takes_what_the_page_cache_has(
    file: Path, page_cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.read_bytes()
    reader, arena = Reader([file], page_cached=page_cached), Arena(1, PAGE)
    direct, preadv, used = set(reader._direct.values()), os.preadv, []

    def spy(descriptor: int, *rest: object) -> int:
        used.append(descriptor in direct)
        return preadv(descriptor, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", spy)
    reader.submit(_record(file, 0, PAGE), arena.buffer(0), Priority.DEMAND).wait()
    reader.close()
    assert used == [not page_cached]


def test_a_disk_error_is_one_clear_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    reader, arena = Reader([file]), Arena(1, PAGE)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match=r"weights cannot be read at byte 0: Input/output error"):
        reader.submit(_record(file, 0, PAGE), arena.buffer(0), Priority.DEMAND).wait()
    reader.close()


def test_short_reads_are_read_on_and_a_broken_one_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    reader, arena = Reader([file]), Arena(1, 64 * PAGE)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][: 3 * PAGE + 512]], offset))
    reader.submit(_record(file, 0, 64 * PAGE), arena.buffer(0), Priority.DEMAND).wait()
    assert bytes(arena.buffer(0)) == file.read_bytes()[: 64 * PAGE]
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: 100)
    with pytest.raises(CheckpointError, match="a short disk read"):
        reader.submit(_record(file, 0, 64 * PAGE), arena.buffer(0), Priority.DEMAND).wait()
    reader.close()


def test_an_arena_that_cannot_be_had_is_refused_with_its_size() -> None:
    with pytest.raises(MachineError, match=r"arena of 1024.00 TiB .*lower --ram"):
        Arena(1, 2**50)
