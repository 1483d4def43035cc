"""A folder of page files stays within its size, keeps what was used last, and touches nothing that is not its own."""

import os
import random
import time
from pathlib import Path

import pytest

from offload.prompts.page_file import BlockPages, PageLayout, SpoiledFile, read_page_file, write_page_file
from offload.prompts.page_folder import PageFolder

LAYOUT = PageLayout((0, 1, 5), 8192, 512, {"model": "tiny"})
WIDE = PageLayout((3,), 96, 0)  # pages that direct I/O does not accept


def pages(layout: PageLayout, seed: int) -> BlockPages:
    chance, count = random.Random(seed), 2 * len(layout.layers)
    return BlockPages(
        *(
            [memoryview(bytearray(chance.randbytes(size))) for _ in range(count)]
            for size in (layout.page_nbytes, layout.scale_nbytes)
        )
    )


def blank(layout: PageLayout) -> BlockPages:
    return BlockPages(
        *(
            [memoryview(bytearray(size)) for _ in range(2 * len(layout.layers))]
            for size in (layout.page_nbytes, layout.scale_nbytes)
        )
    )


def put(folder: PageFolder, key: str, block: int = 0, when: int | None = None) -> int:
    when = time.time_ns() if when is None else when
    found = pages(LAYOUT, int(key, 16))
    return folder.write(LAYOUT, key, "full", block, 128, found, when=when, direct=False)


def key(number: int) -> str:
    return f"{number:032x}"


@pytest.mark.parametrize("layout", [LAYOUT, WIDE])
def test_a_file_gives_back_what_was_written(layout: PageLayout, tmp_path: Path) -> None:
    written, found = pages(layout, 1), blank(layout)
    write_page_file(tmp_path / "one", layout, key(1), 77, written, direct=False)
    assert (tmp_path / "one").stat().st_size == layout.nbytes and layout.nbytes % 4096 == 0
    read_page_file(tmp_path / "one", layout, key(1), 77, found, direct=False)
    assert found == written
    whole = (tmp_path / "one").read_bytes()
    assert whole[layout.place(0) :][: layout.page_nbytes] == bytes(written.pages[0])
    for wrong in ((key(2), 77), (key(1), 78)):
        with pytest.raises(SpoiledFile):
            read_page_file(tmp_path / "one", layout, *wrong, found, direct=False)


def test_every_byte_of_a_file_is_checked(tmp_path: Path) -> None:
    file, chance = tmp_path / "one", random.Random(3)
    write_page_file(file, LAYOUT, key(1), 128, pages(LAYOUT, 1), direct=False)
    whole = file.read_bytes()
    for place in [*range(0, 64), *(chance.randrange(len(whole)) for _ in range(200))]:
        spoiled = bytearray(whole)
        spoiled[place] ^= 1 << chance.randrange(8)
        file.write_bytes(spoiled)
        with pytest.raises(SpoiledFile):
            read_page_file(file, LAYOUT, key(1), 128, blank(LAYOUT), direct=False)


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    size = 20 * LAYOUT.nbytes
    folder, other = (PageFolder(tmp_path, origin * 16, size) for origin in "ab")
    for number in range(12):
        assert put(folder if number % 2 else other, key(number), when=number * 10**9)
    other.used([key(0)], ["full"], 100 * 10**9)  # the oldest is of use again
    for number in range(12, 40):
        put(folder, key(number), when=number * 10**9)
        kept = list(tmp_path.rglob("*.full"))
        assert sum(path.stat().st_size for path in kept) <= size
    assert other.holds(key(0), "full") and not folder.holds(key(1), "full") and folder.holds(key(39), "full")


def test_the_beginning_of_a_text_outlives_its_end(tmp_path: Path) -> None:
    folder, now = PageFolder(tmp_path, "a" * 16, 16 * LAYOUT.nbytes), time.time_ns()
    for block in range(40):
        put(folder, key(block), block, now)
    held = [folder.holds(key(block), "full") for block in range(40)]
    assert held[:12] == [True] * 12


def test_only_its_own_files_are_counted_and_removed(tmp_path: Path) -> None:
    folder = PageFolder(tmp_path, "a" * 16, 4 * LAYOUT.nbytes)
    put(folder, key(1))
    foreign = [tmp_path / "diary.txt", folder.folder / "notes.full", tmp_path / "kv-mine" / f"{key(9)}.full"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine" * 50_000)
        os.utime(path, (1, 1))
    orphan = folder.folder / f"{key(2)}.full-0011aabb.part"
    orphan.write_bytes(b"half")
    os.utime(orphan, (1, 1))
    for number in range(3, 12):
        put(folder, key(number))
    assert all(path.read_bytes() == b"mine" * 50_000 for path in foreign) and not orphan.exists()


def test_a_place_where_no_folder_can_be_made_is_not_taken_for_a_file_that_went_away() -> None:
    with pytest.raises(NotADirectoryError, match="cannot be made there"):
        put(PageFolder(Path("/proc"), "a" * 16, 4 * LAYOUT.nbytes), key(1))
