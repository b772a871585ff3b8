"""Embeds the demo corpus: what the retriever service builds its first collection from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer, DPRContextEncoder, PreTrainedTokenizerBase, RagModel, RagTokenizer
from transformers.utils import logging

from generator_svc.fingerprint import encoder_fingerprint
from services.demo.corpus import Passage, build_corpus
from services.demo.facts import ATTRIBUTION, load_entities
from services.training.retriever import embed

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoint"
CONTEXT_ENCODER = HERE / "context_encoder"
PASSAGES = HERE / "data" / "passages.parquet"


def build_passages(
    checkpoint: Path = CHECKPOINT, context_encoder: Path = CONTEXT_ENCODER, output: Path = PASSAGES
) -> int:
    """Embed the corpus with `context_encoder` and write `output`; returns the number of passages.

    Columns: id int64, title string, text string, embedding halffloat[128]. The schema's metadata carry the
    fingerprint of the checkpoint's question encoder (``encoder``) and the sources of the facts (``attribution``).
    """
    passages = build_corpus(load_entities())
    encoder = DPRContextEncoder.from_pretrained(context_encoder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(context_encoder)
    embeddings = embed_passages(encoder, tokenizer, passages)
    write_passages(output, passages, embeddings, checkpoint_fingerprint(checkpoint))
    return len(passages)


def embed_passages(
    encoder: DPRContextEncoder, tokenizer: PreTrainedTokenizerBase, passages: Sequence[Passage]
) -> np.ndarray:
    """Embeddings of passages as the index stores them: (number of passages, D) float16."""
    texts = [(passage.title, passage.text) for passage in passages]
    return embed(encoder, tokenizer, texts).numpy().astype(np.float16)


def checkpoint_fingerprint(checkpoint: Path) -> str:
    """Fingerprint of a RAG checkpoint's question encoder, as the generator computes it."""
    model = RagModel.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizers: Any = RagTokenizer
    return encoder_fingerprint(model.question_encoder, tokenizers.from_pretrained(checkpoint).question_encoder)


def write_passages(path: Path, passages: Sequence[Passage], embeddings: np.ndarray, encoder: str) -> None:
    """Write the Parquet file. `embeddings`: (number of passages, D) float16."""
    dimension = embeddings.shape[1]
    table = pa.table(
        {
            "id": pa.array([passage.id for passage in passages], pa.int64()),
            "title": pa.array([passage.title for passage in passages], pa.string()),
            "text": pa.array([passage.text for passage in passages], pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), dimension),
        }
    ).replace_schema_metadata({"encoder": encoder, "attribution": ATTRIBUTION})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")


if __name__ == "__main__":
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own, for every file it reads
    print(f"{build_passages()} passages in {PASSAGES}")
