"""Passages with embeddings from RagRetriever's custom data sets and from wiki_dpr's files, and indexes over them."""

import hashlib
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever_svc import formats
from retriever_svc.build import build_collection
from retriever_svc.formats.embedded import read_embedded
from retriever_svc.formats.faiss_file import StoredVectors, check_index, read_header
from shared.errors import InvalidRequest
from tests.formats_data import columns, expected_rows, faiss_index, read_all, write_index, write_shards
from tests.retriever_data import ENCODER, random_embeddings

EMBEDDINGS = random_embeddings(300, 16)
WIKI = pa.table(columns(EMBEDDINGS, id_type=pa.string()))


def small(**changed: Any) -> pa.Table:
    given = columns(random_embeddings(3, 2), id_type=pa.string()) | changed
    return pa.table({name: column for name, column in given.items() if column is not None})


# ── rows and vectors come back ──


@given(
    n=st.integers(1, 30),
    dimension=st.integers(1, 9),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    id_type=st.sampled_from([pa.string(), pa.int64(), pa.int32(), None]),
    shards=st.integers(1, 4),
    form=st.sampled_from(["list", "large", "fixed"]),
    arrow=st.booleans(),
)
@settings(max_examples=50)
def test_tables_come_back(tmp_path_factory: pytest.TempPathFactory, *, n: int, dimension: int, **form: Any) -> None:
    embeddings = random_embeddings(n, dimension, dtype=form["dtype"])
    made = columns(embeddings, id_type=form["id_type"])
    value_type = made["embeddings"].type.value_type
    if form["form"] == "large":
        made["embeddings"] = made["embeddings"].cast(pa.large_list(value_type))
    if form["form"] == "fixed":
        made["embeddings"] = pa.FixedSizeListArray.from_arrays(made["embeddings"].flatten(), dimension)
    folder = write_shards(tmp_path_factory.mktemp("wiki"), pa.table(made), form["shards"], arrow=form["arrow"])
    source = read_embedded(folder, ENCODER).source
    rows, vectors = read_all(source)
    stored = "float16" if form["dtype"] == "float16" else "float32"
    assert (source.count, source.dtype, source.dimension, source.encoder) == (n, stored, dimension, ENCODER)
    assert [row[1:] for row in rows] == [row[1:] for row in expected_rows(n)]
    assert [row[0] for row in rows] == list(range(n) if form["id_type"] is None else range(1, n + 1))
    np.testing.assert_array_equal(vectors, embeddings.astype(stored))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shards", [1, 3])
def test_a_data_set_and_index_saved_for_rag_retriever_come_back(tmp_path: Path, shards: int) -> None:
    datasets = pytest.importorskip("datasets")
    made = {name: column.to_pylist() for name, column in columns(EMBEDDINGS).items()}
    features = datasets.Features(
        title=datasets.Value("string"),
        text=datasets.Value("string"),
        embeddings=datasets.List(datasets.Value("float32")),
    )
    data = datasets.Dataset.from_dict(made, features=features)
    data.save_to_disk(tmp_path / "passages", num_shards=shards)
    data.add_faiss_index("embeddings", string_factory="HNSW8", metric_type=faiss.METRIC_INNER_PRODUCT)
    data.get_index("embeddings").save(str(tmp_path / "index.faiss"))
    imported = read_embedded(tmp_path / "passages", ENCODER, tmp_path / "index.faiss")
    rows, vectors = read_all(imported.source)
    assert [row[1:] for row in rows] == [row[1:] for row in expected_rows(300)]
    np.testing.assert_array_equal(vectors, EMBEDDINGS)
    assert imported.faiss_file == tmp_path / "index.faiss"


@pytest.mark.parametrize("kind", ["Flat", "HNSW8,Flat"])
def test_a_table_without_embeddings_takes_them_from_the_index(tmp_path: Path, kind: str) -> None:
    folder = write_shards(tmp_path / "passages", WIKI.drop_columns("embeddings"), 3)
    index = write_index(tmp_path / "index.faiss", faiss_index(kind, EMBEDDINGS))
    source = read_embedded(folder, ENCODER, index).source
    rows, vectors = read_all(source)
    assert rows == expected_rows(300)
    np.testing.assert_array_equal(vectors, EMBEDDINGS)


