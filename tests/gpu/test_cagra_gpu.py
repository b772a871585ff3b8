"""CAGRA against brute force, on the GPU that built it and on a CPU from the same file."""

from pathlib import Path

import faiss
import numpy as np
import pytest

from retriever_svc import ranking
from retriever_svc.build import Options, build_collection
from retriever_svc.collection import Collection
from retriever_svc.index import Index
from retriever_svc.index.cagra import CAGRA, MAX_HITS
from retriever_svc.ranking import Segment, inner_products
from retriever_svc.rebuild import rebuild
from shared.schemas import SearchParams
from tests.retriever_data import passage_table, random_embeddings, source_of, write_index

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="faiss sees no GPU"),
    pytest.mark.skipif(
        "CUVS" not in faiss.get_compile_options(), reason="this faiss has no cuVS: install faiss-gpu-cuvs to run this"
    ),
]

N, D, B = 20_000, 128, 64
PARAMS = SearchParams(ef_search=128, over_fetch=4)


@pytest.fixture(scope="module")
def embeddings() -> np.ndarray:
    found = random_embeddings(N, D)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def folder(embeddings: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cagra")
    write_index(folder, embeddings, CAGRA)
    return folder


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("share_dead", [0.0, 0.001, 0.5])
def test_it_finds_what_brute_force_finds_and_never_the_dead(
    device: str, share_dead: float, folder: Path, embeddings: np.ndarray
) -> None:
    index = Index.read(folder, device="cuda" if device == "cuda" else "cpu")
    assert index.device.startswith(device)
    dead = np.random.default_rng(3).random(N) < share_dead
    queries_BD = embeddings[:B] + 0.05 * random_embeddings(B, D, seed=1)
    segment = Segment(0, index, np.arange(N), 1.1, dead if share_dead else None)
    found = ranking.search([segment], queries_BD, [5] * B, PARAMS)
    scores_BN = np.where(dead, -np.inf, queries_BD @ embeddings.T)
    best = np.argsort(-scores_BN, axis=1)[:, :5]
    hits = 0
    for ranked, query_D, rows in zip(found, queries_BD, best, strict=True):
        assert len(ranked.rows) == 5
        assert not dead[ranked.rows].any()
        np.testing.assert_array_equal(ranked.scores, inner_products(query_D, embeddings[ranked.rows]))
        hits += len(set(ranked.rows.tolist()) & set(rows.tolist()))
    assert hits / best.size >= 0.95


def test_it_gives_no_more_hits_than_it_says(folder: Path) -> None:
    index = Index.read(folder, device="cuda")
    assert index.max_hits == MAX_HITS
    _, rows_BK = index.search(random_embeddings(3, D, seed=2), MAX_HITS, PARAMS)
    assert rows_BK.shape == (3, MAX_HITS)


def test_a_collection_is_built_and_rebuilt_as_cagra(tmp_path: Path, embeddings: np.ndarray) -> None:
    name = build_collection(tmp_path, source_of(passage_table(embeddings[:5000]), 500), options=Options(CAGRA))
    rebuild(tmp_path, name, 0)
    collection = Collection.open(tmp_path, device="cuda")
    assert (collection.manifest.kind, collection.manifest.factory) == (CAGRA, "CAGRA64")
    assert collection.search(embeddings[:1], [1])[0].ids.tolist() == [0]
