"""Which token comes next: greedy, multinomial and beam search over one or more independent problems.

A search sees log-probabilities and decides; it knows nothing of documents or models. It says which rows the decoder
must run next, until none is left. RAG-Token is one problem a question; RAG-Sequence one problem a document. The rules,
ties included, are those of transformers 5 (``generation/utils.py``: ``_sample``, ``_beam_search``), whose logits
processors and stopping criteria are used as they are. A problem that is finished costs nothing more.

Shapes: G problems, K rows (beams, or samples) of a problem, R rows of all problems that go on, V vocabulary, T tokens.
"""

from typing import Protocol, cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

REJECTED = -1.0e9  # transformers' score of what must not be chosen


class Search(Protocol):
    rows: list[int]
    """Rows of each problem that the decoder must run next; 0 where the problem is finished."""
    tokens: Tensor
    """(R,) int64: their tokens, problem after problem."""
    parents: Tensor
    """(R,) int64: the row of the same problem, one step before, that each continues."""

    def advance(self, log_probs_RV: Tensor, by_document_NRV: Tensor) -> None:
        """Takes the log-probabilities of what follows each row (float32), and chooses.

        ``by_document_NRV``: what each document had to do with them, before any rule. It is kept for the tokens chosen.
        """

    def single(self) -> Tensor | None:
        """(T,) the only row there is, as far as it goes; None where rows compete."""

    def sequences(self) -> list[list[Tensor]]:
        """For each problem its results, best first: (T,) each, the decoder start token first, no padding."""

    def by_document(self) -> list[list[Tensor]]:
        """Beside each of ``sequences`` what was kept of its tokens: (T - 1, N)."""


class RowSearch:
    """Greedy search, or multinomial sampling where there is a sampler. Every row is on its own."""

    def __init__(
        self,
        *,
        problems: int,
        samples: int,
        start: int,
        pad: int,
        processors: LogitsProcessorList,
        stopping: StoppingCriteriaList,
        sampler: torch.Generator | None,
        device: torch.device,
    ) -> None:
        self._problems, self._samples, self._pad = problems, samples, pad
        self._processors, self._stopping, self._sampler = processors, stopping, sampler
        self._history = torch.full((problems * samples, 1), start, device=device)
        self._open = torch.arange(problems * samples, device=device)
        self._lengths = torch.ones_like(self._open)
        self._kept: list[Tensor] = []  # a step: (rows, N)
        self.rows = [1] * problems
        self.tokens = torch.full((problems,), start, device=device)
        self.parents = torch.zeros(problems, dtype=torch.int64, device=device)

    def advance(self, log_probs_RV: Tensor, by_document_NRV: Tensor) -> None:
        if self._history.shape[1] == 1:
            log_probs_RV = log_probs_RV.repeat_interleave(self._samples, 0)
        history = self._history[self._open]
        scores = self._processors(cast("LongTensor", history), cast("FloatTensor", log_probs_RV))
        if self._sampler is None:
            chosen = scores.argmax(-1)
        else:
            probabilities = scores.softmax(-1)
            # Where the rules leave a row no token, multinomial would raise, and end all questions of this step.
            impossible = ~probabilities.isfinite().all(-1)
            if impossible.any():
                probabilities[impossible] = 0.0
                probabilities[impossible, scores.argmax(-1)[impossible]] = 1.0
            chosen = torch.multinomial(probabilities, 1, generator=self._sampler)[:, 0]
        self._keep(chosen, by_document_NRV)
        column = self._history.new_full((len(self._history), 1), self._pad)
        column[self._open, 0] = chosen
        self._lengths[self._open] += 1
        self._history = torch.cat([self._history, column], 1)
        going = ~self._stopping(self._history[self._open], None)
        positions = torch.arange(len(going), device=going.device)
        before = self._open // self._samples
        self._open = self._open[going]
        after = self._open // self._samples
        first_row = torch.searchsorted(before, after)  # where the problem's rows of this step began
        is_first_step = self._history.shape[1] == 2
        self.parents = torch.zeros_like(after) if is_first_step else positions[going] - first_row
        self.tokens = chosen[going]
        self.rows = torch.bincount(after, minlength=self._problems).tolist()

    def _keep(self, chosen: Tensor, by_document_NRV: Tensor) -> None:
        rows = torch.arange(len(chosen), device=chosen.device)
        if not self._kept:
            rows //= self._samples  # all samples of a problem come of one row
        kept = by_document_NRV.new_zeros(len(self._history), len(by_document_NRV))
        kept[self._open] = by_document_NRV[:, rows, chosen].T
        self._kept.append(kept)

    def single(self) -> Tensor | None:
        return self._history[0] if len(self._history) == 1 else None

    def sequences(self) -> list[list[Tensor]]:
        return self._by_problem(self._history, self._lengths)

    def by_document(self) -> list[list[Tensor]]:
        return self._by_problem(torch.stack(self._kept, 1), self._lengths - 1)

    def _by_problem(self, values: Tensor, lengths: Tensor) -> list[list[Tensor]]:
        rows = [row[:length] for row, length in zip(values, lengths.tolist(), strict=True)]
        return [rows[at : at + self._samples] for at in range(0, len(rows), self._samples)]


