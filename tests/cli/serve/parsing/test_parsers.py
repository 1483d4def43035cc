"""What models of each family write, whole and cut anywhere, comes to the same text, thoughts and calls."""

import json
import random
from collections.abc import Callable

import pytest

from cli.serve.parsing.parsers import HarmonyParser, MarkedParser
from cli.serve.parsing.parts import Parser, Part
from offload.text.tool_formats import (
    DEEPSEEK,
    DEEPSEEK_FENCED,
    HERMES,
    LLAMA,
    LLAMA_TAG,
    MISTRAL,
    MISTRAL_ARGS,
    ToolFormat,
    tool_format,
)

THINK = ("<think>", "</think>")
TOOLS = {
    "add": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    "say": {"type": "object", "properties": {"text": {"type": "string"}}},
}
ADD = ("add", {"a": 1, "b": -2})
SAY = ("say", {"text": "42"})


def marked(calls: ToolFormat, opened: bool = False) -> Callable[[], Parser]:
    dropped = ("<|eot|>", "<s>", *calls.inner)  # marks of a family are special tokens, too
    return lambda: MarkedParser(think=THINK, opened=opened, calls=calls, tools=TOOLS, dropped=dropped)


CASES: list[tuple[Callable[[], Parser], str, str, str, list[tuple[str, dict[str, object]]]]] = [
    # parser, what the model writes, its thoughts, its text, its calls
    (marked(HERMES), "Hello <b>world</b>", "", "Hello <b>world</b>", []),
    (marked(HERMES), "<think>\nhm <tool\n</think>\n\nYes", "hm <tool\n", "Yes", []),
    (marked(HERMES, opened=True), "hm\n</think>\nYes<|eot|>", "hm\n", "Yes", []),
    (
        marked(HERMES),
        'Let me.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": -2}}\n</tool_call>',
        "",
        "Let me.\n",
        [ADD],
    ),
    (
        marked(HERMES),
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": -2}"}</tool_call>\n'
        '<tool_call>{"name": "say", "arguments": {"text": "42"}}</tool_call>',
        "",
        "",
        [ADD, SAY],
    ),
    (
        marked(HERMES),
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n-2\n</parameter>\n</function>\n"
        "</tool_call>\n<tool_call>\n<function=say>\n<parameter=text>\n42\n</parameter>\n</function>\n</tool_call>",
        "",
        "",
        [ADD, SAY],
    ),
    (marked(HERMES), "<tool_call>\nnonsense\n</tool_call>!", "", "\nnonsense\n!", []),
    (marked(HERMES), '<tool_call>\n{"name": "add", "argu', "", '\n{"name": "add", "argu', []),
    (marked(MISTRAL), '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": -2}}]', "", "", [ADD]),
    (
        marked(MISTRAL_ARGS),
        'Well.[TOOL_CALLS]add[CALL_ID]x1y[ARGS]{"a": 1, "b": -2}[TOOL_CALLS]say{"text": "42"}',
        "",
        "Well.",
        [ADD, SAY],
    ),
    (
        marked(DEEPSEEK_FENCED),
        "<think>go</think>Now<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
        '{"a": 1, "b": -2}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>say\n```json\n'
        '{"text": "42"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "go",
        "Now",
        [ADD, SAY],
    ),
    (
        marked(DEEPSEEK),
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1, "b": -2}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜>",
        "",
        "",
        [ADD],
    ),
    (marked(LLAMA), '[add(a=1, b=-2), say(text="42")]', "", "", [ADD, SAY]),
    (marked(LLAMA), '<|python_start|>[say(text="42")]<|python_end|>', "", "", [SAY]),
    (marked(LLAMA), '{"name": "add", "parameters": {"a": 1, "b": -2}}', "", "", [ADD]),
    (
        marked(LLAMA_TAG),
        '<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": -2}}; {"name": "say", "parameters": {"text": "42"}}',
        "",
        "",
        [ADD, SAY],
    ),
    (
        marked(DEEPSEEK),
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1, "b": -2}<｜tool▁call▁end｜>\n'
        '<｜tool▁call▁begin｜>say<｜tool▁sep｜>{"text": "42"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        "",
        "",
        [ADD, SAY],
    ),
    (
        marked(MISTRAL),
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": -2}}, {"name": "say", "arguments": {"text": "42"}}]',
        "",
        "",
        [ADD, SAY],
    ),
    (HarmonyParser, "<|channel|>commentary to=functions.now<|message|><|call|>", "", "", [("now", {})]),
    (marked(LLAMA), "[1] is a reference", "", "[1] is a reference", []),
    (marked(LLAMA), '[__import__("os").system("ls")]', "", '[__import__("os").system("ls")]', []),
    (marked(LLAMA), "[" * 5000, "", "[" * 5000, []),
    (marked(LLAMA), "See {this}", "", "See {this}", []),
    (
        HarmonyParser,
        "<|channel|>analysis<|message|>Simple.<|end|><|start|>assistant<|channel|>final<|message|>Yes <b>",
        "Simple.",
        "Yes <b>",
        [],
    ),
    (
        HarmonyParser,
        "<|channel|>analysis<|message|>Add.<|end|><|start|>assistant<|channel|>commentary to=functions.add "
        '<|constrain|>json<|message|>{"a": 1, "b": -2}<|call|>',
        "Add.",
        "",
        [ADD],
    ),
    (
        HarmonyParser,
        "<|channel|>commentary<|message|>First I add.<|end|><|start|>assistant to=functions.add<|channel|>commentary "
        'json<|message|>{"a": 1, "b": -2}',
        "",
        "First I add.",
        [ADD],
    ),
    (HarmonyParser, "no channel at all", "", "no channel at all", []),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[1][:40])
