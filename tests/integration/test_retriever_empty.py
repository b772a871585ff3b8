"""Collections that are made without passages, filled, built, and removed, over HTTP."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from retriever_svc.app import create_app
from retriever_svc.build import build_collection, collection_lock
from retriever_svc.collection import Collection
from retriever_svc.empty import LEAVING
from retriever_svc.index import PRESETS
from retriever_svc.settings import RetrieverSettings
from services.cli import main
from services.client import AsyncRagClient, RagClient
from shared.errors import Conflict, InvalidRequest, NotFound
from tests.retriever_data import ENCODER, brute_force, passage_table, random_embeddings, source_of
from tests.serving import served

N, D = 300, 6
NEW = {"name": "news", "dimension": D, "encoder": ENCODER}


@asynccontextmanager
async def serving(data_dir: Path, **changes: Any) -> AsyncIterator[httpx.AsyncClient]:
    options = {"log_format": "console", **changes}
    app = create_app(RetrieverSettings(data_dir=data_dir, seed=data_dir / "absent", device="cpu", **options))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as http,
    ):
        yield http


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A retriever that begins with nothing at all."""
    async with serving(tmp_path) as http:
        yield http


def folders(data_dir: Path) -> list[str]:
    return [path.name for path in data_dir.glob("collections/*")]


async def create(http: httpx.AsyncClient, **changes: Any) -> httpx.Response:
    return await http.post("/v1/collections", json={**NEW, **changes})


async def upsert(http: httpx.AsyncClient, embeddings: np.ndarray, first: int = 0, **more: Any) -> None:
    passages = [
        {"id": first + i, "title": f"T{first + i}", "text": "t", "embedding": row, **more}
        for i, row in enumerate(embeddings.tolist())
    ]
    response = await http.post("/v1/collections/news/passages", json={"passages": passages})
    assert response.status_code == 200, response.text


async def search(http: httpx.AsyncClient, queries: np.ndarray, n_docs: int = 5, **options: Any) -> list[list[int]]:
    body = {"vectors": queries.tolist(), "n_docs": n_docs, "collection": "news", **options}
    response = await http.post("/v1/retrieve", json=body)
    assert response.status_code == 200, response.text
    found: list[list[int]] = response.json()["doc_ids"]
    return found


async def build(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await http.post("/v1/collections/news/generations", json=body)
    assert response.status_code == 202, response.text
    while True:
        job = (await http.get(f"/v1/jobs/{response.json()['id']}")).json()
        if job["status"] != "running":
            break
        await asyncio.sleep(0.02)
    assert job["status"] == "done", job
    info: dict[str, Any] = (await http.get("/v1/collections/news")).json()
    return info


async def test_a_service_without_any_collection_says_so_and_makes_one(http: httpx.AsyncClient) -> None:
    ready = await http.get("/readyz")
    assert ready.status_code == 200
    assert "holds no collection" in ready.json()["warnings"][0]
    assert (await http.post("/v1/retrieve", json={"vectors": [[1.0]]})).status_code == 404
    made = await create(http, kind="hnsw", dtype="float32", metadata={"year": "integer"})
    assert made.status_code == 201
    info = made.json()
    assert info == (await http.get("/v1/collections/news")).json()
    said = (info["name"], info["count"], info["version"], info["kind"], info["dtype"], info["metadata"])
    assert said == ("news", 0, 0, "hnsw", "float32", {"year": "integer"})
    assert (await http.get("/readyz")).json() == {"status": "ok", "reasons": []}
    assert await search(http, random_embeddings(3, D)) == [[], [], []]


@pytest.mark.parametrize("kind", [*PRESETS, "IVF64,Flat"])
async def test_what_is_stored_is_found_before_and_after_the_first_build_of_every_kind(
    http: httpx.AsyncClient, kind: str
) -> None:
    assert (await create(http, kind=kind, metadata={"year": "integer"})).status_code == 201
    embeddings, queries = random_embeddings(N, D, dtype="float16"), random_embeddings(4, D, seed=1)
    expected, *_ = brute_force(queries, embeddings, np.arange(N), 5)
    await upsert(http, embeddings, metadata={"year": 1999})
    assert await search(http, queries) == expected.tolist()
    assert await search(http, queries, filter="year < 1999") == [[]] * 4
    info = await build(http)
    assert (info["kind"], info["count"]) == (kind, N)
    assert await search(http, queries) == expected.tolist()  # so few are all compared
    await upsert(http, random_embeddings(1, D, seed=9), first=N)
    assert (await http.get("/v1/collections/news")).json()["count"] == N + 1


async def test_the_index_grows_with_the_collection(http: httpx.AsyncClient) -> None:
    """What the kind chooses is chosen anew at every build; what was asked for stays."""
    assert (await create(http, kind="ivf-flat", search_params={"over_fetch": 3})).status_code == 201
    await upsert(http, random_embeddings(60, D))
    small = await build(http)
    await upsert(http, random_embeddings(2000, D, seed=1))
    grown = await build(http)
    assert (small["factory"], grown["factory"]) == ("IVF1,Flat", "IVF51,Flat")
    assert (small["search_params"]["nprobe"], grown["search_params"]["nprobe"]) == (1, 8)
    assert [info["search_params"]["over_fetch"] for info in (small, grown)] == [3, 3]


async def test_a_collection_that_was_emptied_can_be_built_and_filled_again(http: httpx.AsyncClient) -> None:
    await create(http, kind="ivf-pq")
    await upsert(http, random_embeddings(50, D))
    await build(http)
    await http.post("/v1/collections/news/passages/delete", json={"ids": list(range(50))})
    info = await build(http)
    assert (info["count"], info["kind"]) == (0, "ivf-pq")
    await upsert(http, random_embeddings(3, D), first=7)
    assert sorted((await search(http, random_embeddings(1, D)))[0]) == [7, 8, 9]


async def test_what_was_made_and_stored_is_there_after_a_restart(tmp_path: Path) -> None:
    async with serving(tmp_path) as http:
        await create(http, kind="ivf-flat")
        await upsert(http, random_embeddings(5, D))
    async with serving(tmp_path) as http:
        info = (await http.get("/v1/collections/news")).json()
        assert (info["count"], info["version"], info["kind"]) == (5, 1, "ivf-flat")


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"name": "News"}, 422, "name"),
        ({"dimension": 0}, 422, "dimension"),
        ({"dimension": 16_385}, 422, "dimension"),
        ({"encoder": ""}, 422, "encoder"),
        ({"kind": "fast"}, 422, "kind"),
        ({"kind": "LSH"}, 422, "kind"),
        ({"dtype": "int8"}, 422, "dtype"),
        ({"metadata": {"year": "number"}}, 422, "metadata.year"),
        ({"metadata": {"a`b": "string"}}, 422, "metadata.a`b"),
        ({"metadata": {"year": "string", "Year": "string"}}, 422, "metadata.Year"),
        ({"metadata": {"title": "string"}}, 422, "metadata.title"),
        ({"metadata": {"_hidden": "string"}}, 422, "metadata._hidden"),
        ({"search_params": {"nprobe": 4}}, 422, "search_params.nprobe"),
        ({"kind": "hnsw", "search_params": {"nprobe": 4}}, 422, "search_params.nprobe"),
        ({"color": "red"}, 422, "color"),
    ],
)
async def test_what_cannot_be_made_is_refused_by_name_and_leaves_nothing(
    http: httpx.AsyncClient, tmp_path: Path, changes: dict[str, Any], status: int, param: str
) -> None:
    response = await create(http, **changes)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text
    assert (await http.get("/v1/collections")).json()["collections"] == []
    assert folders(tmp_path) == []


