"""Documents split into passages of 100 words, as the paper does (arXiv 2005.11401, section 3: "disjoint 100-word
chunks"; DPR, arXiv 2004.04906, section 4.1)."""

from collections.abc import Iterable, Iterator

import pyarrow as pa

from retriever_svc.formats.passages import RowBatches

WORDS = 100


def split_words(batches: Iterable[pa.RecordBatch], words: int = WORDS) -> Iterator[pa.RecordBatch]:
    """Passages of at most ``words`` words from batches of documents, in their order and of their schema.

    Words are what white space separates, and one space joins them again. Each passage keeps the title and the metadata
    of its document, the last passage of a document may be shorter, and a document without words is left out. Ids are
    numbered anew from 0. (DPR filled up the last passage of an article with words from its beginning; here no text
    stands twice.)
    """
    if words < 1:
        raise ValueError(f"words must be at least 1, it is {words}")
    return _split(batches, words)


def _split(batches: Iterable[pa.RecordBatch], words: int) -> Iterator[pa.RecordBatch]:
    gathered: RowBatches | None = None
    passage_id = 0
    for batch in batches:
        gathered = gathered or RowBatches(batch.schema)
        for document in range(len(batch)):
            title, text, *metadata = (column[document].as_py() for column in batch.columns[1:])
            found = text.split()
            for start in range(0, len(found), words):
                passage = " ".join(found[start : start + words])
                if full := gathered.add(passage_id, title, passage, tuple(metadata)):
                    yield full
                passage_id += 1
    if gathered is not None and (last := gathered.rest()):
        yield last
