"""The application: which path is whose."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cli.serve import page
from cli.serve.body import description
from cli.serve.dialects import chat, completions, messages, native, responses
from cli.serve.errors import ServeError, as_serve_error, error_response
from cli.serve.guard import Access, Guard
from cli.serve.reply import ClientGone
from cli.serve.service import Service
from quant.errors import ColdstreamError

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(service: Service, access: Access) -> Starlette:
    """The ASGI application of ``service``."""
    asked: dict[str, Endpoint] = {
        "/": page.page,
        "/page/{name}": page.page,
        "/live": page.live,
        "/openapi.json": openapi,
        "/health": health,
        "/metrics": metrics,
        "/v1/models": models,
        "/v1/models/{name:path}": model,
        "/props": native.props,
        "/slots": native.slots,
    }
    told: dict[str, Endpoint] = {
        chat.PATH: chat.chat_completions,
        completions.PATH: completions.completions,
        responses.PATH: responses.responses,
        messages.PATH: messages.messages,
        messages.COUNT_PATH: messages.count_tokens,
        "/tokenize": native.tokenize,
        "/detokenize": native.detokenize,
    }
    routes = [Route(path, endpoint, methods=["GET"]) for path, endpoint in asked.items()]
    routes += [Route(path, endpoint, methods=["POST"]) for path, endpoint in told.items()]
    handlers: Any = dict.fromkeys((ServeError, ColdstreamError, HTTPException, ClientGone, Exception), _failed)
    handlers[RuntimeError] = _failed_to_start
    app = Starlette(routes=routes, middleware=[Middleware(Guard, access=access)], exception_handlers=handlers)
    app.state.service = service
    return app


async def _failed(request: Request, error: Exception) -> Response:
    """What a request that failed is told, in the dialect of its path."""
    if isinstance(error, ClientGone):
        return Response(status_code=499)
    if isinstance(error, HTTPException):
        said = f"there is no {request.url.path}" if error.status_code == 404 else str(error.detail)
        return error_response(request.url.path, ServeError(error.status_code, said))
    return error_response(request.url.path, as_serve_error(error))


async def _failed_to_start(request: Request, error: RuntimeError) -> Response:
    """What a request is told for which the system starts no thread. Raises ``error`` if it is another: the log says
    more of those."""
    if as_serve_error(error).status != 503:
        raise error
    return await _failed(request, error)


async def openapi(request: Request) -> Response:
    """What is asked and answered at each path."""
    return Response(description(), media_type="application/json")


async def health(request: Request) -> Response:
    """That the model is loaded: before, nothing listens."""
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    """Prometheus' text."""
    return Response(request.app.state.service.metrics.text(), media_type="text/plain; version=0.0.4")


async def models(request: Request) -> Response:
    """The one model."""
    one = _model(request.app.state.service)
    return JSONResponse(
        {"object": "list", "data": [one], "has_more": False, "first_id": one["id"], "last_id": one["id"]}
    )


async def model(request: Request) -> Response:
    """The one model by its name. Raises ServeError for another."""
    service: Service = request.app.state.service
    if request.path_params["name"] != service.name:
        raise ServeError(404, f"there is no model {request.path_params['name']!r}: this server has {service.name!r}")
    return JSONResponse(_model(service))


def _model(service: Service) -> dict[str, Any]:
    """As OpenAI's clients read it, and Anthropic's."""
    return {
        "id": service.name,
        "object": "model",
        "created": service.started,
        "owned_by": "coldstream",
        "type": "model",
        "display_name": service.name,
        "created_at": datetime.fromtimestamp(service.started, UTC).isoformat(),
        "context_length": service.context,
        "max_model_len": service.context,
        "meta": {"n_ctx": service.context, "n_vocab": service.session.shape.vocab_size},
    }
