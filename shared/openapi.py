"""The OpenAPI document, true to what the chassis does: errors, headers and keys of every operation.

A route names what it raises itself, ``@app.post("/v1/retrieve", responses=raises(NotFound, Overloaded))``; what every
route can answer (a refused body, a missing key, a stop, a crash) is added here.
"""

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import iter_route_contexts

from shared.auth import Requirement
from shared.drain import STILL_ANSWERED
from shared.errors import (
    ErrorBody,
    Forbidden,
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    RagError,
    RequestError,
    Unauthorized,
    Unavailable,
    UnsupportedMediaType,
)

_ERROR_SCHEMA = {"$ref": "#/components/schemas/ErrorBody"}
_WHAT = {
    400: "The body cannot be parsed, or asks for what cannot be done.",
    401: "No key, or an unknown one.",
    403: "The key may not do this.",
    404: "There is no such thing.",
    409: "It contradicts the present state.",
    413: "The body is too large.",
    415: "Content-Type or Accept names a form that is not spoken.",
    422: "A field is refused; `param` names it.",
    424: "The other service failed or cannot be reached.",
    429: "The queue is full.",
    500: "Our fault; the log has the trace.",
    503: "Not ready, or stopping.",
    504: "The deadline passed.",
}


def raises(*errors: type[RagError]) -> dict[int | str, dict[str, Any]]:
    """For a route's ``responses=``: the errors that it raises itself."""
    return {error.status: {"description": _WHAT[error.status], "model": ErrorBody} for error in errors}


def describe(app: FastAPI, *, auth: bool, open_paths: frozenset[str]) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    # FastAPI's own form of a 422, which we never send.
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    definition = ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(definition.pop("$defs"))
    schemas["ErrorBody"] = definition
    if auth:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, method, operation in _operations(document):
        responses = operation.setdefault("responses", {})
        if _is_fastapis(responses.get("422")):
            del responses["422"]
        closed = auth and path not in open_paths
        if closed:
            operation["security"] = [{"key": []}]
        for error in _common(app, path, method, operation, closed=closed):
            responses.setdefault(
                str(error.status),
                {"description": _WHAT[error.status], "content": {"application/json": {"schema": _ERROR_SCHEMA}}},
            )
        for status, response in responses.items():
            response["headers"] = {**response.get("headers", {}), **_headers(status)}
    return document


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, item in document.get("paths", {}).items():
        for method, operation in item.items():
            yield path, method, operation


def _is_fastapis(response: dict[str, Any] | None) -> bool:
    return response is not None and "HTTPValidationError" in str(response.get("content"))


def _common(
    app: FastAPI, path: str, method: str, operation: dict[str, Any], *, closed: bool
) -> Iterator[type[RagError]]:
    yield RagError
    yield PayloadTooLarge  # any request may carry a body
    if path not in STILL_ANSWERED:
        yield Unavailable
    if closed:
        yield Unauthorized
        if _needs_admin(app, path, method):
            yield Forbidden
    if "requestBody" in operation:
        yield RequestError
        yield UnsupportedMediaType
    if "requestBody" in operation or operation.get("parameters"):
        yield InvalidRequest


def _needs_admin(app: FastAPI, path: str, method: str) -> bool:
    for route in iter_route_contexts(app.routes):
        if route.path_format == path and method.upper() in (route.methods or ()):
            return any(
                isinstance(needed.call, Requirement) and needed.call.role == "admin"
                for needed in route.dependant.dependencies
            )
    return False


def _headers(status: str) -> dict[str, Any]:
    """Of every response, and of some: they are required, so that a check of the headers can fail."""
    headers = {"X-Request-ID": _header("Names the request in the logs.", {"type": "string", "maxLength": 128})}
    if status in {str(Overloaded.status), str(Unavailable.status)}:
        seconds = {"type": "integer", "minimum": 1}
        headers["Retry-After"] = _header("Seconds after which it is worth another try.", seconds)
    if status == str(Unauthorized.status):
        headers["WWW-Authenticate"] = _header("How to authenticate.", {"type": "string", "const": "Bearer"})
    return headers


def _header(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "required": True, "schema": schema}
