"""Which token comes next: greedy, multinomial and beam search over one or more independent problems.

A search sees log-probabilities and decides; it knows nothing of documents or models. It says which rows the decoder
must run next, until none is left. RAG-Token is one problem a question; RAG-Sequence one problem a document. The rules,
ties included, are those of transformers 5 (``generation/utils.py``: ``_sample``, ``_beam_search``), whose logits
processors and stopping criteria are used as they are. A problem that is finished costs nothing more.

``choose_in_place`` is the search over tensors that stay where they are: nothing is read back and no shape depends on
what they hold, so that it can be captured (:mod:`generator_svc.engine.lane`). ``advance`` reads who is finished and
lets it go.

Shapes: P problems, K rows (beams, or samples) of a problem, R rows of all problems that go on, C continuations that
compete, V vocabulary, T tokens, L tokens at most, N documents whose share in each token is kept.
"""

from collections.abc import Callable
from typing import Protocol, cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from generator_svc.engine import kernels
from generator_svc.engine.beams import REJECTED, Beams, Continuations, Rules, chosen, take

LAST_TOKEN_ONLY = (EosTokenCriteria, MaxLengthCriteria)  # what they look at, and how many there are

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


def processed(processors: LogitsProcessorList, history: Tensor, scores_RV: Tensor) -> Tensor:
    """What the rules make of scores. The list, called itself, inspects the signature of each of them every time."""
    for processor in processors:
        scores_RV = processor(cast("LongTensor", history), cast("FloatTensor", scores_RV))
    return scores_RV


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
        max_length: int,
        documents: int,
        device: torch.device,
    ) -> None:
        self._problems, self._samples = problems, samples
        self.processors, self._stopping, self._sampler = processors, stopping, sampler
        self.length = 1
        self.history = torch.full((problems * samples, max_length), pad, device=device)
        self.history[:, 0] = start
        self._kept = torch.zeros(problems * samples, max_length - 1, documents, device=device)
        self._open = list(range(problems * samples))
        self.lengths = torch.ones(problems * samples, dtype=torch.int64, device=device)
        self.rows = [1] * problems
        self.tokens = torch.full((problems,), start, device=device)
        self.parents = torch.zeros(problems, dtype=torch.int64, device=device)

    @property
    def state(self) -> tuple[Tensor, ...]:
        """What :meth:`choose_in_place` changes."""
        return self.history, self._kept, self.lengths

    @property
    def open(self) -> Tensor:
        """(P, K, L) the tokens of every row, and padding."""
        return self.history.view(self._problems, self._samples, -1)

    def advance(self, log_probs_RV: Tensor, by_document_NRV: Tensor) -> None:
        length, problems = self.length, [row // self._samples for row in self._open]
        if length == 1:
            log_probs_RV = log_probs_RV.repeat_interleave(self._samples, 0)
        places = slice(None) if len(self._open) == len(self.history) else torch.tensor(self._open)
        tokens = self._chosen(self.history[places, :length], log_probs_RV)
        self.history[places, length] = tokens
        # all samples of a problem come of one row at first
        rows = torch.tensor(problems if length == 1 else range(len(problems)), device=tokens.device)
        self._kept[places, length - 1] = by_document_NRV[:, rows, tokens].T
        self.lengths[places] = self.length = length + 1
        stops = self._stops(self.history[places, : length + 1]).tolist()
        going = [at for at, stop in enumerate(stops) if not stop]
        first_row = {problem: at for at, problem in reversed(list(enumerate(problems)))}  # of this step
        parents = [0 if length == 1 else at - first_row[problems[at]] for at in going]
        self.parents = torch.tensor(parents, dtype=torch.int64, device=tokens.device)
        self.tokens = tokens if len(going) == len(stops) else tokens[going]
        self.rows = [0] * len(self.rows)
        for at in going:
            self.rows[problems[at]] += 1
        self._open = [self._open[at] for at in going]

    def choose_in_place(self, log_probs_RV: Tensor, shares: Shares, alive_P: Tensor) -> None:
        """As :meth:`advance`, for problems of one row, all of which have one here; a finished one's means nothing."""
        length = self.length
        tokens = self._chosen(self.history[:, :length], log_probs_RV)
        self.history[:, length] = tokens
        self._kept[:, length - 1] = shares(torch.arange(len(tokens), device=tokens.device), tokens).T
        self.lengths += alive_P
        self.length = length + 1
        alive_P &= ~self._stops(self.history[:, : length + 1])

    def _chosen(self, history: Tensor, log_probs_RV: Tensor) -> Tensor:
        scores = processed(self.processors, history, log_probs_RV)
        if self._sampler is None:
            return scores.argmax(-1)
        probabilities = scores.softmax(-1)
        # Where the rules leave a row no token, multinomial would raise, and end all questions of this step.
        impossible = ~probabilities.isfinite().all(-1)
        if impossible.any():
            probabilities[impossible] = 0.0
            probabilities[impossible, scores.argmax(-1)[impossible]] = 1.0
        return torch.multinomial(probabilities, 1, generator=self._sampler)[:, 0]

    def _stops(self, history: Tensor) -> Tensor:
        stops: Tensor = self._stopping(cast("LongTensor", history), cast("FloatTensor", None))
        return stops

    def single(self) -> Tensor | None:
        return self.history[0, : self.length] if len(self.history) == 1 else None

    def results(self) -> list[list[Result]]:
        values = zip(self.history.cpu(), self._kept.cpu(), self.lengths.tolist(), strict=True)
        rows = [(row[:length], kept[: length - 1]) for row, kept, length in values]
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
        documents: int,
        device: torch.device,
    ) -> None:
        self._returned, self._rules = returned, Rules(max_length, length_penalty, early_stopping)
        self.processors, self._stopping = processors, stopping
        self._candidates = max(2, 1 + eos_tokens) * beams
        self.length = 1
        self._beams = Beams.at_start(problems, beams, max_length, documents, start=start, pad=pad, device=device)
        self._going = torch.arange(problems, device=device)  # problems of which the beams hold state
        self._results: list[list[Result]] = [[]] * problems
        self.rows = [1] * problems
        self.tokens = torch.full((problems,), start, device=device)
        self.parents = torch.zeros(problems, dtype=torch.int64, device=device)

    @property
    def state(self) -> Beams:
        """What :meth:`choose_in_place` changes."""
        return self._beams

    @property
    def open(self) -> Tensor:
        """(P, K, L) the tokens of open hypotheses, and padding."""
        return self._beams.open

    def advance(self, log_probs_RV: Tensor, by_document_NRV: Tensor) -> None:
        found = self._continuations(log_probs_RV, lambda rows, tokens: by_document_NRV[:, rows, tokens])
        self._beams, parents, going = chosen(self._beams, found, self.length, self._rules)
        self.parents = (parents if self.length > 1 else torch.zeros_like(parents))[going].flatten()
        self.tokens = self.open[going, :, self.length].flatten()
        self.length += 1
        self._retire(going)

    def choose_in_place(self, log_probs_RV: Tensor, shares: Shares, alive_P: Tensor) -> Tensor:
        """As :meth:`advance`, where every problem has all its rows here; one that is not alive stays as it is.

        Returns: (P, K) the row that each beam continues.
        """
        found = self._continuations(log_probs_RV, shares)
        parents = kernels.keep_beams(self._beams, found, alive_P, self.length, self._rules)
        self.length += 1
        return parents

    def _continuations(self, log_probs_RV: Tensor, shares: Shares) -> Continuations:
        length, (problems, beams) = self.length, self._beams.open_scores.shape
        if length == 1:
            log_probs_RV = log_probs_RV.repeat_interleave(beams, 0)
        history = self.open[:, :, :length].flatten(0, 1)
        scores_RV = processed(self.processors, history, log_probs_RV)
        scores, parents, tokens = kernels.best_continuations(
            scores_RV.view(problems, beams, -1), self._beams.open_scores, self._candidates
        )
        of_problem = torch.arange(problems, device=parents.device)[:, None]
        rows = of_problem.expand_as(parents) if length == 1 else of_problem * beams + parents
        return Continuations(scores, parents, tokens, self._stops(parents, tokens), shares(rows, tokens))

    def _stops(self, parents_PC: Tensor, tokens_PC: Tensor) -> Tensor:
        """Which continuations end an answer."""
        if all(isinstance(one, LAST_TOKEN_ONLY) for one in self._stopping):
            sequences = tokens_PC.reshape(-1, 1).expand(-1, self.length + 1)
        else:
            before = take(self.open[:, :, : self.length], parents_PC)
            sequences = torch.cat([before, tokens_PC[:, :, None]], 2).flatten(0, 1)
        stops: Tensor = self._stopping(cast("LongTensor", sequences), cast("FloatTensor", None))
        return stops.view(tokens_PC.shape)

    def _retire(self, going: Tensor) -> None:
        """Puts the results of finished problems aside and forgets their state."""
        if not going.all():
            finished = (~going).nonzero().flatten()
            for problem, found in zip(self._going[finished].tolist(), self._results_of(finished), strict=True):
                self._results[problem] = found
            self._going = self._going[going]
            self._beams = Beams(*(of_problems[going] for of_problems in self._beams))
        self.rows = [0] * len(self._results)
        for problem in self._going.tolist():
            self.rows[problem] = self._beams.open.shape[1]

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
        beams = self._beams
        done, kept = beams.done[problems].cpu(), beams.done_kept[problems].cpu()
        taken = (beams.done_scores[problems, : self._returned] > REJECTED).sum(1).tolist()
        lengths = beams.done_lengths[problems].tolist()
        return [
            [(done[at, i, :n], kept[at, i, : n - 1]) for i, n in enumerate(of_problem[:count])]
            for at, (count, of_problem) in enumerate(zip(taken, lengths, strict=True))
        ]

    def single(self) -> Tensor | None:
        return None
