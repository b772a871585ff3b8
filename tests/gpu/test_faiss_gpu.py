"""faiss on a GPU against faiss on the CPU: the same documents, scores and embeddings, or within a stated tolerance.

Scores that the service returns are computed from the stored embeddings, so they are equal to the bit on any device;
what may differ is which documents faiss finds. In float32 the bound of :mod:`retriever_svc.ranking` holds on the GPU
as well (a matrix product in TF32 would break it), so these are the same, too. With float16 storage the query and the
embeddings are each rounded by at most 2^-11 of their size: a document may be missed within twice that of the cut.

Shapes: N passages, B queries, D dimension.
"""

import asyncio
from pathlib import Path
from typing import Any

import faiss
import httpx
import numpy as np
import pytest

from retriever_svc import ranking
from retriever_svc.app import create_app
from retriever_svc.build import build_collection
from retriever_svc.index import CUDA_MAX_HITS, PRESETS, GpuStorage, Index
from retriever_svc.ranking import Ranked, Segment
from retriever_svc.settings import RetrieverSettings
from shared.errors import StartupError
from tests.retriever_data import passage_table, random_embeddings, source_of, tied_embeddings, write_index

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        faiss.get_num_gpus() == 0, reason="faiss sees no GPU: install faiss-gpu on a machine with CUDA to run this"
    ),
]

N, D = 20_000, 256


def both(
    embeddings_ND: np.ndarray, folder: Path, storage: GpuStorage = "float32", kind: str = "flat"
) -> tuple[Index, Index]:
    """One index file, read for the CPU and for the GPU."""
    write_index(folder, embeddings_ND, kind)
    return Index.read(folder, device="cpu"), Index.read(folder, device="cuda", gpu_storage=storage)


def search(
    index: Index,
    ids: np.ndarray,
    largest_norm: float,
    queries_BD: np.ndarray,
    n_docs: list[int],
    *,
    dead: np.ndarray | None = None,
) -> list[Ranked]:
    params = PRESETS["ivf-pq"].params(index.count)
    return ranking.search([Segment(0, index, ids, largest_norm, dead)], queries_BD, n_docs, params)


@pytest.mark.parametrize("kind", PRESETS)
@pytest.mark.parametrize("share_dead", [0.001, 0.02, 0.5])
def test_what_was_deleted_is_masked_at_once_and_fetched_over(kind: str, share_dead: float, tmp_path: Path) -> None:
    """20, 400 and 10 000 of them: within what the GPU fetches over, and beyond it."""
    embeddings_ND = random_embeddings(N, D)
    cpu, gpu = both(embeddings_ND, tmp_path, kind=kind)
    dead = np.random.default_rng(3).random(N) < share_dead
    args = (np.arange(N), max_norm(embeddings_ND), random_embeddings(16, D, seed=1), [5] * 16)
    pairs = list(zip(search(gpu, *args, dead=dead), search(cpu, *args, dead=dead), strict=True))
    for on_gpu, _ in pairs:
        assert len(on_gpu.rows) == 5
        assert not dead[on_gpu.rows].any()
    shared = sum(len(set(on_gpu.rows) & set(on_cpu.rows)) for on_gpu, on_cpu in pairs)
    assert shared >= (1 if kind == "flat" else 0.97) * 5 * len(pairs)


