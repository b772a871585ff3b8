"""The search equals brute force: ids, scores, order, and the order at the cut."""

from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever_svc import ranking
from retriever_svc.index import Index, use_threads
from retriever_svc.ranking import Ranked, Segment
from shared.errors import StartupError
from shared.schemas import SearchParams
from tests.retriever_data import brute_force, random_embeddings, tied_embeddings, write_index


def index_of(embeddings_ND: np.ndarray, folder: Path, kind: str = "flat") -> Index:
    write_index(folder, embeddings_ND, kind)
    return Index.read(folder, device="cpu")


def search(
    index: Index, ids: np.ndarray, embeddings_ND: np.ndarray, queries_BD: np.ndarray, n_docs: list[int]
) -> list[Ranked]:
    return ranking.search([Segment(0, index, ids, max_norm(embeddings_ND))], queries_BD, n_docs, SearchParams())


def max_norm(embeddings_ND: np.ndarray) -> float:
    return float(np.linalg.norm(embeddings_ND.astype(np.float64), axis=1).max())


@settings(max_examples=60)
@given(
    n=st.integers(1, 120),
    dimension=st.integers(1, 40),
    n_queries=st.integers(1, 12),
    n_docs=st.integers(1, 30),
    tied=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_search_equals_brute_force(
    *,
    n: int,
    dimension: int,
    n_queries: int,
    n_docs: int,
    tied: bool,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    make = tied_embeddings if tied else random_embeddings
    embeddings_ND, queries_BD = make(n, dimension, seed=seed), make(n_queries, dimension, seed=seed + 1)
    ids = np.random.default_rng(seed).permutation(10 * n)[:n].astype(np.int64)

    index = index_of(embeddings_ND, tmp_path_factory.mktemp("index"))
    found = search(index, ids, embeddings_ND, queries_BD, [n_docs] * n_queries)

    want_ids, want_scores, want_rows = brute_force(queries_BD, embeddings_ND, ids, n_docs)
    for b, ranked in enumerate(found):
        assert ids[ranked.rows].tolist() == want_ids[b].tolist()
        np.testing.assert_array_equal(ranked.scores, want_scores[b])
        np.testing.assert_array_equal(ranked.embeddings, embeddings_ND[want_rows[b]])


def test_each_query_gets_its_own_number_of_documents(tmp_path: Path) -> None:
    embeddings_ND = random_embeddings(40, 6)
    index = index_of(embeddings_ND, tmp_path)
    found = search(index, np.arange(40), embeddings_ND, random_embeddings(3, 6, seed=1), [1, 25, 1000])
    assert [len(ranked.rows) for ranked in found] == [1, 25, 40]


def test_of_more_equal_documents_than_were_fetched_the_lowest_ids_come(tmp_path: Path) -> None:
    embeddings_ND = np.ones((500, 4), np.float32)
    ids = np.arange(500)[::-1].copy()  # faiss prefers low rows: here those have the high ids
    index = index_of(embeddings_ND, tmp_path)
    found = search(index, ids, embeddings_ND, np.ones((1, 4), np.float32), [3])
    assert ids[found[0].rows].tolist() == [0, 1, 2]


def test_near_ties_that_float32_sums_misjudge_are_settled_exactly(tmp_path: Path) -> None:
    """Large components cancel and leave a small difference, which float32 loses on the way."""
    rng = np.random.default_rng(0)
    large_NH = rng.integers(-(2**13), 2**13, (300, 16)) * 2.0**10
    small_NH = rng.integers(-(2**10), 2**10, (300, 16)) * 2.0**-10
    embeddings_ND = np.hstack([large_NH + np.round(small_NH), small_NH, -large_NH]).astype(np.float32)
    signs_BH = rng.choice([-1.0, 1.0], (20, 16)).astype(np.float32)
    queries_BD = np.hstack([signs_BH, signs_BH, signs_BH])

    index = index_of(embeddings_ND, tmp_path)
    ids = np.arange(300)
    found = search(index, ids, embeddings_ND, queries_BD, [3] * 20)
    want_ids, want_scores, _ = brute_force(queries_BD, embeddings_ND, ids, 3)
    assert [ranked.rows.tolist() for ranked in found] == want_ids.tolist()
    np.testing.assert_array_equal(np.stack([ranked.scores for ranked in found]), want_scores)
    assert index.search(queries_BD, 3)[1].tolist() != want_ids.tolist(), (
        "faiss alone got it right: the case is too easy"
    )


@settings(max_examples=100)
@given(dimension=st.integers(1, 800), scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e6]), seed=st.integers(0, 2**32 - 1))
def test_faiss_errs_by_no_more_than_the_bound(
    dimension: int, scale: float, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    embeddings_ND = random_embeddings(30, dimension, seed=seed) * np.float32(scale)
    queries_BD = random_embeddings(5, dimension, seed=seed + 1)
    index = index_of(embeddings_ND, tmp_path_factory.mktemp("index"))
    scores_BK, rows_BK = index.search(queries_BD, 30)
    for query_D, scores_K, rows_K in zip(queries_BD, scores_BK, rows_BK, strict=True):
        true_K = embeddings_ND[rows_K].astype(np.float64) @ query_D.astype(np.float64)
        assert np.abs(scores_K - true_K).max() <= ranking.search_error(query_D, max_norm(embeddings_ND))


def test_a_score_is_the_true_inner_product_rounded_once() -> None:
    query = np.array([1e8, 1, -1e8], np.float32)
    assert ranking.inner_products(query, np.ones((2, 3), np.float32)).tolist() == [1.0, 1.0]


def test_a_file_that_is_no_index_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "index.faiss").write_bytes(b"not an index")
    with pytest.raises(StartupError, match=r"index\.faiss"):
        Index.read(tmp_path)


@pytest.mark.parametrize(
    ("other", "because"),
    [
        (faiss.IndexFlatL2(4), "not by inner product"),
        (faiss.IndexPQ(4, 2, 8, faiss.METRIC_INNER_PRODUCT), "IndexPQ"),
        (faiss.IndexHNSWFlat(4, 8, faiss.METRIC_INNER_PRODUCT), "does not hold the embeddings"),
    ],
)
def test_an_index_of_another_kind_or_metric_is_refused(other: faiss.Index, because: str, tmp_path: Path) -> None:
    faiss.write_index(other, str(tmp_path / "index.faiss"))
    with pytest.raises(StartupError, match=because):
        Index.read(tmp_path)


def test_a_gpu_that_is_demanded_and_missing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faiss.get_num_gpus", lambda: 0)
    with pytest.raises(StartupError, match="sees no GPU"):
        Index.read(tmp_path, device="cuda")


def test_zero_threads_chooses_and_another_number_is_kept() -> None:
    assert 1 <= use_threads(0) <= 8
    assert use_threads(1) == 1
