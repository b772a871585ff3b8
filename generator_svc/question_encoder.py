"""The question encoder: text to query vectors.

Shapes: B questions, S tokens, D dimension of the embedding space.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from generator_svc.checkpoint import Checkpoint
from generator_svc.engine.affine import use_onednn
from shared.errors import StartupError
from shared.retrieval import Float32Array

POOLINGS = ("cls", "mean")


class QuestionEncoder:
    """DPR's question encoder, or any other of transformers' encoders, whose weights it takes over (`use_onednn`).

    The vector is the encoder's first output, as `RagModel` takes it. Where that is a state for each token, as with
    BERT, ``question_encoder.pooling`` in the checkpoint's config.json says how they become one vector: "cls", the
    first token's, or "mean", over all tokens. It is asked for and not guessed: both run, and only one fits the index.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._model = checkpoint.model.question_encoder
        use_onednn(self._model)
        self._tokenizer = checkpoint.question_tokenizer
        self._device = checkpoint.device
        self._pooling = getattr(self._model.config, "pooling", None)
        self.fingerprint = checkpoint.encoder
        if self._pooling not in {None, *POOLINGS}:
            raise StartupError(
                f"question_encoder.pooling of {checkpoint.name} is {self._pooling!r}, not one of {POOLINGS}"
            )
        output, _ = self._first_output(["?"])
        if output.dim() != 2 + (self._pooling is not None):
            raise StartupError(
                f"the question encoder of {checkpoint.name} gives an output of shape {tuple(output.shape)}, not one "
                f"vector a question; question_encoder.pooling in config.json is {self._pooling!r}. Where there is a "
                'state for each token it must be "cls" or "mean", as the index was made; otherwise it must be left out'
            )
        self.dimension = int(output.shape[-1])

    def encode(self, questions: Sequence[str]) -> Float32Array:
        """(B, D) float32, of DPR the `pooler_output` (the CLS state, projected).

        Questions longer than the encoder's position table are cut at the right.
        """
        return self.encode_counted(questions)[0]

    @torch.inference_mode()
    def encode_counted(self, questions: Sequence[str]) -> tuple[Float32Array, list[int]]:
        """As `encode`, and how many tokens of each question were read, special ones included."""
        output, mask_BS = self._first_output(questions)
        if self._pooling == "cls":
            output = output[:, 0]
        elif self._pooling == "mean":
            weight_BS1 = mask_BS.unsqueeze(-1).to(output.dtype)
            output = (output * weight_BS1).sum(1) / weight_BS1.sum(1)
        vectors: Float32Array = output.float().cpu().numpy()
        return vectors, mask_BS.sum(1).tolist()

    @torch.inference_mode()
    def _first_output(self, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
        batch = self._tokenizer(list(questions), padding=True, truncation=True, return_tensors="pt").to(self._device)
        output: Tensor = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        return output, batch["attention_mask"]
