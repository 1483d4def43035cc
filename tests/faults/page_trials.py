"""Page files that are written and read while each system call in turn fails, or ends the process.

    LD_PRELOAD=interpose.so python -m tests.faults.page_trials FOLDER [EVERY]

Each trial forks a process that writes, uses and reads the blocks of a few texts in FOLDER/cache, within a size that
makes files go, and disturbs its N-th counted call there, every EVERY-th in turn; another process does the same beside
it, undisturbed. Then every file that has a block's name must hold that block, the size must be kept, and whoever comes
next must be able to read or write every block of a text. Prints one JSON document.
"""

import ctypes
import json
import mmap
import os
import random
import shutil
import sys
import time
from pathlib import Path

from offload.prompts.page_file import BlockPages, PageLayout, SpoiledFile, read_page_file
from offload.prompts.page_folder import PageFolder
from tests.faults.trials import HOWS

LAYOUT = PageLayout((0, 1), 4096, 64)
SIZE = 8 * LAYOUT.nbytes
BLOCKS = 3  # of a text: three texts do not fit


def block_of(key: str) -> BlockPages:
    """What the block of ``key`` holds, where direct I/O accepts it."""
    chance, made = random.Random(key), []
    for size in (LAYOUT.page_nbytes, LAYOUT.scale_nbytes):
        made.append([memoryview(mmap.mmap(-1, size)) for _ in range(2 * len(LAYOUT.layers))])
        for view in made[-1]:
            view[:] = chance.randbytes(size)
    return BlockPages(*made)


def is_whole(path: Path) -> bool:
    """Whether ``path`` holds the block that its name says."""
    key = path.name.partition(".")[0]
    found = block_of("nothing")
    try:
        read_page_file(path, LAYOUT, key, 128, found, direct=True)
    except SpoiledFile:
        return False
    return found == block_of(key)


def work(root: Path, texts: list[int]) -> None:
    """Read or write the blocks of ``texts``. What the system refuses is left out, as a run does."""
    folder = PageFolder(root, "0" * 16, SIZE)
    for text in texts:
        keys = [f"{text:016x}{block:016x}" for block in range(BLOCKS)]
        now = time.time_ns()
        folder.used(keys, ["full"], now)
        for block, key in enumerate(keys):
            try:
                if not folder.holds(key, "full"):
                    folder.write(LAYOUT, key, "full", block, 128, block_of(key), when=now, direct=True)
                if not is_whole(folder.path(key, "full")):
                    folder.remove(folder.path(key, "full"))
            except OSError:
                pass


def child(root: Path, texts: list[int], counted: Path, mode: tuple[int, int, bool], at: int) -> int:
    """``work`` in a fork of this process, with call ``at`` disturbed; its id."""
    made = os.fork()
    if made:
        return made
    code = 1
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    try:
        how, number, growing = mode
        library.fault_arm(f"{root}/".encode(), how, ctypes.c_long(at), number, int(growing))
        work(root, texts)
        code = 0
    except BaseException:  # noqa: BLE001 - a child must never come back to its parent's code
        import traceback

        traceback.print_exc()
    finally:
        calls = library.fault_calls()
        library.fault_arm(b"/nowhere/", 0, ctypes.c_long(0), 0, 0)
        counted.write_text(str(calls))
        os._exit(code)
    return 0


def main() -> None:
    """Make the trials."""
    folder, every = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    root, counted = folder / "cache", folder / "calls"
    root.mkdir(parents=True)
    os.waitpid(child(root, [1, 2, 1], counted, (1, 0, False), 0), 0)
    calls, failures, made = int(counted.read_text()), [], 0
    for at in range(1, calls + 1, every):
        for how in ("kill", ("eio", "eio-stays", "full")[at // every % 3]):
            made += 1
            shutil.rmtree(root)
            root.mkdir()
            disturbed = child(root, [1, 2, 1], counted, HOWS[how], at)
            beside = child(root, [2, 3], folder / "other", (0, 0, False), 0)
            codes = [os.waitstatus_to_exitcode(os.waitpid(one, 0)[1]) for one in (disturbed, beside)]
            left = [path for path in root.rglob("*") if path.is_file()]
            spoiled = [path.name for path in left if path.suffix == ".full" and not is_whole(path)]
            size = sum(path.stat().st_size for path in left)
            work(root, [1, 3])
            after = PageFolder(root, "0" * 16, SIZE)
            missing = [n for n in range(BLOCKS) if not after.holds(f"{3:016x}{n:016x}", "full")]
            if codes not in ([0, 0], [-9, 0]) or spoiled or missing or size > SIZE:
                failures.append(
                    {"at": at, "how": how, "codes": codes, "spoiled": spoiled, "missing": missing, "size": size}
                )
    print(json.dumps({"calls": calls, "trials": made, "failures": failures}))


if __name__ == "__main__":
    main()
