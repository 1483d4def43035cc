"""Tokens to text as they come: the pieces, joined, are what the tokenizer makes of all tokens at once.

A tokenizer's decoder is a chain of stages that each rewrite a list of strings. What a later token may still
change is held back, however long that is: the first bytes of a character, a run of byte tokens (which becomes
one replacement character per byte if the run is no UTF-8 as a whole), the space before a full stop where
spaces are cleaned up. Everything else comes out at once. A token costs time in proportion to its own text.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from typing import Any, Protocol

from tokenizers import Regex, decoders, pre_tokenizers
from transformers import PreTrainedTokenizerBase, TokenizersBackend

from offload.text.tokenizer_files import TokenizersErrors

# What ``clean_up_tokenization`` of transformers replaces, in its order.
_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
_ERRORS = TokenizersErrors("the answer cannot be shown as text")
_BYTE_TOKEN = re.compile(r"<0x(?:[0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")


class Detokenizer:
    """One text, token by token."""

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        stages = _stages_of(tokenizer)
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self._stages = () if stages is None else tuple(stages)
        self._window = _Window(tokenizer, skip_special_tokens) if stages is None else None
        if stages is not None:
            self._backend = tokenizer.backend_tokenizer
            added = self._backend.get_added_tokens_decoder().values() if skip_special_tokens else ()
            self._skipped = frozenset(token.content for token in added if token.special)

    def push(self, token: int) -> str:
        """Text that has become certain with ``token``."""
        with _ERRORS:
            if self._window is not None:
                return self._window.push(token)
            text = self._backend.id_to_token(token)
            if text is None or text in self._skipped:
                return ""
            return _run(self._stages, [text], last=False)

    def pending(self) -> str:
        """Text that is held back, as it would be if no more tokens came."""
        with _ERRORS:
            if self._window is not None:
                return self._window.pending()
            return _run([copy(stage) for stage in self._stages], [], last=True)


class _Stage(Protocol):
    """One rewriting step. Its state is of immutable values only, so that a shallow copy is one of its own."""

    def push(self, text: str) -> Sequence[str]:
        """What ``text`` makes certain."""

    def finish(self) -> Sequence[str]:
        """What was held back."""


def _run(stages: Iterable[_Stage], texts: Sequence[str], *, last: bool) -> str:
    for stage in stages:
        made = [piece for text in texts for piece in stage.push(text)]
        texts = [*made, *stage.finish()] if last else made
    return texts[0] if len(texts) == 1 else "".join(texts)


class _Each:
    """Each string by itself; the first by ``first``."""

    def __init__(self, rewrite: Callable[[str], str], first: Callable[[str], str] | None = None) -> None:
        self._rewrite, self._next = rewrite, first or rewrite

    def push(self, text: str) -> Sequence[str]:
        rewrite, self._next = self._next, self._rewrite
        return (rewrite(text),)

    def finish(self) -> Sequence[str]:
        return ()


class _Bytes:
    """Byte-level BPE: each character of a token stands for a byte."""

    def __init__(self) -> None:
        self._tail = b""

    def push(self, text: str) -> Sequence[str]:
        try:
            data = self._tail + bytes(map(_byte_table().__getitem__, text))
        except KeyError:  # a token that is no bytes: its text as it is
            data = self._tail + text.encode()
        found, used = codecs.utf_8_decode(data, "replace", False)
        self._tail = data[used:]
        return (found,)

    def finish(self) -> Sequence[str]:
        return (self._tail.decode(errors="replace"),)


class _ByteRuns:
    """Byte fallback: a run of tokens such as ``<0xE2>`` is text if the whole of it is UTF-8."""

    def __init__(self) -> None:
        self._run = b""

    def push(self, text: str) -> Sequence[str]:
        if _BYTE_TOKEN.fullmatch(text):
            self._run += bytes((int(text[3:5], 16),))
            return ()
        made = (*self.finish(), text)
        self._run = b""
        return made

    def finish(self) -> Sequence[str]:
        if not self._run:
            return ()
        try:
            return (self._run.decode(),)
        except UnicodeDecodeError:
            return ("\ufffd",) * len(self._run)


class _WordEnds:
    """A suffix such as ``</w>`` is a space, and nothing at the end of the text."""

    def __init__(self, suffix: str) -> None:
        self._suffix, self._last = suffix, None

    _last: str | None

    def push(self, text: str) -> Sequence[str]:
        before, self._last = self._last, text
        return () if before is None else (before.replace(self._suffix, " "),)

    def finish(self) -> Sequence[str]:
        return () if self._last is None else (self._last.replace(self._suffix, ""),)


class _Replaced:
    """Every ``pattern`` in the text as a whole, wherever the strings it comes in are cut."""

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern, self._content, self._held = pattern, content, ""

    def push(self, text: str) -> Sequence[str]:
        *whole, rest = (self._held + text).split(self._pattern)
        size = min(len(self._pattern) - 1, len(rest))
        while not self._pattern.startswith(rest[len(rest) - size :]):
            size -= 1
        self._held = rest[len(rest) - size :]
        return (self._content.join([*whole, rest[: len(rest) - size]]),)

    def finish(self) -> Sequence[str]:
        return (self._held,)


class _StrippedStart:
    """Without the first ``count`` characters of the text as far as they are ``content``."""

    def __init__(self, content: str, count: int) -> None:
        self._content, self._left = content, count

    def push(self, text: str) -> Sequence[str]:
        while text and self._left:
            if not text.startswith(self._content):
                self._left = 0
                break
            text, self._left = text[len(self._content) :], self._left - 1
        return (text,)

    def finish(self) -> Sequence[str]:
        return ()


class _Window:
    """For a tokenizer of another make: the last few tokens are decoded again with each new one.

    Exact only as far as a later token changes nothing but an unfinished character: no text can be known to be
    certain where nothing is known of how it is made.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self._ids: list[int] = []
        self._read = 0  # tokens of the window whose text was given out

    def push(self, token: int) -> str:
        self._ids.append(token)
        new = self.pending()
        if not new or new.endswith("\ufffd"):
            return ""
        self._ids, self._read = self._ids[self._read :], len(self._ids) - self._read
        return new

    def pending(self) -> str:
        given, whole = self._decode(self._ids[: self._read]), self._decode(self._ids)
        return whole[len(given) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens))


