"""PromptCache: beginnings of texts that a run before has computed, read from disk into pages of the KV cache; and what
this run computes, written as it comes.

Reads and writes are done by threads of its own while the model goes on. A page that is being written belongs to the
writer, too, so nobody changes it meanwhile. A layer that attends within chunks needs the current chunk only, so its
pages lie in files of their own, and those of chunks before are not read.
"""

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Tokens
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial

from offload.batch.pages import OutOfPages
from offload.batch.prefixes import Prefix
from offload.model.page_pool import PagePool
from offload.model.paged_cache import PagedCache
from offload.prompts.block_keys import BlockKeys, Content
from offload.prompts.page_file import BlockPages, PageLayout, SpoiledFile, read_page_file
from offload.prompts.page_folder import PageFolder
from offload.records import Reused
from quant.errors import ColdstreamError
from quant.sizes import KV_PAGE_TOKENS

_READERS = 4
_PAUSE_SECONDS = 60.0  # after a write that failed


@dataclass
class KeptText:
    """What is known of one text: ``saved`` of its blocks are on disk or on their way, and ``reused`` tokens were not
    computed. ``when`` it began, in ns since 1970, is the time of use of its blocks."""

    keys: BlockKeys
    when: int = field(default_factory=time.time_ns)
    saved: int = 0
    reused: Reused = field(default_factory=Reused)


