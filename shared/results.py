"""What a retriever found, on the wire: both directions of :class:`shared.retrieval.RetrieveResult`, in every form.

Shapes: B queries, N documents found, D dimension.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from shared import arrow
from shared.arrays import as_float32, decode_array, decode_vectors
from shared.documents import PASSAGE_TYPE, PASSAGE_WITH_METADATA, Documents, passage_array, passage_of
from shared.errors import InvalidRequest, RequestError, UnsupportedMediaType, UpstreamError
from shared.forms import ARROW_TYPE, JSON_TYPE, Form, json_array, media_type
from shared.retrieval import Float32Array, RetrieveResult
from shared.schemas import EncodedArray, IndexInfo, Passage, RetrieveResponse
from shared.validation import refusal_of

_TIMINGS = TypeAdapter(dict[str, float])


def result_to_wire(result: RetrieveResult, form: Form) -> tuple[bytes, str]:
    """Body and Content-Type. In Arrow one row is one query, and what was not asked for has no column."""
    if form == "arrow":
        return _result_to_arrow(result), ARROW_TYPE
    embeds = result.doc_embeds
    return to_json(
        {
            "doc_ids": [ids.tolist() for ids in result.doc_ids],
            "doc_scores": [scores.tolist() for scores in result.doc_scores],
            "retrieved_doc_embeds": None if embeds is None else [json_array(rows, form) for rows in embeds],
            "docs": _json_documents(result.docs),
            "n_found": result.n_found,
            "index": result.index,
            "timings_ms": result.timings_ms,
        }
    ), JSON_TYPE


def _json_documents(docs: Sequence[Sequence[Passage]] | None) -> Any:
    if isinstance(docs, Documents):
        return docs.to_pylist()
    return None if docs is None else [list(of_query) for of_query in docs]


def result_from_wire(body: bytes, content_type: str | None) -> RetrieveResult:
    """The result that a retriever sent.

    Raises: UpstreamError: it sent something else.
    """
    try:
        result = _result_from(body, content_type)
    except RequestError as error:
        raise UpstreamError(f"the retriever's answer cannot be read: {error.message}") from None
    return result


def _result_from(body: bytes, content_type: str | None) -> RetrieveResult:
    kind, _ = media_type(content_type)
    if kind == ARROW_TYPE:
        result = _result_from_arrow(arrow.read_stream(body))
    elif kind == JSON_TYPE:
        result = _result_from_json(body)
    else:
        raise UnsupportedMediaType(f"Content-Type is {kind or 'missing'}")
    for other in (result.doc_scores, result.doc_embeds, result.docs):
        if other is not None and [len(of_query) for of_query in other] != result.n_found:
            raise InvalidRequest("its lists differ in length")
    return result


def _result_from_json(body: bytes) -> RetrieveResult:
    try:
        response = RetrieveResponse.model_validate_json(body)
    except ValidationError as refused:
        raise refusal_of(refused) from None
    embeds: list[Float32Array] | None = None
    if response.retrieved_doc_embeds is not None:
        embeds = [_rows(of_query) for of_query in response.retrieved_doc_embeds]
        # An empty list has lost its dimension; it is that of the other queries.
        dimension = max((rows.shape[1] for rows in embeds), default=0)
        embeds = [rows if len(rows) else np.empty((0, dimension), np.float32) for rows in embeds]
    return RetrieveResult(
        doc_ids=[np.array(ids, dtype=np.int64) for ids in response.doc_ids],
        doc_scores=[as_float32(np.array(scores, dtype=np.float64)) for scores in response.doc_scores],
        doc_embeds=embeds,
        docs=response.docs,
        index=response.index,
        timings_ms=response.timings_ms,
    )


def _rows(rows: list[list[float]] | EncodedArray) -> Float32Array:
    """(N, D), N may be 0."""
    if isinstance(rows, EncodedArray):
        array = decode_array(rows, "retrieved_doc_embeds")
        if array.ndim != 2:
            raise InvalidRequest("retrieved_doc_embeds: expected two dimensions, (N, D)")
        return array
    return decode_vectors(rows, "retrieved_doc_embeds") if rows else np.empty((0, 0), np.float32)


def _result_to_arrow(result: RetrieveResult) -> bytes:
    offsets = pa.array(np.concatenate([[0], np.cumsum(result.n_found)]), pa.int32())
    columns: dict[str, pa.Array] = {
        "doc_ids": pa.ListArray.from_arrays(offsets, pa.array(_joined(result.doc_ids, np.int64))),
        "doc_scores": pa.ListArray.from_arrays(offsets, pa.array(_joined(result.doc_scores, np.float32))),
    }
    if result.doc_embeds is not None:
        dimension = max((rows.shape[1] for rows in result.doc_embeds), default=0)
        flat = pa.array(_joined([rows.reshape(-1) for rows in result.doc_embeds], np.float32))
        rows = pa.FixedSizeListArray.from_arrays(flat, dimension) if dimension else pa.array([], _embeds_type(0))
        columns["retrieved_doc_embeds"] = pa.ListArray.from_arrays(offsets, rows)
    if isinstance(result.docs, Documents):
        columns["docs"] = pa.ListArray.from_arrays(offsets, result.docs.passages)
    elif result.docs is not None:
        passages = passage_array([doc for of_query in result.docs for doc in of_query])
        columns["docs"] = pa.ListArray.from_arrays(offsets, passages)
    return arrow.write_stream(columns, {"index": result.index.model_dump(), "timings_ms": result.timings_ms})


def _result_from_arrow(table: pa.Table) -> RetrieveResult:
    table = table.combine_chunks()
    embeds = _column(table, "retrieved_doc_embeds")
    docs = _column(table, "docs")
    ids, scores = _column(table, "doc_ids"), _column(table, "doc_scores")
    if ids is None or scores is None:
        raise InvalidRequest("doc_ids or doc_scores is missing")
    if ids.type != pa.list_(pa.int64()) or scores.type != pa.list_(pa.float32()):
        raise InvalidRequest("doc_ids or doc_scores has another type")
    if embeds is not None and not _holds_matrices(embeds.type):
        raise InvalidRequest("retrieved_doc_embeds has another type")
    if docs is not None and docs.type not in (pa.list_(PASSAGE_TYPE), pa.list_(PASSAGE_WITH_METADATA)):
        raise InvalidRequest("docs has another type")
    about = {key: arrow.json_metadata(table, key) for key in ("index", "timings_ms")}
    try:
        return RetrieveResult(
            doc_ids=[_numbers(row.values) for row in ids],
            doc_scores=[_numbers(row.values) for row in scores],
            doc_embeds=None if embeds is None else [_matrix(row.values) for row in embeds],
            docs=None if docs is None else [[passage_of(doc) for doc in row.as_py()] for row in docs],
            index=IndexInfo.model_validate(about["index"]),
            timings_ms=_TIMINGS.validate_python(about["timings_ms"]),
        )
    except ValidationError as refused:
        raise refusal_of(refused) from None


def _column(table: pa.Table, name: str) -> pa.Array | None:
    if name not in table.schema.names:
        return None
    chunks = table.column(name)
    column = chunks.chunk(0) if chunks.num_chunks else pa.array([], chunks.type)
    if column.null_count:
        raise InvalidRequest(f"{name} holds nulls")
    return column


def _numbers(values: pa.Array) -> Any:
    if values.null_count:
        raise InvalidRequest("a list holds nulls")
    return values.to_numpy(zero_copy_only=False).copy()


def _matrix(rows: pa.FixedSizeListArray) -> Float32Array:
    if rows.null_count:  # flatten() would leave them out
        raise InvalidRequest("a list holds nulls")
    return as_float32(_numbers(rows.flatten()).reshape(len(rows), rows.type.list_size))


def _holds_matrices(kind: pa.DataType) -> bool:
    if not pa.types.is_list(kind) or not pa.types.is_fixed_size_list(kind.value_type):
        return False
    return bool(kind == _embeds_type(kind.value_type.list_size))


def _embeds_type(dimension: int) -> pa.DataType:
    return pa.list_(pa.list_(pa.float32(), dimension))


def _joined(arrays: Sequence[Any], dtype: Any) -> Any:
    if len(arrays) == 1:
        return arrays[0].astype(dtype, copy=False)
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype, copy=False)
