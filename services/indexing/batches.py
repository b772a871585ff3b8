"""Passages of files in any form that is read, to be embedded, or in batches with embeddings."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from retriever_svc.formats.split import split_words
from retriever_svc.formats.texts import read_passages
from retriever_svc.metadata import NO_METADATA
from retriever_svc.source import files_identity, files_in, from_parquet
from services.indexing.corpus import Corpus
from services.indexing.options import EncoderOptions
from shared.arrow import vector_array
from shared.errors import InvalidRequest

ROWS = 512  # of a request


def has_embeddings(path: Path) -> bool:
    """Whether it is a Parquet file with the column ``embedding``."""
    try:
        return path.suffix == ".parquet" and "embedding" in pq.read_schema(path).names
    except (OSError, pa.ArrowException):
        return False


def corpus_of(path: Path, words: int | None = None, metadata: pa.Schema | None = None) -> Corpus:
    """The passages of a file or folder, split into ``words`` where given, with ``metadata`` as `read_passages` has it.

    Raises: InvalidRequest: it is of no form that is read, or a column cannot be metadata.
    """
    passages = read_passages(path, metadata)
    identity = f"{files_identity(*files_in(path))} {'whole' if words is None else f'split into {words} words'}"

    def batches() -> Iterable[pa.RecordBatch]:
        return passages.batches if words is None else split_words(passages.batches, words)

    return Corpus(batches, identity, passages.metadata)


def embedded_batches(
    path: Path, encoder: str | None, words: int | None = None, metadata: pa.Schema = NO_METADATA
) -> Iterator[pa.RecordBatch]:
    """Batches of id, title, text, embedding and those of ``metadata`` that the file has, of at most ``ROWS``.

    Raises: InvalidRequest: the file cannot be read, or holds no embeddings and no ``encoder`` is named.
    """
    if has_embeddings(path):
        for batch in from_parquet(path, "unknown", metadata, all_there=False).clean_batches():
            yield from _cut(batch)
        return
    if encoder is None:
        raise InvalidRequest(f"{path} holds no embeddings: name the passage encoder in --encoder", param="encoder")
    from services.indexing.encoder import PassageEncoder  # noqa: PLC0415  torch takes a moment

    model = PassageEncoder(EncoderOptions(encoder))
    found = read_passages(path, metadata, all_there=False).batches
    for batch in found if words is None else split_words(found, words):
        for part in _cut(batch):
            embeddings = model.encode(part["title"].to_pylist(), part["text"].to_pylist())
            columns = {name: part.column(name) for name in part.schema.names}
            yield pa.record_batch({**columns, "embedding": vector_array(embeddings)})


def _cut(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(batch), ROWS):
        yield batch.slice(start, ROWS)
