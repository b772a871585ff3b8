"""The original DPR's files, written as its own scripts write them, and arrays beside passages."""

import csv
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever_svc.formats.dpr import DprFiles, find_dpr_files, read_dpr
from retriever_svc.formats.npy import read_npy
from shared.errors import InvalidRequest
from tests.formats_data import Vectors, expected_rows, faiss_index, read_all, write_index
from tests.retriever_data import ENCODER, random_embeddings, text, title

N, D = 60, 6
EMBEDDINGS = random_embeddings(N, D)


def write_passages(folder: Path, form: str = "dict", n: int = N, *, prefix: str = "") -> Path:
    if form == "tsv":
        with (folder / "psgs_w100.tsv").open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["id", "text", "title"])
            writer.writerows((i, text(i), title(i)) for i in range(1, n + 1))
        return folder / "psgs_w100.tsv"
    path = folder / "psgs_w100.tsv.pkl"
    if form == "dict":
        return dump(path, {f"{prefix}{i}": (text(i), title(i)) for i in range(n, 0, -1)})
    first = 0 if form == "list from 0" else 1
    return dump(path, [(text(i), title(i)) for i in range(first, first + n)])


def dump(path: Path, value: Any, protocol: int = pickle.DEFAULT_PROTOCOL) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def shard_rows(embeddings_ND: Vectors, *, prefix: str = "", first: int = 1) -> list[tuple[Any, Vectors]]:
    return [(f"{prefix}{i}", vector) for i, vector in enumerate(embeddings_ND, first)]


def with_extra_dimension(embeddings_ND: Vectors) -> Vectors:
    """As DPR's DenseHNSWFlatIndexer makes all vectors of one length."""
    norms_N = (embeddings_ND**2).sum(axis=1)
    return np.hstack([embeddings_ND, np.sqrt(norms_N.max() - norms_N)[:, None]]).astype(np.float32)


def hnsw(embeddings_ND: Vectors, *, codes: bool) -> Any:
    extended = with_extra_dimension(embeddings_ND)
    d = extended.shape[1]
    index = faiss.IndexHNSWSQ(d, faiss.ScalarQuantizer.QT_8bit, 8) if codes else faiss.IndexHNSWFlat(d, 8)
    index.train(extended)
    index.add(extended)
    return index


# ── rows and vectors come back ──


