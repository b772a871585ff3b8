"""Errors as a client of OpenAI's knows them: what it sent wrong is a 400, the field under the name that it used."""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError

from generator_svc.openai.fields import UNSUPPORTED
from shared.errors import InvalidRequest, RagError, RequestError, UnsupportedParameter
from shared.validation import refusal

_UNKNOWN = "extra_forbidden"


class OpenAIRoute(APIRoute):
    """A route whose refusals are 400, as OpenAI's are, instead of this API's 422."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as refused:
                problems = refused.errors()
                if isinstance(refused.body, bytes):  # not JSON by its Content-Type: the chassis says so
                    raise
                raise refused_by_name(problems) from None
            except InvalidRequest as error:
                raise _bad_request(error) from None

        return handler


def refused_by_name(problems: Sequence[Mapping[str, Any]]) -> RequestError:
    """The error for what pydantic found; fields that cannot be honoured are told first."""
    unknown = [problem for problem in problems if problem["type"] in {UNSUPPORTED, _UNKNOWN}]
    error = refusal(
        [{**p, "msg": "there is no such field"} if p["type"] == _UNKNOWN else p for p in unknown or problems]
    )
    kind = UnsupportedParameter if unknown else RequestError
    return kind(error.message, param=error.param)


def _bad_request(error: InvalidRequest) -> RequestError:
    return RequestError(error.message, param=error.param)


class Renamed:
    """Within ``with Renamed(names)`` errors of the pipeline name the field that the client sent.

    ``names`` maps a field of this API to the one it came from.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValidationError):
            raise self.error(refusal(error.errors(include_input=False, include_url=False))) from None
        if isinstance(error, RagError) and error.param is not None:
            raise self.error(error) from error.__cause__

    def error(self, error: RagError) -> RagError:
        renamed = error.copy()
        if error.param is not None:
            first, dot, rest = error.param.partition(".")
            renamed.param = self._names.get(first, first) + dot + rest
            if error.message.startswith(error.param):
                renamed.message = renamed.param + error.message.removeprefix(error.param)
        return renamed
