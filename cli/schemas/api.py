"""The OpenAPI description of ``coldstream serve``: what is asked of each path, and what is answered.

The server takes a request only if it is as this says, and the tests hold every answer to it.

    python -m cli.schemas.api
"""

import json
from pathlib import Path
from typing import Any

from cli.schemas.replies import (
    ANTHROPIC_ERROR,
    ANTHROPIC_MESSAGE,
    CHAT_ANSWER,
    CHAT_CHUNK,
    COMPLETION,
    ERROR,
    LISTED,
    LIVE,
    MESSAGE_EVENT,
    MODELS,
    PROPS,
    RESPONSE,
    RESPONSE_EVENT,
    SLOT,
    closed,
)
from cli.schemas.requests import CHAT, COMPLETIONS, COUNT, DETOKENIZE, MESSAGE_ASKED, RESPONSES, TOKENIZE
from cli.schemas.types import OBJECT, Schema, const, count, either, many, text

JSON, EVENTS, PLAIN = "application/json", "text/event-stream", "text/plain"
Operation = dict[str, Any]


def _operation(
    summary: str, answers: dict[str, Schema], takes: Schema | None = None, error: Schema = ERROR
) -> Operation:
    content = {kind: {"schema": schema} for kind, schema in answers.items()}
    said: Operation = {"summary": summary}
    if takes is not None:
        said["requestBody"] = {"required": True, "content": {JSON: {"schema": takes}}}
    failed = {"description": "What went wrong", "content": {JSON: {"schema": error}}}
    return {**said, "responses": {"200": {"description": summary, "content": content}, "default": failed}}


def _get(summary: str, answers: Schema, kind: str = JSON) -> Operation:
    return {"get": _operation(summary, {kind: answers})}


def _post(summary: str, takes: Schema, answer: Schema, event: Schema | None = None, error: Schema = ERROR) -> Operation:
    answers = {JSON: answer} | ({EVENTS: event} if event is not None else {})
    return {"post": _operation(summary, answers, takes, error)}


_NAMED = {"name": "name", "in": "path", "required": True, "schema": text()}
PATHS: dict[str, Operation] = {
    "/v1/chat/completions": _post("Answers a conversation", CHAT, CHAT_ANSWER, either(CHAT_CHUNK, ERROR)),
    "/v1/completions": _post("Continues texts", COMPLETIONS, COMPLETION, either(COMPLETION, ERROR)),
    "/v1/responses": _post("Answers a conversation, without a memory", RESPONSES, RESPONSE, RESPONSE_EVENT),
    "/v1/messages": _post("Answers a conversation", MESSAGE_ASKED, ANTHROPIC_MESSAGE, MESSAGE_EVENT, ANTHROPIC_ERROR),
    "/v1/messages/count_tokens": _post(
        "Tokens that a conversation has", COUNT, closed(input_tokens=count()), error=ANTHROPIC_ERROR
    ),
    "/v1/models": _get("The one model", MODELS),
    "/v1/models/{name}": {**_get("The one model by its name", LISTED), "parameters": [_NAMED]},
    "/tokenize": _post(
        "Token ids of a text", TOKENIZE, closed(tokens=many(either(count(), closed(id=count(), piece=text()))))
    ),
    "/detokenize": _post("The text of token ids", DETOKENIZE, closed(content=text())),
    "/props": _get("The model, and what a request gets that says nothing", PROPS),
    "/slots": _get("Answers under way and waiting", many(SLOT)),
    "/live": _get("Where every byte is, how experts are used, what limits the speed", LIVE),
    "/health": _get("That it is there", closed(status=const("ok"))),
    "/metrics": _get("Prometheus' text", text(), PLAIN),
    "/openapi.json": _get("This description", OBJECT),
}
DESCRIPTION: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {
        "title": "coldstream serve",
        "version": "1",
        "description": "One model behind OpenAI's, Anthropic's and llama.cpp's dialects.",
        "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
    },
    "servers": [{"url": "http://127.0.0.1:8080"}],
    "security": [{"bearer": []}, {"key": []}, {}],
    "components": {
        "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
        }
    },
}


def description_text() -> str:
    """The file of the description: a line for each path."""
    lines = [f"{json.dumps(path)}: {json.dumps(said, ensure_ascii=False)}" for path, said in PATHS.items()]
    head = json.dumps(DESCRIPTION, ensure_ascii=False)[:-1]
    return head + ',\n"paths": {\n' + ",\n".join(lines) + "\n}}\n"


if __name__ == "__main__":
    Path(__file__).with_name("openapi.json").write_text(description_text())
