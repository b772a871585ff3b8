"""The demo's retriever and generator in one process, without HTTP: what training and evaluation measure.

B questions, N documents, D dimension.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from generator_svc.contexts import ContextForm, build_contexts, pad_contexts, question_form
from generator_svc.engine import RagEngine
from generator_svc.question_encoder import QuestionEncoder
from services.demo.build import CHECKPOINT, PASSAGES
from shared.errors import StartupError
from shared.schemas import Strategy


@dataclass(frozen=True)
class Answer:
    """An answer with what a caller can judge it by: log p(y|x), and the inner product of the best passage."""

    text: str
    log_prob: float
    top_score: float
    passages: tuple[int, ...]
    """Ids of the retrieved passages, best first."""

    @property
    def probability(self) -> float:
        """p(y|x)"""
        return math.exp(self.log_prob)


@dataclass(frozen=True)
class Read:
    """What the generator reads of B questions: N documents of at most S tokens each."""

    context_input_ids: Tensor  # (B·N, S)
    context_attention_mask: Tensor  # (B·N, S)
    doc_scores: Tensor  # (B, N)
    best_scores: list[float]
    passages: list[tuple[int, ...]]


class DemoRag:
    """Exact search over the shipped embeddings, and the generator's own engine."""

    def __init__(
        self,
        checkpoint: Path = CHECKPOINT,
        passages: Path = PASSAGES,
        *,
        n_docs: int = 5,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        """Load both; ``dtype`` is the generator's, by torch's name.

        Raises:
            StartupError: `passages` were embedded for another question encoder.
        """
        self.engine = RagEngine.from_pretrained(checkpoint, device=device, dtype=dtype)
        loaded = self.engine.checkpoint
        self._questions = QuestionEncoder(loaded)
        self._form = ContextForm.of(loaded.config, loaded.max_source_tokens)
        self._n_docs = n_docs
        table = pq.read_table(passages)
        self.encoder = (table.schema.metadata or {}).get(b"encoder", b"").decode()
        if self.encoder != loaded.encoder:
            raise StartupError(
                f"{passages} was embedded for the encoder {self.encoder!r}, {checkpoint} holds {loaded.encoder!r}: "
                "run python -m services.demo.build"
            )
        self._ids = table["id"].to_pylist()
        self._titles, self._texts = table["title"].to_pylist(), table["text"].to_pylist()
        embeddings = table["embedding"].combine_chunks()
        self._embeddings_PD = embeddings.flatten().to_numpy().reshape(len(table), -1).astype(np.float32)

    def answer(
        self, questions: Sequence[str], strategy: Strategy, *, closed_book: bool = False, batch_size: int = 32
    ) -> list[Answer]:
        """Greedy answers. `closed_book` hides the passages: the reader gets one empty one."""
        answers: list[Answer] = []
        for i in range(0, len(questions), batch_size):
            answers += self._answer_batch(questions[i : i + batch_size], strategy, closed_book=closed_book)
        return answers

    def _answer_batch(self, questions: Sequence[str], strategy: Strategy, *, closed_book: bool) -> list[Answer]:
        read = self.read(questions, closed_book=closed_book)
        generated = self.engine.generate(
            read.context_input_ids, read.context_attention_mask, read.doc_scores, strategy=strategy, num_beams=1
        )
        tokenizer = self.engine.checkpoint.generator_tokenizer
        texts = tokenizer.batch_decode(generated.sequences, skip_special_tokens=True)
        return [
            Answer(text, log_prob, score, passages)
            for text, log_prob, score, passages in zip(
                texts, generated.log_probs.tolist(), read.best_scores, read.passages, strict=True
            )
        ]

    def read(self, questions: Sequence[str], *, closed_book: bool = False) -> Read:
        """What the generator reads of each question."""
        scores_BP = self._questions.encode(questions) @ self._embeddings_PD.T
        rows_BN = np.argsort(-scores_BP, axis=1)[:, : self._n_docs]
        doc_scores_BN = np.take_along_axis(scores_BP, rows_BN, axis=1)
        checkpoint = self.engine.checkpoint
        contexts = []
        for question, rows in zip(questions, rows_BN, strict=True):
            asked = question_form(question, checkpoint.question_tokenizer)
            passages = [("", "")] if closed_book else [(self._titles[row], self._texts[row]) for row in rows]
            built = build_contexts(passages, asked, self._form, checkpoint.generator_tokenizer)
            contexts += [context.input_ids for context in built]
        return Read(
            *pad_contexts(contexts, checkpoint.generator_tokenizer.pad_token_id),
            doc_scores=torch.zeros(len(questions), 1) if closed_book else torch.from_numpy(doc_scores_BN),
            best_scores=doc_scores_BN[:, 0].tolist(),
            passages=[tuple(self._ids[row] for row in rows) for rows in rows_BN],
        )
