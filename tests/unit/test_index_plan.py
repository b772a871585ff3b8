"""What the plan says of a size is what a build of that size takes; what it says of time is checked by a benchmark."""

from pathlib import Path

import numpy as np
import pytest

from retriever_svc.index import INDEX, PRESETS
from retriever_svc.index.plan import Need, choose, goes_to_cuda, index_bytes, needs, visited
from retriever_svc.index.probe import Probe
from tests.retriever_data import random_embeddings, write_index


@pytest.mark.parametrize("kind", PRESETS)
@pytest.mark.parametrize(("count", "dimension"), [(3000, 96), (6000, 48)])
def test_an_index_is_as_large_as_planned(kind: str, count: int, dimension: int, tmp_path: Path) -> None:
    write_index(tmp_path, random_embeddings(count, dimension), kind, "float16")
    assert (tmp_path / INDEX).stat().st_size == pytest.approx(index_bytes(kind, count, dimension), rel=0.05)


def test_every_preset_is_planned_and_grows_with_the_corpus() -> None:
    probe = Probe(32, 100, 2)
    small, large = (list(needs(count, 32, text_bytes=100, probe=probe)) for count in (100_000, 10_000_000))
    assert [need.kind for need in small] == list(PRESETS)
    for a, b in zip(small, large, strict=True):
        assert np.isfinite([a.build_s, a.query_s, b.build_s, b.query_s]).all()
        assert min(a.ram, a.disk, a.build_s, a.query_s) > 0
        assert b.ram > a.ram
        assert b.disk > 50 * a.disk
        assert b.build_s > a.build_s
        assert b.query_s > a.query_s


def test_codes_longer_than_faiss_searches_on_a_gpu_are_planned_for_the_cpu() -> None:
    assert [goes_to_cuda("ivf-pq", dimension) for dimension in (384, 768)] == [True, False]


def test_a_graph_visits_no_more_than_it_holds_and_in_the_end_a_number() -> None:
    for seen in (100.0, 4000.0, 8191.0):
        found = [visited(seen, 8192, count) for count in (1, 100, 8192, 10**10, 10**11)]
        assert found == sorted(found)
        assert found[0] <= 1
        assert found[1] <= 100
        assert found[2] == pytest.approx(seen, rel=0.01)
        assert found[4] == pytest.approx(found[3], rel=0.2)


def need(kind: str, ram: float, query_s: float, recall: float) -> Need:
    return Need(kind, ram, None, 0, 0, 0, query_s, recall)


def test_the_kind_that_misses_least_is_chosen_of_those_that_fit() -> None:
    found = [need("flat", 60, 3.0, 1.0), need("hnsw", 40, 0.01, 0.97), need("ivf-pq", 4, 0.02, 0.9)]
    assert [choose(found, ram, 1.0) for ram in (100, 50, 5, 1)] == [found[1], found[1], found[2], None]
    assert choose(found, 100, 5.0) == found[0]
