"""Parsers: the text of an answer, taken apart as it comes.

Special tokens stand in the text as they are written. Those that mark no part have no meaning here and are dropped.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from cli.serve.parsing.calls import CallReader
from cli.serve.parsing.parts import Part, Splitter
from offload.text.tool_formats import ToolFormat

Schemas = Mapping[str, Any]  # of the arguments, by tool


class MarkedParser:
    """Thoughts between two marks, calls between two others, and text.

    ``think`` are the marks of thoughts (None: the model has none), ``opened`` whether the prompt ends in the first.
    Without ``tools`` calls are text; ``dropped`` are the special tokens of no meaning.
    """

    def __init__(
        self,
        *,
        think: tuple[str, str] | None = None,
        opened: bool = False,
        calls: ToolFormat | None = None,
        tools: Schemas | None = None,
        dropped: Sequence[str] = (),
    ) -> None:
        self.thinks, self.reasoning = think is not None, opened
        self._think, self._calls, self._tools = think or ("", ""), calls, tools or {}
        self._known = {*filter(None, self._think), *(calls.marks if calls else ())}
        self._splitter = Splitter([*self._known, *dropped])
        self._reader: CallReader | None = None  # within calls
        self._bare = calls is not None and calls.bare
        self._begun = not (think or self._bare)  # whether anything but blanks has come since the last mark

    def feed(self, text: str) -> list[Part]:
        """See Parser."""
        return [part for piece, is_mark in self._splitter.feed(text) for part in self._take(piece, is_mark)]

    def finish(self) -> list[Part]:
        """See Parser."""
        return [*self._take(self._splitter.finish(), False), *self._close()]

    def _take(self, piece: str, is_mark: bool) -> list[Part]:
        if is_mark and not (self._reader and self._calls and piece in self._calls.inner):
            return self._mark(piece) if piece in self._known else []
        if self._reader is not None:
            return list(self._reader.feed(piece))
        if not self._begun:
            piece = piece.lstrip()
            if self._calls and self._bare and not self.reasoning and piece[:1] in ("{", "["):
                self._reader = CallReader(self._calls, self._tools)
                return list(self._reader.feed(piece))
        if not piece:
            return []
        self._begun = True
        self._bare = self._bare and self.reasoning
        return [Part("reasoning" if self.reasoning else "text", piece)]

    def _mark(self, mark: str) -> list[Part]:
        calls = self._calls
        if mark in self._think:
            parts, self.reasoning, self._begun = self._close(), mark == self._think[0], False
            return parts
        if calls is not None and mark == calls.begin:
            parts, self._reader = self._close(), CallReader(calls, self._tools)
            return parts
        return self._close()

    def _close(self) -> list[Part]:
        """What is left of calls."""
        reader, self._reader, self._begun = self._reader, None, False
        parts = [] if reader is None else reader.finish()
        self._begun = any(part.kind == "text" for part in parts)
        return parts


class HarmonyParser:
    """gpt-oss: messages with headers, whose channel says what they are."""

    _MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>")

    def __init__(self, dropped: Sequence[str] = ()) -> None:
        self.thinks, self.reasoning = True, False
        self._splitter = Splitter([*self._MARKS, *dropped])
        self._header: str | None = ""  # None: within a message
        self._kind: Literal["text", "reasoning", "call"] = "text"
        self._empty = False  # a call without arguments so far

    def feed(self, text: str) -> list[Part]:
        """See Parser."""
        return [part for piece, is_mark in self._splitter.feed(text) for part in self._take(piece, is_mark)]

    def finish(self) -> list[Part]:
        """See Parser."""
        parts = self._take(self._splitter.finish(), False)
        if self._header and "<|channel|>" not in self._header:  # no message was begun: it is an answer all the same
            parts.append(Part("text", self._header))
        return [*parts, *self._close()]

    def _take(self, piece: str, is_mark: bool) -> list[Part]:
        if piece in ("<|end|>", "<|call|>", "<|return|>", "<|start|>"):
            parts, self._header = self._close(), ""
            return parts
        if self._header is not None:
            if piece != "<|message|>":
                self._header += piece
                return []
            to = re.search(r"to=(?:functions\.)?([^\s<]+)", self._header)
            self.reasoning = to is None and "<|channel|>analysis" in self._header
            self._kind = "call" if to else "reasoning" if self.reasoning else "text"
            self._header, self._empty = None, to is not None
            return [Part("call", name=to[1])] if to else []
        if is_mark or not piece:
            return []
        self._empty = False
        return [Part(self._kind, piece)]

    def _close(self) -> list[Part]:
        empty, self._empty, self.reasoning = self._empty, False, False
        return [Part("call", "{}")] if empty else []
