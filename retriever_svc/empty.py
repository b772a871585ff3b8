"""A collection without passages, to be filled over REST; and the end of one.

Both are whole or not at all, whenever the power goes: a folder is a collection once it has CURRENT, and is none any
more once it has lost its name.
"""

import shutil
import uuid
from pathlib import Path

import pyarrow as pa
import structlog

from retriever_svc import generation as gen
from retriever_svc.build import Options, build_locked, collection_lock
from retriever_svc.changes import FOLDER
from retriever_svc.index import check_params_of_kind
from retriever_svc.metadata import schema_of
from retriever_svc.passages import passage_schema
from retriever_svc.source import Source
from shared.errors import Conflict, InvalidRequest
from shared.schemas import NewCollection

LEAVING = ".leaving-"

log = structlog.get_logger(__name__)


def check_new(asked: NewCollection) -> pa.Schema:
    """Its metadata columns. Raises: InvalidRequest: what cannot be made."""
    check_params_of_kind(asked.kind, asked.dimension, asked.search_params)
    try:
        return schema_of(asked.metadata)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param=f"metadata.{error.param}") from None


def create_empty(collection: Path, asked: NewCollection) -> None:
    """Make the folder of a collection; on the disk when this returns.

    Raises: Conflict: there is one, or another process builds it. InvalidRequest: what cannot be made. OSError: the disk
    does not take it.
    """
    metadata = check_new(asked)
    made = not collection.exists()
    with collection_lock(collection, wait=False):
        if (collection / gen.CURRENT).exists():
            raise Conflict(f"there is a collection `{collection.name}` in the data folder: reload it", param="name")
        for remains in (gen.GENERATIONS, FOLDER):  # of a creation that the power cut short
            shutil.rmtree(collection / remains, ignore_errors=True)
        source = Source(passage_schema(asked.dimension, asked.dtype, metadata), [], asked.encoder, count=0)
        try:
            build_locked(collection, source, Options(asked.kind, asked.search_params, may_be_empty=True))
        except BaseException:
            if made:
                shutil.rmtree(collection, ignore_errors=True)
            raise
    for folder in (collection.parent, collection.parent.parent):
        gen.flush(folder)


def take_away(collection: Path) -> Path:
    """Let the folder be no collection any more; on the disk when this returns. What is left to be removed.

    Raises: Conflict: another process builds it. OSError: the disk does not take it.
    """
    with collection_lock(collection, wait=False):
        leaving = collection.rename(collection.with_name(f"{LEAVING}{uuid.uuid4().hex[:8]}"))
    gen.flush(collection.parent)
    return leaving


def remove_left(collections: Path) -> None:
    """Remove what was taken away, now or before a crash."""
    for leaving in collections.glob(f"{LEAVING}*"):
        shutil.rmtree(leaving, ignore_errors=True)
