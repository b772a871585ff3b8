"""Vectors on the wire: every form gives back what went in, and hostile bodies get a 4xx that names the field."""

import base64
import json
import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shared.arrow import vector_array, write_stream
from shared.errors import InvalidRequest, RagError, RequestError, UnsupportedMediaType, UpstreamError
from shared.retrieval import RetrieveQuery, RetrieveResult
from shared.schemas import EncodedArray, IndexInfo, Passage
from shared.vectors import (
    ARROW_TYPE,
    JSON_TYPE,
    Form,
    decode_array,
    decode_vectors,
    encode_array,
    query_from_wire,
    query_to_wire,
    response_form,
    result_from_wire,
    result_to_wire,
    vectors_from_wire,
    vectors_to_wire,
)

FORMS = st.sampled_from(["json", "base64", "arrow"])
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
MATRICES = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=FLOAT32)
INDEX = IndexInfo(collection="default", generation="g1", encoder="e1")
PASSAGE = pa.struct([("id", pa.int64()), ("title", pa.string()), ("text", pa.string())])
JSON_FLOATS = [1e-45, -0.0, 3.4028235e38, 0.1, 1.17549435e-38, 16777217.0]


def same_bits(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@st.composite
def results(draw: st.DrawFn) -> RetrieveResult:
    counts = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    dimension = draw(st.integers(1, 5))
    embeds = [draw(hnp.arrays(np.float32, (n, dimension), elements=FLOAT32)) for n in counts]
    passages = st.builds(Passage, id=st.integers(0, 2**63 - 1), title=st.text(max_size=9), text=st.text(max_size=9))
    docs = [draw(st.lists(passages, min_size=n, max_size=n)) for n in counts]
    return RetrieveResult(
        doc_ids=[draw(hnp.arrays(np.int64, n, elements=st.integers(0, 2**63 - 1))) for n in counts],
        doc_scores=[draw(hnp.arrays(np.float32, n, elements=FLOAT32)) for n in counts],
        doc_embeds=embeds if draw(st.booleans()) else None,
        docs=docs if draw(st.booleans()) else None,
        index=INDEX,
        timings_ms={"search": draw(st.floats(0, 1e6))},
    )


# --- there and back ----------------------------------------------------------------------------------------


@given(MATRICES, FORMS, st.integers(1, 10**9), st.booleans(), st.none() | st.integers(1, 600_000))
@example(np.array([JSON_FLOATS], np.float32), "json", 5, True, None)
def test_a_query_survives_to_the_bit(
    vectors: np.ndarray[Any, Any], form: Form, n_docs: int, flag: bool, timeout_ms: int | None
) -> None:
    query = RetrieveQuery(vectors, n_docs, "mine-2", flag, not flag, timeout_ms=timeout_ms)
    read = query_from_wire(*query_to_wire(query, form))
    assert same_bits(read.vectors, vectors)
    assert (read.n_docs, read.collection, read.timeout_ms) == (n_docs, "mine-2", timeout_ms)
    assert (read.return_embeds, read.return_passages) == (flag, not flag)


@given(results(), FORMS)
def test_a_result_survives_to_the_bit(result: RetrieveResult, form: Form) -> None:
    read = result_from_wire(*result_to_wire(result, form))
    assert read.n_found == result.n_found
    assert all(map(same_bits, read.doc_ids, result.doc_ids))
    assert all(map(same_bits, read.doc_scores, result.doc_scores))
    assert (read.doc_embeds is None) == (result.doc_embeds is None)
    if read.doc_embeds is not None and result.doc_embeds is not None:
        # Nested lists of no document at all have lost the dimension.
        pairs = [(a, b) for a, b in zip(read.doc_embeds, result.doc_embeds, strict=True) if len(b)]
        assert all(same_bits(a, b) for a, b in pairs)
        assert [len(a) for a in read.doc_embeds] == result.n_found
    assert (read.docs and [list(docs) for docs in read.docs]) == result.docs
    assert (read.index, read.timings_ms) == (result.index, result.timings_ms)


@given(MATRICES, FORMS)
def test_vectors_alone_survive_with_what_stands_beside_them(vectors: np.ndarray[Any, Any], form: Form) -> None:
    metadata = {"model": "m", "dimension": vectors.shape[1], "timings_ms": {"encode": 1.25}}
    read, beside = vectors_from_wire(*vectors_to_wire(vectors, metadata, form))
    assert same_bits(read, vectors)
    assert beside == metadata


@given(hnp.arrays(st.sampled_from([np.float16, np.float32, np.float64]), hnp.array_shapes(max_dims=3, max_side=4)))
def test_base64_holds_the_little_endian_bytes(array: np.ndarray[Any, Any]) -> None:
    encoded = encode_array(array)
    assert base64.b64decode(encoded.data) == array.astype(array.dtype.newbyteorder("<")).tobytes()
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.array_equal(decode_array(encoded), array.astype(np.float32), equal_nan=True)


def test_what_is_not_contiguous_or_big_endian_arrives_as_its_values() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    for view in (array.T, array[::2, ::-1], array.astype(">f4")):
        assert np.array_equal(decode_array(encode_array(view)), view)


def test_float16_columns_are_read() -> None:
    halves = np.array([[0.5, 1.0009765625]], np.float16)
    query = query_from_wire(write_stream({"vector": vector_array(halves)}, {}), ARROW_TYPE)
    assert query.vectors.dtype == np.float32
    assert np.array_equal(query.vectors, halves)
    assert query.n_docs == 5


def test_an_arrow_stream_of_several_and_sliced_batches_is_one_query() -> None:
    array = np.arange(20, dtype=np.float32).reshape(5, 4)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema([("vector", pa.list_(pa.float32(), 4))])) as writer:
        for rows in (vector_array(array)[1:3], vector_array(array)[3:]):
            writer.write_batch(pa.record_batch([rows], names=["vector"]))
    assert np.array_equal(query_from_wire(sink.getvalue().to_pybytes(), ARROW_TYPE).vectors, array[1:])


