"""OpenAI's /v1/chat/completions."""

import json
import secrets
import time
from collections import Counter
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cli.serve.answers import Answers, Usage, Whole
from cli.serve.body import Body, read
from cli.serve.conversation import Conversation, Tool, content_of, prepare, text_of
from cli.serve.errors import ServeError
from cli.serve.parsing.parts import Part
from cli.serve.reply import DONE, Document, Events, reply
from cli.serve.service import Service
from offload.records import TokenRecord

PATH = "/v1/chat/completions"
_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "stop", "max_tokens", "ignore_eos", "seed"),
)


def sampling_of(body: Body) -> Document:
    """What a chat or a plain completion asks of sampling, as Service.sampling takes it."""
    asked = {name: body[name] for name in _SAMPLING if name in body}
    if "seed" in asked:
        asked["seed"] %= 2**64
    if "logit_bias" in asked:
        asked["logit_bias"] = {int(token): bias for token, bias in asked["logit_bias"].items()}
    return asked


def wants_usage(body: Body) -> Document:
    """What each event of a stream has of the usage, which comes with its last."""
    return {"usage": None} if body.get("stream_options", {}).get("include_usage") else {}


def tool_of(function: Document) -> Tool:
    """A tool by its function, of either of OpenAI's dialects."""
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    return Tool(function["name"], function.get("description") or "", parameters)


async def chat_completions(request: HttpRequest) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    body = await read(request)
    asked = sampling_of(body) | {"logprobs": body.get("top_logprobs", 0) if body.get("logprobs") else None}
    asked |= {"max_tokens": body["max_completion_tokens"]} if "max_completion_tokens" in body else {}
    wanted, choice = body.get("response_format", {}), body.get("tool_choice", "auto")
    conversation = Conversation(
        [_message(message, f"messages.{place}") for place, message in enumerate(body["messages"])],
        [tool_of(tool["function"]) for tool in body.get("tools", ())],
        choice if isinstance(choice, str) else choice["function"]["name"],
        body.get("parallel_tool_calls", True),
        wanted.get("type") or "text",
        (wanted.get("json_schema") or {}).get("schema"),
        effort(body.get("reasoning_effort")) | body.get("chat_template_kwargs", {}),
    )
    prepared = await prepare(service, conversation, service.sampling(asked), body.get("n", 1))
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.name}

    async def whole(answers: Answers) -> Document:
        choices = [_choice(service, place, answer) for place, answer in enumerate(await answers.whole())]
        usage = {"usage": usage_document(answers.usage), "timings": answers.usage.timings()}
        return {**head, "object": "chat.completion", "choices": choices, **usage}

    head_of_chunks = {**head, "object": "chat.completion.chunk"} | wants_usage(body)
    return await reply(request, body, prepared, whole, lambda answers: _chunks(service, answers, head_of_chunks))


def _choice(service: Service, place: int, answer: Whole) -> Document:
    message: Document = {"role": "assistant", "content": answer.text()}
    if thoughts := answer.text("reasoning"):
        message["reasoning_content"] = thoughts
    functions = [{"name": part.name, "arguments": part.text} for part in answer.parts if part.kind == "call"]
    if functions:
        message["tool_calls"] = [{"id": call_id(), "type": "function", "function": one} for one in functions]
        message["content"] = message["content"] or None
    found = [one for record in answer.records if (one := logprobs_of(service, record)) is not None]
    finish = finish_reason(answer.records[-1].finish, called=bool(functions))
    logprobs = {"content": found} if found else None
    return {"index": place, "message": message, "logprobs": logprobs, "finish_reason": finish}


async def _chunks(service: Service, answers: Answers, head: Document) -> Events:
    def chunk(index: int, delta: Document, logprobs: Document | None = None, finish: str | None = None) -> Document:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**head, "choices": [choice]}

    for place in range(answers.request.choices):
        yield chunk(place, {"role": "assistant", "content": ""})
    calls: Counter[int] = Counter()  # by answer
    async for step in answers.steps():
        found = logprobs_of(service, step.last)
        logprobs = None if found is None else {"content": [found]}
        deltas = [_delta(part, calls, step.choice) for part in step.parts]
        for delta in deltas or ([{}] if found else []):
            yield chunk(step.choice, delta, logprobs)
            logprobs = None
        if step.finish:
            end = chunk(step.choice, {}, finish=finish_reason(step.finish, called=calls[step.choice] > 0))
            yield end if answers.open else {**end, "timings": answers.usage.timings()}
    if "usage" in head:
        yield {**head, "choices": [], "usage": usage_document(answers.usage)}
    yield DONE


def _delta(part: Part, calls: Counter[int], choice: int) -> Document:
    """What ``part`` adds to answer ``choice``; a call comes with its name first and its arguments then."""
    if part.kind != "call":
        return {"reasoning_content" if part.kind == "reasoning" else "content": part.text}
    if not part.name:
        return {"tool_calls": [{"index": calls[choice] - 1, "function": {"arguments": part.text}}]}
    index, calls[choice] = calls[choice], calls[choice] + 1
    function = {"name": part.name, "arguments": part.text}
    return {"tool_calls": [{"index": index, "id": call_id(), "type": "function", "function": function}]}


def effort(said: str | None) -> Document:
    """The switch of templates that know how long to think."""
    return {"reasoning_effort": said} if said else {}


def call_id() -> str:
    """An id of a call: nine letters and digits, which is what Mistral's templates insist on."""
    return secrets.token_hex(5)[:9]


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message as templates take it. Raises ServeError for what is none."""
    role, said = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise ServeError(400, f"{where} has the role {role!r}: expected system, user, assistant or tool", param=where)
    content = content_of(said, where) if role == "user" else text_of(said, where)
    kept = {"role": "system" if role == "developer" else role, "content": content}
    kept |= {name: said for name in _KEPT if isinstance(said := message.get(name), str)}
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list):
            raise ServeError(400, f"{where}.tool_calls is no list of calls", param=where)
        kept["tool_calls"] = [_called(call, f"{where}.tool_calls") for call in calls]
    return kept


_KEPT = ("reasoning_content", "tool_call_id", "name")


def _called(call: Any, where: str) -> dict[str, Any]:
    try:
        function = call["function"]
        arguments = json.loads(function.get("arguments") or "{}")
        named = {"name": str(function["name"]), "arguments": arguments}
        return {"id": str(call.get("id", "")), "type": "function", "function": named}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        raise ServeError(400, f"{where} is no call: expected a name and arguments as JSON text", param=where) from None


def finish_reason(finish: str, *, called: bool = False) -> str:
    """Why an answer ended, as OpenAI says it."""
    if finish not in ("eos", "stop"):
        return "length"
    return "tool_calls" if called else "stop"


def usage_document(usage: Usage) -> Document:
    """As OpenAI counts."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


def logprobs_of(service: Service, record: TokenRecord) -> Document | None:
    """The log probabilities of a token; None where they were not asked for."""
    if record.logprobs is None:
        return None
    chosen = _logprob(service, record.token_id, record.logprobs.chosen)
    return {**chosen, "top_logprobs": [_logprob(service, token, value) for token, value in record.logprobs.top]}


def _logprob(service: Service, token: int, value: float) -> Document:
    """``bytes`` is null where a token is no whole characters."""
    text = service.session.tokenizer.decode([token])
    return {"token": text, "logprob": value, "bytes": None if "\ufffd" in text else list(text.encode())}
