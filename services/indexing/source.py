"""Finished shards as the source of a collection."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from retriever_svc.metadata import schema_of
from retriever_svc.passages import passage_schema
from retriever_svc.source import Source
from services.indexing.plan import Plan, read_plan
from services.indexing.shards import missing_shards, read_shard, shard_path
from shared.errors import InvalidRequest, StartupError


def shards_source(folder: Path, encoder_fingerprint: str, *, attribution: str | None = None) -> Source:
    """The shards in `folder`, in order, one batch each.

    ``encoder_fingerprint`` is that of the *question* encoder that will search them (``/info`` of the generator names
    it): it names the embedding space, and nothing in a context encoder tells to which one it belongs.

    Raises:
        StartupError: nothing has been embedded there, or not all of it.
    """
    plan = read_plan(folder)
    if plan is None:
        raise StartupError(f"{folder} holds no embeddings: embed a corpus into it first")
    if missing := missing_shards(folder, plan):
        raise StartupError(
            f"{len(missing)} of {len(plan.shards)} shards are missing in {folder}: run the embedding again to finish it"
        )
    return Source(
        schema=passage_schema(plan.encoder.dimension, plan.dtype, schema_of(plan.metadata)),
        batches=_Batches(folder, plan),
        encoder=encoder_fingerprint,
        count=plan.count,
        attribution=attribution,
        identity=plan.digest,
    )


class _Batches:
    """Can be read more than once."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder, self._plan = folder, plan

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for shard in self._plan.shards:
            batch = read_shard(self._folder, self._plan, shard)
            if batch is None:
                raise InvalidRequest(f"{shard_path(self._folder, shard)} is gone or damaged", param="source")
            yield batch
