"""What the kernels share: views of operands, and the device code that finds a program's rows."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._row_tiles import DROPPED, UNUSED

__all__ = [
    "DROPPED",
    "UNUSED",
    "Matrix",
    "Stack",
    "coefficients",
    "locate",
    "matrix",
    "row_of_slot",
    "stack",
    "tile_rows",
]


class Matrix(NamedTuple):
    """A 2-D operand: element (i, j) is at ptr + i * row + j * col."""

    ptr: Any
    row: Any
    col: Any


class Stack(NamedTuple):
    """One matrix per expert: (i, j) of expert e is at ptr + e * expert + i * row + j * col."""

    ptr: Any
    expert: Any
    row: Any
    col: Any


def matrix(tensor: Tensor) -> Matrix:
    """The view of a 2-D tensor that a kernel takes."""
    return Matrix(tensor, *tensor.stride())


def stack(tensor: Tensor) -> Stack:
    """The view of a 3-D tensor [experts, rows, columns] that a kernel takes."""
    return Stack(tensor, *tensor.stride())


def coefficients(row_scale: Tensor | None) -> tuple[Tensor | None, torch.dtype | None, int]:
    """Coefficients of rows as a kernel takes them: side by side, with their dtype and address."""
    if row_scale is None:
        return None, None, 0
    # One choice per token: a column of a wider matrix is flat as it lies, with gaps.
    flat = row_scale.reshape(-1).contiguous()
    return flat, flat.dtype, flat.data_ptr()


@triton.jit
def locate(tiles, first_entry, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's (expert, first row, end of the expert's rows, column block).

    first_entry: where the table for this tile height begins.

    Programs of one expert are numbered column block by column block, row tiles fastest.
    """
    program = tl.program_id(0)
    column_blocks = tl.cdiv(columns, BLOCK_N)
    entry = tiles + (first_entry + program // column_blocks).to(tl.int64) * 4
    expert = tl.load(entry)
    first = tl.load(entry + 1)
    begin = tl.load(entry + 2)
    end = tl.load(entry + 3)
    row_blocks = tl.maximum(tl.cdiv(end - begin, BLOCK_M), 1)
    within = program - first * column_blocks
    column_block = within // row_blocks
    row = begin + (within % row_blocks) * BLOCK_M
    return expert, row, end, column_block


@triton.jit
def row_of_slot(slot, fan_out):
    """Operand row that a slot reads, int64; divided in 32 bits, which hold every slot."""
    return (slot.to(tl.int32) // fan_out).to(tl.int64)


@triton.jit
def tile_rows(slots, row, end, fan_out, BY_EXPERT: tl.constexpr, BLOCK_M: tl.constexpr):
    """Operand rows of a tile, int64 [BLOCK_M]; rows past the end repeat the last one."""
    rows = tl.minimum(row + tl.arange(0, BLOCK_M), end - 1).to(tl.int64)
    if not BY_EXPERT:
        rows = row_of_slot(tl.load(slots + rows), fan_out)
    return rows
