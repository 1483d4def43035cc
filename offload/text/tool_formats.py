"""How families of models write a call of a tool: what is found in a text, and grammars of nothing else.

Which family's way a model has is read from its chat template, which is what taught it.
"""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from offload.text.grammar_rules import json_rule, spelled, thoughts

Parse = Callable[[str, Mapping[str, Any]], "list[ToolCall]"]
BROKEN = (ValueError, KeyError, TypeError, AttributeError, SyntaxError, RecursionError, MemoryError)


@dataclass(frozen=True)
class ToolCall:
    """A tool that the model calls: its name, and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolFormat:
    """Calls stand between ``begin`` and ``end`` (empty: the end of the text), and with ``bare`` also alone where the
    text begins with a brace or a bracket. ``parse`` reads what is between, beside the parameters' schemas by tool;
    it raises one of BROKEN for what is no call.

    ``head`` matches what stands before the arguments of a call, where these are a JSON object, and behind the call
    before; one of its groups is the name. ``written`` is how a call is written, ``{name}`` and ``{arguments}`` being
    the tool's, and ``between`` what stands between two (None: there is one at most). ``around`` begins and ends all of
    them. ``inner`` are marks within a call, which tokens may stand for.
    """

    name: str
    begin: str
    end: str
    parse: Parse
    head: re.Pattern[str]
    written: str
    between: str | None = "\n"
    around: tuple[str, str] = ("", "")
    bare: bool = False
    inner: Sequence[str] = ()

    @property
    def marks(self) -> set[str]:
        """All that has a meaning."""
        return {self.begin, self.end, *self.inner} - {""}

    def grammar(self, tools: Mapping[str, Any], special: Mapping[str, int], *, parallel: bool, opened: str) -> str:
        """A grammar of calls of ``tools`` (name → schema of the arguments) and nothing else, after ``opened`` thoughts
        have been closed by it (empty: there are none). ``special`` are special tokens, which no text spells."""
        rules, names = [], []
        for place, (name, schema) in enumerate(tools.items()):
            before, after = self.written.replace("{name}", name).split("{arguments}")
            names.append(f"tool_{place}")
            rules.append(f"tool_{place}: {spelled(before, special)} args_{place} {spelled(after, special)}")
            rules.append(json_rule(f"args_{place}", schema, as_templates=True))
        more = f"({spelled(self.between, special)} tool)*" if parallel and self.between is not None else ""
        first, last = (spelled(text, special) for text in self.around)
        start = [f"start: {'thoughts' if opened else ''} {first} tool {more} {last}", f"tool: {' | '.join(names)}"]
        return "\n".join([*start, *rules, *thoughts(opened, special)])


def tool_format(template: str) -> ToolFormat:
    """The way of the model with chat template ``template``; Hermes' where it says nothing."""
    return next((made for marks, made in _BY_TEMPLATE if all(mark in template for mark in marks)), HERMES)


def _call(name: object, arguments: object) -> ToolCall:
    if not isinstance(name, str) or not name:
        raise ValueError("a call without a name")
    if isinstance(arguments, str):  # a JSON text within a JSON text
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError("arguments that are no object")
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def _of_json(value: Any) -> list[ToolCall]:
    if isinstance(value, list):
        return [call for one in value for call in _of_json(one)]
    if isinstance(value.get("function"), dict):
        value = value["function"]
    return [_call(value["name"], value.get("arguments", value.get("parameters", {})))]


def _hermes(text: str, schemas: Mapping[str, Any]) -> list[ToolCall]:
    """A JSON object; or as Qwen3-Coder has it, tags with values as plain text."""
    found = re.fullmatch(r"\s*<function=([^>\n]+)>(.*?)(?:</function>)?\s*", text, re.DOTALL)
    if found is None:
        return _of_json(json.loads(text))
    values = re.findall(r"<parameter=([^>\n]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", found[2], re.DOTALL)
    types = schemas.get(found[1], {}).get("properties", {})
    return [_call(found[1], {name: _plain(value, types.get(name, {})) for name, value in values})]


def _plain(value: str, schema: Any) -> Any:
    """A value that is written without quotes, as its schema takes it."""
    if schema.get("type") == "string":
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _mistral(text: str, schemas: Mapping[str, Any]) -> list[ToolCall]:
    """A JSON array; or a name and its arguments, which an id may stand between."""
    if text.lstrip().startswith(("[{", "[ {", "[]")):
        return _of_json(json.loads(text))
    name, _, rest = (
        text.partition("[ARGS]") if "[ARGS]" in text else (text[: text.index("{")], "", text[text.index("{") :])
    )
    return [_call(name.partition("[CALL_ID]")[0].strip(), json.loads(rest))]


