"""Passages in foreign files: every form gives the same rows, and damage is refused by file, line and column."""

import csv
import gzip
import io
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever_svc.formats import lines
from retriever_svc.formats.delimited import END
from retriever_svc.formats.passages import PASSAGE_SCHEMA, RowBatches
from retriever_svc.formats.split import split_words
from retriever_svc.formats.texts import read_passages
from shared.errors import InvalidRequest

Rows = list[tuple[int, str, str]]

characters = st.characters(exclude_categories=["Cs"])
any_text = st.text(characters, max_size=30) | st.sampled_from(
    ['"', 'a "b" c', "\t", "a\nb", ",", "'", "id", "\x00", END, f'"\n{END}']
)
ids = st.integers(0, 2**63 - 1)
rows_with_ids = st.lists(st.tuples(ids, any_text, any_text), max_size=12, unique_by=lambda row: row[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("texts")


def rows_of(path: Path) -> Rows:
    passages = read_passages(path)
    batches = list(passages.batches)
    assert all(batch.schema == PASSAGE_SCHEMA for batch in batches)
    rows = [tuple(row.values()) for batch in batches for row in batch.to_pylist()]
    assert passages.count in (None, len(rows))
    assert sum(map(len, passages.batches)) == len(rows), "the batches can be read again"
    return rows


def delimited(rows: Sequence[Sequence[Any]], header: Sequence[str] | None, **form: Any) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, **form)
    if header is not None:
        writer.writerow(header)
    writer.writerows(rows)
    return file.getvalue().encode()


def write(path: Path, data: bytes, compressed: bool = False) -> Path:
    path = path.with_name(path.name + ".gz") if compressed else path
    path.write_bytes(gzip.compress(data, 1, mtime=0) if compressed else data)
    return path


# ── every form gives the rows that were written ──


@given(rows=rows_with_ids, quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), compressed=st.booleans())
def test_tsv_is_read_as_dpr_reads_it(folder: Path, rows: Rows, quoting: Any, compressed: bool) -> None:
    written = [(passage_id, text, title) for passage_id, title, text in rows]
    data = delimited(written, ["id", "text", "title"], delimiter="\t", quoting=quoting)
    path = write(folder / "psgs_w100.tsv", data, compressed)
    (folder / "plain.tsv").write_bytes(data)
    with (folder / "plain.tsv").open(encoding="utf-8") as file:
        expected = [(int(r[0]), r[2], r[1]) for r in csv.reader(file, delimiter="\t") if r[0] != "id"]
    assert rows_of(path) == expected


@given(rows=rows_with_ids, quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), compressed=st.booleans())
def test_csv_comes_back(folder: Path, rows: Rows, quoting: Any, compressed: bool) -> None:
    data = delimited(rows, ["id", "title", "text"], quoting=quoting)
    assert rows_of(write(folder / "passages.csv", data, compressed)) == rows


@given(rows=rows_with_ids, ascii_only=st.booleans(), strings=st.booleans(), compressed=st.booleans())
def test_jsonl_comes_back(folder: Path, rows: Rows, ascii_only: bool, strings: bool, compressed: bool) -> None:
    objects = [{"text": x, "more": [1], "title": t, "id": str(i) if strings else i} for i, t, x in rows]
    data = "\n".join(json.dumps(value, ensure_ascii=ascii_only) for value in objects).encode()
    assert rows_of(write(folder / "passages.jsonl", data, compressed)) == rows


