"""The passages of an answer as Arrow columns: they go from the disk to the wire without an object for each of them."""

from collections.abc import Sequence
from typing import Any, overload

import pyarrow as pa

from shared.schemas import Passage

PASSAGE_TYPE = pa.struct([("id", pa.int64()), ("title", pa.string()), ("text", pa.string())])


class Documents(Sequence[Sequence[Passage]]):
    """One list of passages a query; made into objects only where one is looked at.

    ``passages``: all of them, of `PASSAGE_TYPE`, query by query; ``counts``: how many each query has.
    """

    def __init__(self, passages: pa.StructArray, counts: Sequence[int]) -> None:
        self.passages = passages
        self._starts = [0]
        for count in counts:
            self._starts.append(self._starts[-1] + count)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, at: int) -> Sequence[Passage]: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Sequence[Passage]]: ...
    def __getitem__(self, at: int | slice) -> Sequence[Passage] | Sequence[Sequence[Passage]]:
        if isinstance(at, slice):
            return [self[b] for b in range(*at.indices(len(self)))]
        b = range(len(self))[at]
        return [Passage.model_validate(fields) for fields in self._rows(b)]

    def to_pylist(self) -> list[list[dict[str, Any]]]:
        """As in JSON."""
        return [self._rows(b) for b in range(len(self))]

    def _rows(self, b: int) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.passages[self._starts[b] : self._starts[b + 1]].to_pylist()
        return rows


def passage_array(passages: Sequence[Passage]) -> pa.StructArray:
    """Passages of `PASSAGE_TYPE`."""
    columns = [pa.array([getattr(one, field.name) for one in passages], field.type) for field in PASSAGE_TYPE]
    return pa.StructArray.from_arrays(columns, fields=list(PASSAGE_TYPE))
