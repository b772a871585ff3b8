"""The RAG heads as one object: contexts and document scores in, answers with their evidence out.

:meth:`RagEngine.generate` and :meth:`RagEngine.score` take batches of tensors, as transformers does. A service that
lets questions come and go uses the parts they are made of: :meth:`RagEngine.task`, :meth:`RagEngine.begin`,
:meth:`RagEngine.step`, :meth:`RagEngine.finish`.

Shapes: B questions, N documents a question, S source tokens, C answers, T target tokens without the start token.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers import BartForConditionalGeneration, LogitsProcessorList, StoppingCriteriaList

from generator_svc.checkpoint import Checkpoint, load_checkpoint
from generator_svc.engine.backend import Answers, Backend, Decoding, Parts, Task, whole
from generator_svc.engine.bart_backend import BartBackend
from generator_svc.engine.evidence import Evidence, Generated, evidence_of
from generator_svc.engine.heads import padded, without_padding
from generator_svc.engine.int8 import supported as int8_supported
from generator_svc.engine.options import check_defaults, generation_config
from generator_svc.engine.transformers_backend import TransformersBackend
from shared.errors import InvalidRequest, StartupError
from shared.schemas import Strategy


class RagEngine:
    """RAG-Token and RAG-Sequence over one checkpoint, whose generator's weights it takes over: on a CPU they go into
    another order, and the model is left without them. Not thread-safe: one thread owns it.

    Raises: StartupError: the checkpoint is to be computed in int8, which this device or generator cannot.
    """

    def __init__(self, checkpoint: Checkpoint, *, cuda_graphs: bool = True) -> None:
        check_defaults(checkpoint.name, checkpoint.generation_defaults)
        self.checkpoint = checkpoint
        is_bart = type(checkpoint.model.generator) is BartForConditionalGeneration
        int8 = checkpoint.dtype == torch.int8
        if int8:
            _check_int8(checkpoint, is_bart=is_bart)
        self._backend: Backend = (
            BartBackend(checkpoint.model, int8=int8, cuda_graphs=cuda_graphs)
            if is_bart
            else TransformersBackend(checkpoint.model)
        )
        generator: Any = checkpoint.config.generator
        self._pad = int(generator.pad_token_id)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str = torch.float32,
        *,
        any_strategy: bool = False,
    ) -> Self:
        """Load a checkpoint folder or hub id; see :func:`generator_svc.checkpoint.load_checkpoint`."""
        resolved = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return cls(load_checkpoint(path, device=device, dtype=resolved, any_strategy=any_strategy))

    def generate(
        self,
        context_input_ids: Tensor,
        context_attention_mask: Tensor,
        doc_scores: Tensor,
        *,
        n_docs: int | None = None,
        **options: Any,
    ) -> Generated:
        """Answer B questions from their N documents each.

        Args:
            context_input_ids: (B·N, S) int64, padded at the right; a question's documents follow each other.
            context_attention_mask: (B·N, S), 0 where padded.
            doc_scores: (B, N), inner products of question and documents.
            n_docs: N, for callers who want it checked; the shape of `doc_scores` decides.
            options: those of :meth:`task`.

        Raises:
            InvalidRequest: shapes that do not agree, or an option that this head or checkpoint cannot honour.
        """
        doc_scores = doc_scores.cpu()
        contexts = self._contexts(context_input_ids, context_attention_mask, doc_scores, n_docs)
        allowed = options.pop("prefix_allowed_tokens_fn", None)
        tasks = []
        for index, (documents, scores) in enumerate(zip(contexts, doc_scores, strict=True)):
            of_question = None if allowed is None else (lambda ids, index=index: allowed(index, ids))
            tasks.append(self.task(documents, scores, prefix_allowed_tokens=of_question, **options))
        return self._joined(self.run(tasks))

    def score(
        self,
        context_input_ids: Tensor,
        context_attention_mask: Tensor,
        doc_scores: Tensor,
        sequences: Tensor,
        *,
        question: Tensor | None = None,
        strategy: Strategy | None = None,
        n_docs: int | None = None,
    ) -> Generated:
        """log p(y|x) and p(z|x,y) of given answers.

        Args:
            sequences: (C, 1 + T) int64 in the form of `Generated.sequences`: the decoder's start token, then the
                answer up to and including its end-of-sequence token; what follows that is padding.
            question: (C,) int64 ascending, whose answer each one is; None: C / B answers for each question.

        The other arguments and the errors are those of :meth:`generate`.
        """
        doc_scores = doc_scores.cpu()
        contexts = self._contexts(context_input_ids, context_attention_mask, doc_scores, n_docs)
        if question is None:
            per_question, rest = divmod(len(sequences), len(contexts))
            if rest:
                raise InvalidRequest("the number of sequences is no multiple of the number of questions")
            question = torch.arange(len(contexts)).repeat_interleave(per_question)
        sequences, question = sequences.cpu(), question.cpu()
        answers = [sequences[question == index] for index in range(len(contexts))]
        return self._joined(whole(self.scoring(contexts, list(doc_scores), answers, strategy)))

    def task(
        self,
        contexts: Sequence[Tensor],
        doc_scores: Tensor,
        *,
        strategy: Strategy | None = None,
        deduplicate: bool | None = None,
        decoding: Literal["thorough", "fast"] = "thorough",
        seed: int | None = None,
        prefix_allowed_tokens: Callable[[Tensor], list[int]] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        **options: Any,
    ) -> Task:
        """One question, with everything about its generation decided.

        Args:
            contexts: token ids of its N documents, (S,) each, no padding.
            doc_scores: (N,).
            strategy: "token" or "sequence"; None: the head that the checkpoint was trained for.
            deduplicate: RAG-Sequence's ``do_deduplication``; None: as the checkpoint says.
            decoding: RAG-Sequence: "thorough" scores every candidate under every document, "fast" takes p(y|x,z) = 0
                where the search over z did not find y, so that ``log_probs`` are lower bounds (paper, §2.5).
            seed: makes sampling repeatable, whatever else runs.
            prefix_allowed_tokens, logits_processor, stopping_criteria: as in transformers.
            options: those named in :data:`generator_svc.engine.options.HONOURED`.

        Raises:
            InvalidRequest: an option that this head or checkpoint cannot honour.
        """
        self._check_contexts(contexts)
        chosen = self.checkpoint.strategy(strategy)
        config = generation_config(self.checkpoint.generation_defaults, chosen, **options)
        if config.max_length is not None and config.max_length - 1 > self.checkpoint.max_target_tokens:
            raise InvalidRequest(
                f"the generator has positions for {self.checkpoint.max_target_tokens} new tokens",
                param="max_new_tokens",
            )
        searched = chosen == "token" and not config.do_sample
        if searched and config.num_return_sequences > config.num_beams:
            raise InvalidRequest("num_return_sequences is above num_beams", param="num_return_sequences")
        if seed is not None and not config.do_sample:
            raise InvalidRequest("seed has an effect only with do_sample", param="seed")
        if decoding == "fast" and chosen != "sequence":
            raise InvalidRequest("decoding has an effect only with strategy 'sequence'", param="decoding")
        if deduplicate is False and chosen != "sequence":
            raise InvalidRequest("deduplicate has an effect only with strategy 'sequence'", param="deduplicate")
        return Task(
            contexts=[context.cpu() for context in contexts],
            log_prior=_log_prior(doc_scores),
            strategy=chosen,
            config=config,
            deduplicate=self.checkpoint.config.do_deduplication if deduplicate is None else deduplicate,
            fast=decoding == "fast",
            seed=seed,
            prefix_allowed_tokens=prefix_allowed_tokens,
            processors=logits_processor or LogitsProcessorList(),
            stopping=stopping_criteria or StoppingCriteriaList(),
        )

    def run(self, tasks: Sequence[Task]) -> list[Evidence]:
        """The answers of all tasks. As many run together, from beginning to end, as the backend takes at once."""
        parts = self.together([task.contexts for task in tasks])
        return [found for part in parts for found in self._run_together(tasks[part])]

    def _run_together(self, tasks: Sequence[Task]) -> list[Evidence]:
        running = self.begin(tasks)
        while unfinished := [decoding for decoding in running if not decoding.finished]:
            self.step(unfinished)
        return self.finish(running)

    def warm_up(self) -> None:
        """What would otherwise make the first questions wait."""
        self._backend.warm_up()

    def together(self, contexts: Sequence[Sequence[Tensor]]) -> Iterable[slice]:
        """Which of a batch's questions best run together, from beginning to end, by the contexts of each."""
        return self._backend.together(contexts)

    def begin(self, tasks: Sequence[Task]) -> list[Decoding]:
        """Encodes the documents of all questions together."""
        return whole(self.beginning(tasks))

    @torch.inference_mode()
    def beginning(self, tasks: Sequence[Task]) -> Parts[list[Decoding]]:
        """The same, in parts."""
        return list((yield from self._backend.begin(tasks)))

    @torch.inference_mode()
    def step(self, running: Sequence[Decoding]) -> Sequence[Decoding]:
        """One token for every row of every question, whatever their options. None may be finished.

        Where that were too many rows for a short step, it is for the first question and as many others as fit; with
        generators that are not BART, it is the whole answer to the first question. On CUDA questions that began
        together are moved on together: a step of one of them is a step of all.

        Returns: those that were moved on.
        """
        return self._backend.step(running)

    def finish(self, done: Sequence[Decoding]) -> list[Evidence]:
        """The answers of questions that are finished."""
        return whole(self.finishing(done))

    @torch.inference_mode()
    def finishing(self, done: Sequence[Decoding]) -> Parts[list[Evidence]]:
        """The same, in parts: RAG-Sequence's candidates are scored now."""
        answers = yield from self._backend.finish(done)
        return [
            evidence_of(
                found,
                decoding.task.log_prior,
                decoding.task.strategy,
                decoding.task.eos_token_ids,
                decoding.task.config.forced_bos_token_id,
            )
            for found, decoding in zip(answers, done, strict=True)
        ]

    @torch.inference_mode()
    def scoring(
        self,
        contexts: Sequence[Sequence[Tensor]],
        doc_scores: Sequence[Tensor],
        sequences: Sequence[Tensor],
        strategy: Strategy | None = None,
    ) -> Parts[list[Evidence]]:
        """As :meth:`score`, in parts, a question at a time: documents N of (S,), scores (N,), answers (C, 1 + T)."""
        chosen = self.checkpoint.strategy(strategy)
        eos, forced_bos = self.checkpoint.eos_token_ids, self.checkpoint.forced_bos_token_id
        for documents, rows in zip(contexts, sequences, strict=True):
            self._check_contexts(documents)
            self._check_answers(rows)
        encoded = iter((yield from self._backend.encode([row.cpu() for documents in contexts for row in documents])))
        by_question = [[next(encoded) for _ in documents] for documents in contexts]
        answers = [[without_padding(row, eos, self._pad) for row in rows.cpu()] for rows in sequences]
        scored = yield from self._backend.score(by_question, answers)
        return [
            evidence_of(Answers(padded(rows, self._pad), log_probs), _log_prior(scores), chosen, eos, forced_bos)
            for rows, log_probs, scores in zip(answers, scored, doc_scores, strict=True)
        ]

    def _contexts(self, input_ids: Tensor, mask: Tensor, doc_scores: Tensor, n_docs: int | None) -> list[list[Tensor]]:
        input_ids, mask = input_ids.cpu(), mask.cpu()
        if n_docs is not None and n_docs != doc_scores.shape[1]:
            raise InvalidRequest(f"doc_scores has {doc_scores.shape[1]} documents, n_docs is {n_docs}", param="n_docs")
        if input_ids.shape != mask.shape or len(input_ids) != doc_scores.numel():
            raise InvalidRequest(
                f"context_input_ids {tuple(input_ids.shape)} and context_attention_mask {tuple(mask.shape)} must have "
                f"one row for each of the doc_scores {tuple(doc_scores.shape)}"
            )
        if bool((mask[:, 1:] > mask[:, :-1]).any()):
            raise InvalidRequest("contexts must be padded at the right", param="context_attention_mask")
        self._check_ids(input_ids, "context_input_ids")
        rows = [ids[kept.bool()] for ids, kept in zip(input_ids, mask, strict=True)]
        documents = doc_scores.shape[1]
        return [rows[start : start + documents] for start in range(0, len(rows), documents)]

    def _check_contexts(self, contexts: Sequence[Tensor]) -> None:
        longest = getattr(self.checkpoint.config.generator, "max_position_embeddings", None)
        if not contexts or min(map(len, contexts)) == 0:
            raise InvalidRequest("a question needs documents, and each of them a token", param="context_input_ids")
        if longest is not None and max(map(len, contexts)) > longest:
            raise InvalidRequest(f"the generator has positions for {longest} tokens", param="context_input_ids")

    def _check_ids(self, ids: Tensor, param: str) -> None:
        generator: Any = self.checkpoint.config.generator
        vocabulary = int(generator.vocab_size)
        if bool((ids < 0).any()) or bool((ids >= vocabulary).any()):
            raise InvalidRequest(f"token ids go from 0 to {vocabulary - 1}; pad with {self._pad}", param=param)

    def _check_answers(self, rows: Tensor) -> None:
        start = self.checkpoint.generation_defaults.decoder_start_token_id
        self._check_ids(rows, "sequences")
        if rows.dim() != 2 or len(rows) == 0 or rows.shape[1] < 2 or bool((rows[:, 0] != start).any()):
            raise InvalidRequest(
                f"every question needs answers, each of them the decoder's start token {start} and a token at least",
                param="sequences",
            )

    def _joined(self, evidence: list[Evidence]) -> Generated:
        counts = torch.tensor([len(found.sequences) for found in evidence])
        return Generated(
            sequences=padded([row for found in evidence for row in found.sequences], self._pad),
            question=torch.arange(len(evidence)).repeat_interleave(counts),
            log_probs=torch.cat([found.log_probs for found in evidence]),
            doc_posterior=torch.cat([found.doc_posterior for found in evidence]),
            evidence=evidence,
        )


def _check_int8(checkpoint: Checkpoint, *, is_bart: bool) -> None:
    """Raises: StartupError: there is nothing here that could multiply this model in int8."""
    generator: Any = checkpoint.config.generator
    if not is_bart:
        reason = f"for BART, and the generator of {checkpoint.name} is {generator.model_type}"
    elif checkpoint.device.type != "cpu":
        reason = "for CPUs; on CUDA take bfloat16"
    elif not int8_supported():
        reason = "for CPUs with VNNI or AMX instructions, and this one has neither"
    else:
        return
    raise StartupError(f"dtype int8 is {reason}. Set GENERATOR_DTYPE=float32 or bfloat16")


def _log_prior(doc_scores: Tensor) -> Tensor:
    """log p(z|x), (N,) float32, on the host."""
    return doc_scores.to("cpu", torch.float32).log_softmax(0)
