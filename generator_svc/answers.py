"""Answers as text and as the token ids that the decoder writes."""

from collections.abc import Sequence
from dataclasses import dataclass

from generator_svc.checkpoint import Checkpoint
from shared.errors import InvalidRequest


@dataclass(frozen=True)
class EncodedAnswer:
    """An answer and the `sequence` that generation writes for it: start token, answer, end-of-sequence token."""

    text: str
    sequence: list[int]


class AnswerCodec:
    """Text of generated ids, and the ids under which an answer's text is scored."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tokenizer = checkpoint.generator_tokenizer
        self._start = int(checkpoint.generation_defaults.decoder_start_token_id)
        self._forced_bos = checkpoint.forced_bos_token_id
        # BART's answers begin with the `<s>` that its tokenizer puts there. A checkpoint that was trained without it
        # says so in its generator's config: nothing else in transformers' format would tell.
        begins_with_bos = getattr(checkpoint.config.generator, "answers_begin_with_bos", True)
        self._unwritten_bos = None if begins_with_bos else self._tokenizer.bos_token_id
        self._eos = checkpoint.eos_token_ids
        self._specials = set(self._tokenizer.all_special_ids)
        self._max_tokens = checkpoint.max_target_tokens
        self._needs_space = _spaces_belong_to_words(checkpoint)
        self._word = self._tokenizer.tokenize("a", add_special_tokens=False)[-1]
        self._word_text = str(self._tokenizer.convert_tokens_to_string([self._word]))

    def text(self, sequence: Sequence[int]) -> str:
        """The text of a generated sequence, without special tokens and outer space."""
        return str(self._tokenizer.decode(list(sequence), skip_special_tokens=True)).strip()

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The text of each token of an answer as it stands there; special tokens by name.

        Without these they join to :meth:`text`, but for characters that are several tokens, which no token shows, and
        space at the end.
        """
        texts: list[str] = []
        follows = False
        for token_id in ids:
            name = str(self._tokenizer.convert_ids_to_tokens(token_id))
            is_special = token_id in self._specials
            text = name if is_special else self._between_words(name)
            texts.append(text if follows or is_special else text.lstrip())
            follows = follows or bool(texts[-1] and not is_special)
        return texts

    def _between_words(self, name: str) -> str:
        """A token's text behind another one: a space in front is lost from many tokenizers' first."""
        return str(self._tokenizer.convert_tokens_to_string([self._word, name])).removeprefix(self._word_text)

    def encode(self, answer: str) -> EncodedAnswer:
        """The sequence under which an answer's text is scored.

        RAG was trained on answers with a space in front (`encode_line` of its training code), so that BART's
        tokenizer gives their first word the token that it has within a passage. An end-of-sequence token, and a
        beginning that the checkpoint forces, are added where the tokenizer adds none.

        Raises:
            InvalidRequest: longer than the generator can write.
        """
        spaced = f" {answer}" if self._needs_space and not answer.startswith(" ") else answer
        ids: list[int] = self._tokenizer(spaced, verbose=False)["input_ids"]
        if self._unwritten_bos is not None and ids[:1] == [self._unwritten_bos]:
            ids = ids[1:]
        if self._forced_bos is not None and ids[:1] != [self._forced_bos]:
            ids = [self._forced_bos, *ids]
        if not ids or ids[-1] not in self._eos:
            ids = [*ids, self._eos[0]]
        if len(ids) > self._max_tokens:
            raise InvalidRequest(f"an answer takes more than {self._max_tokens} tokens", param="answers")
        return EncodedAnswer(answer, [self._start, *ids])


def _spaces_belong_to_words(checkpoint: Checkpoint) -> bool:
    """Whether a space in front changes a word's token, as in BART's byte-level BPE, and none is put there anyway."""
    tokenizer = checkpoint.generator_tokenizer
    plain, spaced = (tokenizer.tokenize(text)[:1] for text in ("a", " a"))
    return spaced != plain and not plain[0].startswith(("Ġ", "▁"))