def _stages_of(tokenizer: Any) -> list[_Stage] | None:
    """The stages of ``tokenizer.decode``; None if it has any that this module does not know."""
    kind, base = type(tokenizer), PreTrainedTokenizerBase
    if not isinstance(tokenizer, TokenizersBackend):
        return None
    if kind.decode is not base.decode or kind._decode is not TokenizersBackend._decode:
        return None
    cleans = tokenizer.clean_up_tokenization_spaces
    if cleans and kind.clean_up_tokenization is not base.clean_up_tokenization:
        return None
    backend = tokenizer.backend_tokenizer
    if backend.decoder is None:
        stages: list[_Stage] | None = [_Each(lambda text: f" {text}", first=str)]
    else:
        stated = json.loads(backend.decoder.__getstate__())
        stages = _chain(stated["decoders"] if stated["type"] == "Sequence" else [stated])
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    if stages is not None and cleans and (forced or type(backend.model).__name__ != "BPE"):
        stages += [_Replaced(*pair) for pair in _CLEAN_UP]
    return stages


def _chain(stated: Sequence[dict[str, Any]]) -> list[_Stage] | None:
    stages: list[_Stage] = []
    whole = False  # whether a stage before has joined the strings to one
    for values in stated:
        kind = values["type"]
        if kind == "Fuse":
            whole = True
            continue
        stage = _of_whole(values) if whole else _of_strings(values)
        if stage is None:
            return None
        stages.append(stage)
        whole = whole or kind == "ByteLevel"
    return stages


def _of_strings(values: dict[str, Any]) -> _Stage | None:
    """The stage that does to a list of strings what the decoder of these ``values`` does."""
    match values["type"]:
        case "ByteLevel":
            return _Bytes()
        case "ByteFallback":
            return _ByteRuns()
        case "BPEDecoder":
            return _WordEnds(values["suffix"])
        case "WordPiece":
            word_piece = decoders.WordPiece(values["prefix"], values["cleanup"])
            return _Each(lambda text: word_piece.decode(["", text]), first=lambda text: word_piece.decode([text]))
        case "Metaspace":
            space = decoders.Metaspace(values["replacement"], values["prepend_scheme"])
            return _Each(lambda text: space.decode(["", text]), first=lambda text: space.decode([text]))
        case "Replace":
            pattern = values["pattern"]
            replace = decoders.Replace(pattern.get("String") or Regex(pattern["Regex"]), values["content"])
            return _Each(lambda text: replace.decode([text]))
        case "Strip":
            strip = decoders.Strip(values["content"], values["start"], values["stop"])
            return _Each(lambda text: strip.decode([text]))
    return None


def _of_whole(values: dict[str, Any]) -> _Stage | None:
    """The same where all strings have been joined to one before."""
    match values:
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": content} if pattern:
            return _Replaced(pattern, content)
        case {"type": "Strip", "content": content, "start": count, "stop": 0}:
            return _StrippedStart(content, count)
    return None


_TABLE: dict[str, int] = {}


def _byte_table() -> dict[str, int]:
    """Which byte each character of a byte-level vocabulary stands for: printable ones of Latin-1 for
    themselves, the others in order for what comes after U+00FF."""
    if not _TABLE:
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        itself = {ord(character) for character in alphabet if ord(character) < 256}
        others = iter(sorted(character for character in alphabet if ord(character) > 255))
        _TABLE.update({chr(byte) if byte in itself else next(others): byte for byte in range(256)})
    return _TABLE
