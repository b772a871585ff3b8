"""Both heads through transformers' own classes, for generators that are not BART (T5, mBART, …).

They return the token ids that transformers 5.23 returns, given contexts with their attention mask. What transformers
gets wrong or ignores is put right here:

- RAG-Sequence drops the attention mask when it generates candidates, so that padding is read as text. The mask is
  passed on.
- RAG-Sequence asserts, or scores with the wrong number, where ``n_docs`` is not the configuration's.
- RAG-Sequence encodes every document again for each candidate. Here each is encoded once.
- RAG-Sequence crashes where more sequences are asked for than there are different candidates. All candidates there
  are come back.
- RAG-Token ignores ``max_new_tokens`` (see :mod:`generator_svc.engine.options`), and gives one sample whatever
  ``num_return_sequences`` says. Its rows are repeated.

Shapes: N documents, S source tokens, D width, C candidates, K candidates of each document, T target tokens without the
start token, V vocabulary.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import RagTokenForGeneration
from transformers.modeling_outputs import BaseModelOutput

from generator_svc.engine.backend import Answers, Parts, Task
from generator_svc.engine.heads import bos_of, padded, rank_scores, unique_rows, without_padding
from shared.errors import InvalidRequest

# Logits of one step of scoring: 2**25 float32 are 128 MiB.
_MAX_LOGITS = 2**25


class WholeDecoding:
    """A question that is answered in one step, since transformers cannot be stopped half-way."""

    def __init__(self, task: Task, states: Sequence[Tensor]) -> None:
        self.task, self.states = task, states
        self.rows: list[Tensor] | None = None  # candidates, without padding

    @property
    def finished(self) -> bool:
        return self.rows is not None

    @property
    def written(self) -> Tensor | None:
        return None


class TransformersBackend:
    """A document is encoded as the encoder's states, (S, D), which stay on the device."""

    def __init__(self, model: RagTokenForGeneration) -> None:
        self._model = model
        generator: Any = model.config.generator
        self._pad = int(generator.pad_token_id)
        self._vocabulary = int(generator.vocab_size)
        self._bos = bos_of(model.config)
        # RAG-Sequence searches with the generator's own `generate`; what the checkpoint says counts for both heads.
        model.generator.generation_config = model.generation_config

    def warm_up(self) -> None:
        pass

    def together(self, contexts: Sequence[Sequence[Tensor]]) -> list[slice]:
        return [slice(at, at + 1) for at in range(len(contexts))]

    def encode(self, contexts: Sequence[Tensor]) -> Parts[list[Tensor]]:
        yield from ()  # in one part
        ids, mask = self._padded_ids(contexts)
        states: Tensor = self._model.generator.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        return [row[: len(context)] for row, context in zip(states, contexts, strict=True)]

    def begin(self, tasks: Sequence[Task]) -> Parts[list[WholeDecoding]]:
        if any(task.fast for task in tasks):
            raise InvalidRequest("fast decoding needs a BART generator", param="decoding")
        encoded = iter((yield from self.encode([context for task in tasks for context in task.contexts])))
        return [WholeDecoding(task, list(islice(encoded, len(task.contexts)))) for task in tasks]

    def step(self, running: Sequence[WholeDecoding]) -> list[WholeDecoding]:
        decoding = running[0]  # others may join and leave before the next one
        task = decoding.task
        with _seeded(task.seed if task.config.do_sample else None, self._model.device):
            found = self._token(task) if task.strategy == "token" else self._candidates(task, decoding.states)
        rows = [without_padding(row, task.eos_token_ids, self._pad) for row in found.cpu()]
        ranked = task.strategy == "sequence"
        decoding.rows = unique_rows(rows) if ranked and task.deduplicate else rows
        return [decoding]

    def finish(self, done: Sequence[WholeDecoding]) -> Parts[list[Answers]]:
        answers = []
        for decoding in done:
            task = decoding.task
            assert decoding.rows is not None  # noqa: S101
            rows = padded(decoding.rows, self._pad)
            (log_probs_CNT,) = yield from self.score([decoding.states], [decoding.rows])
            if task.strategy == "sequence":
                ranks = rank_scores(log_probs_CNT, rows[:, 1:], task.log_prior, self._bos, self._pad)
                best = ranks.topk(min(task.config.num_return_sequences, len(rows))).indices
                rows, log_probs_CNT = rows[best], log_probs_CNT[best]
            answers.append(Answers(rows, log_probs_CNT))
        return answers

    def score(self, encoded: Sequence[Sequence[Tensor]], answers: Sequence[Sequence[Tensor]]) -> Parts[list[Tensor]]:
        scored = []
        for states, rows in zip(encoded, answers, strict=True):
            scored.append((yield from self._score(states, rows)))
        return scored

    def _token(self, task: Task) -> Tensor:
        """RAG-Token: at each step the documents' next-token distributions are mixed by p(z|x), then searched."""
        ids, mask = self._padded_ids(task.contexts)
        config, scores = copy.copy(task.config), task.log_prior[None].to(ids.device)
        if config.do_sample and config.num_beams == 1:
            times, config.num_return_sequences = config.num_return_sequences, 1
            ids, mask, scores = ids.repeat(times, 1), mask.repeat(times, 1), scores.repeat(times, 1)
        sequences: Tensor = self._model.generate(
            context_input_ids=ids,  # type: ignore[arg-type]
            context_attention_mask=mask,  # type: ignore[arg-type]
            doc_scores=scores,
            n_docs=len(task.contexts),
            generation_config=config,
            **self._rules(task),
        )
        return sequences

    def _candidates(self, task: Task, states: Sequence[Tensor]) -> Tensor:
        """RAG-Sequence: candidates from each document by itself (Lewis et al. 2020, §2.5).

        With sampling, each document gives as many samples as make up the number asked for.
        """
        ids, mask = self._padded_ids(task.contexts)
        config = copy.copy(task.config)
        sampled = config.do_sample and config.num_beams == 1
        config.num_return_sequences = -(-config.num_return_sequences // len(states)) if sampled else config.num_beams
        found: Tensor = self._model.generator.generate(
            ids,
            attention_mask=mask,
            encoder_outputs=BaseModelOutput(last_hidden_state=self._padded_states(states)),
            generation_config=config,
            **self._rules(task),
        )
        return found

    @staticmethod
    def _rules(task: Task) -> dict[str, Any]:
        allowed = task.prefix_allowed_tokens
        rules: dict[str, Any] = {"logits_processor": task.processors, "stopping_criteria": task.stopping}
        if allowed is not None:
            rules["prefix_allowed_tokens_fn"] = lambda _, sequence: allowed(sequence)
        return rules

    def _score(self, states: Sequence[Tensor], answers: Sequence[Tensor]) -> Parts[Tensor]:
        """log p(y_t | x, z, y_<t), (C, N, T) float32; a few candidates at a time, so that logits stay small."""
        sequences = padded(answers, self._pad).to(self._model.device)
        labels_CT = sequences[:, 1:]
        n_docs, n_tokens = len(states), labels_CT.shape[1]
        states_NSD = self._padded_states(states)
        mask_NS = padded([row.new_ones(len(row), dtype=torch.int64) for row in states], 0)
        step = max(1, _MAX_LOGITS // (n_docs * n_tokens * self._vocabulary))
        parts = []
        for start in range(0, len(sequences), step):
            if start:
                yield
            rows = sequences[start : start + step]
            logits_RTV = self._model.generator(
                encoder_outputs=BaseModelOutput(last_hidden_state=states_NSD.repeat(len(rows), 1, 1)),
                attention_mask=mask_NS.repeat(len(rows), 1),
                decoder_input_ids=rows[:, :-1].repeat_interleave(n_docs, dim=0),
                use_cache=False,
            ).logits.float()
            labels = rows[:, 1:].repeat_interleave(n_docs, dim=0)
            chosen_RT = logits_RTV.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            parts.append((chosen_RT - logits_RTV.logsumexp(dim=-1)).view(-1, n_docs, n_tokens))
        within_CT = padded([torch.ones_like(row[1:], dtype=torch.bool) for row in answers], 0)
        return torch.cat(parts).cpu().masked_fill(~within_CT.unsqueeze(1), 0.0)

    def _padded_ids(self, contexts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        ids, mask = padded(list(contexts), self._pad), padded([torch.ones_like(context) for context in contexts], 0)
        return ids.to(self._model.device), mask.to(self._model.device)

    @staticmethod
    def _padded_states(states: Sequence[Tensor]) -> Tensor:
        return padded(list(states), 0)


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw from `seed`, and leave torch's generators as they were."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
