"""OpenAI's /v1/chat/completions."""

import json
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cli.serve.body import Body, EventStream, event, read, whole_answer
from cli.serve.conversation import Conversation, Format, Tool, prepare, text_of
from cli.serve.errors import ServeError, error_document
from cli.serve.parts import Part
from cli.serve.service import Answers, Service, Step, Usage
from offload.records import TokenRecord

PATH = "/v1/chat/completions"
Document = dict[str, Any]


class StreamOptions(BaseModel):
    """``stream_options``."""

    include_usage: bool = False


class JsonSchema(BaseModel):
    """``response_format.json_schema``."""

    model_config = ConfigDict(populate_by_name=True)
    name: str = ""
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """``response_format``."""

    type: Format = "text"
    json_schema: JsonSchema | None = None


class Function(BaseModel):
    """A tool."""

    name: Annotated[str, Field(pattern=r"^[\w.:-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None

    def tool(self) -> Tool:
        """As a conversation has it."""
        return Tool(self.name, self.description or "", self.parameters or {"type": "object", "properties": {}})


class FunctionTool(BaseModel):
    """One of ``tools``."""

    type: Literal["function"]
    function: Function


class NamedFunction(BaseModel):
    """``tool_choice.function``."""

    name: str


class ToolChoice(BaseModel):
    """``tool_choice``, where it names a tool."""

    type: Literal["function"]
    function: NamedFunction


class SamplingBody(Body):
    """What chat and plain completions alike may ask of sampling."""

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | Annotated[list[str], Field(max_length=64)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: int | None = None
    ignore_eos: bool = False
    user: str | None = None

    def sampling(self) -> dict[str, Any]:
        """As Service.sampling takes them."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
        more = ("frequency_penalty", "logit_bias", "stop", "max_tokens", "ignore_eos")
        seed = None if self.seed is None else self.seed % 2**64
        return {name: getattr(self, name) for name in (*names, *more)} | {"seed": seed}


class ChatBody(SamplingBody):
    """A request."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=256)] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


async def chat_completions(request: HttpRequest) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    body = await read(request, ChatBody, service.limits.body_bytes)
    asked = body.sampling() | {"logprobs": (body.top_logprobs or 0) if body.logprobs else None}
    if body.max_completion_tokens is not None:
        asked["max_tokens"] = body.max_completion_tokens
    wanted = body.response_format or ResponseFormat()
    choice = body.tool_choice or "auto"
    switches = {**({"reasoning_effort": body.reasoning_effort} if body.reasoning_effort else {})}
    conversation = Conversation(
        [_message(message, place) for place, message in enumerate(body.messages)],
        [tool.function.tool() for tool in body.tools or ()],
        choice if isinstance(choice, str) else choice.function.name,
        body.parallel_tool_calls is not False,
        wanted.type,
        wanted.json_schema.schema_ if wanted.json_schema is not None else None,
        {**switches, **(body.chat_template_kwargs or {})},
    )
    prepared = await prepare(service, conversation, service.sampling(asked), body.n or 1)
    answers = await service.start(prepared)
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.name}
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_chunks(service, answers, head, usage), answers.close, body.ignored)
    return await whole_answer(request, _completion(service, answers, head), answers.close, body.ignored)


async def _completion(service: Service, answers: Answers, head: Document) -> Document:
    messages: list[Document] = [{"role": "assistant", "content": ""} for _ in range(answers.request.choices)]
    choices: list[Document] = [
        {"index": place, "message": message, "logprobs": None} for place, message in enumerate(messages)
    ]
    async for step in answers.steps():
        message = messages[step.choice]
        for part in step.parts:
            if part.call is not None:
                function = {"name": part.call.name, "arguments": part.call.arguments}
                message.setdefault("tool_calls", []).append({"id": call_id(), "type": "function", "function": function})
            else:
                name = "reasoning_content" if part.kind == "reasoning" else "content"
                message[name] = message.get(name, "") + part.text
        if (found := logprobs_of(service, step.record)) is not None:
            choices[step.choice]["logprobs"] = choices[step.choice]["logprobs"] or {"content": []}
            choices[step.choice]["logprobs"]["content"].append(found)
        if step.finish:
            called = "tool_calls" in message
            choices[step.choice]["finish_reason"] = finish_reason(step, called=called)
            message["content"] = message["content"] or (None if called else "")
    usage = {"usage": usage_document(answers.usage), "timings": answers.usage.timings()}
    return {**head, "object": "chat.completion", "choices": choices, **usage}


async def _chunks(service: Service, answers: Answers, head: Document, include_usage: bool) -> AsyncGenerator[str, None]:
    none = {"usage": None} if include_usage else {}

    def chunk(index: int, delta: Document, logprobs: Document | None = None, finish: str | None = None) -> Document:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**head, "object": "chat.completion.chunk", "choices": [choice], **none}

    for place in range(answers.request.choices):
        yield event(chunk(place, {"role": "assistant", "content": ""}))
    calls: Counter[int] = Counter()  # by answer
    try:
        async for step in answers.steps():
            found = logprobs_of(service, step.record)
            logprobs = None if found is None else {"content": [found]}
            deltas = [delta for part in step.parts for delta in _deltas(part, calls, step.choice)]
            for delta in deltas or ([{}] if found else []):
                yield event(chunk(step.choice, delta, logprobs))
                logprobs = None
            if step.finish:
                end = chunk(step.choice, {}, finish=finish_reason(step, called=calls[step.choice] > 0))
                yield event(end if answers.open else {**end, "timings": answers.usage.timings()})
    except ServeError as error:
        yield event(error_document(PATH, error))
        return
    if include_usage:
        yield event({**chunk(0, {}), "choices": [], "usage": usage_document(answers.usage)})
    yield event("[DONE]")


def _deltas(part: Part, calls: Counter[int], choice: int) -> list[Document]:
    """What ``part`` adds to answer ``choice``; a call comes with its name first and its arguments then."""
    if part.call is None:
        return [{"reasoning_content" if part.kind == "reasoning" else "content": part.text}]
    index, calls[choice] = calls[choice], calls[choice] + 1
    named = {"name": part.call.name, "arguments": ""}
    return [
        {"tool_calls": [{"index": index, "id": call_id(), "type": "function", "function": named}]},
        {"tool_calls": [{"index": index, "function": {"arguments": part.call.arguments}}]},
    ]


def call_id() -> str:
    """An id of a call: nine letters and digits, which is what Mistral's templates insist on."""
    return secrets.token_hex(5)[:9]


def _message(message: dict[str, Any], place: int) -> dict[str, Any]:
    """A message as templates take it. Raises ServeError for what is none."""
    role, where = message.get("role"), f"messages.{place}"
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise ServeError(400, f"{where} has the role {role!r}: expected system, user, assistant or tool", param=where)
    kept = {"role": "system" if role == "developer" else role, "content": text_of(message.get("content"), where)}
    kept |= {name: said for name in _KEPT if isinstance(said := message.get(name), str)}
    if calls := message.get("tool_calls"):
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


def finish_reason(step: Step, *, called: bool = False) -> str:
    """Why an answer ended, as OpenAI says it."""
    if step.finish not in ("eos", "stop"):
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
