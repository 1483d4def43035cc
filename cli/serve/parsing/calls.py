"""Calls of tools as they are written: begun when their name is certain, their arguments given out as they come."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from cli.serve.parsing.parts import Part
from offload.text.tool_formats import BROKEN, ToolFormat

_OUTSIDE, _INSIDE = re.compile(r'["{}\[\]]'), re.compile(r'["\\]')  # of a string


class CallReader:
    """Calls written in ``way``, of which nothing but they and what is between them is fed.

    What has another shape than ``way.head`` is read when all of it has come, by ``way.parse`` and the parameters'
    schemas by tool, ``tools``; as text, if it is no call.
    """

    def __init__(self, way: ToolFormat, tools: Mapping[str, Any]) -> None:
        self._way, self._tools = way, tools
        self._text, self._given = "", 0
        self._object: _JsonObject | None = None  # the arguments that are being written

    def feed(self, text: str) -> Iterator[Part]:
        """What has become certain with ``text``."""
        self._text += text
        while True:
            if self._object is None:
                head = self._way.head.match(self._text, self._given)
                if head is None:
                    return
                self._given, self._object = head.end(), _JsonObject(head.end())
                yield Part("call", name=next(filter(None, head.groups())))
            over, end = self._object.read(self._text), self._object.end
            if end > self._given:
                yield Part("call", self._text[self._given : end])
                self._given = end
            if not over:
                return
            self._object = None

    def finish(self) -> list[Part]:
        """What there is besides, when no more comes."""
        rest = self._text[self._given :]
        if self._object is not None:  # cut off in the midst of arguments
            return [Part("call", rest)] if rest else []
        try:
            calls = self._way.parse(rest, self._tools)
        except BROKEN:  # what is left behind a call is what ended it
            return [] if self._given or not rest else [Part("text", rest)]
        return [part for call in calls for part in (Part("call", name=call.name), Part("call", call.arguments))]


class _JsonObject:
    """A JSON object that begins at ``end`` of a text that grows. ``end`` moves on to where it ends."""

    def __init__(self, end: int) -> None:
        self.end, self._depth, self._quoted = end, 0, False

    def read(self, text: str) -> bool:
        """Whether all of it has come."""
        while (found := (_INSIDE if self._quoted else _OUTSIDE).search(text, self.end)) is not None:
            mark = found[0]
            if mark == "\\":
                if found.end() == len(text):  # its other half is to come
                    self.end = found.start()
                    return False
                self.end = found.end() + 1
                continue
            self.end = found.end()
            if mark == '"':
                self._quoted = not self._quoted
            else:
                self._depth += 1 if mark in "{[" else -1
                if not self._depth:
                    return True
        self.end = len(text)
        return False
