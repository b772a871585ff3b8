"""Decode steps as CUDA graphs: one launch a step instead of one a kernel.

A graph replays kernels on the addresses that it was captured with. So on CUDA documents move into groups of a few
sizes whose tensors stay where they are and are used again (:class:`StaticGroup`). A step over such a group
(:class:`StaticStep`) has the same number of rows in each of its slots, fixed tensors for what comes in, and masks
instead of shapes that depend on it. It is captured when a size is first met, and replayed from then on. The search and
its logits processors stay outside. What does not fit (too many documents, nodes or rows) takes the ordinary way,
:meth:`Bart.extend`.

Nothing but :meth:`StaticStep._capture` needs CUDA: uncaptured, the same step runs anywhere.

Shapes: R packed rows, N slots, K rows of a slot, C node positions, S source tokens, H heads, E head, V vocabulary.
"""

import itertools
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from generator_svc.engine.attention import attend
from generator_svc.engine.cache import DocumentCache, Group

if TYPE_CHECKING:
    from generator_svc.engine.decoder import Bart

Memory = Any  # a pool of torch's allocator that graphs take their tensors from

MOST_SLOTS, MOST_SOURCE, MOST_NODES, MOST_ROWS = 64, 1024, 512, 16
MOST_GROUPS = 8  # kept, in use or not; further documents go the ordinary way
WARM_UPS = 3  # runs before a capture, in which libraries choose kernels and take their workspaces


def _power(size: int, least: int = 1) -> int:
    """The power of two that holds `size`."""
    return max(least, 1 << (size - 1).bit_length())


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of