@given(
    rows=rows_with_ids.filter(bool),
    id_type=st.sampled_from([pa.int64(), pa.uint64(), pa.string(), pa.large_string()]),
    text_type=st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]),
    group=st.integers(1, 5),
    shards=st.integers(1, 3),
    kind=st.sampled_from(["parquet", "stream", "file"]),
)
def test_parquet_and_arrow_come_back(
    tmp_path_factory: pytest.TempPathFactory,
    *,
    rows: Rows,
    id_type: pa.DataType,
    text_type: pa.DataType,
    group: int,
    shards: int,
    kind: str,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    numbers = pa.array([row[0] for row in rows], pa.int64()).cast(id_type)
    columns = [pa.array([row[i] for row in rows], pa.string()).cast(text_type) for i in (2, 1)]
    table = pa.table({"more": pa.nulls(len(rows)), "text": columns[0], "id": numbers, "title": columns[1]})
    per_shard = -(-len(rows) // shards)
    for shard in range(shards):
        write_table(folder, f"part-{shard + 9}", table.slice(shard * per_shard, per_shard), kind, group)
    assert rows_of(folder) == rows


def write_table(folder: Path, name: str, table: pa.Table, kind: str, group: int) -> Path:
    if kind == "parquet":
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=group)
        return folder / f"{name}.parquet"
    path = folder / f"{name}.arrow"
    make = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    # a stream may not replace a dictionary in a file, so a shard has one
    with make(path, table.schema) as writer:
        writer.write_table(table.unify_dictionaries().combine_chunks(), max_chunksize=group)
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_saved_by_datasets_comes_back(tmp_path: Path, shards: int) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [(i, f"Title {i}", f"Text “{i}”") for i in range(25)]
    data = datasets.Dataset.from_dict({"title": [r[1] for r in rows], "text": [r[2] for r in rows]})
    data.save_to_disk(tmp_path / "plain", num_shards=shards)
    assert rows_of(tmp_path / "plain") == rows
    data.select([3, 1, 2]).save_to_disk(tmp_path / "selected")
    assert [row[2] for row in rows_of(tmp_path / "selected")] == [rows[i][2] for i in (3, 1, 2)]
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "one")
    assert rows_of(tmp_path / "one") == rows
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "two")
    with pytest.raises(InvalidRequest, match="the splits train, test"):
        read_passages(tmp_path / "two")
    assert rows_of(tmp_path / "two" / "test") == rows


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.tsv", b"title\ttext\nA\ta\nB\tb\n"),
        ("a.tsv", b"\xef\xbb\xbftext\ttitle\r\na\tA\r\nb\tB"),
        ("a.csv", b"more,text,title\n1,a,A\n\n2,b,B\n"),
        ("a.CSV", b"title, text\nA,a\nB,b\n"),
        ("a.jsonl", b'{"title": "A", "text": "a"}\n\n{"title": "B", "text": "b"}'),
    ],
)
def test_rows_without_ids_are_numbered(tmp_path: Path, name: str, data: bytes) -> None:
    assert rows_of(write(tmp_path / name, data)) == [(0, "A", "a"), (1, "B", "b")]


