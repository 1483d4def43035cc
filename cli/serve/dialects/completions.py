"""OpenAI's /v1/completions: text that goes on, without a chat template."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cli.serve.body import EventStream, event, read, whole_answer
from cli.serve.dialects.chat import SamplingBody, usage_document
from cli.serve.errors import ServeError, error_document
from cli.serve.parsers import MarkedParser
from cli.serve.service import Answers, Request, Service, Step

PATH = "/v1/completions"
Document = dict[str, Any]
_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
_DEFAULT_TOKENS = 16  # as OpenAI's


class CompletionBody(SamplingBody):
    """A request. The prompt is a text, its token ids, or several of either."""

    prompt: str | _Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[_Ids], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    suffix: str | None = None
    best_of: int | None = None

    def prompts(self) -> Sequence[str | list[int]]:
        """Each prompt."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


async def completions(request: HttpRequest) -> Response:
    """Continue one text or several."""
    service: Service = request.app.state.service
    body = await read(request, CompletionBody, service.limits.body_bytes)
    for name in ("suffix", "echo"):
        if getattr(body, name):
            raise ServeError(400, f"{name} is not offered here", param=name)
    if body.best_of not in (None, body.n or 1):
        raise ServeError(400, "best_of other than n is not offered here", param="best_of")
    asked = {"max_tokens": _DEFAULT_TOKENS} | {name: v for name, v in body.sampling().items() if v is not None}
    sampling = service.sampling(asked | {"logprobs": body.logprobs})
    ids = [service.session.encode(one) if isinstance(one, str) else one for one in body.prompts()]
    answers = await service.start(Request(ids, sampling, MarkedParser, body.n or 1))
    head: Document = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion"}
    head |= {"created": int(time.time()), "model": service.name}
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_chunks(service, answers, head, usage), answers.close, body.ignored)
    return await whole_answer(request, _completion(service, answers, head), answers.close, body.ignored)


async def _completion(service: Service, answers: Answers, head: Document) -> Document:
    choices: list[Document] = [
        {"index": place, "text": "", "logprobs": None, "finish_reason": None}
        for place in range(answers.request.choices)
    ]
    async for step in answers.steps():
        choice = choices[step.choice]
        found = _logprobs(service, step, len(choice["text"]))
        if found is not None:
            choice["logprobs"] = {key: (choice["logprobs"] or {}).get(key, []) + value for key, value in found.items()}
        choice["text"] += _text(step)
        choice["finish_reason"] = _finish(step)
    timings = answers.usage.timings()
    return {**head, "choices": choices, "usage": usage_document(answers.usage), "timings": timings}


async def _chunks(service: Service, answers: Answers, head: Document, usage: bool) -> AsyncGenerator[str, None]:
    none = {"usage": None} if usage else {}
    sizes = [0] * answers.request.choices
    try:
        async for step in answers.steps():
            text, found = _text(step), _logprobs(service, step, sizes[step.choice])
            sizes[step.choice] += len(text)
            if text or found or step.finish:
                choice = {"index": step.choice, "text": text, "logprobs": found, "finish_reason": _finish(step)}
                yield event({**head, "choices": [choice], **none})
    except ServeError as error:
        yield event(error_document(PATH, error))
        return
    if usage:
        yield event({**head, "choices": [], "usage": usage_document(answers.usage)})
    yield event("[DONE]")


def _text(step: Step) -> str:
    return "".join(part.text for part in step.parts)


def _finish(step: Step) -> str | None:
    return None if not step.finish else "stop" if step.finish in ("eos", "stop") else "length"


def _logprobs(service: Service, step: Step, offset: int) -> Document | None:
    """As plain completions have them: a list for each thing."""
    if step.record.logprobs is None:
        return None
    decode = service.session.tokenizer.decode
    return {
        "tokens": [decode([step.record.token_id])],
        "token_logprobs": [step.record.logprobs.chosen],
        "top_logprobs": [{decode([token]): value for token, value in step.record.logprobs.top}],
        "text_offset": [offset],
    }
