"""The recall of a collection as the service tells it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from retriever_svc.app import create_app
from retriever_svc.build import Options, build_collection
from retriever_svc.settings import RetrieverSettings
from shared.schemas import SearchParams
from tests.retriever_data import passage_table, random_embeddings, source_of

N, D = 1500, 8
NARROW = SearchParams(nprobe=1, over_fetch=1)
WIDE = {"nprobe": 64}


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    for name, kind in (("narrow", "ivf-flat"), ("exact", "flat")):
        params = NARROW if name == "narrow" else None
        source = source_of(passage_table(random_embeddings(N, D)), 500)
        build_collection(tmp_path / "collections" / name, source, options=Options(kind, params))
    return tmp_path


@asynccontextmanager
async def serving(data_dir: Path, **changes: Any) -> AsyncIterator[httpx.AsyncClient]:
    options = {"canary_fraction": 1.0, "log_format": "console", **changes}
    app = create_app(RetrieverSettings(data_dir=data_dir, seed=data_dir / "absent", device="cpu", **options))
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as http,
    ):
        yield http


async def search(http: httpx.AsyncClient, seed: int, collection: str = "narrow", **options: Any) -> None:
    vectors = random_embeddings(1, D, seed=seed).tolist()
    response = await http.post("/v1/retrieve", json={"vectors": vectors, "collection": collection, **options})
    assert response.status_code == 200, response.text


async def recall(http: httpx.AsyncClient, queries: int, collection: str = "narrow") -> dict[str, Any]:
    """Once so many queries were compared."""
    while True:
        found = (await http.get(f"/v1/collections/{collection}")).json()["recall"]
        if found is not None and found["queries"] >= queries:
            return dict(found)
        await asyncio.sleep(0.01)


async def test_the_recall_of_what_serves_is_told_and_measured(data_dir: Path) -> None:
    async with serving(data_dir) as http:
        assert (await http.get("/v1/collections/narrow")).json()["recall"] is None
        for seed in range(10):
            await search(http, seed)
            await search(http, seed, "exact")
            await recall(http, seed + 1)
        found = await recall(http, 10)
        metrics = (await http.get("/metrics")).text
        listed = (await http.get("/v1/collections")).json()["collections"]
    assert (found["at_k"], found["queries"]) == (5, 10)
    assert found["estimate"] < 0.8
    assert f'retriever_recall{{collection="narrow"}} {found["estimate"]}' in metrics
    assert 'retriever_canary_queries_total{collection="narrow",outcome="checked"} 10.0' in metrics
    assert {one["name"]: one["recall"] for one in listed} == {"narrow": found, "exact": None}
    assert "exact" not in [line for line in metrics.splitlines() if line.startswith("retriever_recall")]


async def test_a_search_that_looks_wider_is_seen_to_find_more(data_dir: Path) -> None:
    async with serving(data_dir) as http:
        for seed in range(5):
            await search(http, seed, search_params=WIDE, filter="id < 1200")
            await recall(http, seed + 1)
        assert (await recall(http, 5))["estimate"] == 1.0


async def test_the_next_generation_has_a_recall_of_its_own(data_dir: Path) -> None:
    async with serving(data_dir) as http:
        await search(http, 0)
        assert (await recall(http, 1))["estimate"] < 1.0
        body = {"kind": "ivf-flat", "search_params": WIDE}
        job = (await http.post("/v1/collections/narrow/generations", json=body)).json()["id"]
        while (ended := (await http.get(f"/v1/jobs/{job}")).json())["status"] == "running":
            await search(http, 1)
            await asyncio.sleep(0.05)
        assert ended["status"] == "done", ended
        assert (await http.get("/v1/collections/narrow")).json()["recall"] is None
        for seed in range(3):
            await search(http, seed)
            await recall(http, seed + 1)
        assert (await recall(http, 3))["estimate"] == 1.0


async def test_what_is_not_wanted_is_not_done(data_dir: Path) -> None:
    async with serving(data_dir, canary_fraction=0.0) as http:
        await search(http, 0)
        assert (await http.get("/v1/collections/narrow")).json()["recall"] is None
        assert "retriever_canary_queries_total{" not in (await http.get("/metrics")).text


async def test_a_stop_does_not_wait_for_a_pass_over_the_vectors(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retriever_svc.canary.SHARE_OF_A_CORE", 1e-9)  # one slice would rest for days
    async with serving(data_dir) as http:
        await search(http, 0)
        await asyncio.sleep(0.05)
