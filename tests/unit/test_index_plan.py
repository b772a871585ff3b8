"""What the plan says of a size is what a build of that size takes; what it says of time is checked by a benchmark."""

from pathlib import Path

import numpy as np
import pytest

from retriever_svc.index import INDEX, PRESETS
from retriever_svc.index.plan import Need, choose, index_bytes, looked_through, needs
from tests.retriever_data import random_embeddings, write_index


@pytest.mark.parametrize("kind", PRESETS)
@pytest.mark.parametrize(("count", "dimension"), [(3000, 96), (6000, 48)])
def test_an_index_is_as_large_as_planned(kind: str, count: int, dimension: int, tmp_path: Path) -> None:
    write_index(tmp_path, random_embeddings(count, dimension), kind, "float16")
    assert (tmp_path / INDEX).stat().st_size == pytest.approx(index_bytes(kind, count, dimension), rel=0.05)


def test_every_preset_is_planned_and_grows_with_the_corpus() -> None:
    small, large = (list(needs(count, 32)) for count in (100_000, 10_000_000))
    assert [need.kind for need in small] == list(PRESETS)
    for a, b in zip(small, large, strict=True):
        assert np.isfinite([a.build_s, a.query_s, b.build_s, b.query_s]).all()
        assert min(a.ram, a.disk, a.build_s, a.query_s) > 0
        assert b.ram > a.ram
        assert b.disk > 50 * a.disk
        assert b.build_s > a.build_s
        assert looked_through(b.kind, 10_000_000) > looked_through(a.kind, 100_000)


def need(kind: str, ram: float, query_s: float, recall: float) -> Need:
    return Need(kind, ram, None, 0, 0, 0, query_s, recall)


def test_the_kind_that_misses_least_is_chosen_of_those_that_fit() -> None:
    found = [need("flat", 60, 3.0, 1.0), need("hnsw", 40, 0.01, 0.97), need("ivf-pq", 4, 0.02, 0.9)]
    assert [choose(found, ram, 1.0) for ram in (100, 50, 5, 1)] == [found[1], found[1], found[2], None]
    assert choose(found, 100, 5.0) == found[0]
