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

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

from shared import arrow
from shared.arrays import decode_array, decode_vectors, encode_array
from shared.errors import UnsupportedMediaType
from shared.forms import ARROW_TYPE, JSON_TYPE, Form, json_array, media_type, response_form
from shared.results import result_from_wire, result_to_wire
from shared.retrieval import Float32Array, RetrieveQuery
from shared.schemas import EncodedArray, RetrieveOptions, RetrieveRequest
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

Model = TypeVar("Model", bound=BaseModel)


def query_to_wire(query: RetrieveQuery, form: Form) -> tuple[bytes, str]:
    """Body and Content-Type."""
    options = RetrieveOptions(**{name: getattr(query, name) for name in RetrieveOptions.model_fields}).model_dump()
    if form == "arrow":
        return arrow.write_stream({"vector": arrow.vector_array(query.vectors)}, {"options": options}), ARROW_TYPE
    return to_json({"vectors": json_array(query.vectors, form), **options}), JSON_TYPE


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


def vectors_to_wire(vectors: Float32Array, metadata: dict[str, Any], form: Form) -> tuple[bytes, str]:
    """(B, D) vectors with ``metadata`` beside them (in Arrow: as JSON under the schema's key ``metadata``)."""
    if form == "arrow":
        return arrow.write_stream({"vector": arrow.vector_array(vectors)}, {"metadata": metadata}), ARROW_TYPE
    return to_json({**metadata, "vectors": json_array(vectors, form)}), JSON_TYPE


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


def _validated(model: type[Model], value: object, *, within: str) -> Model:
    try:
        return model.model_validate(value)
    except ValidationError as refused:
        raise refusal_of(refused, within=within) from None
