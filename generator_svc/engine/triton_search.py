"""What the search does, in Triton, for CUDA: two functions of :mod:`generator_svc.engine.kernels`.

A score and its place make one integer that orders as the scores do, so that finding the best of many is finding the
greatest, and no two are equal. How many beams, documents and continuations there are is no constant of a kernel:
another number compiles nothing.

Shapes: as there.
"""
# ruff: noqa: PLR0917, PT018, S101  (kernels take what they need one by one; the callers are ours)

import torch
import triton
import triton.language as tl
from torch import Tensor

from generator_svc.engine.beams import REJECTED, Beams, Continuations, Rules

PIECE = 4096  # scores that a program looks at
COLUMNS = 64  # of hypotheses that are moved at once
PLACES = tl.constexpr(0x7FFFFFFF)
NOTHING = tl.constexpr(-0x8000000000000000)  # below every key
REJECTION = tl.constexpr(REJECTED)


def best_continuations(scores_PKV: Tensor, beam_scores_PK: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    problems, beams, vocabulary = scores_PKV.shape
    assert scores_PKV.stride(2) == 1 and beam_scores_PK.is_contiguous()
    pieces = triton.cdiv(vocabulary, PIECE)
    keys = torch.empty(problems, beams * pieces * count, dtype=torch.int64, device=scores_PKV.device)
    scores_PC = torch.empty(problems, count, dtype=torch.float32, device=scores_PKV.device)
    parents_PC, tokens_PC = (torch.empty_like(scores_PC, dtype=torch.int64) for _ in range(2))
    tile = triton.next_power_of_2(keys.shape[1])
    with torch.cuda.device(scores_PKV.get_device()):
        _best_of_pieces[(problems * beams, pieces)](
            scores_PKV,
            beam_scores_PK,
            keys,
            *scores_PKV.stride()[:2],
            vocabulary,
            beams,
            count,
            TILE=min(PIECE, triton.next_power_of_2(vocabulary)),
            num_warps=4,
        )
        _best_of_problem[(problems,)](
            keys,
            scores_PC,
            parents_PC,
            tokens_PC,
            keys.shape[1],
            vocabulary,
            count,
            TILE=tile,
            num_warps=4 if tile <= 4096 else 16,
        )
    return scores_PC, parents_PC, tokens_PC


@triton.jit(do_not_specialize=["K", "C"])
def _best_of_pieces(
    scores_PKV: tl.tensor,
    beam_scores_PK: tl.tensor,
    keys: tl.tensor,
    stride_p: tl.tensor,
    stride_k: tl.tensor,
    V: tl.tensor,
    K: tl.tensor,
    C: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """A program a piece of a row: its best C."""
    p, k = tl.program_id(0) // K, tl.program_id(0) % K
    v = tl.program_id(1) * TILE + tl.arange(0, TILE)
    scores = tl.load(scores_PKV + p.to(tl.int64) * stride_p + k.to(tl.int64) * stride_k + v, v < V, 0.0)
    left = tl.where(v < V, _key(scores + tl.load(beam_scores_PK + p * K + k), k * V + v), NOTHING)
    out = keys + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * C
    for c in range(C):
        best = tl.max(left, 0)
        left = tl.where(left == best, NOTHING, left)
        tl.store(out + c, best)


@triton.jit(do_not_specialize=["count", "C"])
def _best_of_problem(
    keys: tl.tensor,
    scores_PC: tl.tensor,
    parents_PC: tl.tensor,
    tokens_PC: tl.tensor,
    count: tl.tensor,
    V: tl.tensor,
    C: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """A program a problem: the best C of all its pieces'."""
    p, at = tl.program_id(0), tl.arange(0, TILE)
    left = tl.load(keys + p * count + at, at < count, NOTHING)
    for c in range(C):
        best = tl.max(left, 0)
        left = tl.where(left == best, NOTHING, left)
        place = (best & PLACES) ^ PLACES
        ordered = (best >> 32).to(tl.int32)
        tl.store(scores_PC + p * C + c, (ordered ^ ((ordered >> 31) & PLACES)).to(tl.float32, bitcast=True))
        tl.store(parents_PC + p * C + c, place // V)
        tl.store(tokens_PC + p * C + c, place % V)


@triton.jit
def _key(score: tl.tensor, place: tl.tensor) -> tl.tensor:
    """int64: of a float32 and its place, the first of equals the greater."""
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & PLACES)
    return (ordered.to(tl.int64) << 32) + (place ^ PLACES).to(tl.int64)


def keep_beams(beams: Beams, found: Continuations, alive_P: Tensor, length: int, rules: Rules) -> Tensor:
    assert all(kept.is_contiguous() for kept in (*beams, *found[:4], alive_P))
    problems, rows, longest = beams.open.shape
    count = found.scores.shape[1]
    parents_PK = torch.empty_like(beams.open_scores, dtype=torch.int64)
    with torch.cuda.device(alive_P.get_device()):
        _keep_beams[(problems,)](
            *beams,
            *found,
            alive_P,
            parents_PK,
            length,
            longest,
            *rules.penalties(length),
            *found.shares.stride(),
            beams.open_kept.shape[3],
            rows,
            count,
            ENDS_EARLY=rules.early_stopping is True,
            TILE_K=triton.next_power_of_2(rows),
            TILE_C=triton.next_power_of_2(count),
            TILE_KC=triton.next_power_of_2(rows + count),
            TILE=COLUMNS,
            num_warps=4,
        )
    return parents_PK


@triton.jit(do_not_specialize=["length", "L", "stride_n", "stride_p", "stride_c", "N", "K", "C"])
def _keep_beams(
    open_PKL: tl.tensor,
    open_kept_PKLN: tl.tensor,
    open_scores_PK: tl.tensor,
    done_PKL: tl.tensor,
    done_kept_PKLN: tl.tensor,
    done_scores_PK: tl.tensor,
    done_lengths_PK: tl.tensor,
    is_done_PK: tl.tensor,
    scores_PC: tl.tensor,
    parents_PC: tl.tensor,
    tokens_PC: tl.tensor,
    stops_PC: tl.tensor,
    shares_NPC: tl.tensor,
    alive_P: tl.tensor,
    parents_PK: tl.tensor,
    length: tl.tensor,
    L: tl.tensor,
    penalty_now: tl.tensor,
    best_penalty: tl.tensor,
    stride_n: tl.tensor,
    stride_p: tl.tensor,
    stride_c: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    C: tl.tensor,
    ENDS_EARLY: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_C: tl.constexpr,
    TILE_KC: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """A program a problem. What is moved within a tensor is read by all threads before any of them writes."""
    p = tl.program_id(0)
    k, c, kc = tl.arange(0, TILE_K), tl.arange(0, TILE_C), tl.arange(0, TILE_KC)
    in_beams = k < K
    of_problem = p.to(tl.int64) * K
    if tl.load(alive_P + p):
        scores = tl.load(scores_PC + p * C + c, c < C, 0.0)
        stops = tl.load(stops_PC + p * C + c, c < C, 1) != 0
        scores = tl.where(stops, scores + REJECTION, scores)
        opened = _best_places(tl.where(c < C, _key(scores, c), NOTHING), c, k)
        open_scores = tl.load(scores_PC + p * C + opened, in_beams, 0.0)
        open_stops = tl.load(stops_PC + p * C + opened, in_beams, 0) != 0
        open_scores = tl.where(open_stops, open_scores + REJECTION, open_scores)
        parents = tl.load(parents_PC + p * C + opened, in_beams, 0)

        # Finished ones, the old before the new. Those behind the first K only stand by, so that K beams can go on.
        new_at = kc - K
        ended = _done_score(scores_PC, stops_PC, p * C, new_at, (new_at >= 0) & (new_at < C), penalty_now, K)
        ended = tl.where(kc < K, tl.load(done_scores_PK + of_problem + kc, kc < K, 0.0), ended)
        done_at = _best_places(tl.where(kc < K + C, _key(ended, kc), NOTHING), kc, k)
        is_old, new_at = done_at < K, done_at - K
        is_new = in_beams & (done_at >= K)
        old = of_problem + tl.where(is_old, done_at, 0)
        new = p * C + tl.where(is_new, new_at, 0)
        done_scores = tl.where(
            is_old,
            tl.load(done_scores_PK + old, in_beams & is_old, 0.0),
            _done_score(scores_PC, stops_PC, p * C, new_at, is_new, penalty_now, K),
        )
        done_lengths = tl.where(is_old, tl.load(done_lengths_PK + old, in_beams & is_old, 0), length + 1)
        just_done = (tl.load(stops_PC + new, is_new, 0) != 0) & (new_at < K)
        is_done = tl.where(is_old, tl.load(is_done_PK + old, in_beams & is_old, 0) != 0, just_done)
        new_parents = tl.load(parents_PC + new, is_new, 0)

        tokens = tokens_PC + p * C
        _move(
            open_PKL, done_PKL, tokens, 0, 1, of_problem, L, length, length + 1,
            k, in_beams, opened, parents, is_old, old, is_new, new_at, new_parents, TILE,
        )  # fmt: skip
        shares = shares_NPC + p.to(tl.int64) * stride_p
        _move(
            open_kept_PKLN, done_kept_PKLN, shares, stride_n, stride_c, of_problem, (L - 1) * N, (length - 1) * N,
            length * N, k, in_beams, opened, parents, is_old, old, is_new, new_at, new_parents, TILE,
        )  # fmt: skip
        tl.debug_barrier()
        tl.store(open_scores_PK + of_problem + k, open_scores, in_beams)
        tl.store(done_scores_PK + of_problem + k, done_scores, in_beams)
        tl.store(done_lengths_PK + of_problem + k, done_lengths, in_beams)
        tl.store(is_done_PK + of_problem + k, is_done, in_beams)
        tl.store(parents_PK + of_problem + k, parents, in_beams)

        best_open = tl.max(tl.where(in_beams, open_scores, float("-inf")), 0)
        worst_done = tl.min(tl.where(in_beams, done_scores, float("inf")), 0)
        may_win = in_beams & (tl.div_rn(best_open, best_penalty) > tl.where(is_done, worst_done, REJECTION))
        goes_on = (tl.max(may_win.to(tl.int32), 0) > 0) & (tl.min(stops.to(tl.int32), 0) == 0)
        if ENDS_EARLY:
            goes_on = goes_on & (tl.min((is_done | (k >= K)).to(tl.int32), 0) == 0)
        tl.store(alive_P + p, goes_on)
    else:
        tl.store(parents_PK + of_problem + k, k.to(tl.int64), in_beams)


@triton.jit
def _move(
    open_rows: tl.tensor,
    done_rows: tl.tensor,
    new: tl.tensor,
    stride_n: tl.tensor,
    stride_c: tl.tensor,
    of_problem: tl.tensor,
    width: tl.tensor,
    before: tl.tensor,
    end: tl.tensor,
    k: tl.tensor,
    in_beams: tl.tensor,
    opened: tl.tensor,
    parents: tl.tensor,
    is_old: tl.tensor,
    old: tl.tensor,
    is_new: tl.tensor,
    new_at: tl.tensor,
    new_parents: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """The rows of hypotheses: columns up to `before` are those of their parents, up to `end` what `new` holds."""
    for first in tl.range(0, end, TILE):
        at = (first + tl.arange(0, TILE))[None, :]
        to_open, to_done = in_beams[:, None] & (at < end), is_new[:, None] & (at < end)
        is_last = at >= before
        last = new + tl.where(is_last, at - before, 0) * stride_n
        of_parents = tl.load(open_rows + (of_problem + parents)[:, None] * width + at, to_open & ~is_last)
        of_new_parents = tl.load(open_rows + (of_problem + new_parents)[:, None] * width + at, to_done & ~is_last)
        of_open = tl.load(last + opened[:, None] * stride_c, to_open & is_last)
        of_done = tl.load(last + new_at[:, None] * stride_c, to_done & is_last)
        of_old = tl.load(done_rows + old[:, None] * width + at, (in_beams & is_old)[:, None] & (at < end))
        tl.debug_barrier()
        place = (of_problem + k)[:, None] * width + at
        tl.store(open_rows + place, tl.where(is_last, of_open, of_parents), to_open)
        of_new = tl.where(is_last, of_done, of_new_parents)
        tl.store(done_rows + place, tl.where(is_old[:, None], of_old, of_new), to_open)


@triton.jit
def _best_places(keys: tl.tensor, places: tl.tensor, k: tl.tensor) -> tl.tensor:
    """Where the keys are that `k` others are above of."""
    rank = tl.sum((keys[:, None] < keys[None, :]).to(tl.int32), 1)
    return tl.sum(tl.where(rank[:, None] == k[None, :], places[:, None], 0), 0)


@triton.jit
def _done_score(
    scores_PC: tl.tensor,
    stops_PC: tl.tensor,
    of_problem: tl.tensor,
    c: tl.tensor,
    there: tl.tensor,
    penalty: tl.tensor,
    K: tl.tensor,
) -> tl.tensor:
    """Of continuations as finished ones."""
    at = of_problem + tl.where(there, c, 0)
    score = tl.div_rn(tl.load(scores_PC + at, there, 0.0), penalty)
    is_done = (tl.load(stops_PC + at, there, 0) != 0) & (c < K)
    return tl.where(is_done, score, score + REJECTION)
