"""What a work folder is for: the passages, the encoder and the shards that everything in it belongs to."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from retriever_svc.generation import flush
from services.indexing.options import EmbeddingDtype, EncoderRecipe
from shared.errors import StartupError
from shared.schemas import MetadataType

PLAN = "plan.json"
LOCK = ".lock"
PARTIAL = ".partial"


class Plan(BaseModel):
    """Written before the first shard, and never changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    corpus: str
    count: PositiveInt
    encoder: EncoderRecipe
    dtype: EmbeddingDtype
    shard_rows: PositiveInt
    metadata: dict[str, MetadataType] = {}

    @property
    def digest(self) -> str:
        """Names the plan in each of its shards."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def shards(self) -> range:
        return range(-(-self.count // self.shard_rows))

    def rows_of(self, shard: int) -> range:
        """Rows of the corpus that are in a shard."""
        return range(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.count))


def read_plan(folder: Path) -> Plan | None:
    """The plan in `folder`; None: nothing has been begun there.

    Raises: StartupError: there is one that cannot be read.
    """
    try:
        return Plan.model_validate_json((folder / PLAN).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise StartupError(
            f"{folder / PLAN} cannot be read, so that nobody knows what the shards beside it hold: remove the folder "
            f"or choose another one. {error}"
        ) from error


def write_plan(folder: Path, plan: Plan) -> None:
    """Atomic: a kill leaves a whole plan or none."""
    partial = folder / (PLAN + PARTIAL)
    partial.write_text(plan.model_dump_json(indent=2) + "\n")
    flush(partial)
    partial.replace(folder / PLAN)
    flush(folder)


def check_same(folder: Path, found: Plan, *, encoder: EncoderRecipe, **asked: object) -> None:
    """Refuse to mix.

    Raises: StartupError: the plan found in `folder` is for something else than what is asked for.
    """
    there = {name: getattr(found, name) for name in asked} | _flat(found.encoder)
    asked |= _flat(encoder)
    others = [f"{name} {there[name]}, not {asked[name]}" for name in asked if there[name] != asked[name]]
    if others:
        raise StartupError(
            f"{folder} holds the embeddings of another run ({'; '.join(others)}). Run with what it was begun with to "
            "finish it; for this run choose another folder, or remove that one"
        )


def _flat(encoder: EncoderRecipe) -> dict[str, object]:
    return {f"encoder.{name}": value for name, value in encoder.model_dump().items()}


@contextmanager
def work_folder(folder: Path) -> Iterator[None]:
    """Make `folder`, hold it against other runs and clear what a killed one left unfinished.

    Raises: StartupError: another run is at work there, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StartupError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StartupError(f"another run is embedding into {folder}: wait for its end or stop it") from error
        clear_partial(folder)
        yield
    finally:
        os.close(descriptor)  # which releases the lock; the kernel does it when the process dies


def clear_partial(folder: Path) -> None:
    """Remove the files that were not finished."""
    for partial in folder.glob("*" + PARTIAL):
        partial.unlink(missing_ok=True)
