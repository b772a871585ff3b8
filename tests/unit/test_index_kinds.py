"""Every kind of index against brute force: what it returns is true, it misses little, and never returns the dead."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever_svc import ranking
from retriever_svc.index import PRESETS, Index, merged, recipe
from retriever_svc.ranking import Ranked, Segment, inner_products
from shared.errors import InvalidRequest
from shared.schemas import SearchParams
from tests.retriever_data import brute_force, clustered, random_embeddings, tied_embeddings, write_index

FACTORIES = ["Flat", "SQ4", "HNSW8", "IVF4,SQ8", "IVF8,PQ2x4", "OPQ2,IVF4,PQ2x4", "PCA4,Flat", "IVF4_HNSW8,Flat"]
KINDS = [*PRESETS, *FACTORIES]


def built(folder: Path, embeddings_ND: np.ndarray, kind: str, dtype: str = "float32") -> tuple[Index, SearchParams]:
    settled = write_index(folder, embeddings_ND, kind, dtype)
    return Index.read(folder, dtype=dtype, device="cpu"), settled.params


def max_norm(embeddings_ND: np.ndarray) -> float:
    return float(np.linalg.norm(embeddings_ND.astype(np.float64), axis=1).max())


def limit(index: Index) -> None:
    """As on a GPU: it cannot be told where to look, and gives so many hits at most."""
    index.selects, index.max_hits = False, min(index.count, 300)


def is_true(found: Ranked, query_D: np.ndarray, embeddings_ND: np.ndarray, ids_N: np.ndarray) -> None:
    """Distinct documents with their own embeddings and exact scores, in order."""
    assert len(set(found.rows.tolist())) == len(found.rows)
    np.testing.assert_array_equal(found.ids, ids_N[found.rows])
    np.testing.assert_array_equal(found.embeddings, embeddings_ND[found.rows].astype(np.float32))
    np.testing.assert_array_equal(found.scores, inner_products(query_D, found.embeddings))
    assert np.lexsort((found.ids, -found.scores)).tolist() == list(range(len(found.rows)))


@settings(max_examples=150)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 1500),
    n_added=st.sampled_from([0, 0, 1, 30, 700]),
    share_dead=st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]),
    share_chosen=st.sampled_from([None, 0.02, 0.6]),
    n_queries=st.integers(1, 6),
    n_docs=st.integers(1, 40),
    dtype=st.sampled_from(["float32", "float16"]),
    tied=st.booleans(),
    as_gpu=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_whatever_was_deleted_added_or_chosen_the_lists_are_true_and_full(
    *,
    kind: str,
    n: int,
    n_added: int,
    share_dead: float,
    share_chosen: float | None,
    n_queries: int,
    n_docs: int,
    dtype: str,
    tied: bool,
    as_gpu: bool,
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    make, dice = tied_embeddings if tied else random_embeddings, np.random.default_rng(seed)
    all_ND = make(n + n_added, 8, dtype=dtype, seed=seed)
    ids = dice.permutation(10 * len(all_ND))[: len(all_ND)].astype(np.int64)
    index, params = built(tmp_path_factory.mktemp("index"), all_ND[:n], kind, dtype)
    if as_gpu:
        limit(index)
    dead = dice.random(len(all_ND)) < share_dead
    chosen = None if share_chosen is None else dice.random(len(all_ND)) < share_chosen
    segments = [Segment(0, index, ids[:n], max_norm(all_ND[:n]), dead[:n] if share_dead else None)]
    if n_added:
        added, _ = built(tmp_path_factory.mktemp("added"), all_ND[n:], "flat", "float32")
        segments.append(Segment(n, added, ids[n:], max_norm(all_ND[n:]), dead[n:] if share_dead else None))
    queries_BD = make(n_queries, 8, seed=seed + 1).astype(np.float32)

    parts = None if chosen is None else [chosen[:n], chosen[n:]][: len(segments)]
    found = ranking.search(segments, queries_BD, [n_docs] * n_queries, params, parts)

    allowed = ~dead if chosen is None else ~dead & chosen
    for query_D, ranked in zip(queries_BD, found, strict=True):
        is_true(ranked, query_D, all_ND, ids)
        assert allowed[ranked.rows].all()
        assert len(ranked.rows) == min(n_docs, int(allowed.sum()))
        if kind == "flat":
            rows = np.flatnonzero(allowed)
            scores = inner_products(query_D, all_ND[rows].astype(np.float32))
            best = rows[np.lexsort((ids[rows], -scores))][:n_docs]
            assert ranked.rows.tolist() == best.tolist()


@pytest.mark.parametrize("kind", PRESETS)
@pytest.mark.parametrize("comparable", [0, ranking.COMPARABLE_ROWS])
def test_lists_are_full_where_everything_near_was_deleted_and_the_index_cannot_be_told(
    kind: str, comparable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More deletions around the query than a GPU fetches over, in a collection too large to compare all of it."""
    monkeypatch.setattr(ranking, "COMPARABLE_ROWS", comparable)
    embeddings_ND = random_embeddings(3000, 8)
    query_D = random_embeddings(1, 8, seed=1)[0]
    index, params = built(tmp_path, embeddings_ND, kind)
    limit(index)
    dead = np.zeros(3000, np.bool_)
    dead[np.argsort(-(embeddings_ND @ query_D))[:1500]] = True
    segments = [Segment(0, index, np.arange(3000), max_norm(embeddings_ND), dead)]
    (found,) = ranking.search(segments, query_D[np.newaxis], [20], params)
    is_true(found, query_D, embeddings_ND, np.arange(3000))
    assert len(found.rows) == 20
    assert not dead[found.rows].any()


