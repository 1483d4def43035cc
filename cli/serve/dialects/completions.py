"""OpenAI's /v1/completions: text that goes on, without a chat template."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from cli.serve.answers import Answers, Request
from cli.serve.body import read
from cli.serve.dialects.chat import finish_reason, sampling_of, usage_document, wants_usage
from cli.serve.errors import ServeError
from cli.serve.parsing.parsers import MarkedParser
from cli.serve.reply import DONE, Document, Events, reply
from cli.serve.service import Service
from offload.records import TokenRecord

PATH = "/v1/completions"
_DEFAULT_TOKENS = 16  # as OpenAI's


async def completions(request: HttpRequest) -> Response:
    """Continue one text or several."""
    service: Service = request.app.state.service
    body = await read(request)
    for name in ("suffix", "echo"):
        if body.get(name):
            raise ServeError(400, f"{name} is not offered here", param=name)
    n = body.get("n", 1)
    if body.get("best_of", n) != n:
        raise ServeError(400, "best_of other than n is not offered here", param="best_of")
    sampling = service.sampling({"max_tokens": _DEFAULT_TOKENS, "logprobs": body.get("logprobs"), **sampling_of(body)})
    ids = [service.session.encode(one) if isinstance(one, str) else one for one in _prompts(body["prompt"])]
    if any(max(one, default=0) >= service.session.shape.vocab_size for one in ids):
        raise ServeError(400, f"a token is beyond {service.session.shape.vocab_size - 1:,}", param="prompt")
    head: Document = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion"}
    head |= {"created": int(time.time()), "model": service.name}

    async def whole(answers: Answers) -> Document:
        choices: list[Document] = []
        for answer in await answers.whole():
            logprobs: Document | None = None
            size = 0
            for record in answer.records:
                if found := _logprobs(service, record, size):
                    logprobs = {key: (logprobs or {}).get(key, []) + value for key, value in found.items()}
                size += len(record.text)
            choices.append(_choice(len(choices), answer.text(), logprobs, answer.records[-1].finish))
        timings = answers.usage.timings()
        return {**head, "choices": choices, "usage": usage_document(answers.usage), "timings": timings}

    head_of_chunks, asked = head | wants_usage(body), Request(ids, sampling, MarkedParser, n)
    return await reply(request, body, asked, whole, lambda answers: _chunks(service, answers, head_of_chunks))


def _prompts(said: str | list[Any]) -> Sequence[str | list[int]]:
    """A text, its token ids, or several of either. Raises ServeError for what is none."""
    prompts = [said] if isinstance(said, str) or isinstance(said[0], int) else said
    for one in prompts:
        if not isinstance(one, str) and not (
            isinstance(one, list) and one and all(type(i) is int and i >= 0 for i in one)
        ):
            raise ServeError(400, "prompt: expected a text, its token ids, or several of either", param="prompt")
    return prompts


async def _chunks(service: Service, answers: Answers, head: Document) -> Events:
    sizes = [0] * answers.request.choices
    async for step in answers.steps():
        text = "".join(part.text for part in step.parts)
        found = _logprobs(service, step.last, sizes[step.choice])
        sizes[step.choice] += len(text)
        if text or found or step.finish:
            yield {**head, "choices": [_choice(step.choice, text, found, step.finish)]}
    if "usage" in head:
        yield {**head, "choices": [], "usage": usage_document(answers.usage)}
    yield DONE


def _choice(place: int, text: str, logprobs: Document | None, finish: str) -> Document:
    reason = finish_reason(finish) if finish else None
    return {"index": place, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(service: Service, record: TokenRecord, offset: int) -> Document | None:
    """As plain completions have them: a list for each thing."""
    if record.logprobs is None:
        return None
    decode = service.session.tokenizer.decode
    return {
        "tokens": [decode([record.token_id])],
        "token_logprobs": [record.logprobs.chosen],
        "top_logprobs": [{decode([token]): value for token, value in record.logprobs.top}],
        "text_offset": [offset],
    }
