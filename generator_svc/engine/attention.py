"""Attention of many documents' rows at once.

Rows are packed: the linear layers see no padding. Attention pads them again, and neighbouring documents of one group
go through one kernel together.

Shapes: R packed rows, N documents of a segment, M rows of the one that has most, W nodes that a row may see, S source
tokens, H heads, E head.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from generator_svc.engine.cache import DocumentCache, alike, runs

# Two batched products and a softmax took 0.4 to 0.8 of the time of torch's attention in float32 for a few rows, as long
# or longer from 16 on; in bfloat16 0.35 to 0.55 of it for any number. (Heads of 64, 64 to 224 keys, two AVX-512 cores.)
FEW_ROWS = 8
# oneDNN makes half a megabyte of code for every form of a product of bfloat16 that it meets, and keeps a thousand of
# them. So on a CPU such rows meet few forms: keys, and rows where they are many, in multiples of this number; documents
# in powers of two, or where rows are many one by one.
WIDTHS = 32
# Scores held at once where rows are many: 2 MiB in bfloat16, which stay in a core's cache.
SCORES = 2**20


def widened(keys: int, like: Tensor) -> int:
    """So many keys as rows of this kind attend to, the last of them masked; and so many rows as many of them are."""
    return -(-keys // WIDTHS) * WIDTHS if _makes_code(like) else keys


def _makes_code(like: Tensor) -> bool:
    return like.device.type == "cpu" and like.dtype == torch.bfloat16


class Rows:
    """The rows of neighbouring documents, ``counts`` of each, packed, or padded to `width` or the longest."""

    def __init__(self, counts: Sequence[int], device: torch.device, width: int = 0) -> None:
        self.count, self.shape = sum(counts), (len(counts), width or max(counts))
        self._places: Tensor | None = None
        if min(counts) != self.shape[1]:
            self._places = torch.cat([torch.arange(n) + i * self.shape[1] for i, n in enumerate(counts)]).to(device)

    def padded(self, packed: Tensor) -> Tensor:
        """(R, …) as (N, M, …)"""
        if self._places is None:
            return packed.view(*self.shape, *packed.shape[1:])
        flat = packed.new_zeros(self.shape[0] * self.shape[1], *packed.shape[1:])
        return flat.index_copy_(0, self._places, packed).view(*self.shape, *packed.shape[1:])

    def packed(self, padded: Tensor) -> Tensor:
        """(N, M, …) as (R, …)"""
        flat = padded.flatten(0, 1)
        return flat if self._places is None else flat[self._places]


def attend(q_NHME: Tensor, k_NHSE: Tensor, v_NHSE: Tensor, mask: Tensor | None) -> Tensor:
    """(N, H, M, E). ``mask``: 0 or -inf, to be added."""
    if _makes_code(q_NHME):
        return _attend_in_parts(q_NHME, k_NHSE, v_NHSE, mask)
    if q_NHME.device.type == "cpu" and q_NHME.shape[2] <= FEW_ROWS:
        return _attend(q_NHME, k_NHSE, v_NHSE, mask)
    return scaled_dot_product_attention(q_NHME, k_NHSE, v_NHSE, attn_mask=mask)


def _attend(q_NHME: Tensor, k_NHSE: Tensor, v_NHSE: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.matmul(q_NHME, k_NHSE.transpose(2, 3)).float().mul_(q_NHME.shape[3] ** -0.5)
    weights = (scores if mask is None else scores.add_(mask)).softmax(-1)
    return torch.matmul(weights.to(v_NHSE.dtype), v_NHSE)


def _attend_in_parts(q_NHME: Tensor, k_NHSE: Tensor, v_NHSE: Tensor, mask: Tensor | None) -> Tensor:
    """Such parts as have few forms."""
    documents, heads, rows, _ = q_NHME.shape
    parts, together = powers_of_two(documents), rows
    if rows >= WIDTHS:
        parts = [slice(at, at + 1) for at in range(documents)]
        together = max(WIDTHS, SCORES // (heads * k_NHSE.shape[2]) // WIDTHS * WIDTHS)
    if len(parts) == 1 and rows <= together:
        return _attend(q_NHME, k_NHSE, v_NHSE, mask)
    found_NMHE = torch.empty_like(q_NHME.transpose(1, 2), memory_format=torch.contiguous_format)
    for part in parts:
        for start in range(0, rows, together):
            at = slice(start, start + together)
            of_part = None if mask is None else mask[part] if mask.shape[2] == 1 else mask[part, :, at]
            found = _attend(q_NHME[part, :, at], k_NHSE[part], v_NHSE[part], of_part)
            found_NMHE[part, at] = found.transpose(1, 2)
    return found_NMHE.transpose(1, 2)


def powers_of_two(count: int) -> list[slice]:
    """Neighbours, as many together as a power of two, the most first."""
    sizes = [1 << bit for bit in reversed(range(count.bit_length())) if count >> bit & 1]
    return [slice(end - size, end) for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]


def length_mask(lengths: Sequence[int], like: Tensor, width: int = 0) -> Tensor | None:
    """(N, 1, 1, S), what of the padded positions is there, of `width` or of the longest; None where all is."""
    width = width or max(lengths)
    if min(lengths) == width:
        return None
    ends = torch.tensor(lengths, device=like.device)
    hidden = torch.arange(width, device=like.device) >= ends[:, None]
    return like.new_zeros(len(lengths), 1, 1, width).masked_fill_(hidden[:, None, None], -torch.inf)


def _device_of(visible: Sequence[Tensor | None]) -> torch.device:
    """Where the masks lie: those of a search on its device, those of a trie on the host."""
    return next((mask.device for mask in visible if mask is not None), torch.device("cpu"))


class Attention(Protocol):
    """What the decoder's rows attend to."""

    def attend_to_nodes(self, layer: int, qkv_R3HE: Tensor) -> Tensor:
        """Self-attention, (R, H, E), of the new nodes, which are appended where they are kept."""

    def attend_to_source(self, layer: int, q_RHE: Tensor) -> Tensor:
        """Cross-attention, (R, H, E)."""


