"""A decode step's matrix products in Triton, for CUDA and for halves. ``kernels`` launches these.

A few rows are multiplied with a matrix that is read from memory, so that what counts is that every multiprocessor has
a piece of it on its way. Where a matrix has too few columns for that, its rows are split as well (split-K): a piece
gives partial sums in float32, which the layer normalisation that follows adds up.

Shapes: as in ``kernels``; S splits.
"""
# ruff: noqa: PLR0917, PT018, S101  (as in triton_kernels)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from generator_svc.engine.kernels import NormWeights
from generator_svc.engine.triton_kernels import LEAST_TILE, normalized
from generator_svc.engine.triton_launch import LINE_BYTES, chained, fetch, in_turn, processors

MOST_ROWS, MOST_COLUMNS = 64, 128  # of what a program computes
MOST_SPLITS, LEAST_SPLIT = 8, 384  # of a matrix's rows, and how many of them are worth a program
LINE = tl.constexpr(LINE_BYTES // 2)  # of halves


class Tiles(NamedTuple):
    rows: int
    columns: int
    inner: int
    splits: int


def tiles_of(rows: int, columns: int, inner: int, wanted: int, *, may_split: bool) -> Tiles:
    """The widest that make about so many programs as are wanted, three of four at least, with as few splits as do."""
    of_rows = min(MOST_ROWS, max(LEAST_TILE, triton.next_power_of_2(rows)))
    splits = 1
    while may_split and splits < MOST_SPLITS and inner >= 2 * splits * LEAST_SPLIT:
        splits *= 2
    of_columns = MOST_COLUMNS // 2 if may_split else MOST_COLUMNS  # a part more costs more than a wider tile saves
    row_tiles = triton.cdiv(rows, of_rows)

    def enough(of_columns: int, splits: int) -> bool:
        programs: int = row_tiles * triton.cdiv(columns, of_columns) * splits
        return 4 * programs >= 3 * wanted

    while of_columns > LEAST_TILE and not enough(of_columns, splits):
        of_columns //= 2
    while splits > 1 and enough(of_columns, splits // 2):
        splits //= 2
    return Tiles(of_rows, of_columns, 64 if of_columns > 32 else 128, splits)


def affine(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor, with_gelu: bool) -> Tensor:
    rows, columns, inner = len(x_RI), *weight_OI.shape
    out_RO = x_RI.new_empty(rows, columns)
    tiles = tiles_of(rows, columns, inner, processors(x_RI), may_split=False)
    _launch(x_RI, weight_OI, bias_O, out_RO, tiles, with_gelu)
    return out_RO


def affine_norm(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor, residual_RO: Tensor, norm: NormWeights) -> Tensor:
    rows, columns, inner = len(x_RI), *weight_OI.shape
    tiles = tiles_of(rows, columns, inner, processors(x_RI), may_split=True)
    parts_SRO = torch.empty(tiles.splits, rows, columns, dtype=torch.float32, device=x_RI.device)
    _launch(x_RI, weight_OI, None, parts_SRO, tiles, False)
    return normalized(parts_SRO, bias_O, residual_RO, norm)


def _launch(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out: Tensor, tiles: Tiles, with_gelu: bool) -> None:
    assert x_RI.stride(1) == 1 and weight_OI.is_contiguous()
    rows, columns, inner = len(x_RI), *weight_OI.shape
    of_split = triton.cdiv(triton.cdiv(inner, tiles.splits), tiles.inner) * tiles.inner
    with torch.cuda.device(x_RI.get_device()):
        _product[triton.cdiv(rows, tiles.rows), triton.cdiv(columns, tiles.columns), tiles.splits](
            x_RI,
            x_RI.stride(0),
            weight_OI,
            weight_OI if bias_O is None else bias_O,
            out,
            rows,
            columns,
            inner,
            of_split,
            IS_PART=bias_O is None,
            WITH_GELU=with_gelu,
            TILE_R=tiles.rows,
            TILE_O=tiles.columns,
            TILE_I=tiles.inner,
            LINES=triton.next_power_of_2(triton.cdiv(of_split, LINE.value)),
            **chained(x_RI),
            num_warps=4,
            num_stages=4,
        )


@triton.jit(do_not_specialize=["R"])
def _product(
    x_RI: tl.tensor,
    x_stride: tl.tensor,
    weight_OI: tl.tensor,
    bias_O: tl.tensor,
    out: tl.tensor,
    R: tl.tensor,
    O: tl.tensor,  # noqa: E741
    I: tl.tensor,  # noqa: E741
    of_split: tl.tensor,
    IS_PART: tl.constexpr,
    WITH_GELU: tl.constexpr,
    TILE_R: tl.constexpr,
    TILE_O: tl.constexpr,
    TILE_I: tl.constexpr,
    LINES: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """A program a tile of the product, or of one of the parts (S, R, O) that it is the sum of."""
    r = tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)
    o = tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
    first = tl.program_id(2) * of_split
    end = tl.minimum(first + of_split, I)
    in_rows, in_columns = (r < R)[:, None], (o < O)[None, :]
    x_at = x_RI + r[:, None] * x_stride
    weight_at = weight_OI + o[None, :].to(tl.int64) * I
    if CHAINED and tl.program_id(0) == 0:
        line = first + tl.arange(0, LINES) * LINE
        fetch(tl.where((line < end)[:, None] & in_columns, weight_at + line[:, None], weight_OI))
    in_turn(CHAINED)
    total_RO = tl.zeros((TILE_R, TILE_O), tl.float32)
    for start in tl.range(first, end, TILE_I):
        i = start + tl.arange(0, TILE_I)
        in_split = i < end
        x = tl.load(x_at + i[None, :], in_rows & in_split[None, :], 0.0)
        weight = tl.load(weight_at + i[:, None], in_split[:, None] & in_columns, 0.0)
        total_RO = tl.dot(x, weight, total_RO)
    at = r[:, None] * O + o[None, :]
    if IS_PART:
        tl.store(out + tl.program_id(2) * R * O + at, total_RO, in_rows & in_columns)
    else:
        total_RO += tl.load(bias_O + o, o < O, 0.0).to(tl.float32)[None, :]
        made = total_RO.to(out.dtype.element_ty)
        if WITH_GELU:
            x = made.to(tl.float32)  # as torch rounds what comes between
            made = (0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))).to(made.dtype)
        tl.store(out + at, made, in_rows & in_columns)
