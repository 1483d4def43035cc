"""What llama.cpp's server has beside the dialects of others: what there is, what is under way, and tokens."""

import time

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from cli.serve.body import read
from cli.serve.errors import ServeError
from cli.serve.service import Service
from offload.text.tokenizer import encode_text


async def tokenize(request: HttpRequest) -> Response:
    """The token ids of a text."""
    service: Service = request.app.state.service
    body = await read(request)
    session = service.session
    ids = encode_text(session.tokenizer, body["content"], bool(body.get("add_special")))
    pieces = [{"id": token, "piece": session.tokenizer.decode([token])} for token in ids]
    return JSONResponse({"tokens": pieces if body.get("with_pieces") else ids}, headers=body.ignored)


async def detokenize(request: HttpRequest) -> Response:
    """The text of token ids, special tokens as they are written."""
    service: Service = request.app.state.service
    body = await read(request)
    if max(body["tokens"], default=0) >= service.session.shape.vocab_size:
        raise ServeError(400, f"a token is beyond {service.session.shape.vocab_size - 1:,}", param="tokens")
    return JSONResponse({"content": service.session.tokenizer.decode(body["tokens"])}, headers=body.ignored)


async def props(request: HttpRequest) -> Response:
    """The model and the defaults of a request."""
    service: Service = request.app.state.service
    defaults = service.defaults
    params = {
        name: getattr(defaults, name)
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "max_tokens")
    }
    return JSONResponse(
        {
            "default_generation_settings": {"n_ctx": service.context, "params": params},
            "total_slots": service.limits.parallel,
            "model_alias": service.name,
            "chat_template": service.session.tokenizer.chat_template or "",
            "modalities": {"vision": service.vision, "audio": False},
            "build_info": f"coldstream {service.version}",
        }
    )


async def slots(request: HttpRequest) -> Response:
    """The answers under way and those that wait, in the order in which they came: nothing of their text."""
    service: Service = request.app.state.service
    now = time.monotonic()
    told = [
        {
            "id": place,
            "is_processing": place < service.limits.parallel,
            "n_ctx": service.context,
            "n_prompt_tokens": slot.stream.prompt_tokens,
            "n_cached_tokens": slot.stream.cached_tokens,
            "n_decoded": slot.tokens,
            "seconds": round(now - slot.started, 3),
        }
        for place, slot in enumerate(service.slots.values())
    ]
    return JSONResponse(told)
