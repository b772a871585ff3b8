"""What was written to a collection since its generation was built, in memory: passages, embeddings, and who is dead.

Belongs to the thread that searches.
"""

from bisect import bisect_left
from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retriever_svc.changes import Change, Upsert
from retriever_svc.index import Index
from retriever_svc.metadata import to_wire
from retriever_svc.passages import PassageTable
from retriever_svc.ranking import Segment
from shared.retrieval import Float32Array, Int64Array
from shared.schemas import Passage


@dataclass(frozen=True)
class Moment:
    """How far the changes had come: rows written, and rows buried."""

    written: int
    buried: int


class Delta:
    """Changes over ``passages``, the table of the generation. Rows count on from the table's."""

    def __init__(self, passages: PassageTable, dimension: int) -> None:
        self._base = passages
        self._index = faiss.IndexFlatIP(dimension)
        self._rows: dict[int, int] = {}  # of passages alive here, by id
        self._passages: list[Passage] = []
        self._batches: list[pa.RecordBatch] = []  # one a change: what filters look at
        self._firsts: list[int] = []  # row here of each batch's first
        self._ids = np.empty(0, np.int64)
        self._dead = np.empty(0, np.bool_)
        self.max_norm = 0.0
        self.base_dead = np.zeros(len(passages), np.bool_)
        self.n_base_dead = 0
        self._buried: list[int] = []  # rows in the order in which they died

    def apply(self, change: Change) -> int:
        """How many passages were replaced or deleted by it."""
        gone = sum(self._bury(int(passage_id)) for passage_id in change.ids)
        if isinstance(change, Upsert):
            self._add(change)
        return gone

    def _bury(self, passage_id: int) -> bool:
        row = self._rows.pop(passage_id, None)
        if row is not None:
            self._buried.append(len(self._base) + row)  # before it is dead: see alive_at
            self._dead[row] = True
            return True
        base_row = self._base.row_of(passage_id)
        if base_row is None or self.base_dead[base_row]:
            return False
        self._buried.append(base_row)
        self.base_dead[base_row] = True
        self.n_base_dead += 1
        return True

    def _add(self, change: Upsert) -> None:
        self._index.add(np.ascontiguousarray(change.embeddings, dtype=np.float32))
        self._ids = np.concatenate([self._ids, change.ids])
        self._dead = np.concatenate([self._dead, np.zeros(len(change.ids), np.bool_)])
        metadata = to_wire(change.metadata, len(change.ids))
        first = len(self._passages)
        for passage_id, title, text, more in zip(
            change.ids.tolist(), change.titles, change.texts, metadata, strict=True
        ):
            self._passages.append(Passage(id=passage_id, title=title, text=text, metadata=more))
            self._rows[passage_id] = len(self._passages) - 1  # now that a reader in another thread finds it there
        columns = [pa.array(change.ids), pa.array(change.titles, pa.string()), pa.array(change.texts, pa.string())]
        columns += [] if change.metadata is None else change.metadata.columns
        self._firsts.append(first)
        self._batches.append(pa.record_batch(columns, schema=self._base.filterable))
        norms = np.linalg.norm(change.embeddings.astype(np.float64), axis=1)
        self.max_norm = max(self.max_norm, float(norms.max(initial=0.0)))

    @property
    def count(self) -> int:
        """Passages alive here."""
        return len(self._rows)

    @property
    def size(self) -> int:
        """Changes that a search pays for: rows here, dead ones included, and dead rows of the generation."""
        return len(self._passages) + self.n_base_dead

    @property
    def written(self) -> int:
        """Rows here, dead ones included."""
        return len(self._passages)

    @property
    def moment(self) -> Moment:
        return Moment(self.written, len(self._buried))

    def alive_at(self, moment: Moment) -> npt.NDArray[np.bool_]:
        """(rows of the generation and those written by then,) Who could be found at an earlier ``moment``.

        From any thread: who dies meanwhile is listed before the mask says so, and is brought back.
        """
        dead = np.concatenate([self.base_dead, self._dead[: moment.written]])
        later = np.array(self._buried[moment.buried :], np.int64)
        dead[later[later < len(dead)]] = False
        return ~dead

    def table(self, first: int) -> pa.Table:
        """What filters look at of the rows from ``first`` on, where a change began; from any thread."""
        return pa.Table.from_batches(self._batches[bisect_left(self._firsts, first) :], self._base.filterable)

    def metadata(self, rows: Int64Array) -> pa.RecordBatch | None:
        """The metadata of ``rows`` (at least one); None where the collection has none."""
        if not (names := self._base.metadata.names):
            return None
        found = self.table(0).select(names).take(pa.array(rows - len(self._base)))
        return found.combine_chunks().to_batches()[0]

    def segment(self) -> Segment | None:
        """None where nothing was added."""
        if not self._passages:
            return None
        vectors = faiss.rev_swig_ptr(self._index.get_xb(), self._index.ntotal * self._index.d)
        index = Index(self._index, vectors.reshape(self._index.ntotal, self._index.d))
        dead = self._dead if self.count < len(self._passages) else None
        return Segment(len(self._base), index, self._ids, self.max_norm, dead)

    def alive(self) -> Int64Array:
        """Rows of the passages alive here, in the order in which they came."""
        return len(self._base) + np.flatnonzero(~self._dead)

    def embeddings(self, rows: Int64Array) -> Float32Array:
        """(K, D)"""
        found: Float32Array = self._index.reconstruct_batch(rows - len(self._base))
        return found

    def passage(self, row: int) -> Passage:
        return self._passages[row - len(self._base)]

    def row_of(self, passage_id: int) -> int | None:
        """Row of the passage alive with that id, here or in the generation."""
        if (row := self._rows.get(passage_id)) is not None:
            return len(self._base) + row
        base_row = self._base.row_of(passage_id)
        return None if base_row is None or self.base_dead[base_row] else base_row
