"""The retriever over HTTP, from the app's own factory, through ASGI."""

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever_svc.app import create_app
from retriever_svc.build import build_collection
from retriever_svc.retriever import Retriever
from retriever_svc.search import SearchItem
from retriever_svc.settings import RetrieverSettings
from shared.arrow import vector_array
from shared.errors import StartupError
from shared.retrieval import RetrieveQuery
from shared.vectors import ARROW_TYPE, JSON_TYPE, Form, query_to_wire, result_from_wire
from tests.retriever_data import (
    ENCODER,
    brute_force,
    passage_table,
    random_embeddings,
    source_of,
    text,
    tied_embeddings,
    title,
)

FORMS: list[Form] = ["json", "base64", "arrow"]
ACCEPT = {"json": JSON_TYPE, "base64": f"{JSON_TYPE};vectors=base64", "arrow": ARROW_TYPE}
N, D = 60, 6
EMBEDDINGS = random_embeddings(N, D, dtype="float16")
IDS = np.random.default_rng(5).permutation(1000)[:N].astype(np.int64)


def settings_for(data_dir: Path, **changes: Any) -> RetrieverSettings:
    return RetrieverSettings(
        data_dir=data_dir, seed=data_dir / "absent", device="cpu", **{"log_format": "console", **changes}
    )


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with app.router.lifespan_context(app), client_of(app) as client:
        yield client


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    build_collection(tmp_path / "collections" / "default", source_of(passage_table(EMBEDDINGS, IDS.tolist())))
    return tmp_path


@pytest.fixture
def app(data_dir: Path) -> FastAPI:
    return create_app(settings_for(data_dir))


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(app) as client:
        yield client


async def retrieve(client: httpx.AsyncClient, query: RetrieveQuery, sent: Form, back: Form) -> httpx.Response:
    body, content_type = query_to_wire(query, sent)
    return await client.post(
        "/v1/retrieve", content=body, headers={"Content-Type": content_type, "Accept": ACCEPT[back]}
    )


