"""Rows of a collection that fulfil a condition, to be searched among.

Lance evaluates the condition on both parts, the generation's table and what was written since, so that it means the
same in both. What a condition selects of a generation never changes, nor of rows written already: it is kept, and rows
that come are evaluated as they come.
"""

import threading
from collections import OrderedDict

import lance
import numpy as np
import pyarrow as pa

from retriever_svc.delta import Delta
from retriever_svc.expressions import for_lance, refused
from retriever_svc.passages import FILTERABLE, PassageTable, matching_rows
from retriever_svc.ranking import BoolArray

MOST_KEPT = 256
MOST_BYTES = 2**28  # of conditions kept, one byte a row


class Selection:
    """The rows that one condition selects."""

    def __init__(self, expression: str, base: BoolArray, delta: Delta, columns: list[str]) -> None:
        self.expression = expression
        self.base = base  # of the generation
        self._delta = delta
        self._columns = columns
        self._added = np.empty(0, np.bool_)
        self._lock = threading.Lock()

    def added(self) -> BoolArray:
        """Of the rows written since. In the thread that searches: of all of them.

        Raises: InvalidRequest: the condition has no value for one of them.
        """
        with self._lock:
            if len(self._added) < self._delta.written:
                table = self._delta.table(len(self._added))
                self._added = np.concatenate([self._added, _evaluated(table, self.expression, self._columns)])
            return self._added

    def chosen(self) -> tuple[BoolArray, BoolArray]:
        """Of both, as they are now."""
        return self.base, self.added()


class Filters:
    """The conditions last used with one generation. Safe to use from several threads."""

    def __init__(self, passages: PassageTable, delta: Delta) -> None:
        self._passages, self._delta = passages, delta
        self._kept: OrderedDict[str, Selection] = OrderedDict()
        self._most = max(1, min(MOST_KEPT, MOST_BYTES // max(1, len(passages))))
        self._lock = threading.Lock()
        self.columns = [*FILTERABLE, *passages.metadata.names]

    def kept(self, expression: str) -> Selection | None:
        """The selection, where it is known already."""
        with self._lock:
            if expression in self._kept:
                self._kept.move_to_end(expression)
            return self._kept.get(expression)

    def select(self, expression: str) -> Selection:
        """The selection; reads the columns that it names.

        Raises: InvalidRequest: no condition on the columns there are.
        """
        if (known := self.kept(expression)) is not None:
            return known
        condition = for_lance(expression, self.columns)
        # No rows, no data to fail on: whatever is wrong, the condition is.
        _evaluated(self._passages.filterable.empty_table(), condition, self.columns)
        try:
            base = self._passages.matching(condition)
        except ValueError as error:
            raise refused(_reason(error), self.columns) from error
        found = Selection(condition, base, self._delta, self.columns)
        found.added()
        with self._lock:
            self._kept[expression] = found
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return found


def _evaluated(table: pa.Table, expression: str, columns: list[str]) -> BoolArray:
    try:
        return matching_rows(lance.write_dataset(table, "memory://rows"), expression, len(table))
    except ValueError as error:
        raise refused(_reason(error), columns) from error


def _reason(error: ValueError) -> str:
    """Lance's message without its own source lines and its prefixes."""
    said = str(error).partition(", /")[0]
    for prefix in ("External error: ", "Query Execution error: ", "Invalid user input: "):
        said = said.removeprefix(prefix)
    return said.partition(" Did you mean")[0].rstrip(". ")
