"""transformers' own generation, as it is called when one knows its traps.

- RAG-Token ignores ``max_new_tokens``: lengths are given with the decoder's start token counted in.
- RAG-Sequence passes no attention mask when it generates candidates, and reads the padding as text: a wrong answer
  is no yardstick, so the mask is put back. It costs no time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import RagSequenceForGeneration, RagTokenForGeneration

from benchmarks.models import Inputs
from shared.schemas import Strategy


def transformers_generate(
    model: RagTokenForGeneration, inputs: Inputs, strategy: Strategy, beams: int, new_tokens: int
) -> Tensor:
    """(B, 1 + T) int64: the best answer of each question, of exactly ``new_tokens`` tokens."""
    head: Any = model
    if strategy == "sequence":
        head = RagSequenceForGeneration(
            model.config, question_encoder=model.rag.question_encoder, generator=model.rag.generator
        )
        head.eval()
    with torch.inference_mode(), _masked(model.rag.generator):
        sequences: Tensor = head.generate(
            context_input_ids=inputs.input_ids,
            context_attention_mask=inputs.mask,
            doc_scores=inputs.doc_scores,
            n_docs=inputs.doc_scores.shape[1],
            num_beams=beams,
            num_return_sequences=1,
            min_length=new_tokens + 1,
            max_length=new_tokens + 1,
        )
    return sequences


@contextmanager
def _masked(generator: Any) -> Iterator[None]:
    """While it lasts, the generator's own ``generate`` is told what of its input is padding."""
    pad, generate = generator.config.pad_token_id, generator.generate

    def with_mask(input_ids: Tensor, **options: Any) -> Any:
        return generate(input_ids, **{**options, "attention_mask": (input_ids != pad).long()})

    generator.generate = with_mask
    try:
        yield
    finally:
        del generator.generate