@pytest.mark.parametrize("comparable", [0, ranking.COMPARABLE_ROWS])
def test_where_everything_near_was_deleted_the_lists_are_full(
    comparable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the GPU can fetch over: all rows are compared, or its copy on the host is told which are alive."""
    monkeypatch.setattr(ranking, "COMPARABLE_ROWS", comparable)
    embeddings_ND, query_D = random_embeddings(N, D), random_embeddings(1, D, seed=1)[0]
    _, gpu = both(embeddings_ND, tmp_path, kind="ivf-flat")
    dead = np.zeros(N, np.bool_)
    dead[np.argsort(-(embeddings_ND @ query_D))[: N // 2]] = True
    (found,) = search(gpu, np.arange(N), max_norm(embeddings_ND), query_D[np.newaxis], [20], dead=dead)
    assert len(found.rows) == 20
    assert not dead[found.rows].any()


@pytest.mark.parametrize("kind", [name for name in PRESETS if name != "flat"])
def test_every_kind_finds_on_the_gpu_what_it_finds_on_the_cpu(kind: str, tmp_path: Path) -> None:
    embeddings_ND = random_embeddings(N, D)
    cpu, gpu = both(embeddings_ND, tmp_path, kind=kind)
    args = (np.arange(N), max_norm(embeddings_ND), random_embeddings(64, D, seed=1), [5] * 64)
    pairs = list(zip(search(gpu, *args), search(cpu, *args), strict=True))
    shared = sum(len(set(on_gpu.rows) & set(on_cpu.rows)) for on_gpu, on_cpu in pairs)
    assert shared >= 0.98 * 5 * len(pairs)


def max_norm(embeddings_ND: np.ndarray) -> float:
    return float(np.linalg.norm(embeddings_ND.astype(np.float64), axis=1).max())


def half_precision_error(query_D: np.ndarray, largest_norm: float) -> float:
    """Rounding both sides to float16, and what float32 sums add to that."""
    return (2**-10 + 2**-20) * ranking.norm(query_D) * largest_norm + ranking.search_error(query_D, largest_norm)


@pytest.mark.parametrize("n_queries", [1, 7, 64, 300])
@pytest.mark.parametrize("n_docs", [1, 5, 100, 1000])
def test_the_same_documents_scores_and_embeddings_as_on_the_cpu(n_queries: int, n_docs: int, tmp_path: Path) -> None:
    embeddings_ND = random_embeddings(N, D)
    cpu, gpu = both(embeddings_ND, tmp_path)
    assert gpu.device == "cuda:0 (float32)"
    queries_BD, wanted = random_embeddings(n_queries, D, seed=1), [n_docs] * n_queries
    args = (np.arange(N), max_norm(embeddings_ND), queries_BD, wanted)
    for found, expected in zip(search(gpu, *args), search(cpu, *args), strict=True):
        np.testing.assert_array_equal(found.rows, expected.rows)
        np.testing.assert_array_equal(found.scores, expected.scores)
        np.testing.assert_array_equal(found.embeddings, expected.embeddings)


def test_equal_scores_come_in_the_same_order_as_on_the_cpu(tmp_path: Path) -> None:
    embeddings_ND = tied_embeddings(1500, 4)
    cpu, gpu = both(embeddings_ND, tmp_path)
    ids = np.random.default_rng(2).permutation(1500).astype(np.int64)
    args = (ids, max_norm(embeddings_ND), tied_embeddings(20, 4, seed=1), [10] * 20)
    for found, expected in zip(search(gpu, *args), search(cpu, *args), strict=True):
        np.testing.assert_array_equal(found.rows, expected.rows)


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_the_scores_of_the_search_keep_their_bound(storage: GpuStorage, tmp_path: Path) -> None:
    embeddings_ND = random_embeddings(N, D)
    _, gpu = both(embeddings_ND, tmp_path, storage)
    bound = ranking.search_error if storage == "float32" else half_precision_error
    queries_BD = random_embeddings(64, D, seed=1)
    scores_BK, rows_BK = gpu.search(queries_BD, 100)
    for query_D, scores_K, rows_K in zip(queries_BD, scores_BK, rows_BK, strict=True):
        true_K = embeddings_ND[rows_K].astype(np.float64) @ query_D.astype(np.float64)
        assert np.abs(scores_K - true_K).max() <= bound(query_D, max_norm(embeddings_ND))


def test_half_precision_storage_misses_only_what_is_near_the_cut(tmp_path: Path) -> None:
    embeddings_ND = random_embeddings(N, D)
    cpu, gpu = both(embeddings_ND, tmp_path, "float16")
    largest, queries_BD = max_norm(embeddings_ND), random_embeddings(64, D, seed=1)
    args = (np.arange(N), largest, queries_BD, [10] * 64)
    hits = 0
    for query_D, found, expected in zip(queries_BD, search(gpu, *args), search(cpu, *args), strict=True):
        np.testing.assert_array_equal(found.scores, ranking.inner_products(query_D, embeddings_ND[found.rows]))
        assert np.all(expected.scores - found.scores <= 2 * half_precision_error(query_D, largest))
        hits += len(set(found.rows) & set(expected.rows))
    assert hits >= 0.99 * 640


def test_a_search_wider_than_faiss_can_select_is_narrowed(tmp_path: Path) -> None:
    _, gpu = both(np.ones((CUDA_MAX_HITS + 500, 4), np.float32), tmp_path)
    (found,) = search(gpu, np.arange(gpu.count), 2.0, np.ones((1, 4), np.float32), [1000])
    assert len(found.rows) == 1000
    assert gpu.max_hits == CUDA_MAX_HITS


def test_an_embedding_that_half_precision_cannot_hold_is_refused(tmp_path: Path) -> None:
    embeddings_ND = random_embeddings(10, 4)
    embeddings_ND[3, 2] = 70_000
    with pytest.raises(StartupError, match="choose float32"):
        both(embeddings_ND, tmp_path, "float16")


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_the_service_answers_on_the_gpu_as_on_the_cpu(storage: GpuStorage, tmp_path: Path) -> None:
    embeddings_ND = random_embeddings(2000, 64, dtype="float16")
    build_collection(tmp_path / "collections" / "default", source_of(passage_table(embeddings_ND), batch_rows=500))
    body = {"vectors": random_embeddings(16, 64, seed=1).tolist(), "n_docs": 5}

    async def answer(**changes: Any) -> dict[str, Any]:
        app = create_app(RetrieverSettings(data_dir=tmp_path, seed=tmp_path / "absent", **changes))
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
        ):
            response = await client.post("/v1/retrieve", json=body)
            info = (await client.get("/v1/collections/default")).json()
        assert response.status_code == 200, response.text
        return {**response.json(), "timings_ms": {}, "device": info["device"]}

    on_gpu = asyncio.run(answer(device="cuda", gpu_storage=storage))
    on_cpu = asyncio.run(answer(device="cpu"))
    assert (on_gpu.pop("device"), on_cpu.pop("device")) == (f"cuda:0 ({storage})", "cpu")
    assert on_gpu == on_cpu
