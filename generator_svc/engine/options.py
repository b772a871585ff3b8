"""The options of a generation call, named as in transformers."""

import copy
from dataclasses import dataclass

from transformers import GenerationConfig


@dataclass(frozen=True)
class GenerationOptions:
    """None: as the checkpoint's generation defaults have it. Hashable, so that equal options can share a batch.

    `seed` makes sampling repeatable; `deduplicate` is RAG-Sequence's ``do_deduplication``.
    """

    num_beams: int | None = None
    num_return_sequences: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    length_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    deduplicate: bool = True

    def config(self, defaults: GenerationConfig) -> GenerationConfig:
        """`defaults` with these options on top, for transformers' ``generate(generation_config=…)``.

        The bound on new tokens becomes ``max_length``, the decoder's start token included: RAG-Token ignores
        ``max_new_tokens``.
        """
        config = copy.deepcopy(defaults)
        for name in (
            "num_beams",
            "num_return_sequences",
            "min_new_tokens",
            "length_penalty",
            "no_repeat_ngram_size",
            "do_sample",
            "temperature",
            "top_k",
            "top_p",
        ):
            if (value := getattr(self, name)) is not None:
                setattr(config, name, value)
        max_new_tokens = self.max_new_tokens or config.max_new_tokens
        if max_new_tokens is not None:
            config.max_length, config.max_new_tokens = max_new_tokens + 1, None
        if self.min_new_tokens is not None:
            config.min_length = None  # would bound the answer a second time
        config.num_beams = config.num_beams or 1
        config.num_return_sequences = config.num_return_sequences or 1
        # Sequences and nothing else: scores come from engine.likelihood, as the model gives them.
        config.return_dict_in_generate = False
        config.output_scores = config.output_logits = config.output_attentions = config.output_hidden_states = False
        return config
