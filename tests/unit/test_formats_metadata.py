"""Metadata of passages in foreign files: every form keeps the values that it was given, and splitting does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever_svc.formats.embedded import read_embedded
from retriever_svc.formats.npy import read_npy
from retriever_svc.formats.split import split_words
from retriever_svc.formats.texts import read_passages
from retriever_svc.metadata import NO_METADATA, schema_of, to_wire, types_of
from retriever_svc.source import from_parquet
from shared.errors import InvalidRequest
from shared.schemas import MetadataType
from tests.filters_data import METADATA, metadata_columns, random_metadata
from tests.retriever_data import ENCODER, passage_table, random_embeddings, text, title
from tests.unit.test_formats_texts import delimited, write_table

TYPES = types_of(METADATA)
Metadata = list[dict[str, Any]]


def table_of(metadata: Metadata) -> pa.Table:
    """With a column that cannot be metadata."""
    count = range(len(metadata))
    texts = {"title": pa.array(map(title, count), pa.string()), "text": pa.array(map(text, count), pa.string())}
    return pa.table({**texts, **metadata_columns(metadata), "tags": pa.array([["a"] for _ in count])})


def write(folder: Path, form: str, metadata: Metadata) -> Path:
    passages = [{"title": title(i), "text": text(i)} for i in range(len(metadata))]
    if form == "jsonl":
        path = folder / "passages.jsonl"
        given = [
            {name: value for name, value in row.items() if value is not None or i % 2} for i, row in enumerate(metadata)
        ]
        path.write_text("".join(json.dumps(a | b) + "\n" for a, b in zip(passages, given, strict=True)))
        return path
    if form in {"csv", "tsv"}:
        path = folder / f"passages.{form}"
        rows = [
            ["" if value is None else value for value in (a | b).values()]
            for a, b in zip(passages, metadata, strict=True)
        ]
        header = ["title", "text", *METADATA.names]
        path.write_bytes(delimited(rows, header, delimiter="," if form == "csv" else "\t"))
        return path
    if form == "datasets":
        path = folder / "saved"
        Dataset(table_of(metadata)).save_to_disk(path)
        return path
    return write_table(folder, "passages", table_of(metadata), form, 3)


def expected(form: str, metadata: Metadata) -> Metadata:
    """What a file of text says for an empty string is what it says for null."""
    as_text = form in {"csv", "tsv"}
    return [{name: None if as_text and value == "" else value for name, value in row.items()} for row in metadata]


@pytest.mark.filterwarnings("ignore")  # datasets' own
@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "parquet", "stream", "file", "datasets"])
@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 40), seed=st.integers(0, 10_000), words=st.sampled_from([None, 1, 3]))
def test_metadata_comes_back(
    tmp_path_factory: pytest.TempPathFactory, form: str, count: int, seed: int, words: int | None
) -> None:
    metadata = random_metadata(count, seed)
    metadata[0] |= {
        "year": 1999,
        "lang": "de",
        "Score": 0.5,
        "ok": True,
        "day": "2020-01-02",
        "read at": "2020-01-01T03:00:00Z",
    }
    path = write(tmp_path_factory.mktemp("files"), form, metadata)
    passages = read_passages(path, METADATA)
    batches = passages.batches if words is None else split_words(passages.batches, words)
    table = pa.Table.from_batches(batches)
    assert passages.metadata == METADATA
    rows = dict(zip(map(title, range(count)), expected(form, metadata), strict=True))
    found = to_wire(table.select(METADATA.names), len(table))
    assert found == [rows[name] for name in table["title"].to_pylist()]
    if form in {"jsonl", "csv", "tsv"}:  # which say no types
        assert read_passages(path).metadata == NO_METADATA
    else:
        assert read_passages(path).metadata == METADATA
    assert read_passages(path, schema_of({"lang": "string"})).metadata.names == ["lang"]


@pytest.mark.filterwarnings("ignore")
def test_metadata_beside_embeddings_comes_back(tmp_path: Path) -> None:
    metadata, vectors = random_metadata(30, 1), random_embeddings(30, 4)
    table = table_of(metadata).append_column("embeddings", pa.array(list(vectors)))
    source = read_embedded(write_table(tmp_path, "embedded", table, "parquet", 7), ENCODER).source
    np.save(tmp_path / "vectors.npy", vectors)
    beside = read_npy(tmp_path / "vectors.npy", write(tmp_path, "jsonl", metadata), ENCODER, METADATA)
    for found in (source, beside):
        batch = pa.Table.from_batches(found.clean_batches())
        assert found.metadata == METADATA
        assert to_wire(batch.select(METADATA.names), 30) == metadata
        assert batch.schema.names == ["id", "title", "text", "embedding", *METADATA.names]
    some = read_embedded(tmp_path / "embedded.parquet", ENCODER, None, schema_of({"year": "float"})).source
    years = pa.Table.from_batches(some.clean_batches())["year"].to_pylist()
    assert years == [row["year"] for row in metadata]
    assert some.metadata.field("year").type == pa.float64()


def test_of_a_table_with_embeddings_those_are_kept_that_are_named(tmp_path: Path) -> None:
    table = passage_table(random_embeddings(5, 4))
    for name in ("a", "b.c"):  # the second could not be named in a filter
        table = table.append_column(name, pa.array(range(5)))
    path = write_table(tmp_path, "passages", table, "parquet", 5)
    with pytest.raises(InvalidRequest, match="rename the column; or name the columns to keep"):
        from_parquet(path)
    source = from_parquet(path, metadata=schema_of({"a": "integer"}))
    assert pa.Table.from_batches(source.clean_batches())["a"].to_pylist() == list(range(5))


HEADER = b"title,text,year,ok,Score,day\n"
JSON = b'{"title": "A", "text": "a", "year": 1}\n'


@pytest.mark.parametrize(
    ("name", "data", "types", "param", "says"),
    [
        (
            "a.csv",
            HEADER + b"A,a,1,true,1,2020-01-01\nB,b,x,,,\n",
            {"year": "integer"},
            "year",
            "is 'x' in line 3; exp",
        ),
        ("a.csv", HEADER + b"A,a,1_0,,,\n", {"year": "integer"}, "year", "expected is a 64-bit integer, or nothing"),
        ("a.csv", HEADER + b"A,a,1.5,,,\n", {"year": "integer"}, "year", "is '1.5' in line 2"),
        ("a.csv", HEADER + b"A,a,9223372036854775808,,,\n", {"year": "integer"}, "year", "64-bit integer"),
        ("a.csv", HEADER + b"A,a,,1,,\n", {"ok": "boolean"}, "ok", "expected is true or false"),
        ("a.csv", HEADER + b"A,a,,,inf,\n", {"Score": "float"}, "Score", "expected is a finite number"),
        ("a.csv", HEADER + b"A,a,,,1e999,\n", {"Score": "float"}, "Score", "expected is a finite number"),
        ("a.csv", HEADER + b"A,a,,,,2020-13-01\n", {"day": "date"}, "day", "expected is a date"),
        ("a.csv", HEADER + b"A,a,,,,\n", {"yeer": "integer"}, "yeer", "header must name one column `yeer`; it has"),
        ("a.csv", b"title,text,a,a\n", {"a": "string"}, "a", "must name one column `a`"),
        ("a.tsv", b"1\ta\tA\n", {"year": "integer"}, "year", "has no header"),
        ("a.jsonl", JSON + b'{"title": "A", "text": "a", "year": "1"}\n', {"year": "integer"}, "year", "'1' in line 2"),
        ("a.jsonl", JSON + b'{"title": "A", "text": "a", "year": [1]}\n', {"year": "integer"}, "year", "list"),
        ("a.jsonl", b'{"title": "A", "text": "a", "s": "\\ud800"}\n', {"s": "string"}, "s", "expected is a string"),
        (
            "a.jsonl",
            b'{"title": "A", "text": "a", "s": NaN}\n',
            {"s": "float"},
            "s",
            "expected is a finite number, or nothing",
        ),
        ("a.jsonl", JSON, {"yeer": "integer"}, "yeer", "no line has the key `yeer`"),
    ],
)
def test_what_does_not_fit_is_refused_by_line_and_column(
    tmp_path: Path, *, name: str, data: bytes, types: dict[str, MetadataType], param: str, says: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InvalidRequest, match=says) as refused:
        list(read_passages(tmp_path / name, schema_of(types)).batches)
    assert str(tmp_path / name) in refused.value.message
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("types", "says"),
    [({"absent": "string"}, "no one column 'absent'"), ({"year": "string"}, "year: expected string, got int64")],
)
def test_what_a_table_has_not_is_refused(tmp_path: Path, types: dict[str, MetadataType], says: str) -> None:
    path = write(tmp_path, "parquet", random_metadata(3, 0))
    with pytest.raises(InvalidRequest, match=says):
        read_passages(path, schema_of(types))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv", "parquet", "datasets"])
def test_what_a_file_need_not_have_is_null_where_it_has_it_not(tmp_path: Path, form: str) -> None:
    metadata = random_metadata(9, 2)
    path = write(tmp_path, form, metadata)
    asked = schema_of({"absent": "date", "year": "integer"})
    passages = read_passages(path, asked, all_there=False)
    table = pa.Table.from_batches(passages.batches)
    assert table["year"].to_pylist() == [row["year"] for row in metadata]
    assert "absent" not in table.schema.names or table["absent"].null_count == 9
    assert [one.name for one in passages.metadata] == [name for name in asked.names if name in table.schema.names]


def test_a_file_that_need_not_have_a_column_has_it_in_its_type(tmp_path: Path) -> None:
    (tmp_path / "dpr.tsv").write_bytes(b"1\ta\tA\n")
    year = schema_of({"year": "string"})
    (batch,) = read_passages(tmp_path / "dpr.tsv", year, all_there=False).batches
    assert batch["year"].to_pylist() == [None]
    with pytest.raises(InvalidRequest, match="year: expected string, got int64"):
        read_passages(write(tmp_path, "parquet", random_metadata(3, 0)), year, all_there=False)


def test_a_value_that_does_not_fit_is_named_with_its_file(tmp_path: Path) -> None:
    table = table_of(random_metadata(3, 0)).append_column("large", pa.array([1, 2**64 - 1, 3], pa.uint64()))
    path = write_table(tmp_path, "passages", table, "parquet", 3)
    with pytest.raises(InvalidRequest, match=r"passages\.parquet: `large` cannot be read as int64.* from row 0 on"):
        list(read_passages(path).batches)


def test_long_metadata_makes_batches_of_fewer_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("retriever_svc.formats.passages.BATCH_CHARACTERS", 20)
    rows = [{"title": "t", "text": "x", "year": year, "lang": "l" * 7} for year in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    batches = list(read_passages(tmp_path / "a.jsonl", schema_of({"year": "integer", "lang": "string"})).batches)
    assert [len(batch) for batch in batches] == [3, 2]


@pytest.mark.parametrize("name", ["id", "title", "_row"])
def test_a_passages_own_columns_are_no_metadata(name: str) -> None:
    with pytest.raises(InvalidRequest, match="passage's own field"):
        schema_of({name: "string"})
