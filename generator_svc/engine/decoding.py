"""One question's way through the decoder, and the step that moves many questions at once.

``step`` is the whole of continuous batching: it takes whichever questions are running, whatever their heads, documents,
beams and lengths, runs one pass of the decoder over the new nodes of all of them, and lets each search choose.

Shapes: N documents, R rows of all documents, K rows of one, C cached nodes, D model, V vocabulary.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from generator_svc.engine.backend import Parts, Task
from generator_svc.engine.cache import DocumentCache
from generator_svc.engine.decoder import Bart
from generator_svc.engine.heads import document_log_probs, log_probs_of, marginalize
from generator_svc.engine.search import Result, RowSearch, Search
from generator_svc.engine.trie import Trie

# Rows of logits held at once while scoring: the products are fast from here on, and malloc uses such memory again,
# where it maps more than 32 MiB anew each time (1024 rows: 441 ms, 546 with 256 rows at once).
LOGITS_ROWS = 128
NORMALIZED_ROWS = 16  # of them at once: so many stay in a core's cache
# The same where a launch is what costs. Their logits take 200 MiB in bfloat16, the rows' states less.
CUDA_SCORED_ROWS, CUDA_LOGITS_ROWS = 8192, 2048


class BartDecoding(ABC):
    """A question on its way. RAG-Token: one search over all documents; RAG-Sequence: a problem a document."""

    def __init__(self, task: Task, caches: Sequence[DocumentCache]) -> None:
        self.task, self.caches = task, caches

    @property
    @abstractmethod
    def finished(self) -> bool: ...

    @property
    @abstractmethod
    def written(self) -> Tensor | None: ...

    @abstractmethod
    def results(self) -> list[list[Result]]:
        """What its search has found, a problem at a time."""

    def met(self) -> list[dict[tuple[int, ...], Tensor]]:
        """For each document the results that its search has met, with log p(y_t | x, z, y_<t) of their tokens: (T,).

        RAG-Token's search meets each result under every document, RAG-Sequence's those of its own document.
        """
        if self.task.strategy == "token":
            [results] = self.results()
            found = [(tuple(row.tolist()), (joint_TN - self.task.log_prior).unbind(1)) for row, joint_TN in results]
            return [{row: log_probs[at] for row, log_probs in found} for at in range(len(self.caches))]
        return [{tuple(row.tolist()): kept_T1[:, 0] for row, kept_T1 in results} for results in self.results()]


class TreeDecoding(BartDecoding):
    """A question whose trees grow as its own search says, beside any others."""

    def __init__(self, task: Task, caches: Sequence[DocumentCache], search: Search, device: torch.device) -> None:
        super().__init__(task, caches)
        self.search = search
        self._log_prior = task.log_prior.to(device)
        self.depth = 0
        # a problem: (K, C + K) bool, the nodes behind each of its rows, the row itself included; None as long as it has
        # never had two rows at once, and its row sees every node
        self._visible: list[Tensor | None] = [None for _ in search.rows]

    @property
    def rows(self) -> int:
        """That the next step has, of all documents."""
        return len(self.search.tokens) * (len(self.caches) if self.task.strategy == "token" else 1)

    @property
    def finished(self) -> bool:
        return not any(self.search.rows)

    @property
    def written(self) -> Tensor | None:
        return self.search.single() if self.task.strategy == "token" else None

    def results(self) -> list[list[Result]]:
        return self.search.results()

    def inputs(self) -> tuple[list[DocumentCache], Tensor, list[Tensor | None]]:
        """Documents that still have rows, the rows' tokens (R,), documents one behind the other, and their masks."""
        if self.task.strategy == "token":
            documents = list(self.caches)
            return documents, self.search.tokens.repeat(len(documents)), self._visible * len(documents)
        live = [problem for problem, rows in enumerate(self.search.rows) if rows]
        return [self.caches[at] for at in live], self.search.tokens, [self._visible[at] for at in live]

    def advance(self, logits_RV: Tensor) -> None:
        """Takes the logits of this question's rows, documents one behind the other."""
        if self.task.strategy == "token":
            logits_NKV = logits_RV.view(len(self.caches), -1, logits_RV.shape[1])
            self.search.advance(*marginalize(logits_NKV, self._log_prior))
        else:
            log_probs = document_log_probs(logits_RV)
            # greedy and sampling process logits, beams log-probabilities: as in transformers
            scores = logits_RV if isinstance(self.search, RowSearch) else log_probs.clone()
            self.search.advance(scores, log_probs[None])
        self.depth += 1
        start = 0
        for problem, rows in enumerate(self.search.rows):
            before = self._visible[problem]
            if rows > 1 or (rows and before is not None):
                parents = self.search.parents[start : start + rows]
                new = torch.eye(rows, dtype=torch.bool, device=parents.device)
                before = new.new_ones(1, self.depth) if before is None else before
                self._visible[problem] = torch.cat([before[parents], new], 1)
            start += rows


