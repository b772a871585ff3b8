"""Room and rights in the data folder, and for a checkpoint that has to be downloaded."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from services.doctor.collections import current_manifests
from services.doctor.deployment import Deployment
from services.doctor.finding import Finding, Findings

_found = Findings("disk")

LEAST_FREE = 256 * 2**20
"""Bytes below which the first change log, rebuild or download ends in an error."""


def check(deployment: Deployment) -> Iterator[Finding]:
    if "retriever" in deployment.services and deployment.retriever is not None:
        yield from _data(deployment.retriever.data_dir)
    if "generator" in deployment.services and deployment.generator is not None:
        checkpoint = deployment.generator.checkpoint
        if not Path(checkpoint).exists() and not checkpoint.startswith(("/", ".", "~")):
            cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
            yield _room(cache, LEAST_FREE, f"for {checkpoint} from the hub", "name another disk in HF_HOME")


def _data(folder: Path) -> Iterator[Finding]:
    sizes = [sum(file.size for file in manifest.files.values()) for manifest in current_manifests(folder).values()]
    # The next generation is built beside the one that serves.
    needed = max(LEAST_FREE, *sizes, 0)
    mend = "free some, or name a folder on another disk in RETRIEVER_DATA_DIR"
    yield _room(folder, needed, "for the next generation of the largest collection", mend)
    error = _why_not_written(folder)
    if error is not None:
        what = f"nothing can be written into {folder.absolute()}: {error.strerror or error}"
        yield _found("problem", what, "make it writable for the user who runs the retriever (also read-only mounts)")


def _room(folder: Path, needed: int, purpose: str, mend: str) -> Finding:
    there = _nearest(folder)
    free = shutil.disk_usage(there).free
    what = f"{_size(free)} free at {folder.absolute()}"
    if free < needed:
        return _found("problem", f"no disk: {what}, and {_size(needed)} are needed {purpose}", mend)
    if os.statvfs(there).f_files and not os.statvfs(there).f_favail:
        return _found("problem", f"no disk: the file system of {folder.absolute()} has no inode left", mend)
    return _found("ok", what)


def _why_not_written(folder: Path) -> OSError | None:
    there = _nearest(folder)
    if there != folder.absolute():  # it will be made: nothing is written beside it for a look
        return None if os.access(there, os.W_OK | os.X_OK) else PermissionError(13, f"{there} is not writable")
    try:
        with tempfile.TemporaryFile(dir=there, prefix=".doctor-") as file:
            file.write(b"\0" * 65_536)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"