async def test_search_params_are_those_of_the_kind_although_there_is_no_index_yet(http: httpx.AsyncClient) -> None:
    await create(http, kind="ivf-flat")
    assert await search(http, random_embeddings(1, D), search_params={"nprobe": 4, "over_fetch": 2}) == [[]]
    body = {"vectors": [[0.0] * D], "collection": "news", "search_params": {"ef_search": 4}}
    refused = await http.post("/v1/retrieve", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "search_params.ef_search")


async def test_a_name_that_is_taken_is_a_conflict(http: httpx.AsyncClient, tmp_path: Path) -> None:
    answers = await asyncio.gather(*(create(http) for _ in range(5)))
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409, 409]
    await http.put("/v1/aliases/other", json={"collection": "news"})
    taken = await create(http, name="other")
    assert (taken.status_code, taken.json()["error"]["param"]) == (409, "name")
    build_collection(tmp_path / "collections" / "on-the-disk", source_of(passage_table(random_embeddings(5, D))))
    assert (await create(http, name="on-the-disk")).status_code == 409
    assert Collection.open(tmp_path / "collections" / "on-the-disk", device="cpu").count == 5


# --- the end of one --------------------------------------------------------------------------------------------


async def test_what_was_removed_is_gone_and_its_name_is_free(http: httpx.AsyncClient, tmp_path: Path) -> None:
    await create(http)
    await upsert(http, random_embeddings(5, D))
    assert (await http.delete("/v1/collections/news")).status_code == 204
    assert (await http.get("/v1/collections/news")).status_code == 404
    body = {"vectors": [[0.0] * D], "collection": "news"}
    assert (await http.post("/v1/retrieve", json=body)).status_code == 404
    assert (await http.delete("/v1/collections/news")).status_code == 404
    assert folders(tmp_path) == []
    assert (await create(http, dimension=3)).json()["dimension"] == 3


async def test_a_collection_that_an_alias_stands_for_stays_unless_told_otherwise(http: httpx.AsyncClient) -> None:
    await create(http)
    await http.put("/v1/aliases/live", json={"collection": "news"})
    refused = await http.delete("/v1/collections/news")
    assert (refused.status_code, refused.json()["error"]["param"]) == (409, "remove_aliases")
    assert "`live`" in refused.json()["error"]["message"]
    assert (await http.delete("/v1/collections/live")).status_code == 409  # an alias is no collection
    assert await search(http, random_embeddings(1, D)) == [[]]
    assert (await http.delete("/v1/collections/news", params={"remove_aliases": True})).status_code == 204
    assert (await http.get("/v1/aliases")).json() == {"aliases": {}}


