"""Every error that the services raise on purpose, and its form on the wire.

    RagError
    ├── RequestError              400  the request cannot be taken; the subclasses say why
    │   ├── UnsupportedParameter  400  a field of OpenAI's that cannot be honoured here (``param`` names it)
    │   ├── InvalidRequest        422  a field has a value that is refused (``param`` names it)
    │   ├── UnsupportedMediaType  415  Content-Type or Accept names a form we do not speak
    │   ├── PayloadTooLarge       413
    │   ├── Unauthorized          401  no key, or an unknown one
    │   ├── Forbidden             403  the key may not do this
    │   ├── NotFound              404
    │   │   └── ModelNotFound     404  another model than the one that is served
    │   ├── MethodNotAllowed      405
    │   ├── RequestTimeout        408  the request was sent too slowly
    │   ├── HeadTooLarge          431
    │   └── Conflict              409
    ├── UpstreamError             424  the other service failed or cannot be reached
    │   └── EncoderMismatch       424  the index was made for another encoder
    ├── Overloaded                429  the queue is full; ``Retry-After``
    ├── InferenceError            500  our fault; the trace is in the log, not on the wire
    ├── Unavailable               503  not ready, or draining; ``Retry-After``
    ├── DeadlineExceeded          504
    └── StartupError              exit code 3, never HTTP: the message says what to do

On the wire: ``{"error": {"type", "code", "message", "param", "request_id", "retryable"}}``. A client rebuilds the
class from ``code`` with :func:`error_from_wire`.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Self

from pydantic import BaseModel, Field


class RagError(Exception):
    """Base of all errors. ``message`` is for people, ``param`` names the field at fault."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    def copy(self) -> Self:
        """Another instance of it: one that is raised in several tasks would gather the tracebacks of all."""
        other = type(self).__new__(type(self), *self.args)
        other.__dict__.update(self.__dict__)
        return other


class RequestError(RagError):
    status, type, code = 400, "invalid_request_error", "bad_request"


class InvalidRequest(RequestError):
    status, code = 422, "invalid_request"


class UnsupportedParameter(RequestError):
    code = "unsupported_parameter"


class UnsupportedMediaType(RequestError):
    status, code = 415, "unsupported_media_type"


class PayloadTooLarge(RequestError):
    status, code = 413, "payload_too_large"


class Unauthorized(RequestError):
    status, type, code = 401, "authentication_error", "unauthorized"


class Forbidden(RequestError):
    status, type, code = 403, "permission_error", "forbidden"


class NotFound(RequestError):
    status, type, code = 404, "not_found_error", "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(RequestError):
    status, code = 405, "method_not_allowed"


class RequestTimeout(RequestError):
    status, type, code, retryable = 408, "timeout_error", "request_timeout", True


class HeadTooLarge(RequestError):
    status, code = 431, "head_too_large"


class Conflict(RequestError):
    status, type, code = 409, "conflict_error", "conflict"


class UpstreamError(RagError):
    status, type, code, retryable = 424, "upstream_error", "upstream_failed", True


class EncoderMismatch(UpstreamError):
    code, retryable = "encoder_mismatch", False


class Overloaded(RagError):
    status, type, code, retryable = 429, "overloaded_error", "overloaded", True


class InferenceError(RagError):
    code = "inference_failed"


class Unavailable(RagError):
    status, type, code, retryable = 503, "unavailable_error", "unavailable", True


class DeadlineExceeded(RagError):
    status, type, code, retryable = 504, "timeout_error", "deadline_exceeded", True


class StartupError(RagError):
    """The process cannot serve. The message names the cause and the mend."""

    code = "startup_failed"
    exit_code: ClassVar[int] = 3


class ErrorDetail(BaseModel):
    type: str
    code: str = Field(description="Stable name of the error class; a client decides by it.")
    message: str
    param: str | None = Field(default=None, description="The field at fault, as a dotted path.")
    request_id: str | None = None
    retryable: bool = False


class ErrorBody(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorDetail


def _family(cls: type[RagError]) -> Iterator[type[RagError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _family(child)


ERRORS_BY_CODE: dict[str, type[RagError]] = {cls.code: cls for cls in _family(RagError)}


MAX_TEXT = 500


def _for_the_wire(text: str, limit: int = MAX_TEXT) -> str:
    """Of bounded length, and encodable: what a client sent may hold lone surrogates and be megabytes long."""
    clipped = text if len(text) <= limit else text[:limit] + "…"
    return clipped.encode("utf-8", "backslashreplace").decode("utf-8")


def error_to_wire(error: RagError, request_id: str | None = None) -> dict[str, Any]:
    """The JSON body of an error response."""
    detail = ErrorDetail(
        type=error.type,
        code=error.code,
        message=_for_the_wire(error.message),
        param=None if error.param is None else _for_the_wire(error.param, limit=200),
        request_id=request_id or error.request_id,
        retryable=error.retryable,
    )
    return ErrorBody(error=detail).model_dump()


def error_from_wire(status: int, body: object, retry_after_s: float | None = None) -> RagError:
    """The error that a response stands for; an unknown body or code becomes the class nearest to ``status``."""
    detail = body.get("error") if isinstance(body, dict) else None
    if not isinstance(detail, dict):
        detail = {}
    cls = ERRORS_BY_CODE.get(str(detail.get("code")))
    if cls is None:
        by_status = {c.status: c for c in reversed(ERRORS_BY_CODE.values())}
        cls = by_status.get(status, RequestError if 400 <= status < 500 else RagError)
    return cls(
        str(detail.get("message") or f"HTTP {status}"),
        param=detail.get("param"),
        request_id=detail.get("request_id"),
        retry_after_s=retry_after_s,
    )
