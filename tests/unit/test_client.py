"""`services.client`: what is sent, what comes back, and which error is raised."""

import json
from collections.abc import Callable
from typing import Any, get_type_hints

import httpx
import numpy as np
import pytest

from services.client import AsyncRagClient, RagClient, Unreachable
from services.client.options import (
    AnswerOptions,
    CollectionOptions,
    EncodeOptions,
    RetrieveOptions,
    ScoreOptions,
    SearchOptions,
)
from shared import schemas
from shared.errors import DeadlineExceeded, InvalidRequest, Overloaded, RagError, UpstreamError, error_to_wire
from shared.retrieval import RetrieveResult
from shared.schemas import IndexInfo, OwnPassage, Passage
from shared.vectors import query_from_wire, result_to_wire

INDEX = IndexInfo(collection="default", generation="g1", encoder="e1")
ANSWER = {
    "model": "demo",
    "strategy": "token",
    "results": [
        {
            "question": "q",
            "answers": [{"text": "42", "log_prob": -0.1, "probability": 0.9, "doc_posterior": [1.0]}],
            "abstained": False,
            "documents": [{"id": 1, "title": "t", "text": "42", "score": 2.0, "prior": 1.0, "truncated": False}],
        }
    ],
    "index": INDEX.model_dump(),
    "timings_ms": {"total": 1.0},
}


class Service:
    """Answers every request with the same response, and keeps what it was sent."""

    def __init__(self, status: int = 200, body: Any = None, headers: dict[str, str] | None = None) -> None:
        self.requests: list[httpx.Request] = []
        self._status, self._body, self._headers = status, ANSWER if body is None else body, headers

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return httpx.Response(self._status, json=self._body, headers=self._headers)

    @property
    def sent(self) -> Any:
        return json.loads(self.requests[-1].content)


def client_of(service: Callable[[httpx.Request], httpx.Response], **options: Any) -> RagClient:
    return RagClient("http://rag", retriever_url="http://retriever/", transport=httpx.MockTransport(service), **options)


def failing(error: Exception) -> Callable[[httpx.Request], httpx.Response]:
    def respond(request: httpx.Request) -> httpx.Response:
        raise error

    return respond


@pytest.mark.parametrize(
    ("options", "fields", "positional"),
    [
        (AnswerOptions, schemas.AnswerRequest.model_fields, {"question", "stream"}),
        (ScoreOptions, schemas.ScoreRequest.model_fields, {"question", "answers"}),
        (SearchOptions, schemas.SearchRequest.model_fields, {"question"}),
        (EncodeOptions, schemas.EncodeRequest.model_fields, {"question"}),
        (RetrieveOptions, schemas.RetrieveRequest.model_fields, {"vectors"}),
        (CollectionOptions, schemas.NewCollection.model_fields, {"name", "dimension", "encoder"}),
    ],
)
def test_every_field_of_a_request_is_an_option_of_the_call(
    options: type, fields: dict[str, Any], positional: set[str]
) -> None:
    assert set(get_type_hints(options)) == set(fields) - positional


def test_an_answer_comes_back_typed() -> None:
    result = client_of(Service()).answer("q").results[0]
    assert result.answers[0].text == "42"
    assert result.documents[0].prior == 1.0


def test_only_what_the_caller_gave_is_sent() -> None:
    service = Service()
    client_of(service).answer("q", num_beams=4, passages=[OwnPassage(text="p")])
    assert service.sent == {"question": "q", "num_beams": 4, "passages": [{"text": "p"}]}


def test_the_key_is_sent_as_a_bearer_token() -> None:
    service = Service()
    client_of(service, api_key="secret").answer("q")
    assert service.requests[0].headers["Authorization"] == "Bearer secret"


def test_scores_of_many_questions_take_one_list_of_answers_each() -> None:
    service = Service()
    client_of(service).score(("a", "b"), (("x",), ("y", "z")))
    assert service.sent == {"question": ["a", "b"], "answers": [["x"], ["y", "z"]]}