@pytest.mark.parametrize("kind", PRESETS.values(), ids=PRESETS)
def test_recall_is_above_what_the_preset_states(kind, tmp_path: Path) -> None:  # noqa: ANN001
    embeddings_ND = clustered(6000, 64, seed=1)
    queries_BD = clustered(6000, 64, seed=1)[::40] + 0.05 * random_embeddings(150, 64, seed=2)
    index, params = built(tmp_path, embeddings_ND, kind.name, "float16")
    embeddings_ND = index.embeddings(np.arange(6000))
    found = ranking.search([Segment(0, index, np.arange(6000), 1.1)], queries_BD, [5] * 150, params)
    best = np.argsort(-(queries_BD @ embeddings_ND.T), axis=1)[:, :5]
    hits = sum(len(set(one.rows.tolist()) & set(rows.tolist())) for one, rows in zip(found, best, strict=True))
    assert hits / best.size >= kind.recall_floor


def test_looking_wider_finds_more(tmp_path: Path) -> None:
    embeddings_ND, queries_BD = random_embeddings(6000, 32), random_embeddings(100, 32, seed=1)
    index, params = built(tmp_path, embeddings_ND, "ivf-flat")
    best = np.argsort(-(queries_BD @ embeddings_ND.T), axis=1)[:, :5]
    segments = [Segment(0, index, np.arange(6000), max_norm(embeddings_ND))]

    def recall(asked: SearchParams) -> float:
        found = ranking.search(segments, queries_BD, [5] * 100, merged(params, asked))
        return sum(len(set(one.rows.tolist()) & set(rows.tolist())) for one, rows in zip(found, best, strict=True)) / (
            best.size
        )

    assert recall(SearchParams(nprobe=1)) < recall(SearchParams()) < recall(SearchParams(nprobe=10_000)) == 1.0


@pytest.mark.parametrize(
    ("kind", "params", "param"),
    [
        ("flat", SearchParams(nprobe=3), "search_params.nprobe"),
        ("flat", SearchParams(over_fetch=3), "search_params.over_fetch"),
        ("hnsw", SearchParams(nprobe=3), "search_params.nprobe"),
        ("ivf-pq", SearchParams(ef_search=3), "search_params.ef_search"),
    ],
)
def test_a_setting_that_the_kind_does_not_have_is_refused(
    kind: str, params: SearchParams, param: str, tmp_path: Path
) -> None:
    index, _ = built(tmp_path, random_embeddings(50, 8), kind)
    with pytest.raises(InvalidRequest) as refused:
        index.check_params(params)
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("kind", "because"),
    [
        ("hnws", "neither a preset"),
        ("IVF4,PQ3", "neither a preset"),  # 8 is no multiple of 3
        ("PQ4", "IndexPQ"),
        ("HNSW8_PQ4", "not by inner product"),
        ("IDMap,Flat", "IndexIDMap"),
        ("NSG8", "IndexNSG"),
        ("LSH", "neither a preset"),
        ("IVF4,PQ4,RFlat", "IndexRefine"),
        ("", "neither a preset"),
    ],
)
def test_a_kind_that_cannot_serve_is_refused_before_anything_is_read(kind: str, because: str) -> None:
    with pytest.raises(InvalidRequest, match=because) as refused:
        recipe(kind, 8, 1000)
    assert refused.value.param == "kind"


def test_wiki_dprs_own_strings_are_known() -> None:
    assert recipe("hnsw", 768, 21_000_000).factory == "HNSW128,SQ8"
    assert recipe("ivf-pq", 768, 21_000_000).factory.endswith(",PQ128")
    assert recipe("IVF4096_HNSW128,PQ128", 768, 21_000_000).factory == "IVF4096_HNSW128,PQ128"


def test_a_graph_of_lists_gives_the_lists_that_are_asked_for(tmp_path: Path) -> None:
    """With all lists looked into, nothing that is stored as it is can be missed."""
    embeddings = random_embeddings(8000, 32)
    write_index(tmp_path, embeddings, "IVF200_HNSW8,Flat")
    index = Index.read(tmp_path, dtype="float32", device="cpu")
    queries = random_embeddings(50, 32, seed=1)
    _, rows = index.search(queries, 10, SearchParams(nprobe=200))
    _, _, best = brute_force(queries, embeddings, np.arange(8000), 10)
    np.testing.assert_array_equal(np.sort(rows), np.sort(best))
