"""A model that finds needles: its weights are put together by hand, so that what it says is known.

Tokens: a needle is a key and a value in one (``needle``), a question asks for a key (``question``), an answer says a
value (``answer``), and everything else is hay. Llama 4's form: three layers within chunks do nothing, the fourth,
without positions and over everything, looks for the key that the last token asks for and says the value that stands
with it.
"""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests import checkpoints

KEYS, VALUES = 20, 8
_FIRST_QUESTION = KEYS * VALUES
_FIRST_ANSWER = _FIRST_QUESTION + KEYS
_FIRST_HAY, VOCABULARY = _FIRST_ANSWER + VALUES, 256
_HIDDEN, _WIDTH = 128, 32
# Where in a hidden state things are: a needle's key and value, what is asked for, what is answered, and noise.
_KEY, _VALUE, _ASKED, _SAID, _NOISE = 0, KEYS, KEYS + VALUES, 2 * KEYS + VALUES, 2 * KEYS + 2 * VALUES


def needle(key: int, value: int) -> int:
    """The token that says that ``value`` belongs to ``key``."""
    return key * VALUES + value


def question(key: int) -> int:
    """The token that asks for ``key``."""
    return _FIRST_QUESTION + key


def answer(value: int) -> int:
    """The token that says ``value``."""
    return _FIRST_ANSWER + value


def haystack(tokens: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """A text of ``tokens`` tokens with a needle of each key, at depths spread over all of it, and their values."""
    chance = random.Random(seed)
    text = [chance.randrange(_FIRST_HAY, VOCABULARY) for _ in range(tokens)]
    values = [chance.randrange(VALUES) for _ in range(KEYS)]
    for key, value in enumerate(values):
        text[tokens * key // KEYS + chance.randrange(tokens // KEYS)] = needle(key, value)
    return text, values


def make_finder(dst: Path, context: int, chunk: int = 512) -> Path:
    """Save the model in ``dst``, made for ``context`` tokens and chunks of ``chunk``, and return ``dst``."""
    checkpoints.make(
        "llama4_text",
        dst,
        max_position_embeddings=context,
        attention_chunk_size=chunk,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=_WIDTH,
        num_local_experts=2,
        floor_scale=8192,
        dtype=torch.float32,
    )
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    file = next(dst.glob("*.safetensors"))
    weights = load_file(file)
    for name, weight in weights.items():
        weights[name] = torch.ones_like(weight) if "norm" in name else torch.zeros_like(weight)
    embeddings = weights["model.embed_tokens.weight"]
    embeddings[:, _NOISE:] = 0.3 * noise(VOCABULARY, _HIDDEN - _NOISE)
    for key in range(KEYS):
        for value in range(VALUES):
            embeddings[needle(key, value), _KEY + key] = 4.0
            embeddings[needle(key, value), _VALUE + value] = 4.0
        embeddings[question(key), _ASKED + key] = 6.0
    layer = "model.layers.3.self_attn."
    channels = torch.arange(KEYS)
    q, k, v, o = (weights[f"{layer}{name}_proj.weight"] for name in "qkvo")
    for head in range(2):
        q[head * _WIDTH + channels, _ASKED + channels] = 5.0
        o[_SAID + torch.arange(VALUES), head * _WIDTH + torch.arange(VALUES)] = 1.0
    k[channels, _KEY + channels] = 5.0
    k[:, _NOISE:] = 0.05 * noise(_WIDTH, _HIDDEN - _NOISE)
    v[torch.arange(VALUES), _VALUE + torch.arange(VALUES)] = 1.0
    for value in range(VALUES):
        weights["lm_head.weight"][answer(value), _SAID + value] = 1.0
    save_file({name: weight.to(torch.bfloat16) for name, weight in weights.items()}, file, {"format": "pt"})
    config = json.loads((dst / "config.json").read_text())
    dtype = "dtype" if "dtype" in config else "torch_dtype"
    (dst / "config.json").write_text(json.dumps({**config, dtype: "bfloat16"}))
    return dst