@torch.inference_mode()
def step(bart: Bart, running: Sequence[TreeDecoding]) -> None:
    """One token for every row of every question."""
    for group in {cache.group for decoding in running for cache in decoding.caches}:
        group.shrink()
    caches: list[DocumentCache] = []
    visible: list[Tensor | None] = []
    tokens, depths = [], []
    for decoding in running:
        documents, of_rows, masks = decoding.inputs()
        caches += documents
        visible += masks
        tokens.append(of_rows)
        depths.append(torch.full_like(of_rows, decoding.depth))
    logits_RV = bart.logits(bart.extend(caches, torch.cat(tokens), torch.cat(depths), visible)).float()
    for decoding, logits in zip(running, torch.split(logits_RV, list(map(len, tokens))), strict=True):
        decoding.advance(logits)


def scored_together(bart: Bart) -> int:
    """Nodes of tries in one pass."""
    return bart.cpu_rows if bart.on_cpu else CUDA_SCORED_ROWS


@torch.inference_mode()
def score(bart: Bart, caches: Sequence[DocumentCache], tries: Sequence[Trie]) -> Parts[list[Tensor]]:
    """log p(edge token | document, path to the edge's node): for each document (X,) float32, the edges of its trie.

    On the host. Documents of many questions go together; a trie may stand for several documents, and a document that
    has several tries has one in a pass.
    """
    scores: list[Tensor] = []
    start = rows = 0
    for end, trie in enumerate(tries):
        if rows and (rows + len(trie.tokens) > scored_together(bart) or caches[end] is caches[end - 1]):
            scores += _score_together(bart, caches[start:end], tries[start:end])
            start, rows = end, 0
            yield
        rows += len(trie.tokens)
    return scores + _score_together(bart, caches[start:], tries[start:]) if rows else scores


def _score_together(bart: Bart, caches: Sequence[DocumentCache], tries: Sequence[Trie]) -> list[Tensor]:
    inputs = torch.stack([torch.cat([trie.tokens for trie in tries]), torch.cat([trie.depths for trie in tries])])
    tokens_R, depths_R = inputs.to(bart.device)
    hidden_RD = bart.extend(caches, tokens_R, depths_R, [trie.visible for trie in tries], kept=False)
    starts = itertools.accumulate([len(trie.tokens) for trie in tries], initial=0)
    edge_rows = torch.cat([trie.edge_nodes + start for trie, start in zip(tries, starts, strict=False)])
    edge_tokens = torch.cat([trie.edge_tokens for trie in tries])
    in_order = edge_rows.argsort()
    rows_X, tokens_X = torch.stack([edge_rows[in_order], edge_tokens[in_order]]).to(bart.device)
    together, part = (LOGITS_ROWS, NORMALIZED_ROWS) if bart.on_cpu else (CUDA_LOGITS_ROWS, CUDA_LOGITS_ROWS)
    starts_of_parts = range(0, len(hidden_RD), part)
    bounds = torch.searchsorted(edge_rows[in_order], torch.tensor([*starts_of_parts, len(hidden_RD)])).tolist()
    found = []
    for at, (first, last) in zip(starts_of_parts, itertools.pairwise(bounds), strict=True):
        if at % together == 0:
            logits_RV = bart.logits(hidden_RD[at : at + together])
        of_part = logits_RV[at % together :][:part]
        found.append(log_probs_of(of_part, rows_X[first:last] - at, tokens_X[first:last]))
    scores = torch.empty(len(edge_rows))
    scores[in_order] = torch.cat(found).cpu()
    return list(torch.split(scores, [len(trie.edge_tokens) for trie in tries]))
