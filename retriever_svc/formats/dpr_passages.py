"""DPR's passages by id, in memory: embeddings come in an order of their own."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from retriever_svc.formats.passages import PASSAGE_SCHEMA, Row, batches_of_rows, parse_id, refusal, shown
from retriever_svc.formats.texts import read_passages
from retriever_svc.formats.unpickle import safe_load
from retriever_svc.metadata import NO_METADATA
from shared.retrieval import Int64Array


@dataclass(frozen=True)
class PassagesById:
    """``table``: title and text, rows in ascending order of ``ids`` (N,)."""

    path: Path
    ids: Int64Array
    table: pa.Table

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def read(cls, path: Path, id_prefix: str, *, count_from_0: bool) -> "PassagesById":
        """From ``psgs_w100.tsv`` or its pickle; a list in it, which has no ids, counts from 0 or from 1.

        Raises: InvalidRequest: as :func:`~retriever_svc.formats.texts.read_passages`, or names the entry of the pickle.
        """
        batches: Iterable[pa.RecordBatch]
        if path.suffix == ".pkl":
            batches = batches_of_rows(path, _pickled(path, id_prefix, 0 if count_from_0 else 1))
        else:
            batches = read_passages(path, NO_METADATA).batches
        table = pa.Table.from_batches(batches, PASSAGE_SCHEMA)
        ids_N = table["id"].to_numpy()
        texts = table.select(["title", "text"]).cast(pa.schema({"title": pa.large_string(), "text": pa.large_string()}))
        if not (ids_N[1:] > ids_N[:-1]).all():
            order = np.argsort(ids_N)
            ids_N, texts = ids_N[order], texts.take(order)
        return cls(path, ids_N, texts.combine_chunks())

    def take(self, ids_B: Int64Array, path: Path, first_row: int) -> pa.RecordBatch:
        """The passages of these ids, in their order, as ``PASSAGE_SCHEMA``.

        Raises: InvalidRequest: names the id that no passage has, and its row in ``path``.
        """
        rows_B = np.searchsorted(self.ids, ids_B)
        found_B = rows_B < len(self)
        found_B[found_B] = self.ids[rows_B[found_B]] == ids_B[found_B]
        if not found_B.all():
            row = int(np.argmin(found_B))
            raise refusal(
                path, f"row {first_row + row} is passage {ids_B[row]}, which is not in {self.path.name}", "id"
            )
        (batch,) = self.table.take(rows_B).combine_chunks().to_batches()
        texts = [batch.column(name).cast(pa.string()) for name in ("title", "text")]
        return pa.record_batch([pa.array(ids_B), *texts], schema=PASSAGE_SCHEMA)


def id_of(path: Path, where: str, value: object, prefix: str) -> int:
    """An id as DPR writes it: an integer, its digits, or its digits after a prefix.

    Raises: InvalidRequest: as :func:`~retriever_svc.formats.passages.parse_id`.
    """
    return parse_id(path, where, value.removeprefix(prefix) if isinstance(value, str) else value)


def _pickled(path: Path, id_prefix: str, first: int) -> Iterator[tuple[str, Row]]:
    loaded = safe_load(path)
    if isinstance(loaded, dict):
        for key, entry in loaded.items():
            where = f"entry {shown(key)}"
            yield where, Row(id_of(path, where, key, id_prefix), *_title_and_text(path, where, entry))
    elif isinstance(loaded, list):
        for number, entry in enumerate(loaded, first):
            yield f"entry {number}", Row(number, *_title_and_text(path, f"entry {number}", entry))
    else:
        raise refusal(path, f"holds a {type(loaded).__name__}, not a dict of id: (text, title) or a list of them")


def _title_and_text(path: Path, where: str, entry: Any) -> tuple[str, str]:
    if not isinstance(entry, tuple | list) or len(entry) != 2:
        raise refusal(path, f"{where} is no (text, title): {shown(entry)}")
    text, title = entry
    for name, value in (("text", text), ("title", title)):
        if not isinstance(value, str):
            raise refusal(path, f"`{name}` of {where} is a {type(value).__name__}, not a string", name)
        if not _is_unicode(value):
            raise refusal(path, f"`{name}` of {where} has a lone surrogate", name)
    return title, text


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