def test_what_a_model_writes_comes_apart_the_same_wherever_it_is_cut(
    case: tuple[Callable[[], Parser], str, str, str, list[tuple[str, dict[str, object]]]],
) -> None:
    make, written, thoughts, text, calls = case
    chance = random.Random(written)
    for size in (len(written), 1, 3, 0, 0, 0):
        parser, parts, left = make(), [], written
        while left:
            cut = size or chance.randint(1, 12)
            parts += parser.feed(left[:cut])
            left = left[cut:]
        parts += parser.finish()
        assert "".join(part.text for part in parts if part.kind == "reasoning") == thoughts
        assert "".join(part.text for part in parts if part.kind == "text") == text
        assert [(name, json.loads(arguments)) for name, arguments in called(parts)] == calls


def called(parts: list[Part]) -> list[tuple[str, str]]:
    """The calls in ``parts``, put together."""
    found: list[tuple[str, str]] = []
    for part in parts:
        if part.kind == "call" and part.name:
            found.append((part.name, ""))
        elif part.kind == "call":
            found[-1] = (found[-1][0], found[-1][1] + part.text)
    return found


TEXT = 'a "{quoted}" \\ back [slash] </b>'
SAYS = json.dumps({"text": TEXT})


@pytest.mark.parametrize(
    ("make", "written"),
    [
        (marked(HERMES), '<tool_call>\n{"name": "say", "arguments": %s}\n</tool_call>'),
        (marked(LLAMA), '{"name": "say", "parameters": %s}'),
        (marked(LLAMA_TAG), '<|python_tag|>{"type": "function", "name": "say", "parameters": %s}'),
        (marked(MISTRAL), '[TOOL_CALLS][{"name": "say", "arguments": %s}]'),
        (marked(MISTRAL_ARGS), "[TOOL_CALLS]say[ARGS]%s"),
        (marked(DEEPSEEK), "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>say<｜tool▁sep｜>%s<｜tool▁call▁end｜>"),
        (
            marked(DEEPSEEK_FENCED),
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>say\n```json\n%s\n```",
        ),
        (HarmonyParser, "<|channel|>commentary to=functions.say <|constrain|>json<|message|>%s<|call|>"),
    ],
    ids=["hermes", "llama", "llama-tag", "mistral", "mistral-args", "deepseek", "deepseek-fenced", "harmony"],
)
def test_arguments_are_given_out_while_they_are_written(make: Callable[[], Parser], written: str) -> None:
    before, after = written.split("%s")
    parser, parts = make(), []
    for letter in before + SAYS[:9]:
        parts += parser.feed(letter)
    assert called(parts) == [("say", SAYS[:9])], "the name is certain before the arguments, each letter at once"
    for letter in SAYS[9:] + after:
        parts += parser.feed(letter)
    parts += parser.finish()
    assert called(parts) == [("say", SAYS)] and all(part.kind == "call" for part in parts)
    assert max(len(part.text) for part in parts) <= 4, "but for what a mark may begin with"


def test_arguments_that_are_cut_off_stay_cut_off() -> None:
    parser = marked(HERMES)()
    parts = [*parser.feed('<tool_call>{"name": "say", "arguments": {"text": "a\\'), *parser.finish()]
    assert called(parts) == [("say", '{"text": "a\\')]


def test_text_without_a_mark_is_not_held_back() -> None:
    parser = marked(HERMES)()
    assert [part.text for part in parser.feed("Hello <to")] == ["Hello "]
    assert [part.text for part in parser.feed("day")] == ["<today"]


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{% for m in messages %}<|im_start|>… <tool_call>", "hermes"),
        ("[AVAILABLE_TOOLS] … [TOOL_CALLS]", "mistral"),
        ("<｜tool▁calls▁begin｜> ```json", "deepseek"),
        ("<|header_start|> {{ tools }}", "llama"),
        ("<|start_header_id|> {{ tools }} <|python_tag|>", "llama"),
        ("<|channel|>analysis<|message|>", "harmony"),
        ("{{ messages }}", "hermes"),
    ],
)
def test_the_way_of_a_model_is_read_from_its_template(template: str, found: str) -> None:
    assert tool_format(template).name == found
