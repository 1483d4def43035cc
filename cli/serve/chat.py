"""OpenAI's /v1/chat/completions."""

import secrets
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from cli.serve.body import Body, EventStream, event, read, unless_gone
from cli.serve.conversation import Conversation, Format, prepare, text_of
from cli.serve.errors import ServeError, error_document
from cli.serve.service import Answers, Service, Step, Usage
from offload.records import TokenRecord

PATH = "/v1/chat/completions"


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
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None


class TokenLogprob(TypedDict):
    """A token and its logarithmic probability; ``bytes`` is null where it is no whole characters."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(TokenLogprob):
    """With the likeliest tokens in its place."""

    top_logprobs: list[TokenLogprob]


class Logprobs(TypedDict):
    """Of an answer's text."""

    content: list[ChosenLogprob]


class Message(TypedDict):
    """An answer."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: NotRequired[str]


class Delta(TypedDict):
    """What is new of an answer."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]


FinishReason = Literal["stop", "length", "tool_calls"]


class Choice(TypedDict):
    """One of n answers."""

    index: int
    message: Message
    logprobs: Logprobs | None
    finish_reason: FinishReason


class ChunkChoice(TypedDict):
    """What is new of one of n answers."""

    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


class CachedTokens(TypedDict):
    """Of the prompt."""

    cached_tokens: int


class ReasoningTokens(TypedDict):
    """Of the answers."""

    reasoning_tokens: int


class UsageDocument(TypedDict):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens


class ChatCompletion(TypedDict):
    """All answers."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: UsageDocument
    timings: dict[str, float]


class ChatCompletionChunk(TypedDict):
    """An event of a stream; ``choices`` is empty in the one that carries the usage."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: NotRequired[UsageDocument | None]
    timings: NotRequired[dict[str, float]]


async def chat_completions(request: HttpRequest) -> Response:
    """Answer a conversation."""
    service: Service = request.app.state.service
    body = await read(request, ChatBody, service.limits.body_bytes)
    asked = body.sampling() | {"logprobs": (body.top_logprobs or 0) if body.logprobs else None}
    if body.max_completion_tokens is not None:
        asked["max_tokens"] = body.max_completion_tokens
    wanted = body.response_format or ResponseFormat()
    conversation = Conversation(
        [_message(message, place) for place, message in enumerate(body.messages)],
        wanted.type,
        wanted.json_schema.schema_ if wanted.json_schema is not None else None,
        {"reasoning_effort": body.reasoning_effort, **(body.chat_template_kwargs or {})}
        if body.reasoning_effort
        else body.chat_template_kwargs or {},
    )
    prepared = await prepare(service, conversation, service.sampling(asked), body.n or 1)
    answers = await service.start(prepared)
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": service.name}
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_chunks(service, answers, head, usage), answers.close, body.ignored)
    try:
        whole = await unless_gone(request, _completion(service, answers, head))
    finally:
        answers.close()
    return JSONResponse(whole, headers=body.ignored)


async def _completion(service: Service, answers: Answers, head: dict[str, Any]) -> ChatCompletion:
    choices: list[Choice] = [
        {"index": place, "message": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": "stop"}
        for place in range(answers.request.choices)
    ]
    async for step in answers.steps():
        choice = choices[step.choice]
        message = choice["message"]
        for part in step.parts:
            if part.kind == "reasoning":
                message["reasoning_content"] = message.get("reasoning_content", "") + part.text
            else:
                message["content"] = (message["content"] or "") + part.text
        if (found := logprobs_of(service, step.record)) is not None:
            choice["logprobs"] = {"content": [*(choice["logprobs"] or {"content": []})["content"], found]}
        if step.finish:
            choice["finish_reason"] = finish_reason(step)
    return {
        **head,  # type: ignore[typeddict-item]
        "object": "chat.completion",
        "choices": choices,
        "usage": usage_document(answers.usage),
        "timings": answers.usage.timings(),
    }


async def _chunks(
    service: Service, answers: Answers, head: dict[str, Any], include_usage: bool
) -> AsyncGenerator[str, None]:
    none = {"usage": None} if include_usage else {}

    def chunk(choices: list[ChunkChoice], **more: Any) -> str:
        return event({**head, "object": "chat.completion.chunk", "choices": choices, **none, **more})

    for place in range(answers.request.choices):
        first: Delta = {"role": "assistant", "content": ""}
        yield chunk([{"index": place, "delta": first, "logprobs": None, "finish_reason": None}])
    try:
        async for step in answers.steps():
            found = logprobs_of(service, step.record)
            logprobs: Logprobs | None = None if found is None else {"content": [found]}
            deltas = [_delta(part.kind, part.text) for part in step.parts] or ([Delta()] if found else [])
            for delta in deltas:
                yield chunk([{"index": step.choice, "delta": delta, "logprobs": logprobs, "finish_reason": None}])
                logprobs = None
            if step.finish:
                last = not answers.open
                timings = {"timings": answers.usage.timings()} if last else {}
                end: ChunkChoice = {
                    "index": step.choice,
                    "delta": {},
                    "logprobs": None,
                    "finish_reason": finish_reason(step),
                }
                yield chunk([end], **timings)
    except ServeError as error:
        yield event(error_document(PATH, error))
        return
    if include_usage:
        yield chunk([], usage=usage_document(answers.usage))
    yield event("[DONE]")


def _delta(kind: str, text: str) -> Delta:
    return {"reasoning_content": text} if kind == "reasoning" else {"content": text}


def _message(message: dict[str, Any], place: int) -> dict[str, Any]:
    """A message as templates take it. Raises ServeError for what is none."""
    role, where = message.get("role"), f"messages.{place}"
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise ServeError(400, f"{where} has the role {role!r}: expected system, user, assistant or tool", param=where)
    kept = {"role": "system" if role == "developer" else role, "content": text_of(message.get("content"), where)}
    if isinstance(message.get("reasoning_content"), str):
        kept["reasoning_content"] = message["reasoning_content"]
    return kept


def finish_reason(step: Step) -> FinishReason:
    """Why an answer ended, as OpenAI says it."""
    return "stop" if step.finish in ("eos", "stop") else "length"


def usage_document(usage: Usage) -> UsageDocument:
    """As OpenAI counts."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


def logprobs_of(service: Service, record: TokenRecord) -> ChosenLogprob | None:
    """The log probabilities of a token; None where they were not asked for."""
    if record.logprobs is None:
        return None
    chosen = _token_logprob(service, record.token_id, record.logprobs.chosen)
    return {**chosen, "top_logprobs": [_token_logprob(service, token, value) for token, value in record.logprobs.top]}


def _token_logprob(service: Service, token: int, value: float) -> TokenLogprob:
    text = service.session.tokenizer.decode([token])
    return {"token": text, "logprob": value, "bytes": None if "\ufffd" in text else list(text.encode())}