def test_dprs_file_may_lack_its_header(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", b'7\t"He said ""no""."\tA\n8\tb\tB\n')
    assert rows_of(path) == [(7, "A", 'He said "no".'), (8, "B", "b")]


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for shard in range(11):
        pq.write_table(pa.table({"title": ["t"], "text": [str(shard)]}), tmp_path / f"train-{shard}-of-11.parquet")
    assert [row[2] for row in rows_of(tmp_path)] == [str(shard) for shard in range(11)]


def test_many_rows_come_in_batches(tmp_path: Path) -> None:
    path = tmp_path / "many.tsv"
    path.write_text("id\ttext\ttitle\n" + "".join(f"{i}\tx\ty\n" for i in range(9000)))
    assert [len(batch) for batch in read_passages(path).batches] == [4096, 4096, 808]
    pq.write_table(pa.table({"title": ["t"] * 9000, "text": ["x"] * 9000}), tmp_path / "many.parquet")
    passages = read_passages(tmp_path / "many.parquet")
    assert passages.count == 9000
    assert max(len(batch) for batch in passages.batches) <= 4096


def test_long_texts_make_batches_of_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retriever_svc.formats.passages.BATCH_CHARACTERS", 10)
    rows = RowBatches()
    made = [rows.add(i, "t", "x" * 4) for i in range(5)]
    assert [batch and len(batch) for batch in made] == [None, 2, None, 2, None]


def test_a_field_may_be_longer_than_the_csv_modules_own_limit(tmp_path: Path) -> None:
    long = "word " * 50_000
    path = write(tmp_path / "a.csv", delimited([["t", long]], ["title", "text"]))
    assert rows_of(path) == [(0, "t", long)]


# ── what is damaged is refused ──

HEADER = b"id\ttext\ttitle\n"
JSON = b'{"title": "A", "text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "data", "param", "says"),
    [
        ("a.tsv", b"", "source", "is empty"),
        ("a.tsv", b"id\ttext\n1\ta\n", "title", r"must name one column `title`; it has \['id', 'text'\]"),
        ("a.tsv", b"A title\tA text\n", "title", "must name one column `title`"),
        ("a.tsv", b"id\ttext\ttitle\ttitle\n", "title", "must name one column `title`"),
        ("a.tsv", b"id\tid\ttext\ttitle\n", "id", "more than once"),
        ("a.tsv", HEADER + b"1\ta\tA\n2\tb\n", "title", "line 3 has 2 columns, expected are 3"),
        ("a.tsv", HEADER + b"1\ta\tA\tmore\n", "source", "line 2 has 4 columns"),
        ("a.tsv", HEADER + b"1\ta\tA\n1.5\tb\tB\n", "id", r"`id` is '1.5' in line 3"),
        ("a.tsv", HEADER + b"\ta\tA\n", "id", "`id` is '' in line 2"),
        ("a.tsv", HEADER + b"1_0\ta\tA\n", "id", "must be an integer"),
        ("a.tsv", HEADER + "١\ta\tA\n".encode(), "id", "must be an integer"),
        ("a.tsv", HEADER + b"-1\ta\tA\n", "id", "`id` is -1 in line 2"),
        ("a.tsv", HEADER + b"9223372036854775808\ta\tA\n", "id", "must be from 0"),
        ("a.tsv", HEADER + b"5\ta\tA\n6\tb\tB\n5\tc\tC\n", "id", "id 5 stands in rows 0 and 2"),
        ("a.tsv", HEADER + b"05\ta\tA\n5\tb\tB\n", "id", "id 5 stands in rows 0 and 1"),
        ("a.tsv", HEADER + b'1\t"a\nb\tA\n2\tb\tB\n', "source", "record that begins in line 2 is never closed"),
        ("a.tsv", HEADER + b'1\ta\tA\n2\t"x\ny"\tB\n3\tc\n', "title", "line 5 has 2 columns"),
        ("a.tsv", HEADER + b"1\ta\tA\n2\tb\xff\tB\n", "source", "line 3 is not UTF-8 at byte 3"),
        ("a.csv", b"title,text\nA,\xe4\n", "source", "line 2 is not UTF-8"),
        ("a.csv", b"title,text\nA,a,b\n", "source", "line 2 has 3 columns"),
        ("a.csv", b"title,text\nA,a\rB,b\n", "source", "record that begins in line 2 cannot be read"),
        ("a.jsonl", JSON + b"{broken\n", "source", "line 2 is no JSON"),
        ("a.jsonl", JSON + b"[" * 100_000, "source", "line 2 is no JSON"),
        ("a.jsonl", b"[1]\n", "source", "line 1 holds a list"),
        ("a.jsonl", JSON + b'{"title": "B"}\n', "text", "line 2 has no key `text`"),
        ("a.jsonl", JSON + b'{"title": null, "text": "b"}\n', "title", "`title` is null in line 2"),
        ("a.jsonl", JSON + b'{"title": "B", "text": 5}\n', "text", "`text` is a int, not a string in line 2"),
        ("a.jsonl", b'{"title": "\\ud800", "text": "b"}\n', "title", "lone surrogate in line 1"),
        ("a.jsonl", JSON + b'{"title": "A", "text": "a", "id": 3}\n', "id", "line 2 has an `id`, unlike"),
        ("a.jsonl", b'{"title": "A", "text": "a", "id": 3}\n' + JSON, "id", "line 2 has no `id`, unlike"),
        ("a.jsonl", b'{"title": "A", "text": "a", "id": true}\n', "id", "`id` is True in line 1"),
        ("a.jsonl", b'{"title": "A", "text": "a", "id": 1.0}\n', "id", "must be an integer"),
        ("a.jsonl", b'{"title": "A", "text": "a", "id": null}\n', "id", "must be an integer"),
        ("a.jsonl", JSON + b'{"title": "\xff", "text": "b"}\n', "source", "line 2 is not UTF-8"),
        ("a.parquet", b"PAR1 or so", "source", "cannot be read as Parquet"),
        ("a.arrow", b"ARROW1 or so", "source", "cannot be read as Arrow"),
        ("a.arrow", b"", "source", "cannot be read as Arrow"),
        ("a.txt", b"words", "source", r"taken are \.tsv"),
        ("a.gz", b"words", "source", r"taken are \.tsv"),
        (
            "a.tsv.gz",
            gzip.compress(HEADER + random.Random(0).randbytes(999).hex().encode(), mtime=0)[:-200],
            "source",
            "cannot be read beyond",
        ),
        ("a.tsv.gz", gzip.compress(HEADER, mtime=0)[:20] + b"\xff" * 40, "source", "cannot be read beyond"),
    ],
)
def test_damage_is_refused_by_file_line_and_column(
    tmp_path: Path, name: str, data: bytes, param: str, says: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InvalidRequest, match=says) as refused:
        list(read_passages(tmp_path / name).batches)
    assert str(tmp_path / name) in refused.value.message
    assert refused.value.param == param


