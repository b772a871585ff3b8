"""The names of the forms that vectors take on the wire, and how a client asks for one."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from shared.arrays import encode_array
from shared.errors import UnsupportedMediaType

JSON_TYPE = "application/json"
ARROW_TYPE = "application/vnd.apache.arrow.stream"
Form = Literal["json", "base64", "arrow"]


def media_type(content_type: str | None) -> tuple[str, dict[str, str]]:
    """``type/subtype`` and its parameters, in lower case."""
    main, *rest = (content_type or "").split(";")
    pairs = (part.partition("=") for part in rest)
    return main.strip().lower(), {key.strip().lower(): value.strip().strip('"').lower() for key, _, value in pairs}


def response_form(accept: str | None) -> Form:
    """The form that an Accept header asks for; JSON lists where it does not care.

    Raises: UnsupportedMediaType: it names none of ours.
    """
    best: tuple[float, Form] | None = None
    for item in (accept or "*/*").split(","):
        kind, parameters = media_type(item)
        form = _form_of(kind, parameters)
        quality = _quality(parameters)
        if form is not None and quality > 0 and (best is None or quality > best[0]):
            best = (quality, form)
    if best is None:
        raise UnsupportedMediaType(f"Accept names none of {JSON_TYPE}, {JSON_TYPE};vectors=base64, {ARROW_TYPE}")
    return best[1]


def _form_of(kind: str, parameters: dict[str, str]) -> Form | None:
    if kind == ARROW_TYPE:
        return "arrow"
    if kind == JSON_TYPE:
        return {"base64": "base64", "list": "json", None: "json"}.get(parameters.get("vectors"))  # type: ignore[return-value]
    return "json" if kind in {"*/*", "application/*", ""} else None


def _quality(parameters: dict[str, str]) -> float:
    try:
        return float(parameters.get("q", "1"))
    except ValueError:
        return 0.0


def json_array(array: npt.NDArray[np.floating], form: Form) -> Any:
    """An array inside a JSON body: base64, or nested lists."""
    return encode_array(array) if form == "base64" else array.tolist()
