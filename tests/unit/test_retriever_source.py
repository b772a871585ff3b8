"""What a source must look like, and what is refused of it."""

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retriever_svc.metadata import types_of
from retriever_svc.source import from_parquet
from shared.errors import InvalidRequest
from tests.retriever_data import ENCODER, passage_table, random_embeddings, source_of

PAIRS = pa.list_(pa.float32(), 2)
GOOD = passage_table(random_embeddings(10, 4))


def with_column(name: str, column: Any) -> pa.Table:
    at = GOOD.schema.get_field_index(name)
    return GOOD.set_column(at, name, column)


def embeddings_with(value: float) -> pa.Array:
    bad = random_embeddings(10, 4)
    bad[6, 2] = value
    return pa.FixedSizeListArray.from_arrays(pa.array(bad.ravel()), 4)


def test_rows_pass_in_the_tables_own_schema() -> None:
    wide = with_column("id", pa.array(range(10), pa.uint8())).append_column("more", pa.array([[1]] * 10))
    wide = wide.set_column(1, "title", wide["title"].cast(pa.large_string()))
    clean = pa.Table.from_batches(source_of(wide).clean_batches())
    assert clean.schema.names == ["id", "title", "text", "embedding"]
    assert clean.to_pylist() == GOOD.to_pylist()


def test_columns_of_scalars_are_metadata_in_one_width_each() -> None:
    days = [date(2020, 2, 29), *[None] * 9]
    zone = pa.timestamp("ns", "Europe/Berlin")
    wide = (
        GOOD.append_column("year", pa.array(range(10), pa.uint16()))
        .append_column("score", pa.array([0.5, np.nan, *[None] * 8], pa.float32()))
        .append_column("lang", pa.array(["en"] * 10).dictionary_encode())
        .append_column("ok", pa.array([True] * 10))
        .append_column("day", pa.array(days, pa.date64()))
        .append_column("at", pa.array([datetime(2020, 1, 1, 12, tzinfo=UTC)] * 10, zone))
        .append_column("__index_level_0__", pa.array(range(10)))
        .append_column("raw", pa.array([b""] * 10))
    )
    clean = pa.Table.from_batches(source_of(wide).clean_batches())
    assert types_of(source_of(wide).metadata) == {
        "year": "integer",
        "score": "float",
        "lang": "string",
        "ok": "boolean",
        "day": "date",
        "at": "timestamp",
    }
    assert clean.schema.names[4:] == ["year", "score", "lang", "ok", "day", "at"]
    assert clean["score"].to_pylist() == [0.5, *[None] * 9]
    assert clean["day"].to_pylist() == days
    assert clean["at"].to_pylist() == [datetime(2020, 1, 1, 12)] * 10
    assert clean.select(GOOD.schema.names).to_pylist() == GOOD.to_pylist()


@pytest.mark.parametrize(
    ("name", "column", "says"),
    [
        ("size", pa.array([2**63] * 10, pa.uint64()), "cannot be read as int64"),
        ("score", pa.array([np.inf] * 10), "infinity"),
        ("day", pa.array([2**30] * 10, pa.int32()).cast(pa.date32()), "beyond the years"),
        ("at", pa.array([2**62] * 10, pa.int64()).cast(pa.timestamp("us")), "beyond the years"),
        ("at", pa.array([1] * 10, pa.timestamp("ns")), "lose data"),
        ("Title", pa.array(range(10)), "upper and lower case"),
        ("a.b", pa.array(range(10)), "cannot be named"),
    ],
)
def test_metadata_that_cannot_be_told_is_refused(name: str, column: pa.Array, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        list(source_of(GOOD.append_column(name, column)).clean_batches())
    assert refused.value.param == name


def test_a_parquet_file_tells_its_size_hash_encoder_and_attribution(tmp_path: Path) -> None:
    pq.write_table(GOOD, tmp_path / "passages.parquet")
    source = from_parquet(tmp_path / "passages.parquet")
    assert (source.count, source.encoder, source.attribution) == (10, ENCODER, "made up")
    assert (source.dimension, source.dtype, len(source.sha256 or "")) == (4, "float32", 64)


@pytest.mark.parametrize(
    ("table", "param", "says"),
    [
        (GOOD.drop_columns(["text"]), "text", "one column `text`"),
        (GOOD.append_column("id", GOOD["id"]), "id", "one column `id`"),
        (with_column("embedding", pa.array([[1.0]] * 10)), "embedding", "fixed_size_list"),
        (with_column("embedding", pa.array([[1.0]] * 10, pa.list_(pa.float64(), 1))), "embedding", "fixed_size_list"),
        (with_column("embedding", pa.array([[]] * 10, pa.list_(pa.float32(), 0))), "embedding", "fixed_size_list"),
        (with_column("embedding", embeddings_with(np.nan)), "embedding", r"row 6 \(id 6\) holds NaN"),
        (with_column("embedding", embeddings_with(np.inf)), "embedding", r"row 6 \(id 6\) holds NaN"),
        (with_column("embedding", pa.array([[1.0, None]] * 10, PAIRS)), "embedding", "nulls inside"),
        (with_column("embedding", pa.array([None] * 10, PAIRS)), "embedding", "null in row 0"),
        (with_column("id", pa.array([*range(9), None], pa.int64())), "id", "null in row 9"),
        (with_column("id", pa.array([*range(9), -1], pa.int64())), "id", "row 9; ids must not be negative"),
        (with_column("id", pa.array([*range(9), 2**63], pa.uint64())), "id", "cannot be read as int64"),
        (with_column("id", pa.array([str(i) for i in range(10)])), "id", "must be an integer"),
        (with_column("title", pa.array([*["t"] * 7, None, "t", "t"])), "title", "null in row 7"),
        (with_column("text", pa.array(range(10))), "text", "must be a string"),
        (GOOD.replace_schema_metadata(None), "encoder", "does not say which encoder"),
    ],
)
def test_a_source_that_is_not_clean_is_refused(table: pa.Table, param: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        list(source_of(table).clean_batches())
    assert refused.value.param == param


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "passages.parquet").write_bytes(b"PAR1 or so")
    with pytest.raises(InvalidRequest, match="cannot be read as Parquet"):
        from_parquet(tmp_path / "passages.parquet")


def test_a_file_whose_pages_are_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "passages.parquet"
    pq.write_table(GOOD, path, compression="zstd")
    column = pq.ParquetFile(path).metadata.row_group(0).column(2)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    with pytest.raises(InvalidRequest, match="cannot be read to its end"):
        list(from_parquet(path).clean_batches())