@given(
    n=st.integers(1, 40),
    shards=st.integers(1, 12),
    order=st.randoms(use_true_random=False),
    form=st.sampled_from(["dict", "list", "list from 0", "tsv"]),
    prefix=st.sampled_from(["", "wiki:"]),
    protocol=st.integers(0, pickle.HIGHEST_PROTOCOL),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    suffix=st.sampled_from([".pkl", ""]),
)
@settings(max_examples=60)
def test_shards_and_passages_are_joined_by_id(
    tmp_path_factory: pytest.TempPathFactory, *, n: int, shards: int, order: Any, form: str, prefix: str, **how: Any
) -> None:
    folder = tmp_path_factory.mktemp("dpr")
    first = 0 if form == "list from 0" else 1
    embeddings = random_embeddings(n, 3, dtype=how["dtype"])
    rows = shard_rows(embeddings, prefix=prefix, first=first)
    order.shuffle(rows)
    if form == "list from 0":  # the first shard tells where a list counts from
        rows.sort(key=lambda row: row[0] != f"{prefix}0")
    per_shard = -(-n // shards)
    for shard in range(shards):
        part = rows[shard * per_shard : (shard + 1) * per_shard]
        dump(folder / f"wiki_passages_{shard}{how['suffix']}", part, how["protocol"])
    write_passages(folder, form, n, prefix=prefix)
    source = read_dpr(find_dpr_files(folder), ENCODER).source
    found, vectors = read_all(source)
    expected = [int(row[0].removeprefix(prefix)) for row in rows]
    assert found == [(i, title(i), text(i)) for i in expected]
    np.testing.assert_array_equal(vectors, np.stack([row[1] for row in rows]).astype(source.dtype))
    assert (source.count, source.encoder) == (n, ENCODER)


@pytest.mark.parametrize("form", ["dict", "list", "tsv"])
@pytest.mark.parametrize("named", ["wiki.index", "index"])
def test_vectors_come_from_a_flat_index(tmp_path: Path, form: str, named: str) -> None:
    write_passages(tmp_path, form)
    order = np.random.default_rng(1).permutation(N)
    index = write_index(tmp_path / f"{named}.dpr", faiss_index("Flat", EMBEDDINGS[order]))
    dump(tmp_path / f"{named}_meta.dpr", [str(i + 1) for i in order])
    imported = read_dpr(find_dpr_files(tmp_path), ENCODER)
    rows, vectors = read_all(imported.source)
    assert rows == [expected_rows(N)[i] for i in order]
    np.testing.assert_array_equal(vectors, EMBEDDINGS[order])
    assert imported.faiss_file == index


def test_the_extra_dimension_of_dprs_hnsw_is_taken_off(tmp_path: Path) -> None:
    write_passages(tmp_path)
    write_index(tmp_path / "wiki.index.dpr", hnsw(EMBEDDINGS, codes=False))
    dump(tmp_path / "wiki.index_meta.dpr", list(range(1, N + 1)))
    imported = read_dpr(find_dpr_files(tmp_path / "wiki"), ENCODER)
    rows, vectors = read_all(imported.source)
    assert rows == expected_rows(N)
    np.testing.assert_array_equal(vectors, EMBEDDINGS)
    assert imported.faiss_file is None, "it compares by L2 in another dimension"


def test_vectors_of_8_bit_codes_are_those_that_faiss_decodes(tmp_path: Path) -> None:
    write_passages(tmp_path)
    name = "hf_bert_base.hnswSQ8_correct_phi_128.c_index"
    index = hnsw(EMBEDDINGS, codes=True)
    write_index(tmp_path / f"{name}.index.dpr", index)
    dump(tmp_path / f"{name}.index_meta.dpr", [str(i) for i in range(1, N + 1)])
    files = find_dpr_files(tmp_path)
    with pytest.raises(InvalidRequest, match="does not keep the vectors whole"):
        read_dpr(files, ENCODER)
    _, vectors = read_all(read_dpr(files, ENCODER, quantized=True).source)
    np.testing.assert_array_equal(vectors, np.stack([index.reconstruct(i)[:-1] for i in range(N)]))
    np.testing.assert_allclose(vectors, EMBEDDINGS, atol=0.05)


def test_shards_come_before_the_index(tmp_path: Path) -> None:
    write_passages(tmp_path)
    dump(tmp_path / "wiki_0.pkl", shard_rows(EMBEDDINGS))
    write_index(tmp_path / "wiki.index.dpr", hnsw(EMBEDDINGS, codes=True))
    dump(tmp_path / "wiki.index_meta.dpr", [str(i) for i in range(1, N + 1)])
    np.testing.assert_array_equal(read_all(read_dpr(find_dpr_files(tmp_path), ENCODER).source)[1], EMBEDDINGS)


# ── what does not fit is refused ──


class Planted:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def refused(folder: Path, says: str, **options: Any) -> None:
    with pytest.raises(InvalidRequest, match=says):
        list(read_dpr(find_dpr_files(folder), ENCODER, **options).source.clean_batches())


VECTOR = np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("shard", "says"),
    [
        ([("1", VECTOR), ("1", VECTOR)], "id 1 stands in rows 0 and 1"),
        ([("1", VECTOR)], r"has 2 passages, but there are 1 embeddings"),
        ([("1", VECTOR), ("7", VECTOR)], r"wiki_0\.pkl: row 1 is passage 7, which is not in psgs_w100\.tsv\.pkl"),
        ([("1", VECTOR), ("0", VECTOR)], "row 1 is passage 0, which is not in"),
        ([("1", VECTOR), ("x", VECTOR)], "`id` is 'x' in row 1"),
        ([("1", VECTOR), ("-2", VECTOR)], "`id` is -2 in row 1"),
        ([("1", VECTOR), ("2", np.zeros(3, np.float32))], "the vector of row 1 has dimension 3, the ones before it 2"),
        ([("1", VECTOR), ("2", np.zeros(2, np.int64))], r"the vector of row 1 is int64\[1, 2\]"),
        ([("1", np.zeros(0, np.float32))], r"the vector of row 0 is float32\[1, 0\]"),
        ([("1", VECTOR), ("2", np.array([1, np.nan], np.float32))], r"row 1 \(id 2\) holds NaN"),
        ([("1", VECTOR), ("2", [0.0, 1.0])], r"row 1 is no \(id, vector\)"),
        ([("1", VECTOR), "2"], r"row 1 is no \(id, vector\)"),
        ([("1", VECTOR), (10**5000, VECTOR)], "`id` is <int> in row 1"),
        ([("1", VECTOR), ([["2"]], VECTOR)], "`id` is <list> in row 1"),
        ({"1": VECTOR}, "holds a dict, not a list"),
        ([], "has no embeddings, nor have the other shards"),
        ([("1", Planted())], r"asks for `posix\.system`"),
    ],
)
def test_a_shard_that_is_not_clean_is_refused(tmp_path: Path, shard: Any, says: str) -> None:
    write_passages(tmp_path, n=2)
    dump(tmp_path / "wiki_0.pkl", shard)
    refused(tmp_path, says)


