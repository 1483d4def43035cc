"""PageFolder: page files in a folder of the user's, within a size, the least recently used first out.

Each origin (a model's weights, the form of its KV cache, the kernels that compute it) has a folder of its own, and a
file is named by the key of its block. Nothing else in the folder is ever touched. A file appears by a rename when it
is whole, is never written again, and may go away at any time: any number of processes may use one folder, and be
killed. The time of a file's last use is its time of change; blocks nearer to a text's beginning count as used later,
because without them those behind are of no use.
"""

import errno
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from offload.prompts.page_file import BlockPages, PageLayout, write_page_file
from quant.sizes import format_size

_ORIGIN = re.compile(r"kv-[0-9a-f]{16}")
_FILE = re.compile(r"[0-9a-f]{32}\.(?:full|chunked)(?:-[0-9a-f]{8}\.part)?")
_PART = ".part"
_ORPHAN_SECONDS = 3600
_STEP_NS = 1000  # between the uses of two blocks that follow one another
_FULL, _AFTER = 15 / 16, 7 / 8  # of the size: when files go, and until how much is left


class PageFolder:
    """Page files of ``origin``, 16 hex digits, in ``root``, whose files of all origins have ``size`` bytes at most.

    Other processes are not asked: their files are seen by a look at the folder every 64th of ``size`` written.
    """

    def __init__(self, root: Path, origin: str, size: int) -> None:
        self.root, self.folder, self.size = root, root / f"kv-{origin}", size
        self.spoiled: set[Path] = set()
        self._written = 0  # since the last look
        self._found: int | None = None  # by the last look, less what was removed since

    def path(self, key: str, group: str) -> Path:
        """Where the pages of ``group`` of layers are of block ``key``."""
        return self.folder / f"{key}.{group}"

    def holds(self, key: str, group: str) -> bool:
        """Whether there is such a file, which nobody found spoiled."""
        path = self.path(key, group)
        return os.path.exists(path) and path not in self.spoiled

    def used(self, keys: Sequence[str], groups: Iterable[str], when: int) -> None:
        """The files of ``keys``, a text's blocks from its first on, are of use at ``when``, ns since 1970."""
        groups = tuple(groups)
        for block, key in enumerate(keys):
            for group in groups:
                with suppress(OSError):
                    self._stamp(self.path(key, group), block, when)

    def write(
        self,
        layout: PageLayout,
        key: str,
        group: str,
        block: int,
        tokens: int,
        pages: BlockPages,
        *,
        when: int,
        direct: bool,
    ) -> int:
        """Keep ``pages``, ``tokens`` of the text's ``block``-th block; the bytes that this took, 0 if they are there
        already. Raises OSError."""
        path = self.path(key, group)
        if self.holds(key, group):
            return 0
        if layout.nbytes > self.size * _AFTER:
            raise OSError(errno.EFBIG, f"a block of {tokens} tokens takes {format_size(layout.nbytes)}")
        self._make_room(layout.nbytes)
        part = path.with_name(f"{path.name}-{secrets.token_hex(4)}{_PART}")
        try:
            self._make()
            write_page_file(part, layout, key, tokens, pages, direct=direct)
            self._stamp(part, block, when)
            part.replace(path)
        except OSError:
            with suppress(OSError):
                part.unlink()
            raise
        self.spoiled.discard(path)
        self._written += layout.nbytes
        return layout.nbytes

    def _make(self) -> None:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileNotFoundError as error:  # as /proc says it: not that a file has gone away meanwhile
            raise OSError(errno.ENOTDIR, f"{self.folder.name} cannot be made there") from error

    def remove(self, path: Path) -> None:
        """``path`` is not as it was written: no longer use it."""
        self.spoiled.add(path)
        with suppress(OSError):
            path.unlink()

    @staticmethod
    def _stamp(path: Path, block: int, when: int) -> None:
        time_ns = when - block * _STEP_NS
        os.utime(path, ns=(time_ns, time_ns))

    def _make_room(self, nbytes: int) -> None:
        """Remove the files used longest ago if ``nbytes`` more would be too many."""
        found = self._found
        if found is not None and self._written < self.size // 64 and found + self._written + nbytes < self.size * _FULL:
            return
        files = sorted(self._files())
        total, now = sum(size for _, size, _ in files), time.time_ns()
        over = total + nbytes >= self.size * _FULL
        for when, size, path in files:
            orphan = path.name.endswith(_PART) and now - when > _ORPHAN_SECONDS * 1e9
            if orphan or (over and total + nbytes > self.size * _AFTER):
                with suppress(OSError):
                    path.unlink()
                    total -= size
        self._found, self._written = total, 0

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Last use, bytes and path of every page file of every origin."""
        for folder in _listed(self.root):
            if _ORIGIN.fullmatch(folder.name):
                for file in _listed(Path(folder.path)):
                    if _FILE.fullmatch(file.name):
                        with suppress(OSError):
                            found = file.stat(follow_symlinks=False)
                            yield found.st_mtime_ns, found.st_size, Path(file.path)


def _listed(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []
