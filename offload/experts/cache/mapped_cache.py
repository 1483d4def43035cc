"""MappedCache: experts used from the page cache until they are in their slots; see ``loan.py``."""

from collections.abc import Callable
from functools import partial

from offload.experts.cache.host_cache import ExpertCache, Watcher
from offload.experts.storage.mapped_files import MappedFiles
from offload.experts.storage.reader import Priority, Reader
from offload.experts.storage.store import ExpertRecord, ExpertStore, ExpertWeights
from offload.routing.eviction import Policy
from offload.tiers import Key, Tier


class MappedCache(ExpertCache):
    """An ``ExpertCache`` with a slot for every expert. What is asked for before it is in its slot is lent, if
    the page cache has it; ``fill`` copies all of them."""

    def __init__(self, store: ExpertStore, reader: Reader, policy: Callable[[], Policy], *, ram_slots: int) -> None:
        super().__init__(store, reader, policy, ram_slots=ram_slots)
        self.loans: MappedFiles | None = MappedFiles(reader)
        self.mapped: dict[Key, ExpertWeights] = {}

    def tier_of(self, key: Key) -> Tier:
        """Where ``key`` is now."""
        return "ram" if key in self.mapped else super().tier_of(key)

    def watch(self, watcher: Watcher) -> None:
        """See ``ExpertCache.watch``."""
        super().watch(watcher)
        for key, weights in self.mapped.items():
            watcher.coming(key, weights)
            watcher.arrived(key, True)

    def reached_host(self, key: Key) -> None:
        """``key`` is in its slot: if it was lent, it is used there from now on."""
        super().reached_host(key)
        if self.mapped.pop(key, None) is None:
            return
        if self.watcher is not None:
            self.watcher.coming(key, self._view(key))
            self.watcher.arrived(key, True)
        if not self.mapped:
            self.close()

    def close(self) -> None:
        """Lend nothing more, and let others write to the files."""
        super().close()
        if self.loans is not None:
            self.loans.close()
            self.loans = None

    def _request(self, key: Key, priority: Priority, locked: set[Key]) -> None:
        if priority is Priority.FILL or key in self.host or not (key in self.mapped or self._lend(key)):
            super()._request(key, priority, locked)

    def _lend(self, key: Key) -> bool:
        record = self.store.record(*key)
        image = self.loans.lend(record) if self.loans is not None else None
        if image is None:
            return False
        self.mapped[key] = record.view(image)
        if self.watcher is not None:
            self.watcher.coming(key, self.mapped[key])
            self.watcher.arrived(key, True)
        return True

    def _announce(self, key: Key) -> Callable[[bool], None] | None:
        if key in self.mapped:  # it is where it is lent until this thread has taken note of the copy
            return partial(self._copied, self.store.record(*key))
        return super()._announce(key)

    def _copied(self, record: ExpertRecord, whole: bool) -> None:
        """Called by a reading thread: from now on the mapped pages would count twice."""
        loans = self.loans
        if whole and loans is not None:
            loans.returned(record)

    def _weights(self, key: Key, locked: set[Key]) -> ExpertWeights:
        self._request(key, Priority.DEMAND, locked)
        if key in self.mapped:
            self.counters.used_bytes["ram"] += self.store.record(*key).nbytes
            return self.mapped[key]
        return super()._weights(key, locked)
