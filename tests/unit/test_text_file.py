"""Passages read from the mapped texts are those of the table, for any rows in any order; damage is refused by name."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retriever_svc import generation as gen
from retriever_svc.build import build_collection
from retriever_svc.collection import Collection
from retriever_svc.passages import PassageTable, passage_schema
from retriever_svc.text_file import OFFSETS, TEXTS, MappedTexts, TextWriter, offsets_bytes
from shared.documents import passage_columns
from shared.errors import StartupError
from tests.filters_data import METADATA, metadata_columns, random_metadata
from tests.retriever_data import passage_table, random_embeddings, source_of

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def batch(titles: list[str], texts: list[str]) -> pa.RecordBatch:
    count = len(titles)
    embeddings = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(count, np.float32)), 1)
    columns = [pa.array(range(count), pa.int64()), pa.array(titles, pa.string()), pa.array(texts, pa.string())]
    return pa.record_batch([*columns, embeddings], schema=passage_schema(1, "float32"))


@settings(max_examples=60)
@given(passages=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=20), data=st.data())
def test_what_was_written_is_read(
    passages: list[tuple[str, str]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    cut = data.draw(st.integers(0, len(passages)))
    with TextWriter(folder, []) as writer:
        for part in (passages[:cut], passages[cut:]):
            # A slice of a longer batch, as readers cut them.
            writer.add(batch(["before", *(a for a, _ in part)], ["it", *(b for _, b in part)]).slice(1))
    rows = data.draw(st.lists(st.integers(0, len(passages) - 1), max_size=30))

    texts = MappedTexts.open(folder, len(passages), metadata=False)
    assert texts is not None
    found = texts.take(np.array(rows, np.int64), np.array(rows, np.int64) + 7)
    found.validate(full=True)
    assert found.to_pylist() == [{"id": r + 7, "title": passages[r][0], "text": passages[r][1]} for r in rows]
    assert (folder / OFFSETS).stat().st_size == offsets_bytes(len(passages))


def with_metadata(folder: Path, n: int = 40) -> None:
    table = passage_table(random_embeddings(n, 8))
    for name, column in metadata_columns(random_metadata(n, seed=5)).items():
        table = table.append_column(name, column)
    build_collection(folder, source_of(table))


def without_texts(folder: Path) -> None:
    """As a generation was that was built before there were such files."""
    current = gen.current_generation(folder)
    manifest = json.loads((current / gen.MANIFEST).read_text())
    for name in (TEXTS, OFFSETS):
        (current / name).unlink()
        del manifest["files"][name]
    (current / gen.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("metadata", [False, True])
def test_they_are_the_tables_to_the_byte_and_a_generation_without_is_served_from_the_table(
    tmp_path: Path, *, metadata: bool
) -> None:
    folder = tmp_path / "mine"
    with_metadata(folder) if metadata else build_collection(folder, source_of(passage_table(random_embeddings(40, 8))))
    rows = np.array([39, 0, 7, 7, 12, 39])
    mapped = Collection.open(folder, device="cpu").take(rows)
    without_texts(folder)
    read = Collection.open(folder, device="cpu").take(rows)
    assert mapped.equals(read)
    assert mapped.field("id").to_pylist() == rows.tolist()
    if metadata:
        assert set(json.loads(mapped.field("metadata")[0].as_py())) == set(METADATA.names)


def test_texts_that_are_of_other_passages_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    build_collection(folder, source_of(passage_table(random_embeddings(40, 8))))
    current = gen.current_generation(folder)
    version = gen.read_manifest(current).passages_version
    kept = (current / OFFSETS).read_bytes()

    (current / OFFSETS).write_bytes(kept[:-8])  # of a passage less
    with pytest.raises(StartupError, match=r"texts\.offsets does not fit .*the 40 passages"):
        PassageTable.open(current / gen.PASSAGES, version)

    (current / OFFSETS).write_bytes(kept)
    (current / TEXTS).write_bytes((current / TEXTS).read_bytes()[:-1])
    with pytest.raises(StartupError, match=r"texts\.offsets does not fit .*texts\.bin"):
        PassageTable.open(current / gen.PASSAGES, version)


def test_passages_without_a_letter_are_read(tmp_path: Path) -> None:
    with TextWriter(tmp_path, []) as writer:
        writer.add(batch(["", ""], ["", ""]))
    texts = MappedTexts.open(tmp_path, 2, metadata=False)
    assert texts is not None
    empty = pa.array(["", ""])
    assert texts.take(np.array([1, 0]), np.array([5, 6])).equals(passage_columns(pa.array([5, 6]), empty, empty))
