"""Arguments as text."""

import pytest

from cli.options.typed import typed_text, typed_texts
from quant.errors import InputError


def test_text_is_text() -> None:
    for text in ("", "plain", "é 字 😀"):
        assert typed_text(text) == text
    assert typed_text(None) is None
    assert typed_texts(None) == []


def test_bytes_that_the_locale_does_not_know_are_utf8() -> None:
    ascii_locale = "é 字".encode().decode("ascii", "surrogateescape")
    assert typed_text(ascii_locale) == "é 字"
    assert typed_texts([ascii_locale, "a"]) == ["é 字", "a"]


def test_others_are_refused() -> None:
    with pytest.raises(InputError, match="byte 3 of it is 0xe9"):
        typed_text("caf\udce9")