async def test_what_another_process_builds_is_neither_made_nor_removed(http: httpx.AsyncClient, tmp_path: Path) -> None:
    await create(http)
    await http.put("/v1/aliases/live", json={"collection": "news"})
    for name in ("news", "other"):
        with collection_lock(tmp_path / "collections" / name):
            if name == "other":
                refused = await create(http, name=name)
            else:
                refused = await http.delete(f"/v1/collections/{name}", params={"remove_aliases": True})
        assert (refused.status_code, "another process builds" in refused.text) == (409, True)
    assert await search(http, random_embeddings(1, D)) == [[]]
    await upsert(http, random_embeddings(2, D))
    assert (await http.get("/v1/aliases")).json() == {"aliases": {"live": "news"}}


async def test_searches_and_writes_beside_a_removal_are_answered_or_told_that_it_is_gone(
    http: httpx.AsyncClient,
) -> None:
    await create(http, metadata={"year": "integer"})
    await upsert(http, random_embeddings(N, D))
    await build(http)
    body = {"vectors": random_embeddings(2, D).tolist(), "collection": "news"}
    new = {"passages": [{"text": "t", "embedding": [0.0] * D}]}
    sent = [http.post("/v1/retrieve", json=body | ({"filter": f"year = {i}"} if i % 3 == 0 else {})) for i in range(60)]
    sent += [http.post("/v1/collections/news/passages", json=new) for _ in range(20)]
    tasks = [asyncio.ensure_future(one) for one in sent]
    await asyncio.sleep(0.005)
    assert (await http.delete("/v1/collections/news")).status_code == 204
    answers = await asyncio.gather(*tasks)
    assert not [answer.text for answer in answers if answer.status_code not in {200, 404}]


async def test_what_a_removal_left_behind_at_a_crash_is_removed_at_the_next_start(tmp_path: Path) -> None:
    for name in ("kept", "gone"):
        build_collection(tmp_path / "collections" / name, source_of(passage_table(random_embeddings(5, D))))
    (tmp_path / "collections" / "gone").rename(tmp_path / "collections" / f"{LEAVING}1234")
    async with serving(tmp_path) as http:
        assert [info["name"] for info in (await http.get("/v1/collections")).json()["collections"]] == ["kept"]
    assert folders(tmp_path) == ["kept"]


# --- from Python and from the command line ---------------------------------------------------------------------


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    settings = RetrieverSettings(data_dir=tmp_path, seed=tmp_path / "absent", device="cpu")
    with served(create_app(settings)) as url:
        yield url


def test_the_client_makes_fills_and_removes_one(url: str) -> None:
    with RagClient(retriever_url=url) as client:
        made = client.create_collection("news", dimension=D, encoder=ENCODER, kind="hnsw", metadata={"year": "integer"})
        assert (made.count, made.kind, made.dtype, made.metadata) == (0, "hnsw", "float16", {"year": "integer"})
        rows = [{"text": "t", "embedding": [1.0] * D, "metadata": {"year": 1999}}]
        assert client.upsert(rows, collection="news").ids == [0]
        with pytest.raises(Conflict):
            client.create_collection("news", dimension=D, encoder=ENCODER)
        with pytest.raises(InvalidRequest) as refused:
            client.create_collection("news", dimension=0, encoder=ENCODER)
        assert refused.value.param == "dimension"
        client.drop_collection("news")
        assert client.collections() == []
        with pytest.raises(NotFound):
            client.drop_collection("news")


async def test_the_async_client_does_the_same(url: str) -> None:
    async with AsyncRagClient(retriever_url=url) as client:
        made = await client.create_collection("news", dimension=D, encoder=ENCODER)
        assert await client.collections() == [made]
        assert await client.collection(made.name) == made
        await client.drop_collection("news", remove_aliases=True)
        assert await client.collections() == []


def rag(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `rag index` says, on either channel."""
    with pytest.raises(SystemExit):
        main(["index", *arguments])
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_the_command_line_makes_and_removes_one(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    service = ["--retriever-url", url]
    new = ["create", "news", "--dimension", "6", "--fingerprint", ENCODER, "--kind", "ivf-flat", *service]
    columns = ["--metadata", "year=integer", "--metadata", "lang=string"]
    assert "news: empty, ivf-flat, 6 numbers" in rag(capsys, *new, *columns, "--search-params", '{"nprobe": 9}')
    with RagClient(retriever_url=url) as client:
        (info,) = client.collections()
        assert (info.metadata, info.search_params.nprobe) == ({"year": "integer", "lang": "string"}, 9)
        assert "there is a collection `news`" in rag(capsys, *new)
        assert "year=number" in rag(capsys, *new[:1], "other", *new[2:], "--metadata", "year=number")
        assert "name=type" in rag(capsys, *new, "--metadata", "year")
        httpx.put(f"{url}/v1/aliases/live", json={"collection": "news"})
        assert "`live` stands for `news`" in rag(capsys, "drop", "news", "--yes", *service)
        assert "news is removed" in rag(capsys, "drop", "news", "--yes", "--remove-aliases", *service)
        assert client.collections() == []