# --- answers -------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(1, 60), st.integers(1, 24), st.integers(1, 9)),
    n_docs=st.integers(1, 70),
    tied=st.booleans(),
    dtype=st.sampled_from(["float16", "float32"]),
    seed=st.integers(0, 2**32 - 1),
    sent=st.sampled_from(FORMS),
)
def test_ids_scores_and_embeddings_equal_brute_force_in_every_form(
    *,
    shape: tuple[int, int, int],
    n_docs: int,
    tied: bool,
    dtype: str,
    seed: int,
    sent: Form,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    n, dimension, n_queries = shape
    make = tied_embeddings if tied else random_embeddings
    embeddings_ND, queries_BD = make(n, dimension, dtype=dtype, seed=seed), make(n_queries, dimension, seed=seed + 1)
    ids = np.random.default_rng(seed).permutation(5 * n)[:n].astype(np.int64)
    folder = tmp_path_factory.mktemp("data")
    build_collection(folder / "collections" / "default", source_of(passage_table(embeddings_ND, ids.tolist())))
    want_ids, want_scores, want_rows = brute_force(queries_BD, embeddings_ND, ids, n_docs)

    async def check() -> None:
        async with serving(create_app(settings_for(folder))) as client:
            for back in FORMS:
                response = await retrieve(client, RetrieveQuery(queries_BD, n_docs=n_docs), sent, back)
                assert response.status_code == 200, response.text
                result = result_from_wire(response.content, response.headers["content-type"])
                assert result.n_found == [min(n, n_docs)] * n_queries
                assert result.doc_embeds is not None
                assert result.docs is not None
                for b in range(n_queries):
                    assert result.doc_ids[b].tolist() == want_ids[b].tolist()
                    np.testing.assert_array_equal(result.doc_scores[b], want_scores[b])
                    np.testing.assert_array_equal(result.doc_embeds[b], embeddings_ND[want_rows[b]])
                    assert [(doc.id, doc.title, doc.text) for doc in result.docs[b]] == [
                        (i, title(i), text(i)) for i in want_ids[b].tolist()
                    ]

    asyncio.run(check())


async def test_the_json_body_is_what_the_contract_says(client: httpx.AsyncClient) -> None:
    query_BD = random_embeddings(1, D, seed=1)
    response = await client.post("/v1/retrieve", json={"vectors": query_BD.tolist(), "n_docs": 2})
    ids, scores, rows = brute_force(query_BD, EMBEDDINGS, IDS, 2)
    answer = response.json()
    timings_ms, index = answer.pop("timings_ms"), answer.pop("index")
    assert answer == {
        "doc_ids": ids.tolist(),
        "doc_scores": scores.tolist(),
        "retrieved_doc_embeds": EMBEDDINGS[rows].tolist(),
        "docs": [[{"id": i, "title": title(i), "text": text(i)} for i in ids[0].tolist()]],
        "n_found": [2],
    }
    assert (index["collection"], index["encoder"]) == ("default", ENCODER)
    assert set(timings_ms) == {"search", "passages", "total"}
    assert timings_ms["total"] >= timings_ms["search"] > 0


@pytest.mark.parametrize("form", FORMS)
async def test_what_is_not_asked_for_is_not_sent(client: httpx.AsyncClient, form: Form) -> None:
    query = RetrieveQuery(random_embeddings(2, D), return_embeds=False, return_passages=False)
    response = await retrieve(client, query, form, form)
    result = result_from_wire(response.content, response.headers["content-type"])
    assert (result.doc_embeds, result.docs, result.n_found) == (None, None, [5, 5])


async def test_more_documents_than_there_are_give_shorter_lists(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/retrieve", json={"vectors": random_embeddings(1, D).tolist(), "n_docs": 1000})
    assert response.json()["n_found"] == [N]
    assert sorted(response.json()["doc_ids"][0]) == sorted(IDS.tolist())


async def test_a_query_of_zeros_gets_the_lowest_ids(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/retrieve", json={"vectors": [[0] * D]})
    assert response.json()["doc_ids"] == [sorted(IDS.tolist())[:5]]


async def test_a_large_batch_in_every_form(client: httpx.AsyncClient) -> None:
    """Large enough to be parsed and written off the event loop."""
    queries_BD = random_embeddings(700, D, seed=2)
    want_ids, want_scores, _ = brute_force(queries_BD, EMBEDDINGS, IDS, 5)
    for form in FORMS:
        response = await retrieve(client, RetrieveQuery(queries_BD), form, form)
        result = result_from_wire(response.content, response.headers["content-type"])
        np.testing.assert_array_equal(np.stack(result.doc_ids), want_ids)
        np.testing.assert_array_equal(np.stack(result.doc_scores), want_scores)


# --- shared searches -----------------------------------------------------------------------------------------


async def test_requests_that_share_a_search_get_their_own_answers(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []

    def watch(items: list[SearchItem], *rest: Any) -> Any:
        batches.append(len(items))
        return run_batch(items, *rest)

    from retriever_svc.search import run_batch  # noqa: PLC0415  the real one, before it is watched

    monkeypatch.setattr("retriever_svc.retriever.run_batch", watch)
    rng = np.random.default_rng(7)
    queries = [
        RetrieveQuery(
            random_embeddings(int(rng.integers(1, 4)), D, seed=i),
            n_docs=int(rng.integers(1, 20)),
            return_embeds=bool(i % 2),
            return_passages=bool(i % 3),
        )
        for i in range(24)
    ]
    async with serving(create_app(settings_for(data_dir, max_wait_ms=200, max_batch_size=64))) as client:
        responses = await asyncio.gather(*(retrieve(client, query, "json", "base64") for query in queries))
    assert max(batches) > 1
    assert sum(batches) == len(queries)
    for query, response in zip(queries, responses, strict=True):
        result = result_from_wire(response.content, response.headers["content-type"])
        want_ids, want_scores, want_rows = brute_force(query.vectors, EMBEDDINGS, IDS, query.n_docs)
        np.testing.assert_array_equal(np.stack(result.doc_ids), want_ids)
        np.testing.assert_array_equal(np.stack(result.doc_scores), want_scores)
        assert (result.doc_embeds is not None, result.docs is not None) == (query.return_embeds, query.return_passages)
        if result.doc_embeds is not None:
            np.testing.assert_array_equal(np.stack(result.doc_embeds), EMBEDDINGS[want_rows])


async def test_requests_for_different_collections_at_once(data_dir: Path) -> None:
    other = random_embeddings(9, D + 2, seed=3)
    build_collection(data_dir / "collections" / "other", source_of(passage_table(other)))
    q, p = random_embeddings(1, D, seed=4), random_embeddings(1, D + 2, seed=4)
    async with serving(create_app(settings_for(data_dir, max_wait_ms=50))) as client:
        asked = [RetrieveQuery(q), RetrieveQuery(p, collection="other")] * 4
        responses = await asyncio.gather(*(retrieve(client, query, "json", "json") for query in asked))
    answers = [response.json() for response in responses]
    assert {tuple(answer["doc_ids"][0]) for answer in answers[::2]} == {tuple(brute_force(q, EMBEDDINGS, IDS, 5)[0][0])}
    assert {tuple(answer["doc_ids"][0]) for answer in answers[1::2]} == {
        tuple(brute_force(p, other, np.arange(9), 5)[0][0])
    }


# --- refusals ------------------------------------------------------------------------------------------------

ONE = [[0.5] * D]
NAN_ARROW = np.full((1, D), np.nan, np.float32)


def arrow_body(array: np.ndarray, /, **options: Any) -> bytes:
    column = vector_array(array)
    schema = pa.schema([pa.field("vector", column.type)], metadata={"options": json.dumps(options)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch([column], schema=schema))
    return bytes(sink.getvalue().to_pybytes())


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"vectors": [[0.5] * (D + 1)]}, 422, "vectors"),
        ({"vectors": []}, 422, "vectors"),
        ({"vectors": [[]]}, 422, "vectors"),
        ({"vectors": [[0.5] * D, [0.5]]}, 422, "vectors.1"),
        ({"vectors": [["a"] * D]}, 422, "vectors.0.0"),
        ({"vectors": [[None] * D]}, 422, "vectors.0.0"),
        ({"vectors": [[1e39] * D]}, 422, "vectors.0.0"),
        ({"vectors": [[3e38] * D]}, 422, "vectors"),
        ({"vectors": "abc"}, 422, "vectors"),
        ({"vectors": {"data": "AAAA", "shape": [1, D]}}, 422, "vectors"),
        ({"vectors": {"data": "", "shape": [0, D]}}, 422, "vectors"),
        ({"vectors": {"data": "AA==", "shape": [2**40, 2**40], "dtype": "float16"}}, 422, "vectors"),
        ({}, 422, "vectors"),
        ({"vectors": ONE, "n_docs": 0}, 422, "n_docs"),
        ({"vectors": ONE, "n_docs": -1}, 422, "n_docs"),
        ({"vectors": ONE, "n_docs": 10**9}, 422, "n_docs"),
        ({"vectors": ONE, "n_docs": 10**30}, 422, "n_docs"),
        ({"vectors": ONE, "n_docs": "5"}, 422, "n_docs"),
        ({"vectors": ONE * 21}, 422, "vectors"),
        ({"vectors": ONE * 20, "n_docs": 30}, 422, "n_docs"),
        ({"vectors": ONE, "collection": "other"}, 404, "collection"),
        ({"vectors": ONE, "collection": "../default"}, 422, "collection"),
        ({"vectors": ONE, "timeout_ms": 0}, 422, "timeout_ms"),
        ({"vectors": ONE, "timeout_ms": 600_000}, 422, "timeout_ms"),
        ({"vectors": ONE, "k": 5}, 422, "k"),
        (b'{"vectors": [[NaN, 0, 0, 0, 0, 0]]}', 422, "vectors.0.0"),
        (b"{", 400, None),
        (b"", 400, None),
        (b"[]", 422, None),
        (b"\xff\xfe", 400, None),
    ],
)
async def test_a_bad_json_body_is_refused_by_name(
    data_dir: Path, body: dict[str, Any] | bytes, status: int, param: str | None
) -> None:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    limits = {"max_batch_vectors": 20, "max_documents": 500, "max_timeout_ms": 60_000}
    async with serving(create_app(settings_for(data_dir, **limits))) as client:
        response = await client.post("/v1/retrieve", content=raw, headers={"Content-Type": JSON_TYPE})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


GOOD_ARROW = arrow_body(np.ones((3, D), np.float32))


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (arrow_body(NAN_ARROW), 422, "vector.0.0"),
        (arrow_body(np.ones((1, D + 1), np.float32)), 422, "vectors"),
        (arrow_body(np.ones((0, D), np.float32)), 422, "vector"),
        (arrow_body(np.ones((1, D), np.float64)), 422, "vector"),
        (arrow_body(np.ones((1, D), np.float32), n_docs=0), 422, "options.n_docs"),
        (arrow_body(np.ones((1, D), np.float32), n_docs=10**9), 422, "n_docs"),
        (arrow_body(np.ones((1, D), np.float32), collection="other"), 404, "collection"),
        (arrow_body(np.ones((1, D), np.float32), vectors=[[1]]), 422, "options.vectors"),
        (GOOD_ARROW[: len(GOOD_ARROW) // 2], 400, None),
        (b"", 400, None),
        (b"\x00" * 64, 400, None),
        (b"ARROW1 or so", 400, None),
    ],
)
async def test_a_bad_arrow_body_is_refused(
    client: httpx.AsyncClient, body: bytes, status: int, param: str | None
) -> None:
    response = await client.post("/v1/retrieve", content=body, headers={"Content-Type": ARROW_TYPE})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


async def test_an_arrow_body_cut_anywhere_is_an_answer_or_a_refusal(client: httpx.AsyncClient) -> None:
    for end in range(0, len(GOOD_ARROW), 16):
        response = await client.post("/v1/retrieve", content=GOOD_ARROW[:end], headers={"Content-Type": ARROW_TYPE})
        assert response.status_code in {200, 400, 422}, (end, response.text)


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/octet-stream"},
        {},
        {"Content-Type": JSON_TYPE, "Accept": "text/html"},
        {"Content-Type": JSON_TYPE, "Accept": "application/json;vectors=pickle"},
    ],
)
async def test_a_form_that_is_not_spoken_is_a_415(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    response = await client.post("/v1/retrieve", content=json.dumps({"vectors": ONE}), headers=headers)
    assert response.status_code == 415


@pytest.mark.parametrize("stated", [{}, {"Content-Length": str(2**30)}], ids=["chunked", "stated"])
async def test_a_body_of_a_gigabyte_is_refused_and_never_held(
    client: httpx.AsyncClient, stated: dict[str, str]
) -> None:
    megabyte = b" " * 2**20

    async def gigabyte() -> AsyncIterator[bytes]:
        for _ in range(1024):
            yield megabyte

    headers = {"Content-Type": JSON_TYPE, **stated}
    tracemalloc.start()
    try:
        response = await client.post("/v1/retrieve", content=gigabyte(), headers=headers)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (response.status_code, response.json()["error"]["code"]) == (413, "payload_too_large")
    assert peak_bytes < 64 * 2**20


# --- collections and passages --------------------------------------------------------------------------------


async def test_collections_and_passages_can_be_read(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/collections")).json()["collections"]
    assert [info["name"] for info in listed] == ["default"]
    info = (await client.get("/v1/collections/default")).json()
    assert info == listed[0]
    assert (info["count"], info["dimension"], info["dtype"]) == (N, D, "float16")
    assert (info["kind"], info["metric"], info["device"], info["encoder"]) == ("flat", "inner_product", "cpu", ENCODER)

    wanted = int(IDS[17])
    passage = (await client.get(f"/v1/collections/default/passages/{wanted}")).json()
    assert passage == {"id": wanted, "title": title(wanted), "text": text(wanted)}


@pytest.mark.parametrize(
    ("path", "status", "param"),
    [
        ("/v1/collections/other", 404, "collection"),
        ("/v1/collections/other/passages/1", 404, "collection"),
        ("/v1/collections/default/passages/123456", 404, "passage_id"),
        (f"/v1/collections/default/passages/{2**63}", 422, "passage_id"),
        ("/v1/collections/default/passages/-1", 404, None),
        ("/v1/collections/default/passages/first", 404, None),
        ("/v1/collections/Default", 422, "collection"),
    ],
)
async def test_what_is_not_there_is_said_by_name(
    client: httpx.AsyncClient, path: str, status: int, param: str | None
) -> None:
    response = await client.get(path)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


async def test_info_names_the_versions_and_every_limit(client: httpx.AsyncClient) -> None:
    info = (await client.get("/info")).json()
    assert (info["service"], info["device"]) == ("retriever", "cpu")
    assert {"faiss", "lance"} <= set(info["versions"])
    assert [collection["name"] for collection in info["collections"]] == ["default"]
    limits = [name for name in RetrieverSettings.model_fields if name.startswith("max_")]
    assert set(limits) <= set(info["limits"])


async def test_searches_are_counted(client: httpx.AsyncClient) -> None:
    await client.post("/v1/retrieve", json={"vectors": ONE * 3})
    metrics = (await client.get("/metrics")).text
    assert 'retriever_queries_total{collection="default"} 3.0' in metrics
    assert 'worker_batch_size_count{worker="search"} 1.0' in metrics
    assert 'retriever_index_passages{collection="default"}' in metrics


# --- readiness and the start ---------------------------------------------------------------------------------


async def test_readyz_is_green_when_the_collections_are_loaded(client: httpx.AsyncClient) -> None:
    assert (await client.get("/readyz")).json() == {"status": "ok", "reasons": []}


async def test_readyz_says_that_it_loads(app: FastAPI) -> None:
    async with client_of(app) as client:
        ready = await client.get("/readyz")
        answer = await client.post("/v1/retrieve", json={"vectors": ONE})
    assert (ready.status_code, ready.json()["reasons"]) == (503, ["the collections are being loaded"])
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")


class _DeviceLostError(BaseException):
    """What no handler may swallow, as a fault inside a device driver."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_dead_worker_turns_readyz_red_and_fails_requests(
    app: FastAPI, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_the_device(*_: Any) -> None:
        raise _DeviceLostError

    monkeypatch.setattr("retriever_svc.retriever.run_batch", lose_the_device)
    first = await client.post("/v1/retrieve", json={"vectors": ONE})
    second = await client.post("/v1/retrieve", json={"vectors": ONE})
    assert [first.status_code, second.status_code] == [503, 503]
    ready = await client.get("/readyz")
    assert (ready.status_code, ready.json()["reasons"]) == (503, ["search died: _DeviceLostError"])


async def test_a_search_that_fails_is_a_500_for_itself_alone(
    client: httpx.AsyncClient, app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever: Retriever = app.state.retriever
    with monkeypatch.context() as patch:
        patch.setattr(retriever.collection("default").index, "search", lambda *_: 1 / 0)
        failed = await client.post("/v1/retrieve", json={"vectors": ONE})
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "inference_failed")
    assert "division" not in failed.text
    assert (await client.post("/v1/retrieve", json={"vectors": ONE})).status_code == 200


async def test_a_damaged_collection_stops_the_start(data_dir: Path) -> None:
    index = next((data_dir / "collections" / "default").rglob("index.faiss"))
    index.write_bytes(index.read_bytes()[:-4] + b"\0\0\0\1")
    app = create_app(settings_for(data_dir))
    with pytest.raises(StartupError, match=r"index\.faiss is damaged"):
        async with serving(app):
            pass


@pytest.fixture(autouse=True)
def _quiet(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    capsys.readouterr()
