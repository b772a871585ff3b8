"""The first start: makes the collection ``default`` from a Parquet file of passages, and renews it when that changes.

A ``default`` that somebody built himself is never touched.
"""

import time
from pathlib import Path

import structlog

from retriever_svc import generation as gen
from retriever_svc.build import Options, build_locked, collection_lock
from retriever_svc.source import from_parquet
from shared.errors import InvalidRequest, StartupError

DEFAULT = "default"

log = structlog.get_logger(__name__)


def seed_default(collections: Path, seed: Path) -> None:
    """Make ``collections/default`` from ``seed`` where it is missing or was made from another content of it.

    Does nothing where the seed file does not exist. Two processes that start at once build it once.

    Raises: StartupError: the seed cannot be used, or there is no collection yet and the folder cannot be written.
    """
    if not seed.is_file():
        return
    collection = collections / DEFAULT
    fingerprint = gen.file_sha256(seed)
    reason = _why_build(collection, fingerprint)
    if reason is None:
        return
    try:
        with collection_lock(collection):
            reason = _why_build(collection, fingerprint)  # another process may have built it while we waited
            if reason is None:
                return
            log.info("seeding", collection=DEFAULT, because=reason, source=str(seed))
            started = time.perf_counter()
            build_locked(collection, from_parquet(seed), Options(origin="seed"))
            log.info("seeded", collection=DEFAULT, seconds=round(time.perf_counter() - started, 2))
    except InvalidRequest as error:
        raise StartupError(f"the seed {seed} cannot be used: {error.message}") from error
    except OSError as error:
        if (collection / gen.CURRENT).exists():
            log.warning("seed_not_renewed", collection=DEFAULT, because=reason, cannot_write=str(error))
            return
        raise StartupError(
            f"the collection `{DEFAULT}` cannot be made in {collections} ({error}): "
            "make the data folder writable, or name another in RETRIEVER_DATA_DIR"
        ) from error


def _why_build(collection: Path, seed_sha256: str) -> str | None:
    if not (collection / gen.CURRENT).exists():
        return f"there is no collection `{DEFAULT}`"
    manifest = gen.read_manifest(gen.current_generation(collection))
    if manifest.origin == "seed" and manifest.source_sha256 != seed_sha256:
        return f"the seed of the collection `{DEFAULT}` has changed"
    return None