# --- refusals ----------------------------------------------------------------------------------------------


def refusal(body: bytes | str | object, content_type: str | None = JSON_TYPE) -> RagError:
    if not isinstance(body, bytes):
        body = (body if isinstance(body, str) else json.dumps(body)).encode()
    with pytest.raises(RequestError) as refused:
        query_from_wire(body, content_type)
    return refused.value


def encoded(data: bytes = bytes(8), dtype: str = "float32", shape: object = (1, 2)) -> dict[str, Any]:
    return {"data": base64.b64encode(data).decode(), "dtype": dtype, "shape": shape}


@pytest.mark.parametrize(
    ("vectors", "param"),
    [
        ([], "vectors"),
        ([[]], "vectors"),
        ([[], []], "vectors"),
        ([1, 2], "vectors.0"),
        ([[1, 2], [3]], "vectors.1"),
        ([[1, "2"]], "vectors.0.1"),
        ([[1, True]], "vectors.0.1"),
        ([[1, None]], "vectors.0.1"),
        ([[[1]]], "vectors.0.0"),
        ([[1e39, 1]], "vectors.0.0"),
        ("text", "vectors"),
        (None, "vectors"),
        (encoded(shape=(2,)), "vectors"),
        (encoded(shape=(1, 1, 2)), "vectors"),
        (encoded(shape=(1, 3)), "vectors"),
        (encoded(shape=(0, 2), data=b""), "vectors"),
        (encoded(shape=(2, 0), data=b""), "vectors"),
        (encoded(shape=(2**32, 2**32), data=b""), "vectors"),
        (encoded(shape=(2**62, 2**62, 4)), "vectors"),
        (encoded(shape=(-1, -2)), "vectors.shape.0"),
        (encoded(shape=()), "vectors.shape"),
        (encoded(shape=("1", 2)), "vectors.shape.0"),
        (encoded(dtype="object"), "vectors.dtype"),
        (encoded(dtype="int32"), "vectors.dtype"),
        (encoded() | {"data": "AAAAAAAAAA!="}, "vectors.data"),
        (encoded() | {"data": "AAAA\nAAAAAA="}, "vectors.data"),
        (encoded() | {"data": "éAAAAAAAAAA="}, "vectors.data"),
        (encoded(struct.pack("<ff", 1, float("nan"))), "vectors.0.1"),
        (encoded(struct.pack("<ff", float("-inf"), 1)), "vectors.0.0"),
        (encoded(struct.pack("<dd", 1, 1e300), dtype="float64"), "vectors.0.1"),
        (encoded() | {"more": 1}, "vectors.more"),
    ],
)
def test_vectors_that_are_none_are_refused_by_name(vectors: object, param: str) -> None:
    error = refusal({"vectors": vectors})
    assert isinstance(error, InvalidRequest)
    assert error.param == param


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"n_docs": 0}, "n_docs"),
        ({"collection": "../x"}, "collection"),
        ({"n_dcos": 1}, "n_dcos"),
        ({"return_embeds": 1}, "return_embeds"),
    ],
)
def test_an_option_is_refused_by_name_in_either_form(options: dict[str, Any], param: str) -> None:
    assert refusal({"vectors": [[1.0]], **options}).param == param
    stream = write_stream({"vector": vector_array(np.ones((1, 1), np.float32))}, {"options": options})
    assert refusal(stream, ARROW_TYPE).param == f"options.{param}"


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
def test_json_that_stands_for_no_float32_is_refused(literal: str) -> None:
    assert refusal(f'{{"vectors": [[0, {literal}]]}}').param == "vectors.0.1"


