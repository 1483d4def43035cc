"""A tiny tokenizer of every kind that models come with, hostile where it can be.

Vocabularies hold whole words, halves of characters, bytes that are no UTF-8, spaces at every place, the
replacement character itself, special tokens and added ones that are not special.
"""

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|eot|>")
_ADDED = ("<tool>", " a b ", "naïve", "n't")
_WORDS = (
    "a",
    "b",
    "n",
    "the",
    "'",
    "s",
    ".",
    "?",
    "!",
    ",",
    "n't",
    "'m",
    "'s",
    "'ve",
    "re",
    "\n",
    "é",
    "字",
    "😀",
    "\ufffd",
)
_BYTES = (
    *(bytes([byte]) for byte in (0x00, 0x0A, 0x20, 0x41, 0x80, 0x98, 0x9F, 0xA0, 0xAD, 0xBF, 0xC0, 0xC3, 0xE2, 0xED)),
    *(bytes([byte]) for byte in (0xEF, 0xF0, 0xF4, 0xF5, 0xFF)),
    *(
        b" the",
        b" one",
        b" ",
        b".",
        "字".encode(),
        "😀".encode()[:2],
        "😀".encode()[2:],
        b" x\xf0",
        b"\x9f\x98",
        b"\x80 y",
    ),
    *("é".encode()[:1], "é".encode()[1:], "\ufffd".encode(), b"\xef\xbf", b"\xbd", b"\xff\xfe", "😀😀".encode()[:6]),
)


def byte_characters() -> dict[int, str]:
    """The character that a byte-level vocabulary writes each byte as."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    others = iter(sorted(character for character in alphabet if ord(character) > 255))
    return {byte: chr(byte) if chr(byte) in alphabet else next(others) for byte in range(256)}


def byte_level(pieces: tuple[bytes, ...] = _BYTES, **settings: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose tokens are ``pieces``, in order."""
    characters = byte_characters()
    tokenizer = Tokenizer(
        models.BPE({"".join(characters[byte] for byte in piece): i for i, piece in enumerate(pieces)}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _made(tokenizer, **settings)


def metaspace_bytes(**settings: Any) -> PreTrainedTokenizerFast:
    """As SentencePiece's BPE with byte fallback is converted: Llama 2, Mixtral."""
    words = [*_WORDS, *("▁" + word for word in _WORDS), "▁", "▁▁", "▁▁▁"]
    tokenizer = Tokenizer(
        models.BPE(_vocabulary(["<unk>", *_byte_tokens(), *words]), [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _made(tokenizer, **settings)


def metaspace(**settings: Any) -> PreTrainedTokenizerFast:
    """Metaspace alone, and a dummy space in front of the text."""
    words = [*_WORDS, *("▁" + word for word in _WORDS), "▁", "▁▁", "a▁b"]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((word, -1.0) for word in words)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _made(tokenizer, **settings)


def unigram_bytes(**settings: Any) -> PreTrainedTokenizerFast:
    """Unigram with byte fallback: Gemma and T5 kinds."""
    words = [*_byte_tokens(), *_WORDS, *("▁" + word for word in _WORDS), "▁"]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((word, -1.0) for word in words)], 0, True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return _made(tokenizer, **settings)


def word_piece(**settings: Any) -> PreTrainedTokenizerFast:
    """BERT's, with the clean-up of spaces in its decoder and after it."""
    words = ["[UNK]", *_WORDS, *("##" + word for word in _WORDS), "do", "not", " do not"]
    tokenizer = Tokenizer(models.WordPiece(_vocabulary(words), unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return _made(tokenizer, **{"clean_up_tokenization_spaces": True, **settings})


def word_ends(**settings: Any) -> PreTrainedTokenizerFast:
    """GPT-1's: the end of a word is marked."""
    words = [*_WORDS, *(word + "</w>" for word in _WORDS), "</w>"]
    tokenizer = Tokenizer(models.BPE(_vocabulary(words), [], end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder()
    return _made(tokenizer, **settings)


def word_level(**settings: Any) -> PreTrainedTokenizerFast:
    """No decoder: tokens are words."""
    tokenizer = Tokenizer(models.WordLevel(_vocabulary(["[UNK]", *_WORDS, "", " "]), unk_token="[UNK]"))
    return _made(tokenizer, **{"clean_up_tokenization_spaces": True, **settings})


def replaced_after_fuse(**settings: Any) -> PreTrainedTokenizerFast:
    """A pattern over several tokens, replaced once all are joined; a regular expression before."""
    words = [*_WORDS, *_byte_tokens()[:70], "▁", "ab", "ba", "aba"]
    tokenizer = Tokenizer(models.WordLevel(_vocabulary(words), unk_token="a"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex("▁+"), " "),
            decoders.ByteFallback(),
            decoders.Strip("?", 1, 0),
            decoders.Fuse(),
            decoders.Replace("aba", "<>"),
            decoders.Strip("'", 3, 0),
        ]
    )
    return _made(tokenizer, **settings)


KINDS: dict[str, Callable[..., PreTrainedTokenizerFast]] = {
    "byte-level BPE": byte_level,
    "Metaspace with byte fallback": metaspace_bytes,
    "Unigram with byte fallback": unigram_bytes,
    "Unigram, Metaspace": metaspace,
    "WordPiece": word_piece,
    "BPE with word ends": word_ends,
    "word level": word_level,
    "replaced after all is joined": replaced_after_fuse,
}


def with_bos(tokenizer: PreTrainedTokenizerFast, content: str) -> PreTrainedTokenizerFast:
    """``tokenizer``, which from now on begins a text with token ``content``."""
    backend = tokenizer.backend_tokenizer
    token = tokenizer.convert_tokens_to_ids(content)
    backend.post_processor = processors.TemplateProcessing(f"{content} $A", None, [(content, token)])
    tokenizer.bos_token = content
    return tokenizer


def _byte_tokens() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _vocabulary(words: list[str]) -> dict[str, int]:
    return {word: place for place, word in enumerate(dict.fromkeys(words))}


def _made(tokenizer: Tokenizer, **settings: Any) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
    made.add_tokens([AddedToken(content, special=False, normalized=False) for content in _ADDED])
    special = [AddedToken(content, special=True, normalized=False) for content in SPECIAL]
    made.add_special_tokens({"extra_special_tokens": special})
    return made
