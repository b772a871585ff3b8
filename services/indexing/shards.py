"""Finished shards on disk: Arrow files of passages with their embeddings, each there whole or not at all."""

import uuid
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retriever_svc.formats.passages import with_metadata
from retriever_svc.generation import flush
from retriever_svc.metadata import schema_of
from services.indexing.plan import PARTIAL, Plan

_PLAN_KEY = b"plan"
_EMBEDDING_TYPES = {"float16": pa.float16(), "float32": pa.float32()}


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05}.arrow"


def shard_schema(plan: Plan) -> pa.Schema:
    embedding = pa.field("embedding", pa.list_(_EMBEDDING_TYPES[plan.dtype], plan.encoder.dimension))
    return with_metadata(schema_of(plan.metadata)).append(embedding).with_metadata({_PLAN_KEY: plan.digest})


def write_shard(
    folder: Path, plan: Plan, shard: int, passages: pa.RecordBatch, embeddings_BD: npt.NDArray[np.floating]
) -> None:
    """Write a shard under a temporary name of its own, wait for the disk, and rename it."""
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(embeddings_BD.ravel()), embeddings_BD.shape[1])
    schema = shard_schema(plan)
    path = shard_path(folder, shard)
    # Of its own: a worker that outlives a killed run for a moment must not write into the file of the next run.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.record_batch([*passages.columns, embedding], schema=schema))
    flush(partial)
    partial.replace(path)
    flush(folder)


def read_shard(folder: Path, plan: Plan, shard: int) -> pa.RecordBatch | None:
    """A finished shard, mapped into memory rather than read; None: it is missing, damaged, or of another plan."""
    try:
        with pa.memory_map(str(shard_path(folder, shard))) as file, pa.ipc.open_file(file) as reader:
            if reader.schema.metadata != {_PLAN_KEY: plan.digest.encode()} or reader.num_record_batches != 1:
                return None
            batch = reader.get_batch(0)
    except (OSError, pa.ArrowException):
        return None
    return batch if len(batch) == len(plan.rows_of(shard)) else None


def missing_shards(folder: Path, plan: Plan) -> list[int]:
    return [shard for shard in plan.shards if read_shard(folder, plan, shard) is None]
