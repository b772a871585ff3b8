"""Names an embedding space, so that a question encoder never searches an index made for another one."""

import hashlib

from torch import float32, nn
from transformers import PreTrainedTokenizerBase


def encoder_fingerprint(question_encoder: nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    """Fingerprint of a question encoder: its weights, its vocabulary, and how it pools where its configuration says.

    Weights are hashed as little-endian float32 in name order, so that a checkpoint stored in half precision and
    loaded in single precision keeps its name; hash before casting to another dtype.

    Returns: ``sha256-`` and 16 hex digits.
    """
    digest = hashlib.sha256()
    if pooling := getattr(getattr(question_encoder, "config", None), "pooling", None):
        digest.update(f"pooling:{pooling}\n".encode())
    for name, tensor in sorted(question_encoder.state_dict().items()):
        if not tensor.is_floating_point():
            continue  # position ids are derived, and not in every checkpoint
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", float32).contiguous().numpy().astype("<f4").tobytes())
    for token, index in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{index}:{token}\n".encode())
    return f"sha256-{digest.hexdigest()[:16]}"
