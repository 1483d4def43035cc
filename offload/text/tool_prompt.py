"""Tools for models whose chat template knows nothing of them: told of in words, as Hermes' models are used to."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, Any]]


def told_in_words(messages: Messages, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``messages`` with ``tools`` described in the first, calls written out, and results as the user's messages."""
    told: list[dict[str, Any]] = []
    for message in messages:
        content = message.get("content") or ""
        if not isinstance(content, str):  # with images: a user's, and no call or result
            told.append({"role": message["role"], "content": content})
            continue
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
        if calls:
            content = "\n".join(filter(None, [content, *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]))
        if message["role"] != "tool":
            told.append({"role": message["role"], "content": content})
            continue
        result = f"<tool_response>\n{content}\n</tool_response>"
        if told and told[-1]["content"].startswith("<tool_response>"):
            told[-1]["content"] += f"\n{result}"
        else:
            told.append({"role": "user", "content": result})
    if tools:
        described = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        words = _WORDS.replace("TOOLS", described)
        first = told.pop(0)["content"] if told and told[0]["role"] == "system" else ""
        told.insert(0, {"role": "system", "content": f"{first}\n\n{words}" if first else words})
    return told


def with_texts(messages: Messages) -> list[dict[str, Any]]:
    """``messages`` with the arguments of calls as JSON texts."""
    return [
        {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else dict(message)
        for message in messages
    ]


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


_WORDS = """\
You can call functions. Each line between <tools> and </tools> describes one, its parameters as a JSON schema:
<tools>
TOOLS
</tools>
To call one, write its name and arguments as a JSON object, and nothing after it:
<tool_call>
{"name": "…", "arguments": {…}}
</tool_call>"""
