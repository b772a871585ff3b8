"""A RAG model served the plain way: FastAPI around transformers, as tutorials do it.

    python -m benchmarks.plain_server --port 18010 --batching none

``none`` answers one question after the other, in a thread, so that the event loop stays free. ``naive`` lets questions
that wait be answered together: the first one waits a few milliseconds for others, then one padded `generate` runs for
all of them, and who comes meanwhile waits for the next. Nothing is made slower than it has to be: same torch threads,
the retriever in the process, greedy or beams by one setting for all.
"""

import argparse
import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from benchmarks.demo import MAX_NEW_TOKENS, transformers_rag
from generator_svc.settings import DEMO_CHECKPOINT

WAIT_S = 0.005
LARGEST_BATCH = 32
Answer = Callable[[Sequence[str]], list[str]]


class Question(BaseModel):
    question: str


class Batches:
    """Questions that wait, answered together."""

    def __init__(self, answer: Answer, largest: int) -> None:
        self._answer, self._largest = answer, largest
        self._waiting: asyncio.Queue[tuple[str, asyncio.Future[str]]] = asyncio.Queue()

    async def ask(self, question: str) -> str:
        answered: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        await self._waiting.put((question, answered))
        return await answered

    async def run(self) -> None:
        while True:
            batch = [await self._waiting.get()]
            if self._largest > 1:
                await asyncio.sleep(WAIT_S)
            while len(batch) < self._largest and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            texts = await asyncio.to_thread(self._answer, [question for question, _ in batch])
            for (_, answered), text in zip(batch, texts, strict=True):
                if not answered.done():
                    answered.set_result(text)


def plain_app(answer: Answer, largest: int) -> FastAPI:
    batches = Batches(answer, largest)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(batches.run())
        yield
        running.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/answer")
    async def ask(question: Question) -> dict[str, str]:
        return {"answer": await batches.ask(question.question)}

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--batching", choices=["none", "naive"], required=True)
    parser.add_argument("--checkpoint", type=Path, default=DEMO_CHECKPOINT)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        answer = transformers_rag(
            Path(folder),
            checkpoint=arguments.checkpoint,
            beams=arguments.beams,
            max_new_tokens=arguments.max_new_tokens,
        )
        app = plain_app(answer, LARGEST_BATCH if arguments.batching == "naive" else 1)
        uvicorn.run(app, port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
