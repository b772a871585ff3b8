"""CAGRA where it cannot be built: refused with the reason; and its file, which a CPU serves."""

from pathlib import Path

import faiss
import numpy as np
import pytest

from retriever_svc.build import Options, build_collection
from retriever_svc.collection import Collection
from retriever_svc.index import recipe
from retriever_svc.index.cagra import CAGRA
from shared.errors import InvalidRequest
from shared.schemas import SearchParams
from tests.retriever_data import passage_table, random_embeddings, source_of

N, D = 2000, 32

cannot_build = pytest.mark.skipif(
    "CUVS" in faiss.get_compile_options() and faiss.get_num_gpus() > 0, reason="this machine can build it"
)


@cannot_build
def test_it_is_refused_with_the_reason_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"built without cuVS|sees no GPU") as refused:
        recipe(CAGRA, D, N)
    assert refused.value.param == "kind"
    with pytest.raises(InvalidRequest, match="cannot be built here"):
        build_collection(tmp_path, source_of(passage_table(random_embeddings(10, D))), options=Options(CAGRA))
    assert not list(tmp_path.rglob("*.lance"))


def test_a_missing_gpu_is_told_from_a_missing_cuvs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss, "get_compile_options", lambda: "OPTIMIZE GPU NVIDIA_CUVS")
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    with pytest.raises(InvalidRequest, match="sees no GPU"):
        recipe(CAGRA, D, N)


def test_a_cpu_serves_its_file(tmp_path: Path) -> None:
    """The form that a GPU's graph is stored in, filled by faiss's own graph."""
    embeddings_ND = random_embeddings(N, D)
    index = faiss.IndexHNSWCagra(D, 32, faiss.METRIC_INNER_PRODUCT)
    index.add(embeddings_ND)
    faiss.write_index(index, str(tmp_path / "cagra.faiss"))
    options = Options("hnsw", SearchParams(ef_search=256), index_file=tmp_path / "cagra.faiss")
    build_collection(tmp_path / "made", source_of(passage_table(embeddings_ND), 500), options=options)
    collection = Collection.open(tmp_path / "made", device="cpu")
    assert collection.manifest.factory == "IndexHNSWCagra as it was"
    queries_BD = random_embeddings(50, D, seed=1)
    best = np.argsort(-(queries_BD @ embeddings_ND.T), axis=1)[:, :5]
    found = collection.search(queries_BD, [5] * 50)
    hits = sum(len(set(one.rows.tolist()) & set(rows.tolist())) for one, rows in zip(found, best, strict=True))
    assert hits / best.size >= 0.95