def test_a_misspelt_option_is_refused_before_anything_is_sent() -> None:
    service = Service()
    with pytest.raises(InvalidRequest) as caught:
        client_of(service).answer("q", num_beans=4)  # type: ignore[call-arg]
    assert caught.value.param == "num_beans"
    assert service.requests == []


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="raise num_beams"):
        client_of(Service()).answer("q", num_return_sequences=3)


@pytest.mark.parametrize("form", ["json", "base64", "arrow"])
def test_retrieval_takes_and_gives_arrays_in_every_wire_form(form: Any) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((2, 4), dtype=np.float32)
    embeds = [rng.standard_normal((n, 4), dtype=np.float32) for n in (3, 1)]
    result = RetrieveResult(
        doc_ids=[np.array([7, 8, 2**40]), np.array([9])],
        doc_scores=[np.array([3, 2, 1], np.float32), np.array([0.5], np.float32)],
        doc_embeds=embeds,
        docs=[[Passage(id=n, title="t", text="é") for n in (7, 8, 2**40)], [Passage(id=9, title="", text="x")]],
        index=INDEX,
        timings_ms={"search": 0.5},
    )

    def respond(request: httpx.Request) -> httpx.Response:
        assert request.url == "http://retriever/v1/retrieve"
        query = query_from_wire(request.content, request.headers["Content-Type"])
        np.testing.assert_array_equal(query.vectors, vectors)
        assert query.n_docs == 3
        content, content_type = result_to_wire(result, form)
        # Accept names the form in which the service is to answer, so what came back must be that one.
        assert request.headers["Accept"].split(";")[0] == content_type.split(";")[0]
        return httpx.Response(200, content=content, headers={"Content-Type": content_type})

    found = client_of(respond).retrieve(vectors, n_docs=3, form=form)
    assert found.n_found == [3, 1]
    assert found.docs == result.docs
    assert found.index == INDEX
    assert found.doc_embeds is not None
    for got, expected in zip(
        [*found.doc_ids, *found.doc_scores, *found.doc_embeds],
        [*result.doc_ids, *result.doc_scores, *embeds],
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)


def test_vectors_that_are_no_matrix_are_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        client_of(Service()).retrieve([[1.0, 2.0], [3.0]])
    assert caught.value.param is not None
    assert caught.value.param.startswith("vectors")


def test_calls_to_the_retriever_need_its_address() -> None:
    with RagClient("http://rag") as client, pytest.raises(ValueError, match="retriever_url"):
        client.collections()


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("no", param="n_docs", request_id="r1"),
        UpstreamError("down", request_id="r2"),
        DeadlineExceeded("late", request_id="r3"),
    ],
)
def test_an_error_comes_back_as_the_class_that_was_raised(error: RagError) -> None:
    with pytest.raises(type(error)) as caught:
        client_of(Service(error.status, error_to_wire(error))).answer("q")
    assert (caught.value.message, caught.value.param, caught.value.request_id) == (
        error.message,
        error.param,
        error.request_id,
    )


def test_retry_after_comes_with_the_error() -> None:
    service = Service(429, error_to_wire(Overloaded("full")), {"Retry-After": "2"})
    with pytest.raises(Overloaded) as caught:
        client_of(service).answer("q")
    assert caught.value.retry_after_s == 2.0


def test_the_page_of_a_proxy_becomes_the_error_nearest_to_its_status() -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        headers = {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}
        return httpx.Response(503, text="<h1>Bad gateway</h1>", headers=headers)

    with pytest.raises(RagError) as caught:
        client_of(respond).answer("q")
    assert caught.value.code == "unavailable"
    assert caught.value.retry_after_s is None


def test_an_answer_of_another_program_is_no_answer() -> None:
    with pytest.raises(UpstreamError, match="not a generator"):
        client_of(Service(200, {"hello": "world"})).answer("q")


def test_no_service_at_the_address_is_told_apart_from_one_that_is_not_ready() -> None:
    with pytest.raises(Unreachable, match="no generator answers at http://rag"):
        client_of(failing(httpx.ConnectError("refused"))).answer("q")


