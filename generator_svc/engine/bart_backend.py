"""Both heads over our BART: every document encoded once, every distinct prefix decoded once.

RAG-Token decodes a question as one search over all its documents; RAG-Sequence as one search a document. Their
candidates are then scored under every document as a prefix trie (thorough decoding, Lewis et al. 2020, §2.5), or each
under the documents that proposed it alone (fast decoding, ibid.).

Shapes: N documents, C answers, T target tokens without the start token, X edges of a trie.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import RagTokenForGeneration

from generator_svc.engine.backend import Answers, Task
from generator_svc.engine.cache import DocumentCache, chunks
from generator_svc.engine.decoder import Bart
from generator_svc.engine.decoding import BartDecoding, score, step
from generator_svc.engine.graphs import StaticGroups
from generator_svc.engine.heads import bos_of, padded, rank_scores, unique_rows
from generator_svc.engine.search import BeamSearch, RowSearch, Search
from generator_svc.engine.trie import Trie

# What a batch's documents may hold on a CPU, where more questions at once gain little time: a step is bound by its
# products from some ten rows on.
CPU_HELD_BYTES = 160 * 2**20


class BartBackend:
    def __init__(self, model: RagTokenForGeneration, *, cuda_graphs: bool = True) -> None:
        self._model = model
        generator: Any = model.config.generator
        self._bart = Bart(model.generator)
        if cuda_graphs and self._bart.device.type == "cuda":
            self._bart.graphs = StaticGroups(self._bart, capture=True)
        self._pad = int(generator.pad_token_id)
        self._start = int(model.generation_config.decoder_start_token_id)
        self._bos = bos_of(model.config)

    def together(self, tasks: Sequence[Task]) -> Iterable[slice]:
        if self._bart.device.type != "cpu":
            return [slice(0, len(tasks))]
        held = [self._bart.source_bytes * sum(map(len, task.contexts)) for task in tasks]
        return chunks(held, CPU_HELD_BYTES)

    def encode(self, contexts: Sequence[Tensor], nodes: int) -> list[DocumentCache]:
        return self._bart.prefill(contexts, nodes)

    def begin(self, task: Task, encoded: Sequence[DocumentCache]) -> BartDecoding:
        return BartDecoding(task, list(encoded), self._search(task))

    def step(self, running: Sequence[BartDecoding]) -> None:
        step(self._bart, running)

    def finish(self, done: Sequence[BartDecoding]) -> list[Answers]:
        found = [self._candidates(decoding) for decoding in done]
        met = [decoding.met() for decoding in done]
        # Fast decoding leaves it at what was met; thorough decoding asks every document about every candidate.
        unmet = [
            [] if decoding.task.fast else [row for row in candidates if _key(row) not in of_document]
            for decoding, candidates, of_decoding in zip(done, found, met, strict=True)
            for of_document in of_decoding
        ]
        caches = [cache for decoding in done for cache in decoding.caches]
        scored = iter(self._score(caches, unmet))
        answers = []
        for decoding, candidates, of_decoding in zip(done, found, met, strict=True):
            known = [{**of_document, **next(scored)} for of_document in of_decoding]
            rows, log_probs_CNT = padded(candidates, self._pad), _table(candidates, known)
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
        asked = [rows for rows, documents in zip(answers, encoded, strict=True) for _ in documents]
        scored = iter(self._score([cache for documents in encoded for cache in documents], asked))
        return [
            _table(rows, list(islice(scored, len(documents)))) for rows, documents in zip(answers, encoded, strict=True)
        ]

    def _score(
        self, documents: Sequence[DocumentCache], answers: Sequence[Sequence[Tensor]]
    ) -> list[dict[tuple[int, ...], Tensor]]:
        """For each document log p(y_t | x, z, y_<t) of its answers, (T,) each."""
        of_documents = [tuple(map(_key, rows)) for rows in answers]
        tries = {rows: Trie.of(rows, self._bart.device) for rows in of_documents if rows}  # documents may share one
        asked = [at for at, rows in enumerate(of_documents) if rows]
        edges = iter(score(self._bart, [documents[at] for at in asked], [tries[of_documents[at]] for at in asked]))
        return [
            dict(zip(rows, tries[rows].along_paths(next(edges)), strict=True)) if rows else {} for rows in of_documents
        ]

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


def _key(row: Tensor) -> tuple[int, ...]:
    return tuple(row.tolist())


def _table(answers: Sequence[Tensor], known: Sequence[dict[tuple[int, ...], Tensor]]) -> Tensor:
    """(C, N, T) of what is known of each answer under each document: 0 behind its end, -inf where nothing is."""
    longest = max(map(len, answers)) - 1
    nothing = torch.full((longest,), -math.inf, device=answers[0].device)
    rows = [
        pad(found, (0, longest - len(found))) if (found := of_document.get(_key(row))) is not None else nothing
        for row in answers
        for of_document in known
    ]
    return torch.stack(rows).view(len(answers), len(known), longest)
