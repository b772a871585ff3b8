"""One error of pydantic's many: the field as a client wrote it, and bounded work for whoever sends nonsense."""

import time
from typing import Any

import pytest
from pydantic import ValidationError

from shared.errors import InvalidRequest
from shared.schemas import AnswerRequest, Request, RetrieveRequest, ScoreRequest
from shared.validation import refusal_of


def refused(model: type[Request], body: object) -> InvalidRequest:
    with pytest.raises(ValidationError) as error:
        model.model_validate(body)
    refusal = refusal_of(error.value)
    assert isinstance(refusal, InvalidRequest)
    return refusal


@pytest.mark.parametrize(
    ("model", "body", "param"),
    [
        (AnswerRequest, {}, "question"),
        (AnswerRequest, {"question": ""}, "question"),
        (AnswerRequest, {"question": ["a", " "]}, "question.1"),
        (AnswerRequest, {"question": "a", "passages": [{"text": "t"}, {"title": "t"}]}, "passages.1.text"),
        (AnswerRequest, {"question": "a", "passages": [{"text": "t", "txet": "t"}]}, "passages.0.txet"),
        (AnswerRequest, {"question": "a", "Strategy[x]": 1}, "Strategy[x]"),
        (ScoreRequest, {"question": ["a"], "answers": [["b", 1]]}, "answers.0.1"),
        (RetrieveRequest, {"vectors": {"data": ""}}, "vectors.shape"),
        (RetrieveRequest, {"vectors": [[0.5, "x"]]}, "vectors.0.1"),
    ],
)
def test_the_path_names_fields_and_places_and_no_types(model: type[Request], body: object, param: str) -> None:
    assert refused(model, body).param == param


@pytest.mark.parametrize(
    ("model", "body", "param"),
    [
        (AnswerRequest, {"question": "a", "temperature": 0.5}, "temperature"),
        (AnswerRequest, {"question": "a", "seed": 3}, "seed"),
        (AnswerRequest, {"question": "a", "min_new_tokens": 65}, "min_new_tokens"),
        (AnswerRequest, {"question": "a", "num_return_sequences": 2}, "num_return_sequences"),
        (AnswerRequest, {"question": "a", "do_sample": True, "num_beams": 2}, "num_beams"),
        (AnswerRequest, {"question": ["a"], "stream": True}, "stream"),
        (ScoreRequest, {"question": "a", "answers": [["b"]]}, "answers"),
        (ScoreRequest, {"question": ["a"], "answers": ["b"]}, "answers"),
    ],
)
def test_options_that_do_not_agree_are_refused_by_the_one_at_fault(
    model: type[Request], body: object, param: str
) -> None:
    error = refused(model, body)
    assert error.param == param
    assert error.message.startswith(param)


@pytest.mark.parametrize(("body", "param"), [([], None), ({"question": "a", "passages": ["b"]}, "passages.0")])
def test_what_is_no_object_is_refused_in_terms_of_json(body: object, param: str | None) -> None:
    error = refused(AnswerRequest, body)
    assert (error.param, error.message) == (param, f"{param or 'the body'}: Input should be a JSON object")


@pytest.mark.parametrize("name", ["n_docs", "num_beams", "seed", "timeout_ms"])
def test_an_integer_may_be_written_with_a_point_but_is_no_text_and_no_boolean(name: str) -> None:
    body: dict[str, Any] = {"question": "a", "do_sample": name == "seed"}
    number = getattr(AnswerRequest.model_validate({**body, name: 1.0}), name)
    assert type(number) is int
    for wrong in ("1", True, 1.5, float("nan"), float("inf"), [1]):
        assert refused(AnswerRequest, {**body, name: wrong}).param == name


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (AnswerRequest, {"question": "a", **{f"field{i}": 0 for i in range(300_000)}}),
        (AnswerRequest, {"question": [1] * 300_000}),
        (AnswerRequest, {"question": "a", "passages": [{}] * 300_000}),
        (AnswerRequest, {"question": "a", "passages": [{f"field{i}": 0 for i in range(300_000)}]}),
        (ScoreRequest, {"question": ["a"], "answers": [[1] * 300_000]}),
        (RetrieveRequest, {"vectors": [["x"]] * 300_000}),
        (RetrieveRequest, {"vectors": {"data": "", "shape": ["x"] * 300_000}}),
    ],
)
def test_a_flood_of_mistakes_costs_no_more_than_a_few(model: type[Request], body: object) -> None:
    began_s = time.process_time()
    with pytest.raises(ValidationError) as error:
        model.model_validate(body)
    assert error.value.error_count() < 10
    assert time.process_time() - began_s < 1
