"""Parts of an answer: what is said, what is thought before, and which tools are called."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Part:
    """Text or thoughts that go on; or a call: one with a ``name`` begins it, those that follow are more of its
    arguments, JSON text."""

    kind: Literal["text", "reasoning", "call"]
    text: str = ""
    name: str = ""


class Parser(Protocol):
    """Takes the text of one answer apart as it comes. ``thinks``: whether there may be thoughts in it; ``reasoning``:
    whether it is in the midst of them."""

    thinks: bool
    reasoning: bool

    def feed(self, text: str) -> Sequence[Part]:
        """What has become certain with ``text``."""

    def finish(self) -> Sequence[Part]:
        """What was held back, when no more comes."""


class Splitter:
    """Text as it comes, cut at markers; the beginning of one is held back until it is certain."""

    def __init__(self, markers: Sequence[str]) -> None:
        self._markers = [marker for marker in markers if marker]
        self._held = ""

    def feed(self, text: str) -> Iterator[tuple[str, bool]]:
        """Pieces, and whether each is a marker."""
        text = self._held + text
        while True:
            found = [(at, -len(marker), marker) for marker in self._markers if (at := text.find(marker)) >= 0]
            if not found:
                break
            at, _, marker = min(found)
            if at:
                yield text[:at], False
            yield marker, True
            text = text[at + len(marker) :]
        starts = (size for marker in self._markers for size in range(1, len(marker)) if text.endswith(marker[:size]))
        end = len(text) - max(starts, default=0)
        self._held = text[end:]
        if end:
            yield text[:end], False

    def finish(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return held