@pytest.mark.parametrize(("kind", "letters"), [("HNSW8,SQ8", "IHNs"), ("IVF4_HNSW8,PQ4x4", "IwPQ")])
def test_the_published_indexes_are_checked_against_the_rows(tmp_path: Path, kind: str, letters: str) -> None:
    folder = write_shards(tmp_path / "passages", WIKI, 2)
    index = write_index(tmp_path / "published.faiss", faiss_index(kind, EMBEDDINGS))
    imported = read_embedded(folder, ENCODER, index)
    assert imported.index is not None
    assert (imported.index.kind, imported.index.count, imported.index.dimension) == (letters, 300, 16)
    assert read_embedded(folder, ENCODER).faiss_file is None


def test_a_collection_is_built_from_it(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "passages", WIKI, 2)
    name = build_collection(tmp_path / "collection", read_embedded(folder, ENCODER).source)
    built = faiss.read_index(str(tmp_path / "collection" / "generations" / name / "index.faiss"))
    np.testing.assert_array_equal(built.reconstruct_n(0, 300), EMBEDDINGS)


KINDS = [
    "Flat",
    "HNSW8,Flat",
    "HNSW8,SQ8",
    "IVF4,Flat",
    "IVF4,SQ8",
    "IVF4,PQ4x4",
    "PQ4x4",
    "SQ8",
    "IDMap,Flat",
    "PCA8,Flat",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", [faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2])
def test_a_header_says_what_faiss_says(tmp_path: Path, kind: str, metric: int) -> None:
    index = faiss.index_factory(16, kind, metric)
    index.train(EMBEDDINGS)
    if kind == "IDMap,Flat":
        index.add_with_ids(EMBEDDINGS, np.arange(300))
    else:
        index.add(EMBEDDINGS)
    header = read_header(write_index(tmp_path / "index.faiss", index))
    assert (header.dimension, header.count, header.metric) == (index.d, index.ntotal, index.metric_type)


# ── what does not fit is refused ──


@pytest.mark.parametrize(
    ("table", "param", "says"),
    [
        (small(embeddings=None), "embeddings", "has no column `embeddings`"),
        (small(text=None), "text", "must have one column `text`"),
        (small(embeddings=pa.array([1.0, 2.0, 3.0])), "embeddings", "must be lists of float16"),
        (small(embeddings=pa.array([[1], [2], [3]])), "embeddings", "must be lists of float16"),
        (small(embeddings=pa.array([[], [1.0], [2.0]])), "embeddings", "no numbers in its first row"),
        (small(embeddings=pa.array([[1.0], [2.0], [3.0, 4.0]])), "embeddings", "2 numbers in row 2, 1 in the first"),
        (small(embeddings=pa.array([[1.0], None, [2.0]])), "embeddings", "null in row 1"),
        (small(embeddings=pa.array([[1.0], [None], [2.0]])), "embeddings", "inside the vector of row 1"),
        (small(embeddings=pa.array([[1.0], [np.nan], [2.0]])), "embedding", "row 1 .* holds NaN"),
        (small(embeddings=pa.array([[1.0], [1e300], [2.0]])), "embedding", "row 1 .* holds NaN or infinity"),
        (small(id=pa.array(["1", "two", "3"])), "id", "`id` is 'two' in row 1"),
        (small(id=pa.array(["1", "2", "1"])), "id", "id 1 stands in rows 0 and 2"),
        (small().slice(0, 0), "embeddings", "no numbers in its first row"),
    ],
)
@pytest.mark.parametrize("arrow", [False, True])
def test_a_table_that_is_not_clean_is_refused(
    tmp_path: Path, table: pa.Table, param: str, says: str, arrow: bool
) -> None:
    write_shards(tmp_path, table, 1, arrow=arrow)
    with pytest.raises(InvalidRequest, match=says) as refused:
        list(read_embedded(tmp_path, ENCODER).source.clean_batches())
    assert refused.value.param == param


def test_one_file_tells_its_hash(tmp_path: Path) -> None:
    write_shards(tmp_path, WIKI, 1)
    (path,) = tmp_path.iterdir()
    assert read_embedded(path, ENCODER).source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("make", [pa.ipc.new_stream, pa.ipc.new_file])
def test_a_long_batch_is_cut(tmp_path: Path, make: Any) -> None:
    embeddings = random_embeddings(9000, 2)
    table = pa.table(columns(embeddings, id_type=pa.string()))
    with make(tmp_path / "one.arrow", table.schema) as writer:
        writer.write_table(table)
    source = read_embedded(tmp_path / "one.arrow", ENCODER).source
    assert [len(batch) for batch in source.batches] == [4096, 4096, 808]
    rows, vectors = read_all(source)
    assert rows == expected_rows(9000)
    np.testing.assert_array_equal(vectors, embeddings)


def test_memory_holds_a_few_batches_and_not_the_table(tmp_path: Path) -> None:
    n, dimension = 40_000, 16
    embeddings = np.ones((n, dimension), np.float32)
    write_shards(tmp_path, pa.table(columns(embeddings)), 4, arrow=True)
    source = read_embedded(tmp_path, ENCODER).source
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in source.clean_batches()]
    assert max(held) < n * dimension * 4 / 2


