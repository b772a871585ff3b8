"""From pydantic's list of errors to the one error of the wire: the field at fault as a dotted path, and why."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from shared.errors import InvalidRequest, RequestError

# Between field names pydantic reports which member of a union it tried: `list[str]`, `EncodedArray`, `constrained-str`.
_FIELD = re.compile(r"[a-z_][a-z0-9_]*")
_UNION_MEMBERS = {"str", "int", "float", "bool", "none", "dict", "bytes"}
_LOCATIONS = {"body", "query", "path", "header", "cookie"}  # FastAPI's first element
_NO_OBJECT = {"model_type", "model_attributes_type"}
_DISAGREEMENT = "disagreement"


def disagreement(param: str, message: str) -> PydanticCustomError:
    """What a model's validator raises where a field does not go with the others; the message names the field."""
    return PydanticCustomError(_DISAGREEMENT, "{message}", {"param": param, "message": message})


def refusal(errors: Sequence[Mapping[str, Any]], *, within: str | None = None) -> RequestError:
    """The error to answer with. Of a union's branches the one that got furthest tells the cause.

    Args:
        errors: ``ValidationError.errors()``, or FastAPI's with its location in front.
        within: the field that holds what was checked.
    """
    first = max(errors, key=lambda error: len(error["loc"]))
    if first["type"] == "json_invalid":
        reason = str(first.get("ctx", {}).get("error") or first["msg"])
        return RequestError(f"the body is not valid JSON: {reason}", param=within)
    path = _dotted(first["loc"], unknown_field=first["type"] == "extra_forbidden")
    of_fields = str(first["ctx"]["param"]) if first["type"] == _DISAGREEMENT else ""
    param = ".".join(part for part in (within, path, of_fields) if part) or None
    message = str(first["msg"]).removeprefix("Value error, ")
    if of_fields:
        return InvalidRequest(message, param=param)
    if first["type"] == "missing" and param is None:
        return InvalidRequest("the body is missing")
    message = "Input should be a JSON object" if first["type"] in _NO_OBJECT else message
    return InvalidRequest(f"{param or 'the body'}: {message}", param=param)


def refusal_of(refused: ValidationError, *, within: str | None = None) -> RequestError:
    return refusal(refused.errors(include_input=False, include_url=False), within=within)


def _dotted(loc: Sequence[str | int], *, unknown_field: bool) -> str:
    parts = list(loc[1:] if loc and loc[0] in _LOCATIONS else loc)
    last = len(parts) - 1
    return ".".join(
        str(part)
        for i, part in enumerate(parts)
        if (unknown_field and i == last) or isinstance(part, int) or _names(part)
    )


def _names(part: str) -> bool:
    return _FIELD.fullmatch(part) is not None and part not in _UNION_MEMBERS