@pytest.mark.parametrize(
    ("passages", "says"),
    [
        ({"1": ("a",)}, r"entry '1' is no \(text, title\)"),
        ({"1": "ab"}, r"entry '1' is no \(text, title\)"),
        ({"1": ("a", None)}, "`title` of entry '1' is a NoneType"),
        ({"1": (b"a", "b")}, "`text` of entry '1' is a bytes"),
        ({"1": ("\ud800", "b")}, "lone surrogate"),
        ({"x": ("a", "b")}, "`id` is 'x' in entry 'x'"),
        ({"1": ("a", "b"), 1: ("c", "d")}, "id 1 stands in rows 0 and 1"),
        ([("a", "b", "c")], r"entry 1 is no \(text, title\)"),
        ("text", "holds a str, not a dict"),
        ({}, "is not in"),
        ({"1": ("a", "b"), "2": ("c", "d")}, "has 2 passages, but there are 1 embeddings"),
        ({"1": Planted()}, r"asks for `posix\.system`"),
    ],
)
def test_pickled_passages_that_are_not_clean_are_refused(tmp_path: Path, passages: Any, says: str) -> None:
    dump(tmp_path / "psgs_w100.tsv.pkl", passages)
    dump(tmp_path / "wiki_0.pkl", [("1", VECTOR)])
    refused(tmp_path, says)


@pytest.mark.parametrize(
    ("index", "meta", "says"),
    [
        (lambda: faiss_index("Flat", EMBEDDINGS), ["1"], "holds 1 ids, wiki.index.dpr has 60 vectors"),
        (lambda: faiss_index("Flat", EMBEDDINGS), {"1": 1}, "holds a dict, wiki.index.dpr has 60 vectors"),
        (lambda: faiss_index("Flat", EMBEDDINGS[:9]), list(range(9)), "has 9 vectors, psgs_w100.tsv.pkl has 60"),
        (lambda: faiss.IndexFlatIP(D), [], "has no vectors"),
        (lambda: faiss_index("Flat", EMBEDDINGS), [*range(1, N), 99], "row 59 is passage 99, which is not in"),
        (lambda: faiss_index("Flat", EMBEDDINGS), [*range(1, N), 3], "id 3 stands in rows 2 and 59"),
        (lambda: faiss_index("Flat", EMBEDDINGS), [*range(1, N), None], "`id` is None in row 59"),
        (lambda: faiss_index("Flat", EMBEDDINGS, faiss.METRIC_L2), list(range(1, N + 1)), "compares by L2 distance"),
        (lambda: faiss_index("HNSW8", EMBEDDINGS, faiss.METRIC_L2), list(range(1, N + 1)), "differ in length"),
        (lambda: faiss_index("Flat", EMBEDDINGS), Planted(), r"asks for `posix\.system`"),
    ],
)
def test_an_index_of_something_else_is_refused(tmp_path: Path, index: Callable[[], Any], meta: Any, says: str) -> None:
    write_passages(tmp_path)
    write_index(tmp_path / "wiki.index.dpr", index())
    dump(tmp_path / "wiki.index_meta.dpr", meta)
    refused(tmp_path, says)


