"""Whether the retriever can serve this generator, read in the background so that ``/readyz`` never waits for it."""

import asyncio
from contextlib import suppress

import structlog
from pydantic import ValidationError

from generator_svc.retriever_client import RetrieverClient
from generator_svc.settings import DEFAULT_COLLECTION
from shared.deadline import Deadline
from shared.errors import RagError

log = structlog.get_logger(__name__)


class RetrieverWatch:
    """Asks the retriever every `interval_s` seconds. `problem` says why it cannot serve, None: it can.

    The fingerprint of the collection `default` is compared; a retriever without that collection is fine, since every
    request may name another, and each answer's fingerprint is compared again.
    """

    def __init__(self, client: RetrieverClient, interval_s: float) -> None:
        self._client = client
        self._interval_s = interval_s
        self._task: asyncio.Task[None] | None = None
        self.problem: str | None = "the retriever was not asked yet"

    async def start(self) -> None:
        """Ask once, then go on in the background."""
        await self._ask()
        self._task = asyncio.create_task(self._watch(), name="retriever-watch")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self._ask()

    async def _ask(self) -> None:
        before = self.problem
        try:
            deadline = Deadline.after(None, self._interval_s * 1000)
            await self._client.check_ready(deadline)
            if before is not None:  # it is new, or came back, perhaps with another index
                info = await self._client.collection(DEFAULT_COLLECTION, deadline)
                if info is not None:
                    self._client.check_encoder(info.encoder, info.name)
            self.problem = None
        except RagError as error:
            self.problem = error.message
        except ValidationError:
            self.problem = f"what listens at {self._client.url} does not speak like a retriever service"
        if self.problem != before:
            log.info("retriever_ready" if self.problem is None else "retriever_not_ready", reason=self.problem)