@pytest.mark.parametrize("body", ["", "{", "[1]x", "[" * 10_000, b"\xff\xfe"])
def test_a_body_that_is_no_json_is_a_400(body: bytes | str) -> None:
    assert refusal(body).status == 400


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "application/octet-stream", "application/jsonx"])
def test_another_content_type_is_unsupported(content_type: str | None) -> None:
    assert isinstance(refusal({"vectors": [[1]]}, content_type), UnsupportedMediaType)


def test_parameters_of_the_content_type_do_not_matter() -> None:
    assert query_from_wire(b'{"vectors": [[1]]}', "Application/JSON; charset=utf-8").n_docs == 5


def stream(column: pa.Array, name: str = "vector", **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({name: column})
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


PAIR = pa.list_(pa.float32(), 2)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (stream(pa.array([[1.0, 2.0]], PAIR), name="vectors"), "vector"),
        (stream(pa.array([[1.0, 2.0]], pa.list_(pa.float32()))), "vector"),
        (stream(pa.array([[1.0, 2.0]], pa.list_(pa.float64(), 2))), "vector"),
        (stream(pa.array([[1, 2]], pa.list_(pa.int32(), 2))), "vector"),
        (stream(pa.array(["text"])), "vector"),
        (stream(pa.array([[1.0, 2.0], None], PAIR)), "vector"),
        (stream(pa.array([[1.0, None]], PAIR)), "vector"),
        (stream(pa.array([], PAIR)), "vector"),
        (stream(pa.array([[], []], pa.list_(pa.float32(), 0))), "vector"),
        (stream(pa.array([[1.0, float("nan")]], PAIR)), "vector.0.1"),
        (stream(pa.array([[1.0, float("inf")]], PAIR)), "vector.0.1"),
    ],
)
def test_an_arrow_column_that_holds_no_vectors_is_refused(body: bytes, param: str) -> None:
    error = refusal(body, ARROW_TYPE)
    assert isinstance(error, InvalidRequest)
    assert error.param == param


def test_arrow_that_could_inflate_is_refused_unread() -> None:
    zeros = vector_array(np.zeros((100_000, 8), np.float32))
    for codec in ("zstd", "lz4"):
        bomb = stream(zeros, compression=codec)
        assert len(bomb) < 100_000
        assert "compress" in refusal(bomb, ARROW_TYPE).message
    words = pa.array(["a", "b"] * 10).dictionary_encode()
    assert "dictionary" in refusal(stream(words), ARROW_TYPE).message


def test_options_in_arrow_that_are_no_json_are_refused() -> None:
    for raw in (b"{", b"\xff", b"[" * 100_000):
        table = pa.table({"vector": pa.array([[1.0, 2.0]], PAIR)}).replace_schema_metadata({"options": raw})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        assert refusal(bytes(sink.getvalue()), ARROW_TYPE).param == "options"


@given(st.data())
def test_damaged_arrow_never_raises_anything_else(data: st.DataObject) -> None:
    query = RetrieveQuery(np.ones((3, 4), np.float32))
    body = bytearray(query_to_wire(query, "arrow")[0])
    if data.draw(st.booleans()):
        del body[data.draw(st.integers(0, len(body) - 1)) :]
    for _ in range(data.draw(st.integers(0, 4))):
        if body:
            body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = query_from_wire(bytes(body), ARROW_TYPE)
    except RequestError:
        return
    assert np.isfinite(read.vectors).all()


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(JSON_VALUES | st.fixed_dictionaries({"vectors": JSON_VALUES, "n_docs": JSON_VALUES}))
def test_any_json_is_taken_or_refused(value: object) -> None:
    try:
        read = query_from_wire(json.dumps(value).encode(), JSON_TYPE)
    except RequestError:
        return
    assert read.vectors.ndim == 2


