"""Builds the next generation of a collection from the one that serves and the changes since.

    python -m retriever_svc.rebuild FOLDER GENERATION UPTO [KIND [SEARCH_PARAMS]]

A process of its own, of low priority: a search must not wait for it. Prints the name of what it built. It ends when its
standard input does: the service holds the other end.
"""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from retriever_svc import generation as gen
from retriever_svc.build import Options, build_collection
from retriever_svc.changes import Upsert, read_changes, to_batch
from retriever_svc.delta import Delta
from retriever_svc.index import recipe
from retriever_svc.passages import PassageTable, passage_schema
from retriever_svc.source import BATCH_ROWS, Source
from shared.schemas import SearchParams

NICENESS = 10
STDIN = 0


def rebuild(
    folder: Path, generation: str, upto: int, kind: str | None = None, params: SearchParams | None = None
) -> str:
    """The new generation's name. Whoever asked for it makes it the current one, if nobody else has moved on.

    ``kind`` and ``params``: those of the generation, where they are None; a new kind has its own.
    """
    old = folder / gen.GENERATIONS / generation
    manifest = gen.read_manifest(old)
    if kind is None:
        kind, params = manifest.kind, params or _chosen_params(manifest)
    passages = PassageTable.open(old / gen.PASSAGES, manifest.passages_version)
    delta = Delta(passages, manifest.dimension)
    for _, change in read_changes(folder, manifest.lineage, after=manifest.applied, upto=upto):
        delta.apply(change)
    source = Source(
        passage_schema(manifest.dimension, manifest.dtype, passages.metadata),
        _batches(passages, delta, manifest.dtype),
        manifest.encoder,
        count=manifest.count - delta.n_base_dead + delta.count,
        attribution=manifest.attribution,
        identity=f"{generation} and its changes to {upto}",
    )
    options = Options(kind, params, lineage=manifest.lineage, applied=upto, current=False, may_be_empty=True)
    return build_collection(folder, source, options=options)


def _chosen_params(manifest: gen.Manifest) -> SearchParams:
    """What differs from the kind's own for that count: the rest grows with the collection."""
    own = recipe(manifest.kind, manifest.dimension, manifest.count).params
    chosen = {name: value for name, value in manifest.search_params if value != getattr(own, name)}
    return SearchParams(**chosen)


def _end_with_input() -> None:
    """End when the other end of the pipe does: what nobody waits for must not be built."""
    while os.read(STDIN, 1):  # not through sys.stdin, whose lock a thread must not hold when Python ends
        pass
    os._exit(1)


def _batches(passages: PassageTable, delta: Delta, dtype: str) -> Iterator[pa.RecordBatch]:
    first = 0
    for batch in passages.batches(BATCH_ROWS):
        alive = ~delta.base_dead[first : first + len(batch)]
        first += len(batch)
        yield batch if alive.all() else batch.filter(pa.array(alive))
    rows = delta.alive()
    for part in np.array_split(rows, max(1, -(-len(rows) // BATCH_ROWS))):
        if len(part):
            found = [delta.passage(row) for row in part.tolist()]
            ids = np.array([passage.id for passage in found], np.int64)
            titles, texts = [passage.title for passage in found], [passage.text for passage in found]
            yield to_batch(Upsert(ids, titles, texts, delta.embeddings(part), delta.metadata(part)), dtype)


def main() -> None:
    folder, generation, upto, *rest = sys.argv[1:]
    kind = rest[0] if rest else None
    params = SearchParams.model_validate_json(rest[1]) if len(rest) > 1 else None
    os.nice(NICENESS)
    threading.Thread(target=_end_with_input, daemon=True).start()
    sys.stdout.write(rebuild(Path(folder), generation, int(upto), kind or None, params) + "\n")


if __name__ == "__main__":
    main()