class StaticStep:
    """A step of ``rows`` rows in each slot of a group, over tensors that stay where they are.

    It is what its own rows attend to, as :class:`~generator_svc.engine.attention.Attention` describes.
    """

    def __init__(self, bart: "Bart", caches: "Caches", rows: int, memory: Memory) -> None:
        self._bart, self._caches, self._rows, self._memory = bart, caches, rows, memory
        slots, capacity = caches.hidden_source.shape[0], caches.nodes[0].shape[3]
        self._tokens, self._depths, self._places = torch.zeros(
            3, slots * rows, dtype=torch.int64, device=bart.device
        ).unbind()
        self._slots = torch.arange(slots, device=bart.device).repeat_interleave(rows)
        self._visible = torch.zeros(slots, rows, capacity, dtype=torch.bool, device=bart.device)
        self._positions = torch.arange(capacity, device=bart.device)
        self._node_mask = self._source_mask = torch.empty(0)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits_RV = torch.empty(0)

    @torch.inference_mode()
    def run(
        self, documents: Sequence[DocumentCache], tokens_R: Tensor, depths_R: Tensor, visible: Sequence[Tensor | None]
    ) -> Tensor:
        """(R, V) float32; the arguments are those of :meth:`Bart.extend`."""
        at_R = self._fill(documents, tokens_R, depths_R, visible)
        if self._memory is None:
            return self._computed()[at_R]
        if self._graph is None:
            self._graph = self._capture(self._memory)
        self._graph.replay()
        return self._logits_RV[at_R]

    def _fill(
        self, documents: Sequence[DocumentCache], tokens_R: Tensor, depths_R: Tensor, visible: Sequence[Tensor | None]
    ) -> Tensor:
        """Puts what comes in into its place, and returns the places of the packed rows."""
        counts = [1 if mask is None else len(mask) for mask in visible]
        rows = [(d.slot * self._rows + i, d.size + i) for d, n in zip(documents, counts, strict=True) for i in range(n)]
        at_R: Tensor
        at_R, places_R = torch.tensor(rows).T.contiguous().to(self._bart.device)
        self._places.fill_(len(self._positions) - 1)  # where rows that are padding write; nobody sees it
        self._tokens[at_R], self._depths[at_R], self._places[at_R] = tokens_R, depths_R, places_R
        # a row whose mask is not given sees everything up to itself
        self._visible.fill_(False)
        self._visible.view(-1, len(self._positions))[at_R] = self._positions <= places_R[:, None]
        pairs = zip(documents, visible, strict=True)
        for _, same in itertools.groupby(pairs, key=lambda pair: id(pair[1])):
            sharing = list(same)
            mask = sharing[0][1]
            if mask is not None:
                slots = torch.tensor([document.slot for document, _ in sharing], device=self._bart.device)
                self._visible[slots, : len(mask)] = pad(mask, (0, len(self._positions) - mask.shape[1]))
        return at_R

    def _computed(self) -> Tensor:
        """(N·K, V) float32. No shape depends on what comes in, and nothing is read back."""
        self._node_mask = self._mask(~self._visible)[:, None]
        self._source_mask = self._mask(self._caches.hidden_source)[:, None, None]
        return self._bart.logits(self._bart.decode(self._tokens, self._depths, self))

    def _mask(self, hidden: Tensor) -> Tensor:
        """0 or -inf, to be added. A row that sees nothing is padding: it sees everything, to have a number."""
        hidden = hidden & ~hidden.all(-1, keepdim=True)
        return torch.zeros_like(hidden, dtype=self._bart.dtype).masked_fill_(hidden, -torch.inf)

    def attend_to_nodes(self, layer: int, qkv_R3HE: Tensor) -> Tensor:
        keys, values = self._caches.nodes[layer]
        keys[self._slots, :, self._places] = qkv_R3HE[:, 1]
        values[self._slots, :, self._places] = qkv_R3HE[:, 2]
        return self._packed(attend(self._by_head(qkv_R3HE[:, 0]), keys, values, self._node_mask))

    def attend_to_source(self, layer: int, q_RHE: Tensor) -> Tensor:
        keys, values = self._caches.cross[layer]
        return self._packed(attend(self._by_head(q_RHE), keys, values, self._source_mask))

    def _by_head(self, rows_RHE: Tensor) -> Tensor:
        return rows_RHE.view(-1, self._rows, *rows_RHE.shape[1:]).transpose(1, 2)

    def _packed(self, attended_NHKE: Tensor) -> Tensor:
        return attended_NHKE.transpose(1, 2).flatten(0, 1)

    def _capture(self, memory: Memory) -> torch.cuda.CUDAGraph:
        """Runs the step a few times on a stream of its own and captures it; every run writes the same nodes."""
        with torch.cuda.device(self._bart.device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._computed()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # What other threads do with the device meanwhile is no part of it.
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                self._logits_RV = self._computed()
        return graph


class Caches(NamedTuple):
    """As in :class:`Group`; ``hidden_source`` (N, S) bool: the positions behind each document's end."""

    cross: Sequence[Tensor]
    nodes: Sequence[Tensor]
    hidden_source: Tensor


class StaticGroup:
    """Tensors for the caches of some documents, used by one :class:`Group` after the other."""

    def __init__(self, bart: "Bart", slots: int, source: int, nodes: int) -> None:
        self.size = (slots, source, nodes)
        hidden = torch.ones(slots, source, dtype=torch.bool, device=bart.device)
        self.caches = Caches(bart.caches(slots, source), bart.caches(slots, nodes), hidden)
        self.steps: dict[int, StaticStep] = {}

    def begin(self, lengths: Sequence[int]) -> Group:
        """A group for documents of these lengths."""
        slots, source, _ = self.size
        ends = torch.tensor([*lengths, *[0] * (slots - len(lengths))])
        self.caches.hidden_source.copy_(torch.arange(source) >= ends[:, None])
        return Group(self.caches.cross, self.caches.nodes, fixed=True)


class StaticGroups:
    """The groups that are used again, and the steps over them.

    Args:
        capture: whether steps become CUDA graphs; if not, they run as they are, on any device.
    """

    def __init__(self, bart: "Bart", *, capture: bool) -> None:
        # Graphs share their memory: each one's result is read before the next one runs.
        self._bart, self._memory = bart, torch.cuda.graph_pool_handle() if capture else None
        self._idle: list[StaticGroup] = []
        self._used: weakref.WeakKeyDictionary[Group, StaticGroup] = weakref.WeakKeyDictionary()

    def group(self, lengths: Sequence[int], nodes: int) -> Group | None:
        """A group for documents of these lengths, whose trees will have so many nodes; None where there is none."""
        slots = _power(len(lengths)) if len(lengths) <= 8 else _multiple(len(lengths), 8)
        size = (slots, _multiple(max(lengths), 64), _power(nodes + 1, 32))  # a place for rows that are padding
        if nodes == 0 or any(n > most for n, most in zip(size, (MOST_SLOTS, MOST_SOURCE, MOST_NODES), strict=True)):
            return None
        found = next((static for static in self._idle if static.size == size), None)
        if found is not None:
            self._idle.remove(found)
        else:
            if len(self._used) >= MOST_GROUPS:
                return None
            if len(self._idle) + len(self._used) >= MOST_GROUPS:
                del self._idle[0]  # the one that has waited longest
            found = StaticGroup(self._bart, *size)
        group = found.begin(lengths)
        self._used[group] = found
        weakref.finalize(group, self._idle.append, found).atexit = False
        return group

    def next_logits(
        self, documents: Sequence[DocumentCache], tokens_R: Tensor, depths_R: Tensor, visible: Sequence[Tensor | None]
    ) -> Tensor:
        """As :meth:`Bart.next_logits`: each static group in a step of its own, the other documents together."""
        counts = [1 if mask is None else len(mask) for mask in visible]
        starts = list(itertools.accumulate(counts, initial=0))
        parts: dict[Group | None, list[int]] = {}
        for at, document in enumerate(documents):
            parts.setdefault(document.group if self._fits(document, counts[at]) else None, []).append(at)
        logits_RV = torch.empty(len(tokens_R), self._bart.vocab_size, device=self._bart.device)
        for group, members in parts.items():
            rows = [row for at in members for row in range(starts[at], starts[at + 1])]
            at_R = torch.tensor(rows, device=self._bart.device)
            chosen, masks = [documents[at] for at in members], [visible[at] for at in members]
            if group is None:
                hidden_RD = self._bart.extend(chosen, tokens_R[at_R], depths_R[at_R], masks)
                logits_RV[at_R] = self._bart.logits(hidden_RD)
                continue
            step = self._step(self._used[group], max(counts[at] for at in members))
            logits_RV[at_R] = step.run(chosen, tokens_R[at_R], depths_R[at_R], masks)
            for document, mask in zip(chosen, masks, strict=True):
                document.size += 1 if mask is None else len(mask)
        return logits_RV

    def _fits(self, document: DocumentCache, rows: int) -> bool:
        static = self._used.get(document.group)
        if static is None or document.group.nodes[0] is not static.caches.nodes[0]:  # it has grown beyond them
            return False
        return rows <= MOST_ROWS and document.size + rows < static.size[2]  # the last place is for rows of padding

    def _step(self, static: StaticGroup, rows: int) -> StaticStep:
        bucket = _power(rows)
        if bucket not in static.steps:
            static.steps[bucket] = StaticStep(self._bart, static.caches, bucket, self._memory)
        return static.steps[bucket]
