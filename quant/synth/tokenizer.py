"""A tokenizer for models with random weights: every byte is a token, and every other id decodes to a made-up
word.

So any text can be encoded within any vocabulary of 256 or more, and whatever is generated can be read.
"""

import json
from pathlib import Path

from quant.output_file import write_file

_SYLLABLES = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwxyz" for vowel in "aeiou"]
_CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
MIN_VOCAB = 256


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and a chat template for ``vocab_size`` ids, 256 or more.

    Raises OutputError."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map(_word, range(vocab_size - MIN_VOCAB))]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_file(folder / "tokenizer.json", tokenizer.to_str(pretty=False).encode())
    write_file(folder / "tokenizer_config.json", json.dumps(settings, indent=2).encode() + b"\n")
    write_file(folder / "chat_template.jinja", _CHAT_TEMPLATE.encode())


def _word(number: int) -> str:
    """A word for ``number``, with the sign that stands for a space before it; no two are alike."""
    syllables = []
    number += len(_SYLLABLES)  # two syllables at least
    while number:
        number, rest = divmod(number, len(_SYLLABLES))
        syllables.append(_SYLLABLES[rest])
    return "Ġ" + "".join(reversed(syllables))
