"""Beam search's bookkeeping: which continuations go on, and which are put aside as finished.

The rules, ties included, are those of transformers 5 (``generation/utils.py: _beam_search``).

Shapes: P problems, K beams of each, C continuations that compete, L tokens at most, N documents whose share in each
token is kept.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

REJECTED = -1.0e9  # transformers' score of what must not be chosen


class Beams(NamedTuple):
    """What a search of K beams a problem knows: its open hypotheses, and the best finished ones.

    ``open`` and ``done`` (P, K, L) are their tokens, ``…_kept`` (P, K, L - 1, N) what documents had to do with them,
    but for the first; all others are (P, K).
    """

    open: Tensor
    open_kept: Tensor
    open_scores: Tensor
    done: Tensor
    done_kept: Tensor
    done_scores: Tensor
    done_lengths: Tensor
    is_done: Tensor

    @classmethod
    def at_start(
        cls, problems: int, beams: int, max_length: int, documents: int, *, start: int, pad: int, device: torch.device
    ) -> Self:
        """Equal beams, of which only the first may be continued."""
        rows = torch.full((problems, beams, max_length), pad, device=device)
        rows[:, :, 0] = start
        kept = torch.zeros(problems, beams, max_length - 1, documents, device=device)
        scores = torch.full((problems, beams), REJECTED, device=device)
        open_scores = scores.clone()
        open_scores[:, 0] = 0.0
        lengths = torch.ones(problems, beams, dtype=torch.int64, device=device)
        is_done = torch.zeros(problems, beams, dtype=torch.bool, device=device)
        return cls(rows, kept, open_scores, rows.clone(), kept.clone(), scores, lengths, is_done)


class Continuations(NamedTuple):
    """The best of each problem, best first: (P, C) scores, the row and the token, and whether it ends an answer.

    ``shares`` (N, P, C) is what documents have to do with it.
    """

    scores: Tensor
    parents: Tensor
    tokens: Tensor
    stops: Tensor
    shares: Tensor


class Rules(NamedTuple):
    """``early_stopping`` is transformers': True, False or "never"."""

    max_length: int
    length_penalty: float
    early_stopping: bool | str

    def penalties(self, length: int) -> tuple[float, float]:
        """What scores are divided by: those of answers that end now, and the best that an open beam may still get."""
        is_never = self.early_stopping == "never" and self.length_penalty > 0
        return length**self.length_penalty, (self.max_length - 1 if is_never else length) ** self.length_penalty


def chosen(beams: Beams, found: Continuations, length: int, rules: Rules) -> tuple[Beams, Tensor, Tensor]:
    """The beams after one more token.

    Args:
        length: of the open hypotheses, start token included.

    Returns: they; (P, K) the row that each open one continues; (P,) which problems go on.
    """
    size = beams.open_scores.shape[1]
    now, best = rules.penalties(length)
    candidates_PCL, kept_PCLN = take(beams.open, found.parents), take(beams.open_kept, found.parents)
    candidates_PCL[:, :, length] = found.tokens
    kept_PCLN[:, :, length - 1] = found.shares.movedim(0, -1)

    open_scores_PK, open_at = (found.scores + found.stops.float() * REJECTED).topk(size)

    just_done_PC = found.stops.clone()
    just_done_PC[:, size:] = False  # the others only stand by, so that K beams can go on
    done_scores_PC = found.scores / now + (~just_done_PC).float() * REJECTED
    done_scores_PK, done_at = torch.cat([beams.done_scores, done_scores_PC], 1).topk(size)
    lengths_PC = beams.done_lengths.new_full(just_done_PC.shape, length + 1)
    is_done_PK = torch.cat([beams.is_done, just_done_PC], 1).gather(1, done_at)

    # transformers' heuristic: whether an open beam may still beat the worst of the finished ones
    worst_PK = torch.where(is_done_PK, done_scores_PK.min(1, keepdim=True).values, REJECTED)
    goes_on_P: Tensor = (open_scores_PK[:, :1] / best > worst_PK).any(-1) & ~found.stops.all(-1)
    if rules.early_stopping is True:
        goes_on_P &= ~is_done_PK.all(-1)

    after = Beams(
        take(candidates_PCL, open_at),
        take(kept_PCLN, open_at),
        open_scores_PK,
        take(torch.cat([beams.done, candidates_PCL], 1), done_at),
        take(torch.cat([beams.done_kept, kept_PCLN], 1), done_at),
        done_scores_PK,
        torch.cat([beams.done_lengths, lengths_PC], 1).gather(1, done_at),
        is_done_PK,
    )
    return after, found.parents.gather(1, open_at), goes_on_P


def take(rows: Tensor, index: Tensor) -> Tensor:
    """Rows of each problem."""
    return rows.take_along_dim(index.view(*index.shape, *[1] * (rows.dim() - 2)), 1)
