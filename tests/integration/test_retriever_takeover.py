"""Generations, aliases and collections that change beside requests, builds and damage."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from retriever_svc import app as app_module
from retriever_svc import catalog as catalog_module
from retriever_svc import generation as gen
from retriever_svc.app import create_app
from retriever_svc.build import build_collection
from retriever_svc.rebuild import rebuild
from retriever_svc.settings import RetrieverSettings
from retriever_svc.writer import Writer
from shared.errors import StartupError
from tests.retriever_data import passage_table, random_embeddings, source_of
from tests.retriever_process import ROOT

N, D = 40, 6
PASSAGES = "/v1/collections/news/passages"


def corpus(folder: Path, dimension: int = D, seed: int = 0, n: int = N) -> str:
    return build_collection(folder, source_of(passage_table(random_embeddings(n, dimension, seed=seed))))


def file_of(folder: Path, name: str) -> Path:
    return next(folder.rglob(name))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "collections" / "news"


def app_of(folder: Path, **changes: Any) -> FastAPI:
    data_dir = folder.parent.parent
    options = {"log_format": "console", **changes}
    return create_app(RetrieverSettings(data_dir=data_dir, seed=data_dir / "absent", device="cpu", **options))


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as http,
    ):
        yield http


def passages(dimension: int = D) -> dict[str, Any]:
    return {"passages": [{"id": 999, "text": "new", "embedding": [1.0] * dimension}]}


async def built(http: httpx.AsyncClient) -> dict[str, Any]:
    response = await http.post("/v1/collections/news/generations", json={})
    assert response.status_code == 202, response.text
    while True:
        job: dict[str, Any] = (await http.get(f"/v1/jobs/{response.json()['id']}")).json()
        if job["status"] != "running":
            return job
        await asyncio.sleep(0.02)


# --- writes beside a rollback ------------------------------------------------------------------------------


async def test_what_was_checked_against_one_corpus_is_not_written_to_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, _ = corpus(folder, dimension=4), corpus(folder)
    app = app_of(folder)
    async with serving(app) as http:
        loop, writer, check = asyncio.get_running_loop(), app.state.retriever.writer("news"), app_module.draft_from_wire

        def check_then_roll_back(*given: Any) -> Any:
            draft = check(*given)
            asyncio.run_coroutine_threadsafe(writer.rollback(earlier), loop).result(30)
            return draft

        with monkeypatch.context() as patch:
            patch.setattr(app_module, "draft_from_wire", check_then_roll_back)
            refused = await http.post(PASSAGES, json=passages())
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
        assert (await http.get(f"{PASSAGES}/999")).status_code == 404
        written = await http.post(PASSAGES, json=passages(dimension=4))
        assert (written.status_code, written.json()["version"]) == (200, 1)
    async with serving(app_of(folder)) as http:
        info = (await http.get("/v1/collections/news")).json()
        assert (info["count"], info["dimension"], info["version"]) == (N + 1, 4, 1)


# --- builds beside other builds ----------------------------------------------------------------------------


def test_a_rebuild_leaves_it_to_the_service_what_serves(folder: Path) -> None:
    before = corpus(folder)
    after = rebuild(folder, before, 0)
    assert after != before
    assert gen.current_generation(folder).name == before


async def test_a_corpus_that_was_built_meanwhile_is_not_overruled_by_a_rebuild(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus(folder)
    others, build = [], Writer._built

    async def beside_another(*given: Any) -> str:
        name = await build(*given)
        others.append(await asyncio.to_thread(corpus, folder, 4, 1, 7))
        return name

    monkeypatch.setattr(Writer, "_built", beside_another)
    async with serving(app_of(folder)) as http:
        job = await built(http)
        assert job["status"] == "done", job
        assert (await http.get("/v1/collections/news")).json()["generation"] == job["generation"]
        assert gen.current_generation(folder).name == others[0]
        assert (await http.post("/v1/collections/news/reload")).json()["count"] == 7


async def test_what_another_process_made_current_is_not_removed_as_too_old(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generations, old = folder / gen.GENERATIONS, "20000101T000000-000000"
    (generations / corpus(folder, n=7)).rename(generations / old)
    for _ in range(2):
        corpus(folder)
    build = Writer._built

    async def beside_a_rollback(*given: Any) -> str:
        name = await build(*given)
        gen.set_current(folder, old)
        return name

    monkeypatch.setattr(Writer, "_built", beside_a_rollback)
    async with serving(app_of(folder, keep_generations=2)) as http:
        job = await built(http)
        assert job["status"] == "done", job
        assert gen.current_generation(folder).name == old
        assert (await http.post("/v1/collections/news/reload")).json()["count"] == 7


def test_a_rebuild_ends_when_nobody_waits_for_it(folder: Path) -> None:
    generation = corpus(folder)
    command = [sys.executable, "-m", "retriever_svc.rebuild", str(folder), generation, "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        said, _ = process.communicate(timeout=120)  # closes its input at once
    assert (process.returncode, said) == (1, b"")
    assert [path.name for path in (folder / gen.GENERATIONS).iterdir() if path.name[0] != "."] == [generation]


async def test_a_damaged_generation_is_not_rolled_back_to(folder: Path) -> None:
    earlier, now = corpus(folder), corpus(folder, seed=1)
    (folder / gen.GENERATIONS / earlier / "index.faiss").write_bytes(b"")
    async with serving(app_of(folder)) as http:
        refused = await http.post("/v1/collections/news/rollback", json={"generation": earlier})
        assert refused.status_code == 503
        assert "index.faiss" in refused.json()["error"]["message"]
        assert (await http.get("/v1/collections/news")).json()["generation"] == now


async def test_the_log_of_a_corpus_that_is_gone_is_removed(folder: Path) -> None:
    corpus(folder)
    async with serving(app_of(folder)) as http:
        await http.post(PASSAGES, json=passages())
        (first,) = lineages(folder)
        corpus(folder, seed=1)
        await http.post("/v1/collections/news/reload")
        await http.post(PASSAGES, json=passages())
        assert first in lineages(folder)  # a rollback may still want it
        for _ in range(2):
            assert (await built(http))["status"] == "done"
        (second,) = lineages(folder)
        assert second != first
    async with serving(app_of(folder)) as http:
        assert (await http.get(f"{PASSAGES}/999")).json()["text"] == "new"


def lineages(folder: Path) -> list[str]:
    return [path.name for path in (folder / "changes").iterdir()]


# --- aliases -----------------------------------------------------------------------------------------------


async def test_an_alias_that_waits_for_the_disk_holds_nobody_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus(folder)
    reached, disk = threading.Event(), threading.Event()

    def flush(_: Path) -> None:
        reached.set()
        disk.wait(60)

    async with serving(app_of(folder)) as http:
        with monkeypatch.context() as patch:
            patch.setattr(catalog_module.gen, "flush", flush)
            first = asyncio.create_task(http.put("/v1/aliases/live", json={"collection": "news"}))
            assert await asyncio.to_thread(reached.wait, 60)
            second = asyncio.create_task(http.delete("/v1/aliases/live"))
            found = await http.post("/v1/retrieve", json={"vectors": [[0.0] * D], "collection": "news"})
            assert found.status_code == 200
            assert (await http.get("/v1/aliases")).json() == {"aliases": {}}
            assert not first.done()
            disk.set()
            assert (await first).json() == {"aliases": {"live": "news"}}
            assert (await second).json() == {"aliases": {}}


# --- damage ------------------------------------------------------------------------------------------------


async def test_a_damaged_collection_is_named_and_the_others_serve(folder: Path) -> None:
    corpus(folder)
    corpus(folder.with_name("sound"))
    async with serving(app_of(folder)) as http:
        await http.put("/v1/aliases/live", json={"collection": "news"})
    index = file_of(folder, "index.faiss")
    whole = index.read_bytes()
    index.write_bytes(whole[:-4] + b"\0\0\0\1")
    async with serving(app_of(folder)) as http:
        ready = await http.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (200, "ok")
        (warning,) = ready.json()["warnings"]
        assert "`news` is damaged" in warning
        assert str(index) in warning
        query = {"vectors": [[0.0] * D]}
        assert (await http.post("/v1/retrieve", json={**query, "collection": "sound"})).status_code == 200
        for name in ("news", "live"):
            refused = await http.post("/v1/retrieve", json={**query, "collection": name})
            assert refused.status_code == 503
            assert (str(index) in refused.text, refused.json()["error"]["param"]) == (True, "collection")
        assert (await http.post(PASSAGES, json=passages())).status_code == 503
        new = {"name": "news", "dimension": D, "encoder": "e"}
        assert (await http.post("/v1/collections", json=new)).status_code == 409
        assert (await http.post("/v1/collections/news/reload")).status_code == 503
        index.write_bytes(whole)  # restored from a copy
        assert (await http.post("/v1/collections/news/reload")).status_code == 200
        assert (await http.get("/readyz")).json() == {"status": "ok", "reasons": []}
        assert (await http.post("/v1/retrieve", json={**query, "collection": "live"})).status_code == 200


async def test_a_damaged_collection_can_be_removed(folder: Path) -> None:
    corpus(folder)
    corpus(folder.with_name("sound"))
    file_of(folder, "manifest.json").write_text("{")
    async with serving(app_of(folder)) as http:
        assert (await http.delete("/v1/collections/news")).status_code == 204
        assert (await http.get("/v1/collections/news")).status_code == 404
        assert "warnings" not in (await http.get("/readyz")).json()


async def test_where_every_collection_is_damaged_the_service_does_not_start(folder: Path) -> None:
    for name in ("news", "other"):
        corpus(folder.with_name(name))
        file_of(folder.with_name(name), "index.faiss").write_bytes(b"")
    with pytest.raises(StartupError, match=r"news/generations/.*index\.faiss.*; .*other/generations/.*index\.faiss"):
        async with serving(app_of(folder)):
            pass


async def test_a_restore_that_was_cut_short_does_not_stop_the_start(folder: Path) -> None:
    corpus(folder)
    corpus(folder.with_name(".restoring-1234"))
    async with serving(app_of(folder)) as http:
        assert [info["name"] for info in (await http.get("/v1/collections")).json()["collections"]] == ["news"]
