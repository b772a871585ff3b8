"""Which memory is asked for: whole pages that the arrays fill by half at least; and a search finds the same after."""

import itertools
import mmap
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retriever_svc.index.huge_pages import HUGE, collapsed, covered, to_huge_pages
from tests.retriever_data import random_embeddings


@given(
    st.lists(
        st.tuples(st.integers(0, 20 * HUGE), st.one_of(st.integers(0, 4 * HUGE), st.integers(0, HUGE // 4))), max_size=6
    )
)
def test_pages_that_arrays_fill_by_half_are_covered(arrays: list[tuple[int, int]]) -> None:
    separate, end = [], 0
    for gap, size in arrays:
        separate.append((end + gap, size))
        end += gap + size
    filled = np.zeros(end // HUGE + 2)
    for address, size in separate:
        for page in range(address // HUGE, (address + size) // HUGE + 1):
            filled[page] += max(0, min(address + size, (page + 1) * HUGE) - max(address, page * HUGE))
    stretches = list(covered(separate))
    pages = [page for first, last in stretches for page in range(first // HUGE, last // HUGE)]
    assert pages == np.flatnonzero(2 * filled >= HUGE).tolist()
    assert all(first % HUGE == 0 and last % HUGE == 0 for first, last in stretches)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(stretches)), "two that touch are one"


@pytest.mark.parametrize("factory", ["Flat", "HNSW8,SQ8", "IVF4,Flat", "PCA32,SQfp16"])
def test_a_search_finds_the_same_on_huge_pages(factory: str) -> None:
    vectors = random_embeddings(80_000, 64)  # an array of two huge pages contains one, wherever it begins
    index = faiss.index_factory(64, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    before = index.search(vectors[:50], 5)
    moved = to_huge_pages(index)
    after = index.search(vectors[:50], 5)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    if _linux_collapses():
        assert moved > 0


def test_a_page_that_ends_in_nothing_keeps_no_other_from_being_huge() -> None:
    memory = mmap.mmap(-1, 5 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    first = -(-address // HUGE) * HUGE
    memory.resize(first - address + 3 * HUGE + HUGE // 2)
    memory.write(b"x" * len(memory))
    assert collapsed(first, first + 4 * HUGE) == (3 * HUGE if _linux_collapses() else 0)


def _linux_collapses() -> bool:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    major, minor = Path("/proc/sys/kernel/osrelease").read_text().split(".")[:2]
    return enabled.exists() and "[never]" not in enabled.read_text() and (int(major), int(minor)) >= (6, 1)
