"""What readers see while passages are written and generations take over."""

from pathlib import Path

import numpy as np

from retriever_svc.build import build_collection
from retriever_svc.changes import Upsert
from retriever_svc.collection import Collection
from retriever_svc.search import SearchItem
from shared.retrieval import RetrieveQuery
from tests.retriever_data import passage_table, random_embeddings, source_of


def opened(folder: Path) -> Collection:
    return Collection.open(folder, device="cpu")


def test_searches_of_one_generation_that_was_loaded_twice_share_no_batch(tmp_path: Path) -> None:
    """A rollback to the generation that serves loads it anew, and later writes are in the new one alone."""
    build_collection(tmp_path, source_of(passage_table(random_embeddings(5, 4))))
    query = RetrieveQuery(random_embeddings(1, 4), n_docs=1, collection="x")
    before, after = opened(tmp_path), opened(tmp_path)
    assert before.generation == after.generation
    assert SearchItem(query, before).key == SearchItem(query, before).key
    assert SearchItem(query, before).key != SearchItem(query, after).key


def test_a_passage_can_be_read_once_its_id_is_known(tmp_path: Path) -> None:
    """Passages are read by id from other threads than the one that writes them."""
    build_collection(tmp_path, source_of(passage_table(random_embeddings(5, 4))))
    collection, read = opened(tmp_path), []

    class Rows(dict[int, int]):
        def __setitem__(self, passage_id: int, row: int) -> None:
            super().__setitem__(passage_id, row)
            read.append(collection.passage(passage_id).title)

    collection.delta._rows = Rows()
    collection.apply(1, Upsert(np.array([7, 8]), ["a", "b"], ["", ""], random_embeddings(2, 4)))
    assert read == ["a", "b"]
