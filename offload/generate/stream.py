"""Stream: the answer to one prompt, token by token, while the model may be at work for others, too."""

import queue
import threading
from collections.abc import Callable, Iterator

from offload.records import TokenRecord

Told = Callable[[TokenRecord | BaseException | None], None]


class Stream(Iterator[TokenRecord]):
    """Iterate over it for the records of one sequence as they come; waits for the next.

    ``prompt_tokens`` is what was asked, ``cached_tokens`` how many of these were there from prompts before, known
    with the first record. What goes wrong with this sequence is raised here, after the records before it.

    Who waits for many at once gives ``told``, which gets each record instead, then None or what went wrong, in the
    thread of whoever runs the model or cancels.
    """

    def __init__(self, prompt_tokens: int, on_cancel: "Callable[[Stream], None]", told: Told | None = None) -> None:
        self.prompt_tokens, self._on_cancel = prompt_tokens, on_cancel
        self.cached_tokens = 0
        self._events: queue.SimpleQueue[TokenRecord | BaseException | None] = queue.SimpleQueue()
        self._tell = told or self._events.put
        self._cancelled, self._ended = threading.Event(), threading.Event()
        self._over = False

    def __next__(self) -> TokenRecord:
        """The next record. Raises CheckpointError if the disk fails and MachineError if the GPU does."""
        if self._over or self.cancelled:
            raise StopIteration
        event = self._events.get()
        if isinstance(event, TokenRecord):
            return event
        self._over = True
        if event is None:
            raise StopIteration
        raise event

    def cancel(self) -> None:
        """End the sequence: nothing more is computed for it, and iterating ends. Callable from any thread."""
        if not self._cancelled.is_set():
            self._cancelled.set()
            self._tell(None)  # whoever waits in another thread goes on
            self._on_cancel(self)

    @property
    def cancelled(self) -> bool:
        """Whether ``cancel`` was called."""
        return self._cancelled.is_set()

    @property
    def ended(self) -> bool:
        """Whether no more records come."""
        return self._ended.is_set()

    def push(self, record: TokenRecord) -> None:
        """Give ``record`` to whoever iterates: for the one who runs the model."""
        self._tell(record)

    def end(self, error: BaseException | None = None) -> None:
        """No more records come, because of ``error`` if there is one."""
        self._ended.set()
        self._tell(error)
