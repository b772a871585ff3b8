"""What the decoder remembers of documents: cross-attention keys and values, and for each a tree of decoded nodes.

Hypotheses about one document share prefixes, so the self-attention cache holds a *tree* of tokens rather than a row a
hypothesis: each beam step and each scored candidate appends nodes, and a mask says which nodes a new one descends
from. Nothing is copied when beams are reordered.

Documents that are encoded together lie in one tensor, padded to the longest of them, so that one kernel attends to all
of them.

Shapes: N documents of a group, S source tokens of the longest, C node positions, H heads, E head.
"""

from collections.abc import Iterator, Sequence
from weakref import WeakSet

from torch import Tensor

MOST_PADDING = 1.5
"""Padded together, documents may take so many times the room that they take one by one …"""
FREE_PADDING = 512
"""… and so many positions more: a kernel's start costs more than these."""
FIRST_NODES = 64
"""Nodes that a document's cache has room for at most, before it grows."""
KEPT_PADDING = (1.1, 256)
"""The same where the padding stays in memory, and where a CPU reads it at every step."""


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

    def keep_source(self, layer: int, kv_2HSE: Tensor) -> None:
        """Takes the cross-attention keys and values of a layer."""
        self.group.cross[layer][:, self.slot, :, : self.length] = kv_2HSE


def alike(sizes: Sequence[int], most: float = MOST_PADDING, free: int = FREE_PADDING) -> Iterator[slice]:
    """Neighbours that may be padded to the largest of them."""
    start = largest = total = 0
    for at, size in enumerate(sizes):
        largest, total = max(largest, size), total + size
        if (at + 1 - start) * largest > most * total + free:
            yield slice(start, at)
            start, largest, total = at, size, size
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