class Segment:
    """Neighbouring documents of one group, and the new nodes of their trees.

    Args:
        documents: in the order of their slots, without a gap.
        counts: new nodes of each.
        visible: for each (count, size + count) bool, which nodes each new node descends from, itself included; None
            where it is all of them.
        kept: whether the nodes stay in the cache; if not, they see only each other.
    """

    def __init__(
        self, documents: Sequence[DocumentCache], counts: Sequence[int], visible: Sequence[Tensor | None], kept: bool
    ) -> None:
        self._group, self._kept = documents[0].group, kept
        self._slots = slice(documents[0].slot, documents[-1].slot + 1)
        like = self._group.cross[0]
        # of rows that stay there are as many as beams
        self._rows = Rows(counts, like.device, 0 if kept else widened(max(counts), like))
        lengths = [document.length for document in documents]
        self._source = widened(max(lengths), like)
        self._source_mask = length_mask(lengths, like, self._source)
        seen = [(document.size if kept else 0) + n for document, n in zip(documents, counts, strict=True)]
        self._seen = widened(max(seen), like)
        self._mask = self._node_mask(seen, visible, like)
        if kept:
            self._group.reserve(self._seen)
            self._places = self._new_places(documents, counts, like.device)

    def _new_places(
        self, documents: Sequence[DocumentCache], counts: Sequence[int], device: torch.device
    ) -> tuple[slice | Tensor, slice | Tensor]:
        """Slots and positions of the new nodes: slices where they are the same in all documents."""
        sizes = {(document.size, n) for document, n in zip(documents, counts, strict=True)}
        if len(sizes) == 1:
            [(size, n)] = sizes
            return self._slots, slice(size, size + n)
        places = [(d.slot, d.size + i) for d, n in zip(documents, counts, strict=True) for i in range(n)]
        slots, positions = torch.tensor(places).T.to(device)
        return slots, positions

    def _node_mask(self, seen: Sequence[int], visible: Sequence[Tensor | None], like: Tensor) -> Tensor | None:
        """(N, 1, M, W)"""
        if min(seen) == self._seen and all(v is None for v in visible):
            return None
        seen_by = torch.zeros(*self._rows.shape, self._seen, dtype=torch.bool, device=_device_of(visible))
        start = 0
        for _, equal in itertools.groupby(zip(visible, seen, strict=True), key=lambda pair: (id(pair[0]), pair[1])):
            same = list(equal)
            (seen_here, width), end = same[0], start + len(same)
            if seen_here is None:
                seen_by[start:end, :, :width] = True
            else:
                seen_by[start:end, : len(seen_here), :width] = seen_here
                seen_by[start:end, len(seen_here) :] = True  # rows that are padding: any number will do, but a number
            start = end
        hidden = ~seen_by.to(like.device)
        return like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf).unsqueeze(1)

    def attend_to_nodes(self, layer: int, qkv_R3HE: Tensor) -> Tensor:
        """Self-attention, (R, H, E), of the new nodes, which are appended."""
        if not self._kept:
            q, k, v = self._rows.padded(qkv_R3HE).permute(2, 0, 3, 1, 4)
            return self._packed(attend(q, k, v, self._mask))
        nodes_2NHCE, kv_R2HE = self._group.nodes[layer], qkv_R3HE[:, 1:]
        slots, positions = self._places
        is_slice = isinstance(positions, slice)
        nodes_2NHCE[:, slots, :, positions] = self._rows.padded(kv_R2HE).permute(2, 0, 3, 1, 4) if is_slice else kv_R2HE
        keys, values = nodes_2NHCE[:, self._slots, :, : self._seen].unbind()
        return self._packed(attend(self._by_head(qkv_R3HE[:, 0]), keys, values, self._mask))

    def attend_to_source(self, layer: int, q_RHE: Tensor) -> Tensor:
        """Cross-attention, (R, H, E)."""
        keys, values = self._group.cross[layer][:, self._slots, :, : self._source].unbind()
        return self._packed(attend(self._by_head(q_RHE), keys, values, self._source_mask))

    def _by_head(self, rows_RHE: Tensor) -> Tensor:
        return self._rows.padded(rows_RHE).transpose(1, 2)

    def _packed(self, attended_NHME: Tensor) -> Tensor:
        return self._rows.packed(attended_NHME.transpose(1, 2))


