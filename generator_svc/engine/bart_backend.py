"""Both heads over our BART: every document encoded once, every distinct prefix decoded once.

RAG-Token decodes a question as one search over all its documents; RAG-Sequence as one search a document. Their
candidates are then scored under every document as a prefix trie (thorough decoding, Lewis et al. 2020, §2.5), or each
under the documents that proposed it alone (fast decoding, ibid.).

Shapes: N documents, C answers, T target tokens without the start token, X edges of a trie.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import RagTokenForGeneration

from generator_svc.engine.backend import Answers, Task
from generator_svc.engine.cache import DocumentCache
from generator_svc.engine.decoder import Bart
from generator_svc.engine.decoding import BartDecoding, score, step
from generator_svc.engine.heads import bos_of, padded, rank_scores, unique_rows
from generator_svc.engine.search import BeamSearch, RowSearch, Search
from generator_svc.engine.trie import Trie

FIRST_NODES = 64  # nodes that a document's cache has room for before it grows


class BartBackend:
    def __init__(self, model: RagTokenForGeneration) -> None:
        self._model = model
        generator: Any = model.config.generator
        self._bart = Bart(model.generator)
        self._pad = int(generator.pad_token_id)
        self._start = int(model.generation_config.decoder_start_token_id)
        self._bos = bos_of(model.config)

    def encode(self, contexts: Sequence[Tensor]) -> list[DocumentCache]:
        return self._bart.prefill(contexts, FIRST_NODES)

    def begin(self, task: Task, encoded: Sequence[DocumentCache]) -> BartDecoding:
        return BartDecoding(task, list(encoded), self._search(task))

    def step(self, running: Sequence[BartDecoding]) -> None:
        step(self._bart, running)

    def finish(self, done: Sequence[BartDecoding]) -> list[Answers]:
        found = [self._candidates(decoding) for decoding in done]
        # RAG-Token's search has met every token of its results under every document, RAG-Sequence's candidates have
        # met one document each. Where the rules left nothing to be said, nothing was met.
        met = [decoding.task.strategy == "token" and decoding.search.sequences() != [[]] for decoding in done]
        scored_later = [not known and not decoding.task.fast for decoding, known in zip(done, met, strict=True)]
        scored = iter(
            self.score(
                [decoding.caches for decoding, later in zip(done, scored_later, strict=True) if later],
                [rows for rows, later in zip(found, scored_later, strict=True) if later],
            )
        )
        answers = []
        for decoding, candidates, known in zip(done, found, met, strict=True):
            rows = padded(candidates, self._pad)
            if known:
                log_probs_CNT = padded(decoding.token_log_probs(), 0.0).transpose(1, 2)
            elif decoding.task.fast:
                log_probs_CNT = self._score_own(decoding, candidates)
            else:
                log_probs_CNT = next(scored)
            if decoding.task.strategy == "sequence":
                rows, log_probs_CNT = self._best(decoding.task, rows, log_probs_CNT)
            answers.append(Answers(rows, log_probs_CNT))
        return answers

    def _candidates(self, decoding: BartDecoding) -> list[Tensor]:
        candidates = [row for problem in decoding.search.sequences() for row in problem]
        if not candidates:  # the rules leave nothing to be said
            return [torch.tensor([self._start, self._pad], device=self._bart.device)]
        ranked = decoding.task.strategy == "sequence"
        return unique_rows(candidates) if ranked and decoding.task.deduplicate else candidates

    def score(self, encoded: Sequence[Sequence[DocumentCache]], answers: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        if not answers:
            return []
        tries = [Trie.of([row.tolist() for row in rows], self._bart.device) for rows in answers]
        edges = iter(
            score(
                self._bart,
                [cache for documents in encoded for cache in documents],
                [trie for trie, documents in zip(tries, encoded, strict=True) for _ in documents],
            )
        )
        return [
            torch.stack([trie.along_paths(next(edges), trie.longest) for _ in documents], dim=1)
            for trie, documents in zip(tries, encoded, strict=True)
        ]

    def _score_own(self, decoding: BartDecoding, rows: Sequence[Tensor]) -> Tensor:
        """Fast decoding: (C, N, T) as `score`, but p(y|x,z) = 0 where the search over z did not find y."""
        answers = [tuple(row.tolist()) for row in rows]
        problems = [[tuple(row.tolist()) for row in problem] for problem in decoding.search.sequences()]
        found = {document: candidates for document, candidates in enumerate(problems) if candidates}
        tries = [Trie.of(candidates, self._bart.device) for candidates in found.values()]
        longest = max(map(len, answers)) - 1
        log_probs_CNT = torch.full((len(rows), len(problems), longest), -math.inf, device=self._bart.device)
        edges = score(self._bart, [decoding.caches[document] for document in found], tries) if found else []
        for document, trie, edges_X in zip(found, tries, edges, strict=True):
            of_answer = dict(zip(found[document], trie.along_paths(edges_X, longest), strict=True))
            for at, answer in enumerate(answers):
                if answer in of_answer:
                    log_probs_CNT[at, document] = of_answer[answer]
        return log_probs_CNT

    def _best(self, task: Task, rows: Tensor, log_probs_CNT: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates that thorough or fast decoding ranks first, as many as were asked for."""
        ranks = rank_scores(log_probs_CNT, rows[:, 1:], task.log_prior, self._bos, self._pad)
        best = ranks.topk(min(task.config.num_return_sequences, len(rows))).indices
        return rows[best], log_probs_CNT[best]

    def _search(self, task: Task) -> Search:
        device = self._bart.device
        model: Any = self._model
        config = copy.copy(task.config)
        returned = config.num_return_sequences
        config.num_return_sequences = 1  # says transformers of greedy search, though every document gives an answer
        config, _ = model._prepare_generation_config(config)
        model._prepare_special_tokens(config, True, device=device)
        allowed = task.prefix_allowed_tokens
        rules: dict[str, Any] = {
            "start": int(config.decoder_start_token_id),
            "pad": self._pad,
            "processors": model._get_logits_processor(
                generation_config=config,
                input_ids_seq_length=1,
                prefix_allowed_tokens_fn=None if allowed is None else lambda _, sequence: allowed(sequence),
                logits_processor=task.processors,
                device=device,
            ),
            "stopping": model._get_stopping_criteria(generation_config=config, stopping_criteria=task.stopping),
            "device": device,
        }
        problems = 1 if task.strategy == "token" else len(task.contexts)
        if config.num_beams == 1:
            sampler = None
            if config.do_sample:
                sampler = torch.Generator(device)
                _ = sampler.seed() if task.seed is None else sampler.manual_seed(task.seed)
            samples = -(-returned // problems) if config.do_sample else 1
            return RowSearch(problems=problems, samples=samples, sampler=sampler, **rules)
        eos = config._eos_token_tensor
        return BeamSearch(
            problems=problems,
            beams=config.num_beams,
            returned=returned if task.strategy == "token" else config.num_beams,
            max_length=config.max_length,
            eos_tokens=0 if eos is None else len(eos),
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
            **rules,
        )
