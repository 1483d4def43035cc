"""MappedCache: experts used from the page cache until they are in their slots; see ``mapped_files.py``."""

from collections.abc import Callable
from functools import partial

from offload.experts.cache.expert_cache import ExpertCache
from offload.experts.cache.watcher import Watcher
from offload.experts.storage.mapped_files import MappedFiles
from offload.experts.storage.reader import Priority, Reader
from offload.experts.storage.store import ExpertRecord, ExpertStore, ExpertWeights
from offload.routing.eviction import Policy
from offload.tiers import Key, Tier


class MappedCache(ExpertCache):
    """An ``ExpertCache`` with a slot for every expert. What is asked for before it is in its slot is used from
    the page cache, if that has it: those experts are ``mapped``. ``fill`` copies all of them; ``files`` is None
    once that is done."""

    def __init__(
        self, store: ExpertStore, reader: Reader, policy: Policy, *, ram_slots: int, ram_bytes: int | None = None
    ) -> None:
        super().__init__(store, reader, policy, ram_slots=ram_slots, ram_bytes=ram_bytes)
        self.files: MappedFiles | None = MappedFiles(reader)
        self.mapped: dict[Key, ExpertWeights] = {}

    def tier_of(self, key: Key) -> Tier:
        """Where ``key`` is now."""
        return "ram" if key in self.mapped else super().tier_of(key)

    def watch(self, watcher: Watcher) -> None:
        """See ``ExpertCache.watch``."""
        super().watch(watcher)
        for key, weights in self.mapped.items():
            self._tell(key, weights)

    def host_changed(self, key: Key) -> None:
        """``key`` is in its slot: if it was mapped, it is used there from now on."""
        if self.mapped.pop(key, None) is None:
            return
        self._tell(key, self._view(key))
        if not self.mapped:
            self.close()

    def check_files(self) -> None:
        """See ``ExpertCache.check_files``."""
        if self.files is not None:
            self.files.check()

    def close(self) -> None:
        """Map nothing more, and let others write to the files."""
        if self.files is not None:
            self.files.close()
            self.files = None

    def _request(self, key: Key, priority: Priority, locked: set[Key]) -> None:
        if priority is Priority.FILL or key in self.host or not (key in self.mapped or self._map(key)):
            super()._request(key, priority, locked)

    def _map(self, key: Key) -> bool:
        record = self.store.record(*key)
        image = self.files.map(record) if self.files is not None else None
        if image is None:
            return False
        self.mapped[key] = record.view(image)
        self._tell(key, self.mapped[key])
        return True

    def _announce(self, key: Key) -> Callable[[bool], None] | None:
        if key in self.mapped:  # it is used from the page cache until this thread has taken note of the copy
            return partial(self._copied, self.store.record(*key))
        return super()._announce(key)

    def _copied(self, record: ExpertRecord, whole: bool) -> None:
        """Called by a reading thread: from now on the mapped pages would count twice."""
        files = self.files
        if whole and files is not None:
            files.unmap(record)

    def _weights(self, key: Key, locked: set[Key]) -> ExpertWeights:
        self._request(key, Priority.DEMAND, locked)
        if key in self.mapped:
            self.counters.used_bytes["ram"] += self.store.record(*key).nbytes
            return self.mapped[key]
        return super()._weights(key, locked)
