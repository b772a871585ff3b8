"""The client of the retriever, against a real HTTP server that fails in chosen ways."""

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial

import httpx
import numpy as np
import pytest
import structlog
from starlette.responses import JSONResponse, PlainTextResponse, Response

from generator_svc.retriever_client import RetrieverClient
from generator_svc.settings import GeneratorSettings
from services.client import AsyncRagClient
from shared.deadline import Deadline
from shared.errors import (
    DeadlineExceeded,
    EncoderMismatch,
    InferenceError,
    InvalidRequest,
    NotFound,
    Overloaded,
    RagError,
    Unavailable,
    UpstreamError,
)
from shared.retrieval import RetrieveQuery
from tests.serving import free_port, served
from tests.small_retriever import SmallRetriever, error

ENCODER = "sha256-ours"
RANDOM = np.random.default_rng(0)
QUERY = RetrieveQuery(RANDOM.standard_normal((2, 8), dtype=np.float32), n_docs=3)


@pytest.fixture
def retriever() -> SmallRetriever:
    return SmallRetriever(RANDOM.standard_normal((6, 8), dtype=np.float32), ENCODER)


@pytest.fixture
def url(retriever: SmallRetriever) -> Iterator[str]:
    with served(retriever.app) as url:
        yield url


@pytest.fixture
async def client(url: str) -> AsyncIterator[RetrieverClient]:
    async for made in open_client(url):
        yield made


async def open_client(url: str, **settings: object) -> AsyncIterator[RetrieverClient]:
    client = RetrieverClient(GeneratorSettings(retriever_url=url, **{"retriever_retry_s": 0.3, **settings}), ENCODER)
    yield client
    await client.aclose()


def soon(seconds: float = 5) -> Deadline:
    return Deadline.after(None, seconds * 1000)


async def test_documents_arrive_bit_for_bit(retriever: SmallRetriever, client: RetrieverClient) -> None:
    found, expected = await client.retrieve(QUERY, soon()), retriever.search(QUERY)
    assert [list(ids) for ids in found.doc_ids] == [list(ids) for ids in expected.doc_ids]
    assert found.docs == expected.docs
    for ours, theirs in zip(found.doc_embeds, expected.doc_embeds, strict=True):
        assert np.array_equal(ours, theirs)


async def test_request_id_deadline_and_key_are_passed_on(retriever: SmallRetriever, url: str) -> None:
    async for client in open_client(url, retriever_api_key="sesame"):
        with structlog.contextvars.bound_contextvars(request_id="asked-here"):
            await client.retrieve(QUERY, soon(2))
    request, query = retriever.requests[0]
    assert request.headers["x-request-id"] == "asked-here"
    assert request.headers["authorization"] == "Bearer sesame"
    assert 1500 < query.timeout_ms <= 2000


async def test_a_retriever_that_is_away_fails_within_the_retry_budget() -> None:
    async for client in open_client(f"http://127.0.0.1:{free_port()}"):
        began = time.monotonic()
        with pytest.raises(UpstreamError, match="cannot be reached"):
            await client.retrieve(QUERY, soon(30))
        assert time.monotonic() - began < 1.5


async def test_no_pause_outlasts_the_deadline() -> None:
    async for client in open_client(f"http://127.0.0.1:{free_port()}", retriever_retry_s=30):
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="cannot be reached"):
            await client.retrieve(QUERY, soon(0.4))
        assert time.monotonic() - began < 1


async def test_a_retriever_that_comes_back_in_time_is_not_noticed(retriever: SmallRetriever) -> None:
    port, done = free_port(), threading.Event()

    def start_later() -> None:
        time.sleep(0.4)
        with served(retriever.app, port):
            done.wait(10)

    thread = threading.Thread(target=start_later)
    thread.start()
    try:
        async for client in open_client(f"http://127.0.0.1:{port}", retriever_retry_s=5):
            assert (await client.retrieve(QUERY, soon())).n_found == [3, 3]
    finally:
        done.set()
        thread.join()


async def test_a_kept_connection_that_the_retriever_closed_is_replaced(retriever: SmallRetriever) -> None:
    port = free_port()
    async for client in open_client(f"http://127.0.0.1:{port}"):
        for _ in range(2):  # the second server knows nothing of the first one's connections
            with served(retriever.app, port):
                assert (await client.retrieve(QUERY, soon())).n_found == [3, 3]


async def given_up_on(retrieve: Callable[[], Awaitable[object]], retriever: SmallRetriever) -> None:
    """Many, of whom most do not wait for their documents."""
    dice, gate = random.Random(1), asyncio.Semaphore(8)

    async def slow(_query: RetrieveQuery) -> None:
        await asyncio.sleep(dice.random() * 0.004)

    async def one() -> bool:
        async with gate:
            try:
                async with asyncio.timeout(dice.random() * dice.choice([0.01, 0.03, 0.1])):
                    await retrieve()
            except TimeoutError:
                return False
            return True

    retriever.fault = slow
    answered = await asyncio.gather(*(one() for _ in range(1200)))
    assert min(answered.count(True), answered.count(False)) > 20
    retriever.fault = None


