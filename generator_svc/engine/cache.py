"""What the decoder remembers of documents: cross-attention keys and values, and for each a tree of decoded nodes.

Hypotheses about one document share prefixes, so the self-attention cache holds a *tree* of tokens rather than a row a
hypothesis: each beam step and each scored candidate appends nodes, and a mask says which nodes a new one descends
from. Nothing is copied when beams are reordered.

Documents that are encoded together lie in one tensor, padded to the longest of them, so that one kernel attends to all
of them.

Shapes: N documents of a group, S source tokens of the longest, C node positions, H heads, E head.
"""

import itertools
import math
import mmap
from collections.abc import Iterator, Sequence
from weakref import WeakSet

import torch
from torch import Tensor

MOST_PADDING = 1.5
"""Padded together, documents may take so many times the room that they take one by one …"""
FREE_PADDING = 512
"""… and so many positions more: a kernel's start costs more than these."""
FIRST_NODES = 64
"""Nodes that a document's cache has room for at most, before it grows."""
KEPT_PADDING = (1.1, 256)
"""The same where the padding stays in memory, and where a CPU reads it at every step."""


def zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for keys and values.

    Zeros, because what is masked must still be a number. On a CPU pages of its own: malloc keeps what it is given back,
    up to 64 MiB, and would write zeros where no document will ever have a token.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


class Group:
    """Caches of documents that were encoded together. A document that nobody holds any more leaves it.

    Args:
        cross, nodes: a tensor a layer, (2, N, H, S, E) and (2, N, H, C, E): keys and values.
        fixed: whether somebody else will use the tensors again, so that documents that leave give nothing back.
    """

    def __init__(self, cross: Sequence[Tensor], nodes: Sequence[Tensor], *, fixed: bool = False) -> None:
        self.documents: WeakSet[DocumentCache] = WeakSet()
        self.cross, self.nodes, self._fixed = list(cross), list(nodes), fixed

    @property
    def slots(self) -> int:
        """Documents that there is room for."""
        return self.cross[0].shape[1]

    def reserve(self, nodes: int) -> None:
        """Makes room for so many nodes of every document."""
        capacity = self.nodes[0].shape[3]
        if nodes > capacity:
            for layer, kept in enumerate(self.nodes):
                grown = kept.new_zeros(*kept.shape[:3], max(nodes, 2 * capacity), kept.shape[4])
                grown[:, :, :, :capacity] = kept
                self.nodes[layer] = grown

    def shrink(self) -> None:
        """Gives the room back of documents that have left, where it is half of the group or more."""
        if self._fixed or 2 * len(self.documents) > self.slots:
            return
        staying = sorted(self.documents, key=lambda document: document.slot)
        slots = [document.slot for document in staying]
        for caches in (self.cross, self.nodes):
            for layer, kept in enumerate(caches):
                caches[layer] = kept[:, slots]
        for slot, document in enumerate(staying):
            document.slot = slot


class DocumentCache:
    """One document: its place in a group, ``length`` source tokens and ``size`` nodes."""

    def __init__(self, group: Group, slot: int, length: int) -> None:
        self.group, self.slot, self.length = group, slot, length
        self.size = 0
        group.documents.add(self)


class SourcePlaces:
    """Where the cross-attention keys and values of neighbouring documents of one group belong.

    Args:
        documents: their P source tokens are packed, in this order.
        device: where one copy is made of all; None: one of each document.
    """

    def __init__(self, documents: Sequence[DocumentCache], device: torch.device | None) -> None:
        self._documents, self._group = documents, documents[0].group
        self._places: Tensor | None = None
        if device is not None:
            slots = torch.tensor([document.slot for document in documents])
            lengths = torch.tensor([document.length for document in documents])
            positions = torch.cat([torch.arange(document.length) for document in documents])
            self._places = torch.stack([slots.repeat_interleave(lengths), positions]).to(device)

    def keep(self, layer: int, kv_P2HE: Tensor) -> None:
        """Takes those of a layer."""
        cache_2NHSE = self._group.cross[layer]
        if self._places is None:
            lengths = [document.length for document in self._documents]
            for document, of_document in zip(self._documents, torch.split(kv_P2HE, lengths), strict=True):
                cache_2NHSE[:, document.slot, :, : document.length] = of_document.permute(1, 2, 0, 3)
        else:
            slots, positions = self._places
            cache_2NHSE[:, slots, :, positions] = kv_P2HE


def runs(documents: Sequence[DocumentCache]) -> list[slice]:
    """Neighbours in one group, slot by slot."""
    breaks = [
        at
        for at, (left, right) in enumerate(itertools.pairwise(documents), start=1)
        if right.group is not left.group or right.slot != left.slot + 1
    ]
    return [slice(start, end) for start, end in itertools.pairwise([0, *breaks, len(documents)])]


def alike(sizes: Sequence[int], most: float = MOST_PADDING, free: int = FREE_PADDING) -> Iterator[slice]:
    """Neighbours that may be padded to the largest of them."""
    start = largest = total = 0
    for at, size in enumerate(sizes):
        largest, total = max(largest, size), total + size
        if (at + 1 - start) * largest > most * total + free:
            yield slice(start, at)
            start, largest, total = at, size, size
    if sizes:
        yield slice(start, len(sizes))


def chunks(sizes: Sequence[int], limit: float) -> Iterator[slice]:
    """Neighbours whose sizes sum to `limit` at most, but one at least."""
    start = held = 0
    for at, size in enumerate(sizes):
        if at > start and held + size > limit:
            yield slice(start, at)
            start, held = at, 0
        held += size
    yield slice(start, len(sizes))
