"""Passages on their way in over HTTP: from a body to a change that the collection can take, or a refusal by name."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ValidationError

from retriever_svc.changes import Upsert
from retriever_svc.collection import Collection
from retriever_svc.metadata import PASSAGE_COLUMNS, from_arrow, from_json
from shared import arrow
from shared.arrays import decode_vectors
from shared.errors import Conflict, InvalidRequest, UnsupportedMediaType
from shared.forms import ARROW_TYPE, JSON_TYPE, media_type
from shared.retrieval import Float32Array, Int64Array
from shared.schemas import INT64_MAX, UpsertRequest
from shared.validation import refusal_of

SQRT_MAX = float(np.sqrt(np.finfo(np.float32).max))


@dataclass(frozen=True)
class Draft:
    """An upsert whose ids are not all known: those marked in ``unnamed`` (n,) get the next free ones.

    ``checked``: the collection that it was checked against.
    """

    change: Upsert
    unnamed: npt.NDArray[np.bool_]
    checked: Collection | None = None

    def check(self, collection: Collection) -> None:
        """Refuse what another corpus, which took over since the first check, cannot take.

        Raises: Conflict.
        """
        if self.checked is None or self.checked is collection:
            return
        shapes = [
            (one.manifest.dimension, one.manifest.dtype, one.passages.metadata) for one in (self.checked, collection)
        ]
        if shapes[0] != shapes[1]:
            raise Conflict(
                f"another generation of `{collection.name}` took over, with another dimension, dtype or other metadata "
                "columns: look at the collection and send the passages again"
            )

    def name(self, free: int) -> int:
        """Number the unnamed from ``free`` on, past those that are named; the next id that is free then.

        Raises: InvalidRequest: there are no more numbers.
        """
        first = max(free, int(self.change.ids[~self.unnamed].max(initial=-1)) + 1)
        wanted = int(self.unnamed.sum())
        if wanted and first + wanted > INT64_MAX:
            raise InvalidRequest("no ids are left above the largest of the collection: name them", param="passages.id")
        if wanted:
            self.change.ids[self.unnamed] = np.arange(first, first + wanted)
        return first + wanted


def draft_from_wire(body: bytes, content_type: str | None, collection: Collection) -> Draft:
    """The passages of a request, checked against the collection.

    Raises: RequestError: no valid JSON or Arrow; InvalidRequest: a field is refused; UnsupportedMediaType.
    """
    kind, _ = media_type(content_type)
    if kind == ARROW_TYPE:
        draft = _from_arrow(arrow.read_stream(body), collection.passages.metadata)
    elif kind == JSON_TYPE:
        draft = _from_json(body, collection.passages.metadata)
    else:
        raise UnsupportedMediaType(f"Content-Type must be {JSON_TYPE} or {ARROW_TYPE}")
    return _checked(draft, collection)


def _from_json(body: bytes, metadata: pa.Schema) -> Draft:
    try:
        passages = UpsertRequest.model_validate_json(body).passages
    except ValidationError as refused:
        raise refusal_of(refused) from None
    dimension = len(passages[0].embedding)
    for i, passage in enumerate(passages):
        if len(passage.embedding) != dimension or not dimension:
            where = f"passages.{i}.embedding"
            raise InvalidRequest(f"{where}: {len(passage.embedding)} numbers, the first has {dimension}", param=where)
    return _draft(
        [passage.id for passage in passages],
        [passage.title for passage in passages],
        [passage.text for passage in passages],
        decode_vectors([passage.embedding for passage in passages], "passages.embedding"),
        from_json([passage.metadata for passage in passages], metadata),
    )


def _from_arrow(table: pa.Table, metadata: pa.Schema) -> Draft:
    wanted = {"id": pa.int64(), "title": pa.string(), "text": pa.string()}
    if missing := {"text", "embedding"} - set(table.schema.names):
        raise InvalidRequest(f"the column {min(missing)!r} is missing", param=min(missing))
    if unknown := set(table.schema.names) - {*PASSAGE_COLUMNS, *metadata.names}:
        there = ", ".join([*PASSAGE_COLUMNS, *metadata.names])
        raise InvalidRequest(f"the column {min(unknown)!r} is not known; there are: {there}", param=min(unknown))
    if len(set(table.schema.names)) < len(table.schema.names):
        raise InvalidRequest("a column stands there twice")
    for name, column in wanted.items():
        if name in table.schema.names and table.schema.field(name).type != column:
            raise InvalidRequest(f"{name}: expected {column}, got {table.schema.field(name).type}", param=name)
    if not len(table):
        raise InvalidRequest("expected at least one passage", param="passages")
    for name in ("title", "text"):
        if name in table.schema.names and table[name].null_count:
            raise InvalidRequest(f"{name}: nulls are no text", param=name)
    ids = table["id"].to_pylist() if "id" in table.schema.names else [None] * len(table)
    if any(i is not None and i < 0 for i in ids):
        raise InvalidRequest("id: ids must not be negative", param="id")
    titles = table["title"].to_pylist() if "title" in table.schema.names else [""] * len(table)
    embeddings = arrow.vector_column(table.select(["embedding"]), "embedding")
    return _draft(ids, titles, table["text"].to_pylist(), embeddings, from_arrow(table, metadata))


def _draft(
    ids: list[int | None],
    titles: list[str],
    texts: list[str],
    embeddings: Float32Array,
    metadata: pa.RecordBatch | None,
) -> Draft:
    unnamed = np.array([i is None for i in ids])
    numbers: Int64Array = np.array([-1 if i is None else i for i in ids], np.int64)
    return Draft(Upsert(numbers, titles, texts, embeddings, metadata), unnamed)


def _checked(draft: Draft, collection: Collection) -> Draft:
    change = draft.change
    collection.check_dimension(change.embeddings, "passages.embedding")
    named = change.ids[~draft.unnamed]
    values, counts = np.unique(named, return_counts=True)
    if (counts > 1).any():
        raise InvalidRequest(f"id {values[counts > 1][0]} stands there twice", param="passages.id")
    with np.errstate(over="ignore"):
        stored = change.embeddings.astype(collection.manifest.dtype).astype(np.float32)
    norms = np.linalg.norm(stored.astype(np.float64), axis=1)
    too_large = np.flatnonzero(~(norms < SQRT_MAX))
    if len(too_large):
        raise InvalidRequest(
            f"the embedding of passage {too_large[0]} is too large to be stored as {collection.manifest.dtype}",
            param=f"passages.{too_large[0]}.embedding",
        )
    return Draft(replace(change, embeddings=stored), draft.unnamed, collection)