class BeamSearch:
    """Beam search as transformers does it: 2K candidates a step; finished ones are kept aside, with length penalty."""

    def __init__(
        self,
        *,
        problems: int,
        beams: int,
        start: int,
        pad: int,
        processors: LogitsProcessorList,
        stopping: StoppingCriteriaList,
        returned: int,
        max_length: int,
        eos_tokens: int,
        length_penalty: float,
        early_stopping: bool | str,
        device: torch.device,
    ) -> None:
        self._beams, self._returned, self._max_length = beams, returned, max_length
        self._length_penalty, self._early_stopping = length_penalty, early_stopping
        self._processors, self._stopping = processors, stopping
        self._candidates = max(2, 1 + eos_tokens) * beams
        self._length = 1
        shape = (problems, beams)
        self._open = torch.full((*shape, max_length), pad, device=device)
        self._open[:, :, 0] = start
        self._open_scores = torch.full(shape, REJECTED, device=device)
        self._open_scores[:, 0] = 0.0  # the beams are equal at first: only one may be continued
        self._done = self._open.clone()
        self._done_scores = torch.full(shape, REJECTED, device=device)
        self._done_lengths = torch.ones(shape, dtype=torch.int64, device=device)
        self._is_done = torch.zeros(shape, dtype=torch.bool, device=device)
        self._going = torch.arange(problems, device=device)  # problems of which the tensors above hold state
        self._results: list[list[Tensor]] = [[]] * problems
        # beside _open and _done: (G, K, max_length, N)
        self._open_kept = self._done_kept = torch.empty(0, device=device)
        self._results_kept: list[list[Tensor]] = [[]] * problems
        self.rows = [1] * problems
        self.tokens = torch.full((problems,), start, device=device)
        self.parents = torch.zeros(problems, dtype=torch.int64, device=device)

    def advance(self, log_probs_RV: Tensor, by_document_NRV: Tensor) -> None:
        beams, length, vocabulary = self._beams, self._length, log_probs_RV.shape[1]
        if length == 1:
            log_probs_RV = log_probs_RV.repeat_interleave(beams, 0)
        history = self._open[:, :, :length].reshape(-1, length)
        scores = self._processors(cast("LongTensor", history), cast("FloatTensor", log_probs_RV)).view(
            -1, beams, vocabulary
        )
        scores = scores + self._open_scores[:, :, None]
        top_scores, top = scores.flatten(1).topk(self._candidates)
        parents = top // vocabulary
        candidates = _take(self._open, parents)
        candidates[:, :, length] = top % vocabulary
        candidates_kept = self._kept_of(parents, top % vocabulary, by_document_NRV)
        stops = self._stopping(candidates[:, :, : length + 1].flatten(0, 1), None).view(top.shape)

        self._open_scores, kept = (top_scores + stops.float() * REJECTED).topk(beams)
        self._open, self._open_kept = _take(candidates, kept), _take(candidates_kept, kept)
        self._keep_done(candidates, candidates_kept, top_scores, stops)
        self._length = length + 1
        going = self._improvable() & ~stops.all(-1)
        if self._early_stopping is True:
            going &= ~self._is_done.all(-1)
        self._retire(going)
        self.parents = (parents.gather(1, kept) if length > 1 else torch.zeros_like(kept))[going].flatten()
        self.tokens = self._open[:, :, length].flatten()

    def _kept_of(self, parents: Tensor, tokens: Tensor, by_document_NRV: Tensor) -> Tensor:
        """What is kept of the candidates: (G, candidates, max_length, N)."""
        if self._length == 1:
            self._open_kept = by_document_NRV.new_zeros(*self._open.shape, len(by_document_NRV))
            self._done_kept = self._open_kept
        problems = torch.arange(len(parents), device=parents.device)[:, None]
        rows = problems.expand_as(parents) if self._length == 1 else problems * self._beams + parents
        kept = _take(self._open_kept, parents)
        kept[:, :, self._length - 1] = by_document_NRV[:, rows, tokens].movedim(0, -1)
        return kept

    def _keep_done(self, candidates: Tensor, candidates_kept: Tensor, top_scores: Tensor, stops: Tensor) -> None:
        just_done = stops.clone()
        just_done[:, self._beams :] = False  # the second half only stands by, so that K beams can go on
        scores = top_scores / (self._length**self._length_penalty)
        scores = scores + (~just_done).float() * REJECTED
        lengths = torch.full_like(self._done_lengths[:, :1], self._length + 1).expand_as(just_done)
        self._done_scores, best = torch.cat([self._done_scores, scores], 1).topk(self._beams)
        self._done = _take(torch.cat([self._done, candidates], 1), best)
        self._done_kept = _take(torch.cat([self._done_kept, candidates_kept], 1), best)
        self._done_lengths = torch.cat([self._done_lengths, lengths], 1).gather(1, best)
        self._is_done = torch.cat([self._is_done, just_done], 1).gather(1, best)

    def _improvable(self) -> Tensor:
        """(G,) whether an open beam may still beat the worst of the finished ones: transformers' heuristic."""
        if self._early_stopping == "never" and self._length_penalty > 0:
            best_length = self._max_length - 1
        else:
            best_length = self._length - 1
        best_open: Tensor = self._open_scores[:, :1] / (best_length**self._length_penalty)
        worst_done = torch.where(self._is_done, self._done_scores.min(1, keepdim=True).values, REJECTED)
        better: Tensor = best_open > worst_done
        return better.any(-1)

    def _retire(self, going: Tensor) -> None:
        """Puts the results of finished problems aside and forgets their state.

        Rows that no hypothesis has taken, since the rules allow too few, are left out; transformers returns them: a
        start token and padding.
        """
        for at in (~going).nonzero().flatten().tolist():
            taken = int((self._done_scores[at, : self._returned] > REJECTED).sum())
            lengths = self._done_lengths[at, :taken].tolist()
            problem = int(self._going[at])
            self._results[problem] = [row[:n] for row, n in zip(self._done[at], lengths, strict=False)]
            self._results_kept[problem] = [row[: n - 1] for row, n in zip(self._done_kept[at], lengths, strict=False)]
        if not going.all():
            self._going = self._going[going]
            of_problems = ("_open", "_open_kept", "_open_scores", "_done", "_done_kept", "_done_scores")
            for name in (*of_problems, "_done_lengths", "_is_done"):
                setattr(self, name, getattr(self, name)[going])
        self.rows = [0] * len(self._results)
        for problem in self._going.tolist():
            self.rows[problem] = self._beams

    def single(self) -> Tensor | None:
        return None

    def sequences(self) -> list[list[Tensor]]:
        return self._results

    def by_document(self) -> list[list[Tensor]]:
        return self._results_kept


def _take(rows: Tensor, index: Tensor) -> Tensor:
    return rows.take_along_dim(index.view(*index.shape, *[1] * (rows.dim() - 2)), 1)