def test_a_line_without_an_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LINE_LIMIT", 100)
    path = write(tmp_path / "a.jsonl", JSON + b"x" * 101)
    with pytest.raises(InvalidRequest, match="line 2 is longer than 100 bytes"):
        list(read_passages(path).batches)


PLAIN = {"id": pa.array([1, 2, 3]), "title": pa.array(["A", "B", "C"]), "text": pa.array(["a", "b", "c"])}
BAD_UTF8 = pa.Array.from_buffers(
    pa.string(), 3, [None, pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xffc")]
)
BAD_OFFSETS = pa.Array.from_buffers(
    pa.string(), 3, [None, pa.array([0, 1, 2**30, 3], pa.int32()).buffers()[1], pa.py_buffer(b"abc")]
)


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
@pytest.mark.parametrize(
    ("columns", "param", "says"),
    [
        ({"text": None}, "text", "must have one column `text`"),
        ({"text": pa.array([1, 2, 3])}, "text", "`text` must hold strings, it holds int64"),
        ({"id": pa.array([1.0, 2.0, 3.0])}, "id", "`id` must hold integers"),
        ({"title": pa.array(["A", None, "C"])}, "title", "`title` is null in row 1"),
        ({"id": pa.array([1, 2, None])}, "id", "`id` is null in row 2"),
        ({"id": pa.array([1, -2, 3])}, "id", "`id` is -2 in row 1"),
        ({"id": pa.array([1, 2**63, 3], pa.uint64())}, "id", "`id` from row 0 on"),
        ({"id": pa.array(["1", "x", "3"])}, "id", "`id` is 'x' in row 1"),
        ({"id": pa.array(["1", "-2", "3"])}, "id", "`id` is -2 in row 1"),
        ({"id": pa.array([3, 2, 3])}, "id", "id 3 stands in rows 0 and 2"),
        ({"text": BAD_UTF8}, "source", "Invalid UTF8"),
    ],
)
def test_damage_in_tables_is_refused(
    tmp_path: Path, kind: str, columns: dict[str, pa.Array | None], param: str, says: str
) -> None:
    given = {name: column for name, column in (PLAIN | columns).items() if column is not None}
    path = write_table(tmp_path, "part", pa.table(given), kind, 2)
    with pytest.raises(InvalidRequest, match=says) as refused:
        list(read_passages(path).batches)
    assert str(tmp_path) in refused.value.message
    assert refused.value.param == param


def test_offsets_that_leave_the_buffer_are_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path, "part", pa.table(PLAIN | {"text": BAD_OFFSETS}), "stream", 3)
    with pytest.raises(InvalidRequest, match="cannot be read beyond row 0"):
        list(read_passages(path).batches)


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
@given(cut=st.integers(1, 10_000))
@settings(max_examples=30)
def test_a_table_cut_short_is_refused(folder: Path, kind: str, cut: int) -> None:
    table = pa.table(PLAIN | {"text": pa.array(["x" * 100] * 3)})
    path = write_table(folder, "cut", table, kind, 2)
    data = path.read_bytes()
    path.write_bytes(data[: -1 - cut % (len(data) - 1)])
    with pytest.raises(InvalidRequest, match="cannot be read"):
        rows_of(path)


