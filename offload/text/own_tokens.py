"""OwnTokens: the tokens that answers were made of, for the prompts that go on from them.

The next prompt of a conversation has the answer before as text, and a tokenizer may cut that text in another way than
the model did, or cut what stands before it otherwise once something follows: then all that the KV cache holds of the
answer is of no use, and the model reads its own words as it has not said them. So where a prompt has the same text
between the same special tokens as a text that was run, it gets the tokens of that text. The prompt still decodes to
what the chat template has put; only where its text is cut differs.

Whatever the two texts have else is compared token by token, and only as far as they are alike is anything taken over. A
special token ends what may be cut otherwise: tokenizers cut text at those before they look at it.
"""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from offload.batch.token_ids import common, frozen

_MOST_TEXTS, _MOST_TOKENS = 64, 1 << 20  # 4 MiB
_DROPPED = 4  # tokens at an answer's end that templates trim
_GLANCE = 24  # tokens by which texts that go on differently are told apart without reading all of them
_UNKNOWN = "\ufffd"  # what bytes decode to that are no character: other bytes do, too

_Ids = npt.NDArray[np.int32]


class OwnTokens:
    """The latest texts, prompts with their answers, of a model with ``tokenizer``. Callable from any thread."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known = len(tokenizer)
        made = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = np.array(sorted(token for token, one in made.items() if one.special), dtype=np.int32)
        self._texts: list[_Ids] = []  # the latest last
        self._lock = threading.Lock()

    def remember(self, tokens: Sequence[int]) -> None:
        """``tokens`` are a prompt, or one gone on with, and its answer."""
        new = frozen(tokens)
        with self._lock:
            self._texts = [text for text in self._texts if not _begins(new, text)]
            self._texts.append(new)
            while len(self._texts) > _MOST_TEXTS or sum(map(len, self._texts)) > _MOST_TOKENS:
                del self._texts[0]

    def as_said(self, ids: list[int], most: int) -> list[int]:
        """``ids`` of a conversation, with the tokens of answers in it as the model chose them; as they are if that made
        them more than ``most``."""
        with self._lock:
            texts = self._texts[::-1]
        given = np.asarray(ids, dtype=np.int32)
        found = [merged for text in texts if (merged := self._merged(text, given)) is not None]
        reach, best = max(found, key=lambda pair: pair[0], default=(0, given))
        return best.tolist() if reach and len(best) <= most else ids

    def _merged(self, said: _Ids, given: _Ids) -> tuple[int, _Ids] | None:
        """How many tokens of ``said`` a prompt can begin with that decodes as ``given`` does, and that prompt; None if
        there is nothing to change."""
        mine, theirs, start = 0, 0, -1  # up to where both have the same text, and from where on not the same tokens
        while True:
            alike = common(said[mine:], given[theirs:])
            mine, theirs = mine + alike, theirs + alike
            if mine == len(said) or theirs == len(given):
                break
            begin = self._before(given[:theirs])
            end = self._after(given, theirs)
            if end is None:  # what the answer is to follow
                break
            first = mine - (theirs - begin)
            last = self._after(said, mine) or len(said)
            count = self._same_text(said[first:last], given[begin : end + 1], mine - first)
            if not count:
                break
            start = first if start < 0 else start
            mine, theirs = first + count, end
            if mine < last:
                break
        found = np.concatenate([said[:mine], given[theirs:]])
        same = start >= 0 and self._text(found[start : mine + 1]) == self._text(given[start : theirs + 1])
        return (mine, found) if same else None

    def _same_text(self, said: _Ids, given: _Ids, alike: int) -> int:
        """How many tokens of ``said``, all or nearly all, have the text of ``given`` but its last, a special token, and
        before it; both begin with the same ``alike`` tokens. 0 if there is no such number, or no more than ``alike``.

        What a token is decoded to may depend on its neighbours, so those stay with it. Tokens without a text,
        such as those of pictures, are equal to none but themselves."""
        if max(said[alike:].max(initial=0), given[alike:].max(initial=0)) >= self._known:
            return 0
        glance = max(0, alike - 2)
        one, other = (self._text(ids[glance : glance + _GLANCE]).rstrip(_UNKNOWN) for ids in (said, given[:-1]))
        if not one.startswith(other) and not other.startswith(one):
            return 0
        text = self._text(given)
        if _UNKNOWN in text:
            return 0
        counts = range(len(said), max(alike, len(said) - _DROPPED - 1), -1)
        return next((count for count in counts if self._text(np.append(said[:count], given[-1])) == text), 0)

    def _text(self, ids: _Ids) -> str:
        text: str = self._tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _before(self, ids: _Ids) -> int:
        """Where the last special token of ``ids`` is, 0 if there is none."""
        places = np.flatnonzero(np.isin(ids, self._special))
        return int(places[-1]) if len(places) else 0

    def _after(self, ids: _Ids, place: int) -> int | None:
        """Where the first special token is from ``place`` on."""
        places = np.flatnonzero(np.isin(ids[place:], self._special))
        return place + int(places[0]) if len(places) else None


def _begins(new: _Ids, text: _Ids) -> bool:
    """Whether ``new`` begins with all of ``text``."""
    end = len(text)
    return end <= len(new) and (not end or (new[end - 1] == text[-1] and common(text, new) == end))
