"""Documents split into passages of 100 words, as the paper does (arXiv 2005.11401, section 3: "disjoint 100-word
chunks"; DPR, arXiv 2004.04906, section 4.1)."""

from collections.abc import Iterable, Iterator

import pyarrow as pa

from retriever_svc.formats.passages import RowBatches

WORDS = 100


def split_words(batches: Iterable[pa.RecordBatch], words: int = WORDS) -> Iterator[pa.RecordBatch]:
    """Passages of at most ``words`` words from batches of documents, in their order; ``PASSAGE_SCHEMA`` both.

    Words are what white space separates, and one space joins them again. Each passage keeps the title of its document,
    the last passage of a document may be shorter, and a document without words is left out. Ids are numbered anew
    from 0. (DPR filled up the last passage of an article with words from its beginning; here no text stands twice.)
    """
    if words < 1:
        raise ValueError(f"words must be at least 1, it is {words}")
    return _numbered(_passages(batches, words))


def _numbered(rows: Iterable[tuple[str, str]]) -> Iterator[pa.RecordBatch]:
    gathered = RowBatches()
    for passage_id, (title, text) in enumerate(rows):
        if full := gathered.add(passage_id, title, text):
            yield full
    if last := gathered.rest():
        yield last


def _passages(batches: Iterable[pa.RecordBatch], words: int) -> Iterator[tuple[str, str]]:
    for batch in batches:
        for title, text in zip(batch.column("title"), batch.column("text"), strict=True):
            found = text.as_py().split()
            for start in range(0, len(found), words):
                yield title.as_py(), " ".join(found[start : start + words])