class Segments:
    """The documents' rows, packed one document behind the other; neighbours in a group attend together."""

    def __init__(self, documents: Sequence[DocumentCache], visible: Sequence[Tensor | None], *, kept: bool) -> None:
        counts = [1 if v is None else len(v) for v in visible]
        starts = [0, *itertools.accumulate(counts)]
        self._parts: list[tuple[slice, Segment]] = []
        for run in runs(documents):
            for part in alike([max(n, d.length) for n, d in zip(counts[run], documents[run], strict=True)]):
                at = slice(run.start + part.start, run.start + part.stop)
                segment = Segment(documents[at], counts[at], visible[at], kept)
                self._parts.append((slice(starts[at.start], starts[at.stop]), segment))

    def attend_to_nodes(self, layer: int, qkv_R3HE: Tensor) -> Tensor:
        return torch.cat([part.attend_to_nodes(layer, qkv_R3HE[rows]) for rows, part in self._parts])

    def attend_to_source(self, layer: int, q_RHE: Tensor) -> Tensor:
        return torch.cat([part.attend_to_source(layer, q_RHE[rows]) for rows, part in self._parts])


def slot_order(documents: Sequence[DocumentCache]) -> list[int] | None:
    """The order in which documents of a group stand together, slot by slot; None where they do already."""
    groups: dict[int, int] = {}
    keys = [(groups.setdefault(id(document.group), len(groups)), document.slot) for document in documents]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return None if order == list(range(len(keys))) else order


def row_order(order: Sequence[int], counts: Sequence[int]) -> Tensor:
    """(R,) the packed rows of documents, ``counts`` of each, in the order of the documents."""
    starts = [0, *itertools.accumulate(counts)]
    return torch.tensor([row for at in order for row in range(starts[at], starts[at + 1])])
