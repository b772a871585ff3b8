"""The passages of an answer as Arrow columns: they go from the disk to the wire without an object for each of them."""

from collections.abc import Mapping, Sequence
from typing import Any, overload

import pyarrow as pa
from pydantic import TypeAdapter
from pydantic_core import to_json

from shared.schemas import Passage

PASSAGE_TYPE = pa.struct([("id", pa.int64()), ("title", pa.string()), ("text", pa.string())])
# Of collections that have metadata: each passage's as JSON, so that a value is the same in every form.
PASSAGE_WITH_METADATA = pa.struct([*PASSAGE_TYPE, pa.field("metadata", pa.string())])
# Made once: a type makes its fields anew whenever it is asked.
_FIELDS, _FIELDS_WITH_METADATA = list(PASSAGE_TYPE), list(PASSAGE_WITH_METADATA)

_METADATA: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


class Documents(Sequence[Sequence[Passage]]):
    """One list of passages a query; made into objects only where one is looked at.

    ``passages``: all of them, of one of the two types, query by query; ``counts``: how many each query has.
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
        return [passage_of(fields) for fields in self.passages[self._starts[b] : self._starts[b + 1]].to_pylist()]

    def to_pylist(self) -> list[list[dict[str, Any]]]:
        """As in JSON."""
        return [self._rows(b) for b in range(len(self))]

    def _rows(self, b: int) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.passages[self._starts[b] : self._starts[b + 1]].to_pylist()
        for row in rows:
            if row.get("metadata") is not None:
                row["metadata"] = _METADATA.validate_json(row["metadata"])
        return rows


def passage_columns(
    ids: pa.Array, titles: pa.Array, texts: pa.Array, metadata: pa.Array | None = None
) -> pa.StructArray:
    """Passages as one of the two types; ``metadata`` as :func:`metadata_column` makes it, where there is any."""
    if metadata is None:
        return pa.StructArray.from_arrays([ids, titles, texts], fields=_FIELDS)
    return pa.StructArray.from_arrays([ids, titles, texts, metadata], fields=_FIELDS_WITH_METADATA)


def metadata_column(metadata: Sequence[Mapping[str, Any] | None]) -> pa.Array:
    """Each passage's as JSON."""
    return pa.array([None if one is None else to_json(one).decode() for one in metadata], pa.string())


def passage_array(passages: Sequence[Passage], *, metadata: bool | None = None) -> pa.StructArray:
    """Passages as columns, with ``metadata`` or without; None: as the passages are."""
    if metadata is None:
        metadata = any(one.metadata is not None for one in passages)
    ids, titles, texts = (
        pa.array([getattr(one, field.name) for one in passages], field.type) for field in PASSAGE_TYPE
    )
    return passage_columns(
        ids, titles, texts, metadata_column([one.metadata for one in passages]) if metadata else None
    )


def passage_of(fields: Any) -> Passage:
    """Of a row of either type. Raises: ValidationError: it is none."""
    if isinstance(fields, dict) and fields.get("metadata") is not None:
        fields = {**fields, "metadata": _METADATA.validate_json(fields["metadata"])}
    return Passage.model_validate(fields)
