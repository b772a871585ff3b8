"""The demo's questions, and the two that answer them: our services over HTTP, and transformers' own RAG.

The rival is transformers as its documentation uses it: `RagRetriever` over a faiss index of the same embeddings and
`RagTokenForGeneration.generate`, on the same checkpoint and passages.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from transformers import RagConfig, RagRetriever, RagTokenForGeneration, RagTokenizer

from generator_svc.settings import DEMO_CHECKPOINT
from retriever_svc.settings import DEMO_PASSAGES
from services.client import RagClient
from services.demo.corpus import build_corpus
from services.demo.facts import load_entities
from services.demo.questions import question_set

PORT, RETRIEVER_PORT = 18000, 18001
MAX_NEW_TOKENS = 32  # no answer of the demo's is as long


def demo_questions(count: int) -> list[str]:
    """Questions about entities that training never saw."""
    entities = load_entities()
    return [question.text for question in question_set(entities, build_corpus(entities), "test", count, seed=23)]


def transformers_rag(
    folder: Path, *, checkpoint: Path = DEMO_CHECKPOINT, beams: int = 1, max_new_tokens: int = MAX_NEW_TOKENS
) -> Callable[[Sequence[str]], list[str]]:
    """Questions to answers through transformers alone; its retriever's files go into ``folder``."""
    passages = Dataset.from_dict(
        {
            "title": (table := pq.read_table(DEMO_PASSAGES))["title"].to_pylist(),
            "text": table["text"].to_pylist(),
            "embeddings": [[float(x) for x in row] for row in table["embedding"].to_pylist()],
        }
    )
    passages.save_to_disk(folder / "passages")
    passages.add_faiss_index("embeddings", metric_type=faiss.METRIC_INNER_PRODUCT)
    passages.get_index("embeddings").save(folder / "index.faiss")
    config = RagConfig.from_pretrained(
        checkpoint,
        index_name="custom",
        passages_path=str(folder / "passages"),
        index_path=str(folder / "index.faiss"),
    )
    rag_tokenizer: Any = RagTokenizer
    tokenizer = rag_tokenizer.from_pretrained(checkpoint)
    rag_retriever: Any = RagRetriever
    retriever = rag_retriever(config, tokenizer.question_encoder, tokenizer.generator)
    model: Any = RagTokenForGeneration.from_pretrained(checkpoint, config=config, dtype=torch.float32)
    model.set_retriever(retriever)  # given to from_pretrained, it ends up in the generation settings, which crash
    model.eval()

    @torch.inference_mode()
    def answer(questions: Sequence[str]) -> list[str]:
        batch = tokenizer.question_encoder(list(questions), padding=True, return_tensors="pt")
        sequences = model.generate(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_length=1 + max_new_tokens,  # the start token counts
            num_beams=beams,
        )
        return [text.strip() for text in tokenizer.batch_decode(sequences, skip_special_tokens=True)]

    return answer


@contextmanager
def both_services(folder: Path, key: str | None = None, **variables: str) -> Iterator[RagClient]:
    """`rag up` over a new data folder, until both are ready; ``key`` is the client's, ``variables`` are settings."""
    ports = ("--port", str(PORT), "--retriever-port", str(RETRIEVER_PORT))
    up = subprocess.Popen(
        [sys.executable, "-m", "services.cli", "up", *ports],
        env=os.environ | {"RETRIEVER_DATA_DIR": str(folder / "data")} | variables,
        stdout=subprocess.DEVNULL,
    )
    try:
        client = RagClient(f"http://127.0.0.1:{PORT}", api_key=key, retriever_url=f"http://127.0.0.1:{RETRIEVER_PORT}")
        while client.ready().status != "ok":
            if up.poll() is not None:
                raise SystemExit("the services did not start: try `make run`")
            time.sleep(0.2)
        yield client
    finally:
        up.terminate()
        up.wait()