async def test_those_who_give_up_leave_their_connections_to_others(retriever: SmallRetriever, url: str) -> None:
    async for client in open_client(url, retriever_connections=2):
        await given_up_on(partial(client.retrieve, QUERY, soon(60)), retriever)
        found = await asyncio.gather(*(client.retrieve(QUERY, soon()) for _ in range(20)))
        assert [each.n_found for each in found] == [[3, 3]] * 20


async def test_those_who_give_up_on_the_python_client_do(
    retriever: SmallRetriever, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.client.clients._LIMITS", httpx.Limits(max_connections=2))
    monkeypatch.setattr("services.client.clients.getproxies", lambda: {"no": "*"})
    async with AsyncRagClient(retriever_url=url, timeout_s=5) as client:
        await given_up_on(partial(client.retrieve, QUERY.vectors, n_docs=3), retriever)
        found = await asyncio.gather(*(client.retrieve(QUERY.vectors, n_docs=3) for _ in range(20)))
        assert [each.n_found for each in found] == [[3, 3]] * 20


async def test_not_ready_is_tried_again(retriever: SmallRetriever, url: str) -> None:
    async def first_time(query: RetrieveQuery) -> Response | None:
        return error(Unavailable("loading")) if len(retriever.requests) < 3 else None

    retriever.fault = first_time
    async for client in open_client(url, retriever_retry_s=5):
        assert (await client.retrieve(QUERY, soon())).n_found == [3, 3]
    assert len(retriever.requests) == 3


async def test_not_ready_for_too_long_is_an_upstream_error(retriever: SmallRetriever, client: RetrieverClient) -> None:
    async def always(query: RetrieveQuery) -> Response:
        return error(Unavailable("loading"))

    retriever.fault = always
    with pytest.raises(UpstreamError, match="loading"):
        await client.retrieve(QUERY, soon())


@pytest.mark.parametrize(
    ("raised", "becomes", "param"),
    [
        (NotFound("there is no collection `x`", param="collection"), NotFound, "collection"),
        (InvalidRequest("n_docs: at most 5", param="n_docs"), InvalidRequest, "n_docs"),
        (InvalidRequest("there is no column", param="filter"), InvalidRequest, "filter"),
        (InvalidRequest("no nprobe", param="search_params.nprobe"), InvalidRequest, "search_params.nprobe"),
        # The caller of the generator sent no vectors and chose no path: these are not its fault.
        (InvalidRequest("vectors: 9 dimensions", param="vectors"), UpstreamError, None),
        (NotFound("there is nothing at this path"), UpstreamError, None),
        (Overloaded("queue full"), Overloaded, None),
        (InferenceError("trace in the log"), UpstreamError, None),
        (DeadlineExceeded("too late"), DeadlineExceeded, None),
    ],
    ids=lambda value: value.code if isinstance(value, RagError) else None,
)
async def test_errors_are_the_callers_or_the_upstreams(
    retriever: SmallRetriever, client: RetrieverClient, raised: RagError, becomes: type[RagError], param: str | None
) -> None:
    async def fail(query: RetrieveQuery) -> Response:
        return error(raised)

    retriever.fault = fail
    with pytest.raises(becomes) as caught:
        await client.retrieve(QUERY, soon())
    assert type(caught.value) is becomes
    assert caught.value.param == param
    assert raised.message in caught.value.message
    assert len(retriever.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        PlainTextResponse("<html>a proxy's page</html>", 502),
        PlainTextResponse("ok"),
        JSONResponse({"documents": []}),
        Response(b"\xff\xff\xff\xff\x10\x00", media_type="application/vnd.apache.arrow.stream"),
    ],
    ids=["proxy", "text", "other-json", "truncated-arrow"],
)
async def test_an_answer_that_is_none_is_an_upstream_error(
    retriever: SmallRetriever, client: RetrieverClient, answer: Response
) -> None:
    async def garbage(query: RetrieveQuery) -> Response:
        return answer

    retriever.fault = garbage
    with pytest.raises(UpstreamError):
        await client.retrieve(QUERY, soon())


async def test_a_slow_retriever_costs_no_more_than_the_deadline(
    retriever: SmallRetriever, client: RetrieverClient
) -> None:
    async def slow(query: RetrieveQuery) -> None:
        await asyncio.sleep(2)

    retriever.fault = slow
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await client.retrieve(QUERY, soon(0.3))
    assert time.monotonic() - began < 1


async def test_an_index_of_another_encoder_is_refused(retriever: SmallRetriever, client: RetrieverClient) -> None:
    retriever.index = retriever.index.model_copy(update={"encoder": "sha256-theirs"})
    with pytest.raises(EncoderMismatch, match=r"sha256-theirs.*sha256-ours"):
        await client.retrieve(QUERY, soon())