def test_a_folder_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"has no passages: one of psgs_w100\.tsv\.pkl"):
        find_dpr_files(tmp_path)
    passages = write_passages(tmp_path)
    with pytest.raises(InvalidRequest, match="has no embeddings"):
        find_dpr_files(tmp_path)
    with pytest.raises(InvalidRequest, match="comes without embeddings"):
        read_dpr(DprFiles(passages), ENCODER)
    (tmp_path / "wiki.index.dpr").touch()
    with pytest.raises(InvalidRequest, match="come together"):
        find_dpr_files(tmp_path)
    for name in ("wiki.index_meta.dpr", "other.index.dpr", "other.index_meta.dpr"):
        (tmp_path / name).touch()
    with pytest.raises(InvalidRequest, match="several files"):
        find_dpr_files(tmp_path)
    for path in ("other", "other.index.dpr"):
        assert find_dpr_files(tmp_path / path).index == tmp_path / "other.index.dpr"


# ── an array beside passages ──


@given(n=st.integers(1, 40), dimension=st.integers(1, 9), dtype=st.sampled_from(["float16", "float32", "float64"]))
def test_an_array_and_a_tsv_come_back(
    tmp_path_factory: pytest.TempPathFactory, n: int, dimension: int, dtype: str
) -> None:
    folder = tmp_path_factory.mktemp("npy")
    embeddings = random_embeddings(n, dimension, dtype=dtype)
    np.save(folder / "vectors.npy", embeddings)
    source = read_npy(folder / "vectors.npy", write_passages(folder, "tsv", n), ENCODER)
    rows, vectors = read_all(source)
    assert rows == expected_rows(n)
    assert source.count == n
    np.testing.assert_array_equal(vectors, embeddings.astype(source.dtype))


def test_an_array_longer_than_a_batch_is_cut_where_the_passages_are(tmp_path: Path) -> None:
    embeddings = np.asfortranarray(random_embeddings(5000, 2))
    np.save(tmp_path / "vectors.npy", embeddings)
    source = read_npy(tmp_path / "vectors.npy", write_passages(tmp_path, "tsv", 5000), ENCODER)
    assert [len(batch) for batch in source.batches] == [4096, 904]
    np.testing.assert_array_equal(read_all(source)[1], embeddings)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (EMBEDDINGS[:59], r"has 59 rows, psgs_w100\.tsv has more passages"),
        (random_embeddings(61, D), r"has 61 rows, psgs_w100\.tsv has 60 passages"),
        (EMBEDDINGS[0], r"the array is float32\[6\]"),
        (EMBEDDINGS[:, :0], r"the array is float32\[60, 0\]"),
        (EMBEDDINGS.astype(np.int8), r"the array is int8\[60, 6\]"),
        (np.array([None] * N), "cannot be read as an array"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(tmp_path: Path, array: Any, says: str) -> None:
    np.save(tmp_path / "vectors.npy", array)
    passages = write_passages(tmp_path, "tsv")
    with pytest.raises(InvalidRequest, match=says) as refusal:
        list(read_npy(tmp_path / "vectors.npy", passages, ENCODER).clean_batches())
    assert "vectors.npy" in refusal.value.message


@pytest.mark.parametrize("damage", [lambda data: data[:-4], lambda data: data[:20], lambda _: b"", lambda _: b"words"])
def test_a_damaged_array_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "vectors.npy"
    np.save(path, EMBEDDINGS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InvalidRequest, match="cannot be read as an array"):
        read_npy(path, write_passages(tmp_path, "tsv"), ENCODER)


def test_several_arrays_in_one_file_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "vectors.npz", a=EMBEDDINGS)
    with pytest.raises(InvalidRequest, match="several arrays"):
        read_npy(tmp_path / "vectors.npz", write_passages(tmp_path, "tsv"), ENCODER)