def test_readers_import_neither_torch_nor_datasets() -> None:
    modules = [f"retriever_svc.formats.{module.name}" for module in pkgutil.iter_modules(formats.__path__)]
    assert len(modules) > 10
    code = f"import sys, {', '.join(modules)}; print({{'torch', 'transformers', 'datasets'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"set()\n"


def test_the_row_is_named_inside_its_shard(tmp_path: Path) -> None:
    rows = [[1.0]] * 10
    rows[8] = [1.0, 2.0]
    made = columns(random_embeddings(10, 1)) | {"embeddings": pa.array(rows)}
    write_shards(tmp_path, pa.table(made), 2)
    with pytest.raises(InvalidRequest, match=r"train-1-of-2\.parquet: `embeddings` has 2 numbers in row 3"):
        list(read_embedded(tmp_path, ENCODER).source.clean_batches())


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (faiss_index("Flat", EMBEDDINGS, faiss.METRIC_L2), "compares by L2 distance .* inner product"),
        (faiss_index("HNSW8", EMBEDDINGS, faiss.METRIC_L2), "compares by L2 distance"),
        (faiss_index("Flat", EMBEDDINGS, faiss.METRIC_L1), "faiss's metric 2"),
        (faiss_index("Flat", EMBEDDINGS[:299]), "has 299 vectors, there are 300 passages"),
        (faiss_index("Flat", EMBEDDINGS[:, :8].copy()), "dimension 8, the embeddings have 16"),
        (faiss.IndexIVFFlat(faiss.IndexFlatIP(16), 16, 4), "not trained"),
    ],
)
def test_an_index_of_something_else_is_refused(tmp_path: Path, index: Any, says: str) -> None:
    folder = write_shards(tmp_path / "passages", WIKI, 1)
    write_index(tmp_path / "index.faiss", index)
    with pytest.raises(InvalidRequest, match=says) as refused:
        read_embedded(folder, ENCODER, tmp_path / "index.faiss")
    assert refused.value.param == "index"


@pytest.mark.parametrize("kind", ["HNSW8,SQ8", "IVF4_HNSW8,PQ4x4", "SQ8", "PCA8,Flat"])
def test_vectors_are_not_taken_from_an_index_that_changed_them(tmp_path: Path, kind: str) -> None:
    folder = write_shards(tmp_path / "passages", WIKI.drop_columns("embeddings"), 1)
    index = write_index(tmp_path / "index.faiss", faiss_index(kind, EMBEDDINGS))
    with pytest.raises(InvalidRequest, match="does not keep the vectors whole"):
        read_embedded(folder, ENCODER, index)


@pytest.mark.parametrize("data", [b"", b"IxFI", b"PAR1" + b"\0" * 60, b"IBxF" + b"\1" * 60, b"IxFI" + b"\xff" * 60])
def test_a_file_that_is_no_index_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "index.faiss").write_bytes(data)
    with pytest.raises(InvalidRequest, match=r"index\.faiss: is no index file of faiss"):
        check_index(tmp_path / "index.faiss", count=None, dimension=None)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        check_index(tmp_path / "none.faiss", count=None, dimension=None)


def test_an_index_cut_short_gives_no_vectors(tmp_path: Path) -> None:
    path = write_index(tmp_path / "index.faiss", faiss_index("Flat", EMBEDDINGS))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InvalidRequest, match="cannot be read by this faiss"):
        StoredVectors(path)


def test_paths_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no such file"):
        read_embedded(tmp_path / "none", ENCODER)
    with pytest.raises(InvalidRequest, match="no Parquet or Arrow files"):
        read_embedded(tmp_path, ENCODER)
