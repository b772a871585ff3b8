"""`make bench`: questions answered by both services over HTTP, beside transformers' own RAG in one process.

The rival is transformers as its documentation uses it: `RagRetriever` over a faiss index of the same embeddings and
`RagTokenForGeneration.generate`, on the same checkpoint, passages, questions and torch threads. Ours pays for two
processes and two HTTP hops. Medians of `--repeats` runs after a warm-up; greedy search, 5 documents.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import RagConfig, RagRetriever, RagTokenForGeneration, RagTokenizer

from generator_svc.settings import DEMO_CHECKPOINT
from retriever_svc.settings import DEMO_PASSAGES
from services.client import RagClient
from services.demo.corpus import build_corpus
from services.demo.facts import load_entities
from services.demo.questions import question_set

PORT, RETRIEVER_PORT = 18000, 18001
RESULTS = Path(__file__).parent / "results" / "answer.json"
MAX_NEW_TOKENS = 32


def transformers_rag(folder: Path) -> Callable[[Sequence[str]], list[str]]:
    """Questions to answers through transformers alone."""
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
        DEMO_CHECKPOINT,
        index_name="custom",
        passages_path=str(folder / "passages"),
        index_path=str(folder / "index.faiss"),
    )
    rag_tokenizer: Any = RagTokenizer
    tokenizer = rag_tokenizer.from_pretrained(DEMO_CHECKPOINT)
    rag_retriever: Any = RagRetriever
    retriever = rag_retriever(config, tokenizer.question_encoder, tokenizer.generator)
    model: Any = RagTokenForGeneration.from_pretrained(
        DEMO_CHECKPOINT, config=config, retriever=retriever, dtype=torch.float32
    )
    model.eval()

    @torch.inference_mode()
    def answer(questions: Sequence[str]) -> list[str]:
        batch = tokenizer.question_encoder(list(questions), padding=True, return_tensors="pt")
        sequences = model.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], max_length=MAX_NEW_TOKENS
        )
        return [text.strip() for text in tokenizer.batch_decode(sequences, skip_special_tokens=True)]

    return answer


@contextmanager
def both_services(folder: Path) -> Iterator[RagClient]:
    """`rag up`, until both are ready."""
    ports = ("--port", str(PORT), "--retriever-port", str(RETRIEVER_PORT))
    up = subprocess.Popen(
        [sys.executable, "-m", "services.cli", "up", *ports],
        env=os.environ | {"RETRIEVER_DATA_DIR": str(folder / "data")},
        stdout=subprocess.DEVNULL,
    )
    try:
        client = RagClient(f"http://127.0.0.1:{PORT}", retriever_url=f"http://127.0.0.1:{RETRIEVER_PORT}")
        while client.ready().status != "ok":
            if up.poll() is not None:
                raise SystemExit("the services did not start: try `make run`")
            time.sleep(0.2)
        yield client
    finally:
        up.terminate()
        up.wait()


def median_s(run: Callable[[], object], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    entities = load_entities()
    asked = question_set(entities, build_corpus(entities), "test", max(arguments.batches), seed=23)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, both_services(Path(folder)) as ours:
        rival = transformers_rag(Path(folder))
        for size in arguments.batches:
            questions = [question.text for question in asked[:size]]
            theirs_s = median_s(partial(rival, questions), arguments.repeats)
            ours_s = median_s(partial(ours.answer, questions, max_new_tokens=MAX_NEW_TOKENS), arguments.repeats)
            rows.append({"batch": size, "transformers_s": theirs_s, "ours_s": ours_s, "ratio": theirs_s / ours_s})
    table = Table(title=f"seconds a batch on {os.cpu_count()} cores, torch {torch.__version__}")
    for name in ("batch", "transformers_s", "ours_s", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" for value in row.values()))
    Console().print(table)
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "torch": torch.__version__}
    RESULTS.write_text(json.dumps({"command": "make bench", "machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
