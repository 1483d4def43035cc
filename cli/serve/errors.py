"""What goes wrong with a request, in the words of the dialect that it was made in."""

import itertools
from typing import Any

from starlette.responses import JSONResponse

from quant.errors import BudgetError, CheckpointError, ColdstreamError, InputError, SchemeError, UsageError

# Status → what OpenAI, and what Anthropic, call it.
_KINDS = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    403: ("permission_error", "permission_error"),
    404: ("not_found_error", "not_found_error"),
    405: ("invalid_request_error", "invalid_request_error"),
    408: ("timeout_error", "timeout_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_error"),
    500: ("server_error", "api_error"),
    503: ("server_error", "overloaded_error"),
}
_numbers = itertools.count(1)


class ServeError(Exception):
    """A request that cannot be answered: an HTTP ``status``, one clear line, and the ``param`` that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int = 0,
        retry: bool = True,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {"Retry-After": str(retry_after)} if retry_after else {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"
        if not retry:  # the official clients would ask again, which would take as long
            self.headers["X-Should-Retry"] = "false"


def as_serve_error(error: BaseException) -> ServeError:
    """``error`` as the client is told of it: its own mistakes by name, everything else as a failure of ours."""
    if isinstance(error, ServeError):
        return error
    line = " ".join(str(error).split())
    if isinstance(error, BudgetError):
        return ServeError(400, line, code="context_length_exceeded")
    if isinstance(error, (UsageError, InputError, SchemeError)):
        return ServeError(400, line)
    if isinstance(error, CheckpointError) and "chat template" in line:
        return ServeError(400, line, param="messages")
    if isinstance(error, ColdstreamError):
        return ServeError(500, line)
    if isinstance(error, RuntimeError) and "can't start new thread" in line:
        return ServeError(503, "the system starts no more threads: try again later, or raise `ulimit -u`")
    return ServeError(500, f"the server failed: {type(error).__name__}; its log says more")


def error_document(path: str, error: ServeError) -> dict[str, Any]:
    """The body of an answer to ``path`` that says ``error``."""
    openai, anthropic = _KINDS.get(error.status, _KINDS[500])
    if path.startswith("/v1/messages"):
        said = {"type": anthropic, "message": error.message}
        return {"type": "error", "error": said, "request_id": f"req_{next(_numbers):08d}"}
    if path.startswith("/v1/"):
        return {"error": {"message": error.message, "type": openai, "param": error.param, "code": error.code}}
    return {"error": {"code": error.status, "message": error.message, "type": openai}}


def error_event(path: str, error: ServeError, number: int) -> dict[str, Any]:
    """What a stream of ``path`` says of ``error``, after ``number`` events."""
    if path.startswith("/v1/responses"):
        said = {"code": error.code or "server_error", "message": error.message, "param": error.param}
        return {"type": "error", **said, "sequence_number": number}
    return error_document(path, error)


def error_response(path: str, error: ServeError) -> JSONResponse:
    """The answer to ``path`` that says ``error``."""
    return JSONResponse(error_document(path, error), error.status, error.headers)
