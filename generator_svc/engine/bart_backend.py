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
from transformers import RagTokenForGeneration

from generator_svc.engine.backend import Answers, Parts, Task
from generator_svc.engine.cache import DocumentCache, chunks
from generator_svc.engine.decoder import Bart
from generator_svc.engine.decoding import BartDecoding, TreeDecoding, score, scored_together, step
from generator_svc.engine.heads import bos_of, padded, rank_scores, unique_rows
from generator_svc.engine.lane import LaneDecoding
from generator_svc.engine.lanes import Lanes
from generator_svc.engine.search import BeamSearch, RowSearch
from generator_svc.engine.trie import Trie, pieces

# Keys and values that a batch's documents may hold on a CPU, where more questions at once gain little time: a step is
# bound by its products from some ten rows on.
CPU_HELD_NUMBERS = 40 * 2**20


class BartBackend:
    def __init__(self, model: RagTokenForGeneration, *, int8: bool = False, cuda_graphs: bool = True) -> None:
        self._model = model
        generator: Any = model.config.generator
        self._bart = Bart(model.generator, int8=int8)
        self.lanes: Lanes | None = None
        """What moves questions of one form on in step; None: every question by itself."""
        if cuda_graphs and self._bart.device.type == "cuda":
            self.use_lanes(capture=True)
        self._pad = int(generator.pad_token_id)
        self._start = int(model.generation_config.decoder_start_token_id)
        self._bos = bos_of(model.config)

    def together(self, contexts: Sequence[Sequence[Tensor]]) -> Iterable[slice]:
        if not self._bart.on_cpu:
            return [slice(0, len(contexts))]
        held = [self._bart.source_bytes * sum(map(len, of_question)) for of_question in contexts]
        return chunks(held, CPU_HELD_NUMBERS * self._bart.dtype.itemsize)

    def warm_up(self) -> None:
        self._bart.warm_up()

    def use_lanes(self, *, capture: bool) -> None:
        self.lanes = Lanes(self._bart, self._search, capture=capture)

    def encode(self, contexts: Sequence[Tensor]) -> Parts[list[DocumentCache]]:
        return self._bart.prefill(contexts, nodes=0)

    def begin(self, tasks: Sequence[Task]) -> Parts[list[BartDecoding]]:
        in_lanes = [None] * len(tasks) if self.lanes is None else self.lanes.begin(tasks)
        placed = [(task, found) for task, found in zip(tasks, in_lanes, strict=True) if found is not None]
        if placed:
            contexts = [context for task, _ in placed for context in task.contexts]
            self._bart.encode(contexts, [cache for _, found in placed for cache in found.caches])
        others = [task for task, found in zip(tasks, in_lanes, strict=True) if found is None]
        nodes = max((task.nodes for task in others), default=0)
        encoded = iter((yield from self._bart.prefill([c for task in others for c in task.contexts], nodes)))
        return [
            TreeDecoding(task, list(islice(encoded, len(task.contexts))), self._search(task), self._bart.device)
            if found is None
            else found
            for task, found in zip(tasks, in_lanes, strict=True)
        ]

    def step(self, running: Sequence[BartDecoding]) -> list[BartDecoding]:
        in_lanes = [decoding for decoding in running if isinstance(decoding, LaneDecoding)]
        others = [decoding for decoding in running if isinstance(decoding, TreeDecoding)]
        if self._bart.on_cpu:
            others = _of_a_short_step(others, self._bart.cpu_rows)
        lanes = {decoding.lane for decoding in in_lanes}
        for lane in lanes:
            lane.step()
        if others:
            step(self._bart, others)
        for lane in lanes:
            lane.settle()
        return [*in_lanes, *others]

    def finish(self, done: Sequence[BartDecoding]) -> Parts[list[Answers]]:
        found = [self._candidates(decoding) for decoding in done]
        met = [decoding.met() for decoding in done]
        # Fast decoding leaves it at what was met; thorough decoding asks every document about every candidate. On CUDA
        # also about those that it has met, which costs less than a trie for each document.
        unmet = [
            []
            if decoding.task.fast or all(key in of_document for key in keys)
            else [
                row
                for row, key in zip(candidates, keys, strict=True)
                if not self._bart.on_cpu or key not in of_document
            ]
            for decoding, candidates, of_decoding in zip(done, found, met, strict=True)
            for keys in [[_key(row) for row in candidates]]
            for of_document in of_decoding
        ]
        caches = [cache for decoding in done for cache in decoding.caches]
        scored = iter((yield from self._score(caches, unmet)))
        answers = []
        for decoding, candidates, of_decoding in zip(done, found, met, strict=True):
            known = [{**of_document, **next(scored)} for of_document in of_decoding]
            rows, log_probs_CNT = padded(candidates, self._pad), _table(candidates, known)
            if decoding.task.strategy == "sequence":
                rows, log_probs_CNT = self._best(decoding.task, rows, log_probs_CNT)
            answers.append(Answers(rows, log_probs_CNT))
        return answers

    def _candidates(self, decoding: BartDecoding) -> list[Tensor]:
        candidates = [row for results in decoding.results() for row, _ in results]
        if not candidates:  # the rules leave nothing to be said
            return [torch.tensor([self._start, self._pad])]
        ranked = decoding.task.strategy == "sequence"
        return unique_rows(candidates) if ranked and decoding.task.deduplicate else candidates

    def score(
        self, encoded: Sequence[Sequence[DocumentCache]], answers: Sequence[Sequence[Tensor]]
    ) -> Parts[list[Tensor]]:
        asked = [rows for rows, documents in zip(answers, encoded, strict=True) for _ in documents]
        scored = iter((yield from self._score([cache for documents in encoded for cache in documents], asked)))
        return [
            _table(rows, list(islice(scored, len(documents)))) for rows, documents in zip(answers, encoded, strict=True)
        ]

    def _score(
        self, documents: Sequence[DocumentCache], answers: Sequence[Sequence[Tensor]]
    ) -> Parts[list[dict[tuple[int, ...], Tensor]]]:
        """For each document log p(y_t | x, z, y_<t) of its answers, (T,) each."""
        of_documents = [tuple(map(_key, rows)) for rows in answers]
        together = scored_together(self._bart)
        tries = {rows: [(piece, Trie.of(piece)) for piece in pieces(rows, together)] for rows in set(of_documents)}
        asked = [
            (at, *found) for at, rows in enumerate(of_documents) for found in tries[rows]
        ]  # documents may share tries
        edges = yield from score(self._bart, [documents[at] for at, _, _ in asked], [trie for _, _, trie in asked])
        known: list[dict[tuple[int, ...], Tensor]] = [{} for _ in documents]
        for (at, piece, trie), of_trie in zip(asked, edges, strict=True):
            known[at] |= zip(piece, trie.along_paths(of_trie), strict=True)
        return known

    def _best(self, task: Task, rows: Tensor, log_probs_CNT: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates that thorough or fast decoding ranks first, as many as were asked for."""
        ranks = rank_scores(log_probs_CNT, rows[:, 1:], task.log_prior, self._bos, self._pad)
        best = ranks.topk(min(task.config.num_return_sequences, len(rows))).indices
        return rows[best], log_probs_CNT[best]

    def _search(self, task: Task, problems: int = 0) -> BeamSearch | RowSearch:
        """For so many problems of questions like this one; 0: those of this one."""
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
        per_question = 1 if task.strategy == "token" else len(task.contexts)
        problems = problems or per_question
        rules["max_length"] = config.max_length
        rules["documents"] = len(task.contexts) if task.strategy == "token" else 1  # that share in a token
        if config.num_beams == 1:
            sampler = None
            if config.do_sample:
                sampler = torch.Generator(device)
                _ = sampler.seed() if task.seed is None else sampler.manual_seed(task.seed)
            samples = -(-returned // per_question) if config.do_sample else 1
            return RowSearch(problems=problems, samples=samples, sampler=sampler, **rules)
        eos = config._eos_token_tensor
        return BeamSearch(
            problems=problems,
            beams=config.num_beams,
            returned=returned if task.strategy == "token" else config.num_beams,
            eos_tokens=0 if eos is None else len(eos),
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
            **rules,
        )


def _of_a_short_step(decodings: Sequence[TreeDecoding], most: int) -> list[TreeDecoding]:
    """The first, and of the others as many as there is room for, those with few rows before those with many."""
    chosen, rows = list(decodings[:1]), sum(decoding.rows for decoding in decodings[:1])
    for decoding in sorted(decodings[1:], key=lambda decoding: decoding.rows):
        rows += decoding.rows
        if rows > most:
            break
        chosen.append(decoding)
    return chosen


def _key(row: Tensor) -> tuple[int, ...]:
    return tuple(row.tolist())


def _table(answers: Sequence[Tensor], known: Sequence[dict[tuple[int, ...], Tensor]]) -> Tensor:
    """(C, N, T) of what is known of each answer under each document: 0 behind its end, -inf where nothing is."""
    table = torch.zeros(len(answers), len(known), max(map(len, answers)) - 1)
    for of_answer, row in zip(table, map(_key, answers), strict=True):
        for place, of_document in zip(of_answer, known, strict=True):
            found = of_document.get(row)
            if found is None:
                place.fill_(-math.inf)
            else:
                place[: len(found)] = found
    return table