def test_a_connection_that_breaks_says_so() -> None:
    with pytest.raises(Unreachable, match="broke"):
        client_of(failing(httpx.ReadError("reset"))).answer("q")


def test_a_service_that_is_too_slow_is_a_deadline_exceeded() -> None:
    with pytest.raises(DeadlineExceeded, match="within 60 s"):
        client_of(failing(httpx.ReadTimeout("slow"))).answer("q")


def test_the_client_waits_a_little_longer_than_the_deadline_that_it_sends() -> None:
    service = Service()
    client_of(service, timeout_s=1).answer("q", timeout_ms=5000)
    waits = service.requests[0].extensions["timeout"]["read"]
    assert 5 < waits < 10


def test_readiness_gives_the_reasons() -> None:
    service = Service(503, {"status": "unavailable", "reasons": ["loading the checkpoint"]})
    assert client_of(service).ready().reasons == ["loading the checkpoint"]


def test_a_service_that_cannot_be_reached_is_not_ready() -> None:
    health = client_of(failing(httpx.ConnectError("refused"))).ready("retriever")
    assert health.status == "unavailable"
    assert "no retriever answers" in health.reasons[0]


async def test_the_async_client_sends_and_raises_the_same() -> None:
    service = Service()
    async with AsyncRagClient("http://rag", transport=httpx.MockTransport(service)) as client:
        assert (await client.answer("q", n_docs=2)).results[0].answers[0].text == "42"
    assert service.sent == {"question": "q", "n_docs": 2}
    refusing = Service(422, error_to_wire(InvalidRequest("no", param="n_docs")))
    async with AsyncRagClient("http://rag", transport=httpx.MockTransport(refusing)) as client:
        with pytest.raises(InvalidRequest):
            await client.answer("q")


# --- streams -----------------------------------------------------------------------------------------------


def events(*pairs: tuple[str, Any]) -> Callable[[httpx.Request], httpx.Response]:
    body = "".join(f"event: {event}\ndata: {json.dumps(data)}\n\n" for event, data in pairs)
    return lambda _: httpx.Response(200, text=body, headers={"Content-Type": "text/event-stream"})


DOCUMENTS = ("documents", {"documents": ANSWER["results"][0]["documents"]})  # type: ignore[index]


def test_a_stream_gives_documents_pieces_and_the_response() -> None:
    service = events(DOCUMENTS, ("token", {"text": "4"}), ("later", {}), ("token", {"text": "2"}), ("answer", ANSWER))
    documents, *pieces, answer = client_of(service).stream("q")
    assert [document.id for document in documents] == [1]  # type: ignore[union-attr]
    assert pieces == ["4", "2"]
    assert answer == schemas.AnswerResponse.model_validate(ANSWER)


async def test_the_async_client_streams_the_same() -> None:
    service = events(DOCUMENTS, ("token", {"text": "42"}), ("answer", ANSWER))
    async with AsyncRagClient("http://rag", transport=httpx.MockTransport(service)) as client:
        streamed = [event async for event in client.stream("q")]
    assert streamed == list(client_of(service).stream("q"))


def test_an_error_event_is_raised_as_its_class() -> None:
    refused = error_to_wire(DeadlineExceeded("too late"))
    with pytest.raises(DeadlineExceeded, match="too late"):
        list(client_of(events(DOCUMENTS, ("error", refused))).stream("q"))


def test_an_error_before_the_stream_is_raised_as_its_class() -> None:
    with pytest.raises(Overloaded):
        list(client_of(Service(429, error_to_wire(Overloaded("full")))).stream("q"))


def test_a_stream_that_breaks_off_is_no_answer() -> None:
    with pytest.raises(Unreachable, match="ended early"):
        list(client_of(events(DOCUMENTS)).stream("q"))


def test_events_of_something_else_are_an_upstream_error() -> None:
    with pytest.raises(UpstreamError, match="not a generator"):
        list(client_of(events(("answer", {"text": "?"}))).stream("q"))
