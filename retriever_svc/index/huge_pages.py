"""Puts the arrays of an index on huge pages.

A graph or a list is read at places that have nothing to do with each other. With pages of 4 KiB nearly each of them
is one that the processor has to look up in page tables first (in a virtual machine in two sets of them), and the
lookups push everything else out of its caches. Linux gives pages of 2 MiB to who asks for them.
"""

import ctypes
import mmap
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import faiss

HUGE = 2 << 20
# Linux 6.1: do it now. What `mmap` has a name for leaves it to a thread of the kernel, which takes its time.
COLLAPSE = 25


def to_huge_pages(index: Any) -> int:
    """Ask for huge pages for what ``index`` holds; how many bytes got them. Where that cannot be, nothing changes."""
    if not index.ntotal or not sys.platform.startswith("linux"):
        return 0
    return sum(collapsed(first, end) for first, end in covered(_arrays(index)))


def collapsed(first: int, end: int) -> int:
    """Ask for huge pages for a stretch of addresses; how many of its bytes have them.

    Its last page may reach beyond what is mapped, where an array ends with the heap: that one is refused, and the
    others are not.
    """
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    madvise(first, end - first, mmap.MADV_HUGEPAGE)  # where the next line fails, the kernel may do it later
    if madvise(first, end - first, COLLAPSE) == 0:
        return end - first
    return sum(HUGE for page in range(first, end, HUGE) if madvise(page, HUGE, COLLAPSE) == 0)


def covered(arrays: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Stretches of whole huge pages that belong to ``arrays`` (address, size) by half at least: first address, end."""
    bytes_of: Counter[int] = Counter()
    whole: list[tuple[int, int]] = []
    for address, size in arrays:
        first, last = address // HUGE, (address + size) // HUGE
        if first == last:
            bytes_of[first] += size
            continue
        bytes_of[first] += (first + 1) * HUGE - address
        bytes_of[last] += address + size - last * HUGE
        if first + 1 < last:
            whole.append((first + 1, last))
    whole += [(page, page + 1) for page, size in bytes_of.items() if 2 * size >= HUGE]
    stretch: tuple[int, int] | None = None
    for first, end in sorted(whole):
        if stretch is not None and first <= stretch[1]:
            stretch = stretch[0], max(stretch[1], end)
            continue
        if stretch is not None:
            yield stretch[0] * HUGE, stretch[1] * HUGE
        stretch = first, end
    if stretch is not None:
        yield stretch[0] * HUGE, stretch[1] * HUGE


def _arrays(index: Any) -> Iterator[tuple[int, int]]:
    """Address and size of each."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        yield from _arrays(index.index)
    elif isinstance(index, faiss.IndexHNSW):
        graph: Any = index.hnsw
        yield int(graph.neighbors.data()), 4 * graph.neighbors.size()
        yield from _arrays(index.storage)
    elif isinstance(index, faiss.IndexIVF):
        yield from _lists(index)
    elif isinstance(index, faiss.IndexFlatCodes):
        yield int(index.codes.data()), index.codes.size()


def _lists(index: Any) -> Iterator[tuple[int, int]]:
    lists: Any = faiss.downcast_InvertedLists(index.invlists)
    if not isinstance(lists, faiss.ArrayInvertedLists):  # mapped from a file
        return
    for number in range(index.nlist):
        count = lists.list_size(number)
        if count:
            yield int(lists.get_codes(number)), count * lists.code_size
            yield int(lists.get_ids(number)), count * 8
