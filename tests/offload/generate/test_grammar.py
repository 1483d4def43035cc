"""Random logits that follow a grammar: whatever they say, the text is what the grammar allows."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from transformers import AutoTokenizer

from offload.generate.grammar import ANY_JSON, Grammars, json_grammar, lark_grammar
from offload.generate.sampling import Sampler
from offload.records import Sampling
from quant.errors import InputError, UsageError

EOS = frozenset({1, 4})


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> Grammars:
    return Grammars(tokenizer, 4096, EOS)


def written(tokenizer: Any, grammars: Grammars, grammar: str, seed: int, most: int, favour: str = "") -> str | None:
    """A text of random logits by ``grammar``; None if it has not ended after ``most`` tokens."""
    chance = torch.Generator().manual_seed(seed)
    sampler = Sampler(Sampling(temperature=1.0, seed=seed, grammar=grammar), grammars)
    ids: list[int] = [0]
    liked = tokenizer(favour, add_special_tokens=False).input_ids
    for _ in range(most):
        logits = torch.randn(4096, generator=chance) * 2
        logits[liked] += 9
        ids.append(sampler.pick(logits, ids))
        if ids[-1] in EOS:
            return str(tokenizer.decode(ids[1:-1]))
    return None


def schema_of(chance: random.Random, depth: int = 2) -> dict[str, Any]:
    """A random JSON Schema."""
    kinds: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "boolean"},
        lambda: {"type": "null"},
        lambda: {"type": "integer", "minimum": chance.randint(-50, 0), "maximum": chance.randint(1, 2000)},
        lambda: {"type": "number", "minimum": 0, "maximum": 10},
        lambda: {"type": "string", "maxLength": chance.randint(1, 12)},
        lambda: {"enum": chance.sample(["red", "green", 7, None, "ein Wort", "\\", '"'], 3)},
        lambda: {"type": "string", "pattern": "^[a-f]{2,5}$"},
        lambda: {"const": chance.choice(["x", 3, True])},
    ]
    if depth:
        kinds += 2 * [
            lambda: {
                "type": "array",
                "items": schema_of(chance, depth - 1),
                "minItems": chance.randint(0, 1),
                "maxItems": chance.randint(1, 3),
            },
            lambda: {"anyOf": [schema_of(chance, depth - 1), schema_of(chance, depth - 1)]},
            lambda: _object(chance, depth),
        ]
    return chance.choice(kinds)()


def _object(chance: random.Random, depth: int) -> dict[str, Any]:
    names = chance.sample(["name", "größe", "n", "tags", "a b"], chance.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: schema_of(chance, depth - 1) for name in names},
        "required": names[: chance.randint(0, len(names))],
        "additionalProperties": False,
    }


def test_every_finished_answer_is_valid_by_its_schema(tokenizer: Any, grammars: Grammars) -> None:
    finished = 0
    for seed in range(200):
        schema = schema_of(random.Random(seed))
        text = written(tokenizer, grammars, json_grammar(schema), seed, most=120, favour='",]}0 1')
        if text is not None:
            jsonschema.validate(json.loads(text), schema)
            finished += 1
    assert finished > 150


def test_any_object_is_an_object_and_nothing_else(tokenizer: Any, grammars: Grammars) -> None:
    found = [written(tokenizer, grammars, json_grammar(ANY_JSON), seed, most=80, favour='"}') for seed in range(10)]
    done = [json.loads(text) for text in found if text is not None]
    assert len(done) > 5 and all(isinstance(value, dict) for value in done)


def test_the_text_may_end_only_where_its_grammar_is_complete(tokenizer: Any, grammars: Grammars) -> None:
    sampler = Sampler(Sampling(grammar=json_grammar({"const": True})), grammars)
    ids: list[int] = [0]
    logits = torch.zeros(4096)
    logits[list(EOS)] = 50.0
    while ids[-1] not in EOS:
        ids.append(sampler.pick(logits, ids))
    assert tokenizer.decode(ids[1:-1]) == "true"


@pytest.mark.parametrize(
    "schema", [{"type": "nothing"}, {"type": "string", "pattern": "(?=a)b"}, {"$ref": "http://x/y"}]
)
def test_a_schema_that_cannot_be_kept_to_is_refused(grammars: Grammars, schema: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="grammar cannot be followed: "):
        grammars.matcher(json_grammar(schema))


def test_blanks_come_to_an_end(tokenizer: Any, grammars: Grammars) -> None:
    text = written(tokenizer, grammars, json_grammar({"type": "array", "maxItems": 0}), 0, most=40, favour=" \n")
    assert text is not None and json.loads(text) == []


def test_a_special_token_is_named_by_its_number(tokenizer: Any, grammars: Grammars) -> None:
    eot = tokenizer.convert_tokens_to_ids("<|header_start|>")
    sampler = Sampler(Sampling(grammar=lark_grammar(f'start: <[{eot}]> "x"')), grammars)
    assert sampler.pick(torch.randn(4096), [0]) == eot


def test_a_grammar_contradicts_going_on_after_the_end() -> None:
    with pytest.raises(UsageError, match="contradict"):
        Sampling(grammar=json_grammar(ANY_JSON), ignore_eos=True)
    with pytest.raises(UsageError, match="session"):
        Sampler(Sampling(grammar=json_grammar(ANY_JSON)))
