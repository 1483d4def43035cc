"""Watcher: who has to know what each host slot holds."""

from typing import Protocol

from offload.experts.storage.store import ExpertWeights
from offload.tiers import Key


class Watcher(Protocol):
    """Is told what each host slot holds: native code can then find experts, and wait for them, without asking."""

    def coming(self, key: Key, weights: ExpertWeights) -> None:
        """``key``'s bytes will be read to where ``weights`` view them, valid until it is evicted."""

    def arrived(self, key: Key, whole: bool) -> None:
        """``key``'s bytes are all there, or could not be read. Called by a reading thread."""

    def evicted(self, key: Key) -> None:
        """``key``'s slot will be overwritten."""
