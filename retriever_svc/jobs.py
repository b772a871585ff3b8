"""Work that goes on after its request was answered, and what became of it."""

import asyncio
import uuid
from collections.abc import Coroutine
from typing import Any

import structlog

from shared.errors import NotFound, RagError
from shared.schemas import Job

REMEMBERED = 100

log = structlog.get_logger(__name__)


class Jobs:
    """The last jobs, by id. Belongs to the event loop."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def get(self, job_id: str) -> Job:
        """Raises: NotFound."""
        if job_id not in self._jobs:
            raise NotFound(f"there is no job {job_id}, or it is long past", param="job_id")
        return self._jobs[job_id]

    def start(self, collection: str, work: Coroutine[Any, Any, str]) -> Job:
        """Begin ``work``, which gives the name of a generation."""
        job = Job(id=uuid.uuid4().hex, collection=collection, status="running")
        self._jobs[job.id] = job
        for forgotten in list(self._jobs)[:-REMEMBERED]:
            del self._jobs[forgotten]
        task = asyncio.create_task(self._run(job, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    async def _run(self, job: Job, work: Coroutine[Any, Any, str]) -> None:
        try:
            ended = job.model_copy(update={"status": "done", "generation": await work})
        except Exception as error:
            log.exception("job_failed", job=job.id, collection=job.collection)
            why = error.message if isinstance(error, RagError) else f"{type(error).__name__}: {error}"
            ended = job.model_copy(update={"status": "failed", "error": why})
        self._jobs[job.id] = ended
