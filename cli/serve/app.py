"""The application: which path is whose."""

import logging
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cli.serve import page
from cli.serve.body import ClientGone
from cli.serve.dialects import chat, completions, messages, native, responses
from cli.serve.errors import ServeError, as_serve_error, error_response
from cli.serve.guard import Access, Guard
from cli.serve.service import Service
from quant.errors import ColdstreamError

Endpoint = Callable[[Request], Awaitable[Response]]
_log = logging.getLogger("coldstream.serve")


def make_app(service: Service, access: Access) -> Starlette:
    """The ASGI application of ``service``."""
    routes = [
        _route("/", page.page, "GET"),
        _route("/page/{name}", page.page, "GET"),
        _route("/live", page.live, "GET"),
        _route("/health", health, "GET"),
        _route("/metrics", metrics, "GET"),
        _route("/v1/models", models, "GET"),
        _route("/v1/models/{name:path}", model, "GET"),
        _route(chat.PATH, chat.chat_completions, "POST"),
        _route(completions.PATH, completions.completions, "POST"),
        _route(responses.PATH, responses.responses, "POST"),
        _route(messages.PATH, messages.messages, "POST"),
        _route(messages.COUNT_PATH, messages.count_tokens, "POST"),
        _route("/tokenize", native.tokenize, "POST"),
        _route("/detokenize", native.detokenize, "POST"),
        _route("/props", native.props, "GET"),
        _route("/slots", native.slots, "GET"),
    ]
    handlers: Any = {HTTPException: _no_such_path}
    app = Starlette(routes=routes, middleware=[Middleware(Guard, access=access)], exception_handlers=handlers)
    app.state.service = service
    return app


def _route(path: str, endpoint: Endpoint, method: str) -> Route:
    return Route(path, _answered(endpoint), methods=[method])


def _answered(endpoint: Endpoint) -> Endpoint:
    """``endpoint``, whose errors become answers in the dialect of its path."""

    @wraps(endpoint)
    async def answered(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ClientGone:
            return Response(status_code=499)
        except (ServeError, ColdstreamError) as error:
            return error_response(request.url.path, as_serve_error(error))
        except Exception as error:  # noqa: BLE001 - one request that fails ends no other
            _log.exception("%s failed", request.url.path)
            return error_response(request.url.path, as_serve_error(error))

    return answered


async def _no_such_path(request: Request, error: HTTPException) -> Response:
    message = f"there is no {request.url.path}" if error.status_code == 404 else str(error.detail)
    return error_response(request.url.path, ServeError(error.status_code, message))


async def health(request: Request) -> Response:
    """That the model is loaded: before, nothing listens."""
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    """Prometheus' text."""
    return Response(request.app.state.service.metrics.text(), media_type="text/plain; version=0.0.4")


async def models(request: Request) -> Response:
    """The one model."""
    return JSONResponse({"object": "list", "data": [_model(request.app.state.service)]})


async def model(request: Request) -> Response:
    """The one model by its name. Raises ServeError for another."""
    service: Service = request.app.state.service
    if request.path_params["name"] != service.name:
        raise ServeError(404, f"there is no model {request.path_params['name']!r}: this server has {service.name!r}")
    return JSONResponse(_model(service))


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.started,
        "owned_by": "coldstream",
        "context_length": service.context,
        "max_model_len": service.context,
        "meta": {"n_ctx": service.context, "n_vocab": service.session.shape.vocab_size},
    }