def _deepseek(text: str, schemas: Mapping[str, Any]) -> list[ToolCall]:
    found = re.findall(r"<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)(?:<｜tool▁call▁end｜>|\Z)", text, re.DOTALL)
    calls = []
    for head, rest in found:
        fenced = re.fullmatch(r"([^\n]+)\n```json\n(.*?)\n?```\s*", rest, re.DOTALL)
        calls.append(
            _call(fenced[1].strip(), json.loads(fenced[2])) if fenced else _call(head.strip(), json.loads(rest))
        )
    if not calls:
        raise ValueError("no call")
    return calls


def _llama(text: str, schemas: Mapping[str, Any]) -> list[ToolCall]:
    """JSON objects, separated by semicolons; or a Python list of calls."""
    text = text.strip()
    if text.startswith("{"):
        calls, decoder, at = [], json.JSONDecoder(), 0
        while at < len(text):
            value, at = decoder.raw_decode(text, at)
            calls += _of_json(value)
            at += len(text[at:]) - len(text[at:].lstrip(" \n;,"))
        return calls
    if text.startswith("[{"):
        return _of_json(json.loads(text))
    made = ast.parse(text, mode="eval").body
    nodes = made.elts if isinstance(made, ast.List) else [made]
    calls = []
    for node in nodes:
        if not isinstance(node, ast.Call) or node.args:
            raise ValueError("no call")
        arguments = {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords if keyword.arg}
        calls.append(_call(ast.unparse(node.func), arguments))
    if not calls:
        raise ValueError("no call")
    return calls


def _literal(node: ast.expr) -> Any:
    """A Python value, or one with JSON's names for true, false and null."""
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "null": None}[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        return {str(_literal(key)): _literal(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    return ast.literal_eval(node)


def _harmony(text: str, schemas: Mapping[str, Any]) -> list[ToolCall]:
    raise ValueError("headers, which HarmonyParser reads, say what is a call")


_HEAD = (
    r'[\s\[\],;}]*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?'
    r'"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_JSON_HEAD = re.compile(_HEAD)
_MISTRAL_HEAD = re.compile(_HEAD + r"|\s*([\w.:-]+)(?:\[CALL_ID\][^\[{]*)?(?:\[ARGS\])?\s*(?=\{)")
_DEEPSEEK_HEAD = re.compile(
    r"[\s`]*(?:<｜tool▁call▁end｜>\s*)?<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?\s*"
    r"([^\s<]+)(?:<｜tool▁sep｜>|\n```json)\s*(?=\{)"
)
_JSON = '{"name": "{name}", "arguments": {arguments}}'
HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", _hermes, _JSON_HEAD, f"<tool_call>\n{_JSON}\n</tool_call>")
_MARKS = ("[ARGS]", "[CALL_ID]")
MISTRAL = ToolFormat(
    "mistral", "[TOOL_CALLS]", "", _mistral, _MISTRAL_HEAD, _JSON, ", ", ("[TOOL_CALLS][", "]"), inner=_MARKS
)
_ARGS = "[TOOL_CALLS]{name}[ARGS]{arguments}"
MISTRAL_ARGS = ToolFormat("mistral", "[TOOL_CALLS]", "", _mistral, _MISTRAL_HEAD, _ARGS, "", inner=_MARKS)
_AROUND = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_BEGIN, _SEP, _END = _MARKS_DEEPSEEK = ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>")
_PLAIN = f"{_BEGIN}{{name}}{_SEP}{{arguments}}{_END}"
_FENCED = f"{_BEGIN}function{_SEP}{{name}}\n```json\n{{arguments}}\n```{_END}"
DEEPSEEK = ToolFormat("deepseek", *_AROUND, _deepseek, _DEEPSEEK_HEAD, _PLAIN, "", _AROUND, inner=_MARKS_DEEPSEEK)
DEEPSEEK_FENCED = replace(DEEPSEEK, written=_FENCED, between="\n")
_LLAMA = '{"name": "{name}", "parameters": {arguments}}'
LLAMA = ToolFormat("llama", "<|python_start|>", "<|python_end|>", _llama, _JSON_HEAD, _LLAMA, None, bare=True)
LLAMA_TAG = replace(LLAMA, begin="<|python_tag|>", end="")
_CHANNEL = "<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}"
HARMONY = ToolFormat("harmony", "", "", _harmony, re.compile(r"(?!)"), _CHANNEL, None)
_BY_TEMPLATE: Sequence[tuple[tuple[str, ...], ToolFormat]] = (
    (("<|channel|>", "<|message|>"), HARMONY),
    (("<tool_call>",), HERMES),
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL_ARGS),
    (("[TOOL_CALLS]",), MISTRAL),
    (("<｜tool▁calls▁begin｜>", "```json"), DEEPSEEK_FENCED),
    (("<｜tool▁calls▁begin｜>",), DEEPSEEK),
    (("<|python_start|>",), LLAMA),
    (("<|python_tag|>",), LLAMA_TAG),
    (("<|header_start|>", "tools"), LLAMA),
    (("<|start_header_id|>", "tools"), LLAMA_TAG),
)
