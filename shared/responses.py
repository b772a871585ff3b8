"""How an error becomes a response, whoever raised it: a route, a middleware, FastAPI's validation or the router."""

import json
import math
from typing import cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match, Mount
from starlette.types import Scope

from shared.errors import (
    ERRORS_BY_CODE,
    MethodNotAllowed,
    NotFound,
    Overloaded,
    RagError,
    RequestError,
    Unauthorized,
    Unavailable,
    UnsupportedMediaType,
    error_to_wire,
)
from shared.validation import refusal

REQUEST_ID = "shared.request_id"  # key of the ASGI scope
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


def error_response(error: RagError, scope: Scope) -> Response:
    headers: dict[str, str] = {}
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, Overloaded | Unavailable):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s or 1)))
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = ", ".join(_allowed_methods(scope))
    body = json.dumps(error_to_wire(error, scope.get(REQUEST_ID)), ensure_ascii=False).encode()
    return Response(body, error.status, headers, media_type="application/json")


def install_error_handlers(app: FastAPI) -> None:
    """Errors of ours pass through to :class:`shared.request_context.RequestContext`; these two are frameworks'."""
    app.add_exception_handler(RequestValidationError, _on_refused_request)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_refused_request(request: Request, error: Exception) -> Response:
    refused = cast("RequestValidationError", error)
    problems = refused.errors()
    if isinstance(refused.body, bytes) and any(tuple(problem["loc"]) == ("body",) for problem in problems):
        # FastAPI parses a body only where its Content-Type is JSON, and else offers the bytes to the model.
        return error_response(UnsupportedMediaType("Content-Type must be application/json"), request.scope)
    return error_response(refusal(problems), request.scope)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    error = cast("HTTPException", error)
    cause = error.__cause__
    if isinstance(cause, RagError):  # FastAPI wraps what reading the body raised: too large, for one
        return error_response(cause, request.scope)
    if isinstance(cause, UnicodeDecodeError):
        reason = f"the body is not valid {cause.encoding.upper()}, from byte {cause.start} on"
        return error_response(RequestError(reason), request.scope)
    if isinstance(cause, RecursionError):
        return error_response(RequestError("the body is nested too deeply"), request.scope)
    if error.status_code == NotFound.status and error.detail == "Not Found":
        return error_response(NotFound("there is nothing at this path"), request.scope)
    if error.status_code == MethodNotAllowed.status:
        return error_response(MethodNotAllowed("the path does not take this method"), request.scope)
    by_status = {cls.status: cls for cls in reversed(ERRORS_BY_CODE.values())}
    cls = by_status.get(error.status_code, RequestError if error.status_code < 500 else RagError)
    return error_response(cls(str(error.detail)), request.scope)


def _allowed_methods(scope: Scope) -> list[str]:
    """Of all routes with this path; the router's own header names those of the first one only."""
    asked = {key: scope[key] for key in ("type", "path", "root_path", "headers") if key in scope}
    routes = [route for route in scope["app"].routes if not isinstance(route, Mount)]

    def takes(method: str) -> bool:
        return any(route.matches({**asked, "method": method})[0] is Match.FULL for route in routes)

    return [method for method in _METHODS if takes(method)] or ["GET", "HEAD"]
