"""The error tree: what each class says about itself, and what survives the way over the wire."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import errors
from shared.errors import (
    ERRORS_BY_CODE,
    ErrorBody,
    Overloaded,
    RagError,
    RequestError,
    Unavailable,
    error_from_wire,
    error_to_wire,
)

CLASSES = st.sampled_from(list(ERRORS_BY_CODE.values()))


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    drawn = dict(re.findall(r"[├└]── (\w+) +(\d{3})", errors.__doc__ or ""))
    assert drawn == {
        cls.__name__: str(cls.status)
        for cls in ERRORS_BY_CODE.values()
        if cls.__name__ not in {"RagError", "StartupError"}
    }


def test_codes_are_unique() -> None:
    def family(cls: type[RagError]) -> list[type[RagError]]:
        return [cls, *(heir for child in cls.__subclasses__() for heir in family(child))]

    codes = [cls.code for cls in family(RagError)]
    assert len(codes) == len(set(codes))


@given(CLASSES, st.text(max_size=300), st.none() | st.text(max_size=100))
def test_a_client_rebuilds_the_error(cls: type[RagError], message: str, param: str | None) -> None:
    body = json.loads(json.dumps(error_to_wire(cls(message, param=param), "id-1")).encode())
    ErrorBody.model_validate(body)
    rebuilt = error_from_wire(cls.status, body, retry_after_s=2)
    assert type(rebuilt) is cls
    assert (rebuilt.message or None, rebuilt.param) == (message or rebuilt.message, param)
    assert (rebuilt.request_id, rebuilt.retry_after_s) == ("id-1", 2)


@given(st.text(st.characters(), max_size=3000))
def test_any_message_can_be_sent_and_stays_short(message: str) -> None:
    wire = error_to_wire(RequestError(message, param=message))["error"]
    assert len(json.dumps(wire, ensure_ascii=False).encode()) < 60_000
    assert len(wire["message"]) <= 501 * len("\\ud800")


@pytest.mark.parametrize("body", [None, "oops", [], {}, {"error": None}, {"error": "x"}, {"error": {"code": ["a"]}}])
def test_an_answer_that_is_not_ours_becomes_the_class_nearest_to_its_status(body: object) -> None:
    assert type(error_from_wire(429, body)) is Overloaded
    assert type(error_from_wire(503, body)) is Unavailable
    assert type(error_from_wire(418, body)) is RequestError
    assert type(error_from_wire(502, body)) is RagError
    assert error_from_wire(502, body).message == "HTTP 502"


def test_a_copy_is_another_instance_with_the_same_contents() -> None:
    error = Overloaded("full", param="queue", retry_after_s=3)
    other = error.copy()
    assert other is not error
    assert (type(other), other.args, vars(other)) == (Overloaded, error.args, vars(error))
