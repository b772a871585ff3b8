"""The question encoder: text to query vectors.

Shapes: B questions, D dimension of the embedding space.
"""

from collections.abc import Sequence

import torch

from generator_svc.checkpoint import Checkpoint
from shared.errors import StartupError
from shared.retrieval import Float32Array


class QuestionEncoder:
    """DPR's question encoder, or any whose first output is one vector a question, as `RagModel` takes it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._model = checkpoint.model.question_encoder
        self._tokenizer = checkpoint.question_tokenizer
        self._device = checkpoint.device
        self.fingerprint = checkpoint.encoder
        probe = self._first_output(["?"])
        if probe.dim() != 2:
            raise StartupError(
                f"the question encoder of {checkpoint.name} gives an output of shape {tuple(probe.shape)}, not one "
                "vector a question; RAG needs one that pools, such as DPRQuestionEncoder"
            )
        self.dimension = int(probe.shape[1])

    def encode(self, questions: Sequence[str]) -> Float32Array:
        """(B, D) float32: DPR's `pooler_output` (the CLS state, projected) of each question.

        Questions longer than the encoder's position table are cut at the right.
        """
        vectors: Float32Array = self._first_output(questions).float().cpu().numpy()
        return vectors

    @torch.inference_mode()
    def _first_output(self, questions: Sequence[str]) -> torch.Tensor:
        batch = self._tokenizer(list(questions), padding=True, truncation=True, return_tensors="pt").to(self._device)
        output: torch.Tensor = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        return output
