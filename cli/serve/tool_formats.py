"""How families of models write a call of a tool: what is found in a text, and grammars of nothing else.

Which family's way a model has is read from its chat template, which is what taught it.
"""

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cli.serve.parts import ToolCall
from offload.generate.grammar import json_rule

Parse = Callable[[str, Mapping[str, Any]], list[ToolCall]]
BROKEN = (ValueError, KeyError, TypeError, AttributeError, SyntaxError, RecursionError, MemoryError)


@dataclass(frozen=True)
class ToolFormat:
    """Calls stand between ``begin`` and ``end`` (empty: the end of the text), and with ``bare`` also alone where the
    text begins with a brace or a bracket. ``parse`` reads what is between, beside the parameters' schemas by tool;
    it raises one of BROKEN for what is no call.

    ``written`` is how a call is written, ``{name}`` and ``{arguments}`` being the tool's, and ``between`` what stands
    between two (None: there is one at most). ``around`` begins and ends all of them.
    """

    name: str
    begin: str
    end: str
    parse: Parse
    written: str
    between: str | None = "\n"
    around: tuple[str, str] = ("", "")
    bare: bool = False

    def grammar(self, tools: Mapping[str, Any], special: Mapping[str, int], *, parallel: bool, opened: str) -> str:
        """A grammar of calls of ``tools`` (name → schema of the arguments) and nothing else, after ``opened`` thoughts
        have been closed by it (empty: there are none). ``special`` are special tokens, which no text spells."""
        rules, names = [], []
        for place, (name, schema) in enumerate(tools.items()):
            before, after = self.written.replace("{name}", name).split("{arguments}")
            names.append(f"tool_{place}")
            rules.append(f"tool_{place}: {spelled(before, special)} args_{place} {spelled(after, special)}")
            rules.append(json_rule(f"args_{place}", schema))
        more = f"({spelled(self.between, special)} tool)*" if parallel and self.between is not None else ""
        first, last = (spelled(text, special) for text in self.around)
        start = [f"start: {'thoughts' if opened else ''} {first} tool {more} {last}", f"tool: {' | '.join(names)}"]
        return "\n".join([*start, *rules, *thoughts(opened, special)])


def thoughts(closing: str, special: Mapping[str, int]) -> list[str]:
    """The rule of thoughts that ``closing`` ends."""
    if not closing:
        return []
    if closing in special:
        return [f"thoughts: /(.|\\n)*/ {spelled(closing, special)} /\\s*/"]
    return [f"thoughts: THOUGHT /\\s*/\nTHOUGHT[lazy]: /(.|\\n)*/ {json.dumps(closing)}"]


def spelled(text: str, special: Mapping[str, int]) -> str:
    """``text`` as a grammar has it: quoted, special tokens by their numbers."""
    if not text:
        return ""
    pattern = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)) or r"(?!)"
    pieces = re.split(f"({pattern})", text)
    return " ".join(f"<[{special[piece]}]>" if piece in special else json.dumps(piece) for piece in pieces if piece)


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
    """The arguments alone: the name stands in the header, which the parser puts before."""
    name, _, arguments = text.partition("\n")
    return [_call(name, json.loads(arguments or "{}"))]


_JSON = '{"name": "{name}", "arguments": {arguments}}'
HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", _hermes, f"<tool_call>\n{_JSON}\n</tool_call>")
MISTRAL = ToolFormat("mistral", "[TOOL_CALLS]", "", _mistral, _JSON, ", ", ("[TOOL_CALLS][", "]"))
MISTRAL_ARGS = ToolFormat("mistral", "[TOOL_CALLS]", "", _mistral, "[TOOL_CALLS]{name}[ARGS]{arguments}", "")
_SEP = "<｜tool▁sep｜>"
_DEEPSEEK_AROUND = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
DEEPSEEK = ToolFormat(
    "deepseek",
    *_DEEPSEEK_AROUND,
    _deepseek,
    f"<｜tool▁call▁begin｜>{{name}}{_SEP}{{arguments}}<｜tool▁call▁end｜>",
    "",
    _DEEPSEEK_AROUND,
)
DEEPSEEK_FENCED = ToolFormat(
    "deepseek",
    *_DEEPSEEK_AROUND,
    _deepseek,
    f"<｜tool▁call▁begin｜>function{_SEP}{{name}}\n```json\n{{arguments}}\n```<｜tool▁call▁end｜>",
    "\n",
    _DEEPSEEK_AROUND,
)
_LLAMA = '{"name": "{name}", "parameters": {arguments}}'
LLAMA = ToolFormat("llama", "<|python_start|>", "<|python_end|>", _llama, _LLAMA, None, bare=True)
LLAMA_TAG = ToolFormat("llama", "<|python_tag|>", "", _llama, _LLAMA, None, bare=True)
HARMONY = ToolFormat(
    "harmony",
    "",
    "",
    _harmony,
    "<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}",
    None,
)
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