def edit_state(**values: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "state.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "state.json").write_text("{"), "state.json: cannot be read"),
        (lambda folder: (folder / "state.json").write_text("[]"), "no JSON object"),
        (edit_state(_data_files=[]), "names no data files"),
        (edit_state(_data_files=["a"]), "without a file name"),
        (edit_state(_data_files=[{"filename": "../data.arrow"}]), "no name inside the folder"),
        (edit_state(_data_files=[{"filename": "data.arrow", "skip": 3}]), "takes a part of a file"),
        (edit_state(_data_files=[{"filename": "gone.arrow"}]), "gone.arrow: cannot be read"),
        (edit_state(_indices_data_files=[{"filename": "i.arrow"}]), "flatten_indices"),
        (edit_state(_data_files=[{"filename": "data.arrow"}, {"filename": "other.arrow"}]), "other.arrow: has the col"),
    ],
)
def test_a_damaged_folder_of_datasets_is_refused(tmp_path: Path, damage: Callable[[Path], object], says: str) -> None:
    write_table(tmp_path, "data", pa.table(PLAIN), "stream", 2)
    write_table(tmp_path, "other", pa.table({"title": ["A"], "text": ["a"]}), "stream", 2)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    assert len(rows_of(tmp_path)) == 3
    damage(tmp_path)
    with pytest.raises(InvalidRequest, match=says):
        read_passages(tmp_path)


def test_folders_and_names_that_say_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="folder of no form that is known"):
        read_passages(tmp_path)
    with pytest.raises(InvalidRequest, match="no such file"):
        read_passages(tmp_path / "none.tsv")
    for kind in ("parquet", "stream"):
        write_table(tmp_path, "data", pa.table(PLAIN), kind, 2)
    with pytest.raises(InvalidRequest, match="both Parquet and Arrow"):
        read_passages(tmp_path)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["train-00000-of-00003", "train-00002-of-00003"], "lacks 1 of 00003 shards of 'train', the first is 1"),
        (["train-0-of-1", "test-0-of-1"], "more than one table"),
        (["train-0-of-1", "more"], "more than one table"),
    ],
)
def test_a_folder_with_too_few_or_too_many_shards_is_refused(tmp_path: Path, names: list[str], says: str) -> None:
    for name in names:
        write_table(tmp_path, name, pa.table(PLAIN), "parquet", 2)
    with pytest.raises(InvalidRequest, match=says):
        read_passages(tmp_path)


def test_what_datasets_caches_beside_the_shards_is_passed_over(tmp_path: Path) -> None:
    for name in ("wiki_dpr-train-00000-of-00001", "cache-0123456789abcdef"):
        write_table(tmp_path, name, pa.table(PLAIN), "stream", 2)
    assert len(rows_of(tmp_path)) == 3


# ── documents split into passages ──


def documents(texts: Sequence[str], rows: int) -> list[pa.RecordBatch]:
    columns = {"id": range(7, 7 + len(texts)), "title": [f"T{i}" for i in range(len(texts))], "text": texts}
    table = pa.table([pa.array(column) for column in columns.values()], schema=PASSAGE_SCHEMA)
    return table.to_batches(max_chunksize=rows)


@given(
    texts=st.lists(st.text(st.sampled_from("ab \n\t\u3000"), max_size=60)),
    words=st.integers(1, 7),
    rows=st.integers(1, 4),
)
def test_split_keeps_every_word_in_its_place(texts: list[str], words: int, rows: int) -> None:
    passages = [row for batch in split_words(documents(texts, rows), words) for row in batch.to_pylist()]
    assert [row["id"] for row in passages] == list(range(len(passages)))
    for i, text in enumerate(texts):
        of_document = [row["text"].split(" ") for row in passages if row["title"] == f"T{i}"]
        assert [word for chunk in of_document for word in chunk] == text.split()
        assert all(len(chunk) == words for chunk in of_document[:-1])
        assert all(1 <= len(chunk) <= words for chunk in of_document)
    assert [row["title"] for row in passages] == sorted((r["title"] for r in passages), key=lambda t: int(t[1:]))


def test_a_passage_has_a_hundred_words() -> None:
    text = " ".join(str(i) for i in range(250))
    (batch,) = split_words(documents([text], 1))
    assert [len(passage.as_py().split()) for passage in batch.column("text")] == [100, 100, 50]
    assert set(batch.column("title").to_pylist()) == {"T0"}


def test_words_must_be_at_least_one() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        split_words([], 0)


def test_an_id_is_found_again_far_from_its_first_row(tmp_path: Path) -> None:
    ids_N = np.random.default_rng(0).permutation(20_000)
    path = tmp_path / "a.tsv"
    path.write_text("id\ttext\ttitle\n" + "".join(f"{i}\tx\ty\n" for i in [*ids_N, ids_N[5]]))
    with pytest.raises(InvalidRequest, match=f"id {ids_N[5]} stands in rows 5 and 20000"):
        list(read_passages(path).batches)
