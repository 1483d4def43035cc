"""Decoder: what runs a model's steps. ``cpu`` runs a token as one native call, ``gpu`` as one CUDA graph, and
``plain`` everything through transformers' own modules."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from offload.model.kv_cache import KVCache, SequenceCache

Row = tuple[Sequence[int], SequenceCache]  # tokens, and the sequence that they go on


class StepAbandoned(Exception):
    """A step was broken off because nobody wants it any more."""


class Decoder:
    """Runs token ids through a model. What a decoder has no need of does nothing here.

    In a decode loop each token goes: ``forward``, ``launch`` of the next token, ``flush``; then the expert
    cache's counters may be taken, and ``attend`` ends the time in which the caller may touch that cache.
    """

    name: str  # what a report calls it
    bound: KVCache | None = None  # the one cache that its steps can use, if they are bound to one
    reads_disk_pages = False  # whether its attention can have pages of the KV cache brought from disk

    def __init__(self) -> None:
        self._abandoned = threading.Event()

    def abandon(self) -> None:
        """Break off the ``forward`` that is under way, at its next layer: it raises StepAbandoned, and so do later
        ones until ``resume``. Callable from any thread."""
        self._abandoned.set()

    def resume(self) -> None:
        """Steps are wanted again."""
        self._abandoned.clear()

    def check_wanted(self) -> None:
        """Between two layers: raise StepAbandoned if ``abandon`` was called."""
        if self._abandoned.is_set():
            raise StepAbandoned

    def forward(self, ids: Sequence[int], cache: SequenceCache, *, keep: int = 1) -> Tensor:
        """Append ``ids`` to ``cache`` and return the logits ``[keep, V]`` of the last ``keep`` tokens; those of
        a single token are valid until the next step begins.

        Raises BudgetError if the KV cache is full, CheckpointError if an expert cannot be read and MachineError
        if the GPU fails.
        """
        raise NotImplementedError

    def forward_rows(self, rows: Sequence[Row]) -> Tensor:
        """Append some tokens to the cache of each of some sequences and return the logits ``[T, V]`` of all of them, in
        that order. Raises what ``forward`` does; some caches may have got theirs then.

        Here one after the other; a decoder that can reads each weight once for all.
        """
        return torch.cat([self.forward(ids, cache, keep=len(ids)) for ids, cache in rows])

    @property
    def continues(self) -> bool:
        """Whether several tokens that go on a sequence are run in one step; else they are run one after the other."""
        return True

    @property
    def same_in_chunks(self) -> bool:
        """Whether a prompt comes to the same, to the bit, however it is cut into chunks."""
        return False

    def launch(self, token: int) -> bool:
        """Begin the step of ``token`` before ``forward`` asks for it, and say whether that could be done. What
        goes wrong with it is raised by that ``forward``."""
        return False

    def flush(self) -> None:
        """Count in statistics and expert cache what the last finished step used."""

    def attend(self) -> None:
        """From here until the next ``forward`` or ``synchronize`` the expert cache is the decoder's."""

    def synchronize(self) -> None:
        """Wait until a step that was launched has ended; ``forward`` still returns what it found."""

    def drop(self) -> None:
        """Forget a step that was launched, as if it had never begun."""

    @property
    def ended_at(self) -> float:
        """When the last launched step ended, by ``time.perf_counter``."""
        return 0.0

    def weights_moved(self) -> None:
        """Note anew where the model's dense weights lie in memory."""

    def close(self) -> None:
        """End threads."""
