"""Vectors on the wire: JSON with nested lists, JSON with base64, or an Arrow IPC stream; exact to the bit, both ways.

========  =====================================  ============================================================
form      Content-Type                           vectors
========  =====================================  ============================================================
json      application/json                       nested lists; a float32 is written as the float64 it equals
base64    application/json                       :class:`shared.schemas.EncodedArray`
arrow     application/vnd.apache.arrow.stream    columns of fixed_size_list<float32>; options and metadata as
                                                 JSON in the schema's metadata
========  =====================================  ============================================================

A client chooses its request's form by Content-Type and the answer's by Accept (``application/json;vectors=base64``).
Shapes: B queries, N documents found, D dimension.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import to_json

from shared import arrow
from shared.arrays import as_float32, decode_array, decode_vectors, encode_array
from shared.errors import InvalidRequest, RequestError, UnsupportedMediaType, UpstreamError
from shared.retrieval import Float32Array, RetrieveQuery, RetrieveResult
from shared.schemas import EncodedArray, IndexInfo, Passage, RetrieveOptions, RetrieveRequest, RetrieveResponse
from shared.validation import refusal_of

__all__ = [
    "ARROW_TYPE",
    "JSON_TYPE",
    "Form",
    "decode_array",
    "decode_vectors",
    "encode_array",
    "query_from_wire",
    "query_to_wire",
    "response_form",
    "result_from_wire",
    "result_to_wire",
    "vectors_from_wire",
    "vectors_to_wire",
]

JSON_TYPE = "application/json"
ARROW_TYPE = "application/vnd.apache.arrow.stream"
Form = Literal["json", "base64", "arrow"]

_PASSAGE = pa.struct([("id", pa.int64()), ("title", pa.string()), ("text", pa.string())])
_TIMINGS = TypeAdapter(dict[str, float])
Model = TypeVar("Model", bound=BaseModel)


# --- choosing the form -------------------------------------------------------------------------------------


def media_type(content_type: str | None) -> tuple[str, dict[str, str]]:
    """``type/subtype`` and its parameters, in lower case."""
    main, *rest = (content_type or "").split(";")
    pairs = (part.partition("=") for part in rest)
    return main.strip().lower(), {key.strip().lower(): value.strip().strip('"').lower() for key, _, value in pairs}


def response_form(accept: str | None) -> Form:
    """The form that an Accept header asks for; JSON lists where it does not care.

    Raises: UnsupportedMediaType: it names none of ours.
    """
    best: tuple[float, Form] | None = None
    for item in (accept or "*/*").split(","):
        kind, parameters = media_type(item)
        form = _form_of(kind, parameters)
        quality = _quality(parameters)
        if form is not None and quality > 0 and (best is None or quality > best[0]):
            best = (quality, form)
    if best is None:
        raise UnsupportedMediaType(f"Accept names none of {JSON_TYPE}, {JSON_TYPE};vectors=base64, {ARROW_TYPE}")
    return best[1]


def _form_of(kind: str, parameters: dict[str, str]) -> Form | None:
    if kind == ARROW_TYPE:
        return "arrow"
    if kind == JSON_TYPE:
        return {"base64": "base64", "list": "json", None: "json"}.get(parameters.get("vectors"))  # type: ignore[return-value]
    return "json" if kind in {"*/*", "application/*", ""} else None


def _quality(parameters: dict[str, str]) -> float:
    try:
        return float(parameters.get("q", "1"))
    except ValueError:
        return 0.0


# --- a batch of queries ------------------------------------------------------------------------------------


def query_to_wire(query: RetrieveQuery, form: Form) -> tuple[bytes, str]:
    """Body and Content-Type."""
    options = {name: getattr(query, name) for name in RetrieveOptions.model_fields}
    if form == "arrow":
        return arrow.write_stream({"vector": arrow.vector_array(query.vectors)}, {"options": options}), ARROW_TYPE
    return to_json({"vectors": _json_array(query.vectors, form), **options}), JSON_TYPE


def query_from_wire(body: bytes, content_type: str | None) -> RetrieveQuery:
    """The query of a request.

    Raises:
        UnsupportedMediaType: another Content-Type.
        RequestError: no valid JSON or Arrow.
        InvalidRequest: a field is refused; ``param`` names it.
    """
    kind, _ = media_type(content_type)
    if kind == ARROW_TYPE:
        table = arrow.read_stream(body)
        options = arrow.json_metadata(table, "options")
        checked = _validated(RetrieveOptions, {} if options is None else options, within="options")
        vectors = arrow.vector_column(table)
    elif kind == JSON_TYPE:
        try:
            request = RetrieveRequest.model_validate_json(body)
        except ValidationError as refused:
            raise refusal_of(refused) from None
        checked, vectors = request, decode_vectors(request.vectors)
    else:
        raise UnsupportedMediaType(f"Content-Type must be {JSON_TYPE} or {ARROW_TYPE}")
    return RetrieveQuery(vectors, **{name: getattr(checked, name) for name in RetrieveOptions.model_fields})


# --- what was found ----------------------------------------------------------------------------------------


def result_to_wire(result: RetrieveResult, form: Form) -> tuple[bytes, str]:
    """Body and Content-Type. In Arrow one row is one query, and what was not asked for has no column."""
    if form == "arrow":
        return _result_to_arrow(result), ARROW_TYPE
    embeds, docs = result.doc_embeds, result.docs
    return to_json(
        {
            "doc_ids": [ids.tolist() for ids in result.doc_ids],
            "doc_scores": [scores.tolist() for scores in result.doc_scores],
            "retrieved_doc_embeds": None if embeds is None else [_json_array(rows, form) for rows in embeds],
            "docs": None if docs is None else [list(of_query) for of_query in docs],
            "n_found": result.n_found,
            "index": result.index,
            "timings_ms": result.timings_ms,
        }
    ), JSON_TYPE


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
    if result.docs is not None:
        passages = [doc for of_query in result.docs for doc in of_query]
        fields = [pa.array([getattr(doc, field.name) for doc in passages], field.type) for field in _PASSAGE]
        columns["docs"] = pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(fields, fields=list(_PASSAGE)))
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
    if docs is not None and docs.type != pa.list_(_PASSAGE):
        raise InvalidRequest("docs has another type")
    about = {key: arrow.json_metadata(table, key) for key in ("index", "timings_ms")}
    try:
        return RetrieveResult(
            doc_ids=[_numbers(row.values) for row in ids],
            doc_scores=[_numbers(row.values) for row in scores],
            doc_embeds=None if embeds is None else [_matrix(row.values) for row in embeds],
            docs=None if docs is None else [[Passage.model_validate(doc) for doc in row.as_py()] for row in docs],
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
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype, copy=False)


# --- vectors alone -----------------------------------------------------------------------------------------


def vectors_to_wire(vectors: Float32Array, metadata: dict[str, Any], form: Form) -> tuple[bytes, str]:
    """(B, D) vectors with ``metadata`` beside them (in Arrow: as JSON under the schema's key ``metadata``)."""
    if form == "arrow":
        return arrow.write_stream({"vector": arrow.vector_array(vectors)}, {"metadata": metadata}), ARROW_TYPE
    return to_json({**metadata, "vectors": _json_array(vectors, form)}), JSON_TYPE


def vectors_from_wire(body: bytes, content_type: str | None) -> tuple[Float32Array, dict[str, Any]]:
    """What :func:`vectors_to_wire` wrote.

    Raises: RequestError: something else.
    """
    kind, _ = media_type(content_type)
    if kind == ARROW_TYPE:
        table = arrow.read_stream(body)
        return arrow.vector_column(table), arrow.json_metadata(table, "metadata") or {}
    try:
        fields = _JsonVectors.model_validate_json(body)
    except ValidationError as refused:
        raise refusal_of(refused) from None
    return decode_vectors(fields.vectors), dict(fields.model_extra or {})


class _JsonVectors(BaseModel, extra="allow"):
    vectors: list[list[float]] | EncodedArray


def _json_array(array: Float32Array, form: Form) -> object:
    return encode_array(array) if form == "base64" else array.tolist()


def _validated(model: type[Model], value: object, *, within: str) -> Model:
    try:
        return model.model_validate(value)
    except ValidationError as refused:
        raise refusal_of(refused, within=within) from None