class Load:
    """Reads under way that make ``length`` tokens of a text present, of which ``held`` were in memory."""

    def __init__(self, length: int, held: int) -> None:
        self.length, self.held = length, held
        self.reads: list[Future[int]] = []
        self._started = time.perf_counter()
        self.seconds = 0.0

    @property
    def done(self) -> bool:
        """Whether nothing more is to come."""
        return all(read.done() for read in self.reads)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is done, for ``seconds`` at most; whether it is."""
        finished = not wait(self.reads, seconds).not_done
        self.seconds = time.perf_counter() - self._started
        return finished

    def cancel(self) -> None:
        """Read no more; nothing is written into pages once this returns."""
        for read in self.reads:
            read.cancel()
        wait(self.reads)

    @property
    def nbytes(self) -> int:
        """Bytes read, negative if a file could not be."""
        sizes = [read.result() for read in self.reads]
        return sum(sizes) if all(size >= 0 for size in sizes) else -1


class PromptCache:
    """Pages of ``pool`` in ``folder``. ``content`` tells images apart (see BlockKeys), ``about`` is said in every
    file; ``direct`` moves pages past the page cache. ``notes`` gets what a user should know, once."""

    def __init__(
        self,
        pool: PagePool,
        folder: PageFolder,
        content: Content,
        about: Mapping[str, object],
        notes: list[str],
        *,
        direct: bool = True,
    ) -> None:
        self._pool, self._folder, self._content, self._notes, self._direct = pool, folder, content, notes, direct
        shape = pool.shape
        self._chunks = {"full": 0, "chunked": shape.attention_chunk_size}
        layers = range(shape.num_layers)
        named = {"full": [i for i in layers if i not in shape.chunked_layers], "chunked": sorted(shape.chunked_layers)}
        sizes = pool.page_nbytes
        self._layouts = {
            group: PageLayout(tuple(found), *sizes, {**about, "group": group})
            for group, found in named.items()
            if found
        }
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="prompt-reader")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="prompt-writer")
        self._start_threads()
        self._pending: dict[tuple[str, str], Future[None]] = {}
        self._written: deque[tuple[tuple[str, str], list[int]]] = deque()
        self._paused_until = 0.0
        self.saved_nbytes = 0
        self.reads = True  # not where computing is to be measured

    def _start_threads(self) -> None:
        """Now, not in the midst of reads. Raises RuntimeError if the system starts no more threads."""
        all_there = threading.Barrier(_READERS + 1)
        try:
            for _ in range(_READERS):
                self._readers.submit(all_there.wait)
            self._writer.submit(int)
        except RuntimeError:
            all_there.abort()
            raise
        all_there.wait()

    def text(self) -> KeptText:
        """What is to be known of a text that begins."""
        return KeptText(BlockKeys(self._folder.folder.name, self._pool.shape.vocab_size, self._content))

    def load(self, text: KeptText, tokens: Tokens[int], cache: PagedCache) -> Load | None:
        """Begin to read what ``cache`` lacks of the beginning of ``tokens``; None if nothing is to be had.

        While it reads, the cache holds its pages and says that it has no tokens; ``finish`` ends that.
        """
        keys, held = text.keys.follow(tokens), cache.get_seq_length()
        length, tail = self._reach(text.keys, tokens, cache)
        self._writer.submit(self._folder.used, keys[: length // KV_PAGE_TOKENS], tuple(self._layouts), text.when)
        if length <= held or not self.reads:
            return None
        try:
            places = cache.make_places(length)
        except OutOfPages:
            cache.free()
            return None
        load = Load(length, held)
        group_of = {layer: group for group, layout in self._layouts.items() for layer in layout.layers}
        files: dict[tuple[int, str], list[int]] = {}
        for layer, block, page in places:
            files.setdefault((block, group_of[layer]), []).append(page)
        for (block, group), pages in sorted(files.items()):
            key = keys[block] if block < length // KV_PAGE_TOKENS else tail
            count = min(KV_PAGE_TOKENS, length - block * KV_PAGE_TOKENS)
            load.reads.append(self._readers.submit(self._read, group, key, count, self._pool.block_pages(pages)))
        return load

    def finish(self, text: KeptText, load: Load, cache: PagedCache) -> bool:
        """``load`` is done: ``cache`` has its tokens. False if a file was not to be had: then it has none."""
        nbytes = load.nbytes
        if nbytes < 0:
            cache.free()
            return False
        cache.filled(load.length)
        before = text.reused if text.reused.disk else Reused(memory=load.held)
        text.reused = before + Reused(0, load.length - load.held, nbytes, load.seconds)
        return True

    def save(self, text: KeptText, tokens: Tokens[int], cache: PagedCache) -> None:
        """Have the blocks of ``tokens`` written that are whole in ``cache`` and were not before."""
        whole = cache.get_seq_length() // KV_PAGE_TOKENS
        if whole <= text.saved:
            return
        keys = text.keys.follow(tokens[: whole * KV_PAGE_TOKENS])
        for block in range(text.saved, whole):
            self._save(text, cache, block, keys[block], KV_PAGE_TOKENS)
        text.saved = whole

    def save_tails(self, prefixes: Iterable[Prefix[PagedCache]]) -> None:
        """Have what no whole block holds of texts that are over written, too."""
        for prefix in prefixes:
            tokens, text = prefix.tokens.tolist(), self.text()
            self.save(text, tokens, prefix.kept)
            block, rest = divmod(len(tokens), KV_PAGE_TOKENS)
            if rest:
                self._save(text, prefix.kept, block, text.keys.after(block, tokens[-rest:]), rest)

    def cut(self, position: int, tokens: int) -> int:
        """How many of ``tokens`` after ``position`` to run in one step: up to the last block of a chunk. Pages go when
        the chunk is over, and those before are whole and saved by then."""
        chunk = self._chunks["chunked"] if "chunked" in self._layouts else 0
        last = ((position // chunk + 1) * chunk - 1) // KV_PAGE_TOKENS * KV_PAGE_TOKENS if chunk else 0
        return last - position if position < last < position + tokens else tokens

    def collect(self) -> bool:
        """Give back the pages of what has been written; whether there were any."""
        before = self._pool.counts.given_back
        while self._written:
            done, pages = self._written.popleft()
            self._pending.pop(done, None)
            self._let_go(pages)
        return self._pool.counts.given_back > before

    def release(self) -> bool:
        """The same, waiting for a write if there is one under way."""
        if self._pending and not self._written:
            wait([next(iter(self._pending.values()))])
        return self.collect() or bool(self._pending)

    def flush(self) -> None:
        """Wait until all is written."""
        wait(list(self._pending.values()))
        self.collect()

    def close(self) -> None:
        """Write what is still to be written, and end the threads."""
        self.flush()
        self._readers.shutdown()
        self._writer.shutdown()

    def _reach(self, keys: BlockKeys, tokens: Tokens[int], cache: PagedCache) -> tuple[int, str]:
        """How many tokens can be had with what is on disk, and the key of the last block if it is none that is
        whole."""
        held, disk = cache.get_seq_length(), self._pool.disk
        most, missing = len(keys.keys), dict[str, list[int]]()
        if disk is not None:  # what is to pass through memory to where a KV cache is on disk
            most = min(most, (held + disk.tiers.recent) // KV_PAGE_TOKENS)
        cut = most < len(keys.keys)
        for group in self._layouts:  # full layers first: what they lack ends the search
            in_memory = range(self._first(group, held), held // KV_PAGE_TOKENS)
            missing[group], last = [-1], -1
            for block in range(most):
                if block not in in_memory and not self._folder.holds(keys.keys[block], group):
                    if group == "full":
                        most = block
                        break
                    last = block
                missing[group].append(last)

        def whole(blocks: int, length: int) -> bool:
            return all(missing[group][blocks] < self._first(group, length) for group in self._layouts)

        blocks = next((n for n in range(most, 0, -1) if whole(n, n * KV_PAGE_TOKENS)), 0)
        start = blocks * KV_PAGE_TOKENS
        for length in () if cut else range(min(len(tokens), start + KV_PAGE_TOKENS - 1), max(start, held), -1):
            if whole(blocks, length):
                key = keys.after(blocks, tokens[start:length])
                if all(self._folder.holds(key, group) for group in self._layouts):
                    return length, key
        return start, ""

    def _first(self, group: str, length: int) -> int:
        """The first block that layers of ``group`` look at after ``length`` tokens."""
        chunk = self._chunks[group]
        return length // chunk * chunk // KV_PAGE_TOKENS if chunk else 0

    def _read(self, group: str, key: str, tokens: int, pages: BlockPages) -> int:
        """Bytes read, or -1 if the file was not to be had."""
        path, layout = self._folder.path(key, group), self._layouts[group]
        try:
            read_page_file(path, layout, key, tokens, pages, direct=self._direct)
        except FileNotFoundError:  # another process needed its room
            self._folder.spoiled.add(path)
        except SpoiledFile as error:
            self._folder.remove(path)
            self._say(f"a file of the prompt cache was left out and removed: {error}; its tokens are computed ({path})")
        except OSError as error:
            self._folder.spoiled.add(path)
            self._say(f"a file of the prompt cache cannot be read ({error.strerror}): its tokens are computed ({path})")
        else:
            return layout.nbytes
        return -1

    def _save(self, text: KeptText, cache: PagedCache, block: int, key: str, tokens: int) -> None:
        if time.monotonic() < self._paused_until:
            return
        end = block * KV_PAGE_TOKENS + tokens
        for group, layout in self._layouts.items():
            done = (key, group)
            if self._first(group, end) > block or done in self._pending or self._folder.holds(*done):
                continue  # nobody who goes on from its end looks at it; or it is there
            pages = [int(page) for page in cache.tables[list(layout.layers), block]]
            if min(pages) < 0:
                continue  # its chunk was over before it was whole; or the KV cache has it on disk
            for page in pages:
                self._pool.counts.share(page)
            cache.is_shared()
            write = partial(self._write, done, block, tokens, text.when, pages)
            self._pending[done] = self._writer.submit(write)

    def _write(self, done: tuple[str, str], block: int, tokens: int, when: int, pages: list[int]) -> None:
        key, group = done
        try:
            if time.monotonic() >= self._paused_until:
                self.saved_nbytes += self._folder.write(
                    self._layouts[group],
                    key,
                    group,
                    block,
                    tokens,
                    self._pool.block_pages(pages),
                    when=when,
                    direct=self._direct,
                )
        except FileNotFoundError:  # another process needed its room
            pass
        except (OSError, ColdstreamError) as error:
            self._paused_until = time.monotonic() + _PAUSE_SECONDS
            said = getattr(error, "strerror", None) or error
            self._say(f"prompts are not kept in {self._folder.root} ({said}): what is there already is still read")
        finally:
            self._written.append((done, pages))

    def _let_go(self, pages: list[int]) -> None:
        for page in pages:
            self._pool.counts.give_back(page)

    def _say(self, note: str) -> None:
        if not any(said.startswith(note.split(":")[0][:40]) for said in self._notes):
            self._notes.append(note)