@given(
    st.builds(
        dict,
        data=st.text(max_size=24),
        dtype=st.sampled_from(["float16", "float32", "float64"]),
        shape=st.lists(st.integers(0, 2**63), min_size=1, max_size=3),
    )
)
def test_any_encoded_array_is_taken_or_refused(fields: dict[str, Any]) -> None:
    try:
        array = decode_vectors(EncodedArray(**fields))
    except InvalidRequest:
        return
    assert list(array.shape) == fields["shape"]


# --- answers that are not ours -----------------------------------------------------------------------------


@given(results(), FORMS, st.data())
def test_a_damaged_answer_is_the_retrievers_fault(result: RetrieveResult, form: Form, data: st.DataObject) -> None:
    body, content_type = result_to_wire(result, form)
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = result_from_wire(bytes(damaged), content_type)
    except UpstreamError:
        return
    assert len(read.doc_scores) == len(read.doc_ids)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("doc_ids", pa.array([[None]], pa.list_(pa.int64()))),
        ("doc_ids", pa.array([1])),
        ("doc_scores", pa.array([None], pa.list_(pa.float32()))),
        ("retrieved_doc_embeds", pa.array([1.0])),
        ("retrieved_doc_embeds", pa.array([[1.0]], pa.list_(pa.float32()))),
        ("retrieved_doc_embeds", pa.array([[None]], pa.list_(pa.list_(pa.float32(), 2)))),
        ("retrieved_doc_embeds", pa.array([[[1.0, None]]], pa.list_(pa.list_(pa.float32(), 2)))),
        ("docs", pa.array(["text"])),
        ("docs", pa.array([[{"id": -1, "title": "t", "text": "t"}]], pa.list_(PASSAGE))),
        ("docs", pa.array([[{"id": 1, "title": None, "text": "t"}]], pa.list_(PASSAGE))),
        ("docs", pa.array([[None]], pa.list_(PASSAGE))),
    ],
)
def test_a_column_of_an_answer_that_cannot_be_used_is_the_retrievers_fault(column: str, values: pa.Array) -> None:
    columns = {
        "doc_ids": pa.array([[1]], pa.list_(pa.int64())),
        "doc_scores": pa.array([[1.0]], pa.list_(pa.float32())),
        column: values,
    }
    with pytest.raises(UpstreamError):
        result_from_wire(write_stream(columns, {"index": INDEX.model_dump(), "timings_ms": {}}), ARROW_TYPE)


@pytest.mark.parametrize("about", [{}, {"index": 1}, {"index": INDEX.model_dump(), "timings_ms": {"search": "long"}}])
def test_an_answer_without_its_index_is_the_retrievers_fault(about: dict[str, Any]) -> None:
    columns = {
        "doc_ids": pa.array([[1]], pa.list_(pa.int64())),
        "doc_scores": pa.array([[1.0]], pa.list_(pa.float32())),
    }
    with pytest.raises(UpstreamError):
        result_from_wire(write_stream(columns, about), ARROW_TYPE)


def test_lists_of_different_lengths_are_no_answer() -> None:
    body = json.loads(
        result_to_wire(RetrieveResult([np.array([1])], [np.ones(1, np.float32)], None, None, INDEX), "json")[0]
    )
    body["doc_scores"] = [[1.0, 2.0]]
    with pytest.raises(UpstreamError, match="differ in length"):
        result_from_wire(json.dumps(body).encode(), JSON_TYPE)
    with pytest.raises(UpstreamError):
        result_from_wire(b"<html>", "text/html")


# --- choosing the form -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        (None, "json"),
        ("", "json"),
        ("*/*", "json"),
        ("application/json", "json"),
        ("application/json;vectors=base64", "base64"),
        ('application/json; vectors="base64"; q=0.5', "base64"),
        (ARROW_TYPE, "arrow"),
        (f"{ARROW_TYPE}, application/json;q=0.9", "arrow"),
        (f"{ARROW_TYPE};q=0.1, application/json", "json"),
        (f"text/html, {ARROW_TYPE};q=0, */*;q=0.1", "json"),
    ],
)
def test_accept_chooses_the_form(accept: str | None, form: str) -> None:
    assert response_form(accept) == form


@pytest.mark.parametrize("accept", ["text/html", "application/json;vectors=pickle", "application/json;q=0", "x"])
def test_an_accept_that_names_none_of_ours_is_unsupported(accept: str) -> None:
    with pytest.raises(UnsupportedMediaType):
        response_form(accept)
