"""Which token comes next: greedy, multinomial and beam search over one or more independent problems.

A search sees log-probabilities and decides; it knows nothing of documents or models. It says which rows the decoder
must run next, until none is left. RAG-Token is one problem a question; RAG-Sequence one problem a document. The rules,
ties included, are those of transformers 5 (``generation/utils.py``: ``_sample``, ``_beam_search``), whose logits
processors and stopping criteria are used as they are. A problem that is finished costs nothing more.

``choose`` is the search itself, over tensors alone: nothing is read back and no shape depends on what they hold, so
that it can be captured (:mod:`generator_svc.engine.lanes`). ``advance`` reads who is finished and lets it go.

Shapes: G problems, K rows (beams, or samples) of a problem, R rows of all problems that go on, V vocabulary, T tokens,
N documents whose share in each token is kept.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

REJECTED = -1.0e9  # transformers' score of what must not be chosen

Shares = Callable[[Tensor, Tensor], Tensor]
"""(rows, tokens) of one shape → (N, …): what each document had to do with these tokens, before any rule."""


Result = tuple[Tensor, Tensor]
"""(T,) tokens, the decoder start token first, no padding; and (T - 1, N), what was kept of them. On the host."""


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

    def results(self) -> list[list[Result]]:
        """For each problem what it has found, best first."""


class RowSearch:
    """Greedy search, or multinomial sampling where there is a sampler. Every row is on its own."""

    STATE: ClassVar[Sequence[str]] = ("history", "kept", "lengths")

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
        max_length: int,
        documents: int,
        device: torch.device,
    ) -> None:
        self._problems, self._samples = problems, samples
        self.processors, self._stopping, self._sampler = processors, stopping, sampler
        self.length = 1
        self.history = torch.full((problems * samples, max_length), pad, device=device)
        self.history[:, 0] = start
        self.kept = torch.zeros(problems * samples, max_length - 1, documents, device=device)
        self._open = torch.arange(problems * samples, device=device)
        self.lengths = torch.ones_like(self._open)
        self.rows = [1] * problems
        self.tokens = torch.full((problems,), start, device=device)
        self.parents = torch.zeros(problems, dtype=torch.int64, device=device)

    def advance(self, log_probs_RV: Tensor, by_document_NRV: Tensor) -> None:
        is_first_step = self.length == 1
        going = self.choose(log_probs_RV, lambda rows, tokens: by_document_NRV[:, rows, tokens])
        positions = torch.arange(len(going), device=going.device)
        before = self._open // self._samples
        self._open = self._open[going]
        after = self._open // self._samples
        first_row = torch.searchsorted(before, after)  # where the problem's rows of this step began
        self.parents = torch.zeros_like(after) if is_first_step else positions[going] - first_row
        self.tokens = self.tokens[going]
        self.rows = torch.bincount(after, minlength=self._problems).tolist()

    def choose(self, log_probs_RV: Tensor, shares: Shares) -> Tensor:
        """(R,) which of the rows go on; ``tokens`` are then those of all of them."""
        length, rows = self.length, self._open
        if length == 1:
            log_probs_RV = log_probs_RV.repeat_interleave(self._samples, 0)
            rows = rows // self._samples  # all samples of a problem come of one row
        else:
            rows = torch.arange(len(rows), device=rows.device)
        history = self.history[self._open]
        scores = self.processors(cast("LongTensor", history[:, :length]), cast("FloatTensor", log_probs_RV))
        if self._sampler is None:
            self.tokens = scores.argmax(-1)
        else:
            probabilities = scores.softmax(-1)
            # Where the rules leave a row no token, multinomial would raise, and end all questions of this step.
            impossible = ~probabilities.isfinite().all(-1)
            if impossible.any():
                probabilities[impossible] = 0.0
                probabilities[impossible, scores.argmax(-1)[impossible]] = 1.0
            self.tokens = torch.multinomial(probabilities, 1, generator=self._sampler)[:, 0]
        history[:, length] = self.tokens
        self.history = self.history.index_copy(0, self._open, history)
        kept = self.kept[self._open]
        kept[:, length - 1] = shares(rows, self.tokens).T
        self.kept = self.kept.index_copy(0, self._open, kept)
        self.lengths = self.lengths.index_fill(0, self._open, length + 1)
        self.length = length + 1
        stops: Tensor = self._stopping(cast("LongTensor", history[:, : length + 1]), cast("FloatTensor", None))
        return ~stops

    def single(self) -> Tensor | None:
        return self.history[0, : self.length] if len(self.history) == 1 else None

    def results(self) -> list[list[Result]]:
        values = zip(self.history.cpu(), self.kept.cpu(), self.lengths.tolist(), strict=True)
        rows = [(row[:length], kept[: length - 1]) for row, kept, length in values]
        return [rows[at : at + self._samples] for at in range(0, len(rows), self._samples)]


class BeamSearch:
    """Beam search as transformers does it: 2K candidates a step; finished ones are kept aside, with length penalty."""

    STATE: ClassVar[Sequence[str]] = (
        "open", "open_kept", "open_scores", "done", "done_kept", "done_scores", "done_lengths", "is_done",
    )  # fmt: skip

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
        documents: int,
        device: torch.device,
    ) -> None:
        self._beams, self._returned, self._max_length = beams, returned, max_length
        self._length_penalty, self._early_stopping = length_penalty, early_stopping
        self.processors, self._stopping = processors, stopping
        self._candidates = max(2, 1 + eos_tokens) * beams
        self.length = 1
        shape = (problems, beams)
        self.open = torch.full((*shape, max_length), pad, device=device)
        self.open[:, :, 0] = start
        self.open_scores = torch.full(shape, REJECTED, device=device)
        self.open_scores[:, 0] = 0.0  # the beams are equal at first: only one may be continued
        self.done = self.open.clone()
        self.done_scores = torch.full(shape, REJECTED, device=device)
        self.done_lengths = torch.ones(shape, dtype=torch.int64, device=device)
        self.is_done = torch.zeros(shape, dtype=torch.bool, device=device)
        self.open_kept = torch.zeros(*shape, max_length - 1, documents, device=device)
        self.done_kept = torch.zeros_like(self.open_kept)
        self._going = torch.arange(problems, device=device)  # problems of which the tensors above hold state
        self._results: list[list[Result]] = [[]] * problems
        self.rows = [1] * problems
        self.tokens = torch.full((problems,), start, device=device)
        self.parents = torch.zeros(problems, dtype=torch.int64, device=device)

    def advance(self, log_probs_RV: Tensor, by_document_NRV: Tensor) -> None:
        going = self.choose(log_probs_RV, lambda rows, tokens: by_document_NRV[:, rows, tokens])
        self._retire(going)
        self.parents, self.tokens = self.parents[going].flatten(), self.tokens[going].flatten()

    def choose(self, log_probs_RV: Tensor, shares: Shares) -> Tensor:
        """(G,) which of the problems go on; ``tokens`` and ``parents``, (G, K), are then those of all of them."""
        beams, length, vocabulary = self._beams, self.length, log_probs_RV.shape[1]
        if length == 1:
            log_probs_RV = log_probs_RV.repeat_interleave(beams, 0)
        history = self.open[:, :, :length].reshape(-1, length)
        scores = self.processors(cast("LongTensor", history), cast("FloatTensor", log_probs_RV)).view(
            -1, beams, vocabulary
        )
        scores = scores + self.open_scores[:, :, None]
        top_scores, top = scores.flatten(1).topk(self._candidates)
        parents, tokens = top // vocabulary, top % vocabulary
        candidates = _take(self.open, parents)
        candidates[:, :, length] = tokens
        candidates_kept = _take(self.open_kept, parents)
        problems = torch.arange(len(parents), device=parents.device)[:, None]
        rows = problems.expand_as(parents) if length == 1 else problems * beams + parents
        candidates_kept[:, :, length - 1] = shares(rows, tokens).movedim(0, -1)
        stops = self._stopping(
            cast("LongTensor", candidates[:, :, : length + 1].flatten(0, 1)), cast("FloatTensor", None)
        ).view(top.shape)

        self.open_scores, kept = (top_scores + stops.float() * REJECTED).topk(beams)
        self.open, self.open_kept = _take(candidates, kept), _take(candidates_kept, kept)
        self._keep_done(candidates, candidates_kept, top_scores, stops)
        self.length = length + 1
        self.parents = parents.gather(1, kept) if length > 1 else torch.zeros_like(kept)
        self.tokens = self.open[:, :, length]
        going: Tensor = self._improvable() & ~stops.all(-1)
        if self._early_stopping is True:
            going &= ~self.is_done.all(-1)
        return going

    def _keep_done(self, candidates: Tensor, candidates_kept: Tensor, top_scores: Tensor, stops: Tensor) -> None:
        just_done = stops.clone()
        just_done[:, self._beams :] = False  # the second half only stands by, so that K beams can go on
        scores = top_scores / (self.length**self._length_penalty)
        scores = scores + (~just_done).float() * REJECTED
        lengths = torch.full_like(self.done_lengths[:, :1], self.length + 1).expand_as(just_done)
        self.done_scores, best = torch.cat([self.done_scores, scores], 1).topk(self._beams)
        self.done = _take(torch.cat([self.done, candidates], 1), best)
        self.done_kept = _take(torch.cat([self.done_kept, candidates_kept], 1), best)
        self.done_lengths = torch.cat([self.done_lengths, lengths], 1).gather(1, best)
        self.is_done = torch.cat([self.is_done, just_done], 1).gather(1, best)

    def _improvable(self) -> Tensor:
        """(G,) whether an open beam may still beat the worst of the finished ones: transformers' heuristic."""
        if self._early_stopping == "never" and self._length_penalty > 0:
            best_length = self._max_length - 1
        else:
            best_length = self.length - 1
        best_open: Tensor = self.open_scores[:, :1] / (best_length**self._length_penalty)
        worst_done = torch.where(self.is_done, self.done_scores.min(1, keepdim=True).values, REJECTED)
        better: Tensor = best_open > worst_done
        return better.any(-1)

    def _retire(self, going: Tensor) -> None:
        """Puts the results of finished problems aside and forgets their state."""
        if not going.all():
            finished = (~going).nonzero().flatten()
            for problem, found in zip(self._going[finished].tolist(), self._results_of(finished), strict=True):
                self._results[problem] = found
            self._going = self._going[going]
            for name in self.STATE:
                setattr(self, name, getattr(self, name)[going])
        self.rows = [0] * len(self._results)
        for problem in self._going.tolist():
            self.rows[problem] = self._beams

    def results(self) -> list[list[Result]]:
        found = list(self._results)
        for problem, so_far in zip(self._going.tolist(), self._results_of(slice(None)), strict=True):
            found[problem] = so_far
        return found

    def _results_of(self, problems: Tensor | slice) -> list[list[Result]]:
        """Of problems that still have state here.

        Rows that no hypothesis has taken, since the rules allow too few, are left out; transformers returns them: a
        start token and padding.
        """
        done, kept = self.done[problems].cpu(), self.done_kept[problems].cpu()
        taken = (self.done_scores[problems, : self._returned] > REJECTED).sum(1).tolist()
        lengths = self.done_lengths[problems].tolist()
        return [
            [(done[at, i, :n], kept[at, i, : n - 1]) for i, n in enumerate(of_problem[:count])]
            for at, (count, of_problem) in enumerate(zip(taken, lengths, strict=True))
        ]

    def single(self) -> Tensor | None:
        return None


def _take(rows: Tensor, index: Tensor) -> Tensor:
    return rows.take_along_dim(index.view(*index.shape, *[1] * (rows.dim() - 2)), 1)
