"""Metadata and filters over HTTP."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest

from retriever_svc.app import create_app
from retriever_svc.build import build_collection
from retriever_svc.filters import Filters
from retriever_svc.settings import RetrieverSettings
from shared.arrow import vector_array, write_stream
from shared.retrieval import RetrieveQuery
from shared.vectors import ARROW_TYPE, JSON_TYPE, Form, query_to_wire, result_from_wire
from tests.filters_data import metadata_columns, random_metadata
from tests.retriever_data import passage_table, random_embeddings, source_of

N, D = 60, 6
EMBEDDINGS = random_embeddings(N, D)
ROWS = random_metadata(N, 1)
FORMS: list[Form] = ["json", "base64", "arrow"]
ACCEPT = {"json": JSON_TYPE, "base64": f"{JSON_TYPE};vectors=base64", "arrow": ARROW_TYPE}
PASSAGES = "/v1/collections/default/passages"


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    table = passage_table(EMBEDDINGS)
    build_collection(tmp_path / "collections" / "plain", source_of(table))
    for name, column in metadata_columns(ROWS).items():
        table = table.append_column(name, column)
    build_collection(tmp_path / "collections" / "default", source_of(table))
    app = create_app(RetrieverSettings(data_dir=tmp_path, seed=tmp_path / "absent", device="cpu", log_format="console"))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield client


async def retrieve(client: httpx.AsyncClient, **options: Any) -> httpx.Response:
    return await client.post("/v1/retrieve", json={"vectors": EMBEDDINGS[:1].tolist(), "n_docs": N, **options})


@pytest.mark.parametrize("sent", FORMS)
@pytest.mark.parametrize("back", FORMS)
async def test_a_filter_holds_for_every_document_in_every_form(
    client: httpx.AsyncClient, sent: Form, back: Form
) -> None:
    query = RetrieveQuery(EMBEDDINGS[:3], n_docs=N, filter="year >= 1995 and lang = 'en'")
    body, content_type = query_to_wire(query, sent)
    headers = {"Content-Type": content_type, "Accept": ACCEPT[back]}
    response = await client.post("/v1/retrieve", content=body, headers=headers)
    assert response.status_code == 200, response.text
    result = result_from_wire(response.content, response.headers["content-type"])
    wanted = [i for i, row in enumerate(ROWS) if (row["year"] or 0) >= 1995 and row["lang"] == "en"]
    assert wanted
    assert result.docs is not None
    for ids, docs in zip(result.doc_ids, result.docs, strict=True):
        assert sorted(ids.tolist()) == wanted
        assert [doc.metadata for doc in docs] == [ROWS[i] for i in ids.tolist()]


async def test_a_collection_without_metadata_says_nothing_of_it(client: httpx.AsyncClient) -> None:
    response = await retrieve(client, collection="plain", n_docs=2, filter="id < 1")
    assert response.json()["docs"] == [[{"id": 0, "title": "Title 0", "text": "Passage 0 says “0”."}]]
    assert "metadata" not in (await client.get("/v1/collections/plain")).json()
    assert "metadata" not in (await client.get("/v1/collections/plain/passages/0")).json()
    body, _ = query_to_wire(RetrieveQuery(EMBEDDINGS[:1]), "json")
    assert b"filter" not in body


async def test_a_collection_tells_its_columns(client: httpx.AsyncClient) -> None:
    info = (await client.get("/v1/collections/default")).json()
    assert info["metadata"] == {
        "year": "integer",
        "lang": "string",
        "Score": "float",
        "ok": "boolean",
        "day": "date",
        "read at": "timestamp",
    }
    assert (await client.get(f"{PASSAGES}/3")).json()["metadata"] == ROWS[3]


async def test_requests_with_different_filters_at_once(client: httpx.AsyncClient) -> None:
    filters = [f"id < {n}" for n in (1, 5, 9)] * 5
    answers = await asyncio.gather(*(retrieve(client, filter=one) for one in filters))
    assert [answer.json()["n_found"] for answer in answers] == [[1], [5], [9]] * 5


@pytest.mark.parametrize("bad", ["nope = 1", "year = 'x'", "year =", "(select 1) = 1", "x" * 4001, ""])
async def test_a_bad_filter_is_refused_by_name(client: httpx.AsyncClient, bad: str) -> None:
    response = await retrieve(client, filter=bad)
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "filter"


async def test_the_service_answers_while_a_filter_is_evaluated(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading  # noqa: PLC0415

    may_end, select = threading.Event(), Filters.select

    def slow(self: Filters, expression: str) -> Any:
        may_end.wait(10)
        return select(self, expression)

    monkeypatch.setattr(Filters, "select", slow)
    filtered = asyncio.create_task(retrieve(client, filter="id < 3"))
    await asyncio.sleep(0.05)
    assert (await retrieve(client)).json()["n_found"] == [N]
    late = await retrieve(client, filter="id < 4", timeout_ms=20)
    assert late.status_code == 504
    may_end.set()
    assert (await filtered).json()["n_found"] == [3]


@pytest.mark.parametrize(
    ("metadata", "param"),
    [
        ({"nope": 1}, "passages.0.metadata.nope"),
        ({"year": "1990"}, "passages.0.metadata.year"),
        ({"year": 1990.5}, "passages.0.metadata.year"),
        ({"year": True}, "passages.0.metadata.year"),
        ({"year": 2**63}, "passages.0.metadata.year"),
        ({"ok": 1}, "passages.0.metadata.ok"),
        ({"lang": 3}, "passages.0.metadata.lang"),
        ({"lang": ["en"]}, "passages.0.metadata.lang"),
        ({"day": "31.1.2020"}, "passages.0.metadata.day"),
        ({"day": "2020-02-30"}, "passages.0.metadata.day"),
        ({"read at": "noon"}, "passages.0.metadata.read at"),
        ({"Score": "1"}, "passages.0.metadata.Score"),
        ([], "passages.0.metadata"),
    ],
)
async def test_metadata_that_does_not_fit_is_refused(client: httpx.AsyncClient, metadata: Any, param: str) -> None:
    passage = {"text": "x", "embedding": [0.5] * D, "metadata": metadata}
    response = await client.post(PASSAGES, json={"passages": [passage]})
    assert response.status_code == 422
    assert response.json()["error"]["param"] == param


async def test_metadata_that_is_missing_is_null_and_times_are_utc(client: httpx.AsyncClient) -> None:
    given = {"year": 2001.0, "Score": 3, "day": "2020-02-29", "read at": "2020-01-01T02:00:00+02:00"}
    passages = [
        {"id": 900, "text": "x", "embedding": [0.5] * D, "metadata": given},
        {"id": 901, "text": "y", "embedding": [0.5] * D},
    ]
    assert (await client.post(PASSAGES, json={"passages": passages})).is_success
    nothing = dict.fromkeys(["year", "lang", "Score", "ok", "day", "read at"])
    stored = nothing | {"year": 2001, "Score": 3.0, "day": "2020-02-29", "read at": "2020-01-01T00:00:00Z"}
    assert (await client.get(f"{PASSAGES}/900")).json()["metadata"] == stored
    assert (await client.get(f"{PASSAGES}/901")).json()["metadata"] == nothing
    found = await retrieve(client, filter="`read at` = timestamp '2020-01-01T00:00:00Z' and id >= 900")
    assert found.json()["doc_ids"] == [[900]]


@pytest.mark.parametrize(
    ("column", "values", "status"),
    [
        ("year", pa.array([1990, None], pa.int16()), 200),
        ("Score", pa.array([1, 2]), 200),
        ("lang", pa.nulls(2), 200),
        ("year", pa.array(["a", "b"]), 422),
        ("nope", pa.array([1, 2]), 422),
    ],
)
async def test_arrow_columns_must_be_the_collections(
    client: httpx.AsyncClient, column: str, values: pa.Array, status: int
) -> None:
    columns = {"text": pa.array(["a", "b"]), "embedding": vector_array(np.ones((2, D), np.float32)), column: values}
    response = await client.post(PASSAGES, content=write_stream(columns, {}), headers={"Content-Type": ARROW_TYPE})
    assert response.status_code == status, response.text
    if status == 422:
        assert response.json()["error"]["param"] == column
