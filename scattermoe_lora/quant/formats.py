"""Stacks of experts as they are stored, and how each becomes dense.

A stored stack holds E matrices [d1, d2]. Whatever the format, `dense` gives any of them, in any
order, in fp32, fp16 or bf16, into a buffer of the caller if there is one. Values validate
themselves when they are built; building one reads no element and copies nothing.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .._arguments import check_dtype
from .._sizes import ceil_div
from ..ops._check import check_tensor
from ..ops._selection import output, select
from ..ops.dequantize import DequantizePlan, NestedScales, dequantize_four_bit
from ..ops.dequantize_scaled import dequantize_scaled

INT8_STEP = 1 / 127
CODES = 16
NESTED_CODES = 256


@runtime_checkable
class StoredExperts(Protocol):
    """A stack of experts in some storage format."""

    @property
    def experts(self) -> int:
        """Number of experts."""

    @property
    def shape(self) -> tuple[int, int]:
        """(d1, d2) of one expert, in the order of the storage."""

    @property
    def device(self) -> torch.device:
        """Where the storage is."""

    @property
    def dtype(self) -> torch.dtype:
        """What the experts were before they were stored, if the storage tells, or bf16."""

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, statistics included."""

    def dense(
        self,
        expert_ids: Tensor | range | None = None,
        *,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """The experts `expert_ids` as [selected, d1, d2] of `dtype`.

        Args:
            expert_ids: int64 or int32 [selected] in any order and with duplicates, a range of step
                1, or None for all. Ids on a CPU are checked; an id on a GPU outside [0, experts)
                gives NaN.
            dtype: float32, float16 or bfloat16.
            out: contiguous buffer [selected, d1, d2] of `dtype` that is overwritten and returned.

        Raises:
            TypeError, ValueError: an argument does not fit; the message holds both numbers.
        """


class _Stacked:
    """Formats whose tensor `data` is [experts, d1, d2]."""

    __slots__ = ()
    data: Tensor

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.data.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d1, d2) of one expert."""
        return self.data.shape[1], self.data.shape[2]

    @property
    def device(self) -> torch.device:
        """Where the storage is."""
        return self.data.device


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBit:
    """Two elements per byte, a codebook of 16 values, one scale per block of the flattened stack.

    packed: uint8 [experts d1 d2 / 2], contiguous; the even element is the high nibble (NF4, FP4 of
    bitsandbytes). absmax: [ceil(experts d1 d2 / blocksize)], fp32, or uint8 where `nested` decodes
    it. codebook: fp32 [16].

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a tensor has another size or device; an expert has an odd number of elements, so
            that experts share a byte; blocksize is odd or not positive.
    """

    packed: Tensor
    absmax: Tensor
    codebook: Tensor
    blocksize: int
    experts: int
    shape: tuple[int, int]
    nested: NestedScales | None = None
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        _check_stack(self.experts, self.shape)
        elements = math.prod(self.shape)
        if elements % 2:
            raise ValueError(
                f"an expert of shape {list(self.shape)} has {elements} elements, but bytes of "
                "4-bit storage hold 2: experts that share a byte cannot be told apart"
            )
        if self.blocksize < 2 or self.blocksize % 2:
            raise ValueError(f"blocksize must be even and at least 2, got {self.blocksize}")
        total = self.experts * elements
        _check_tensor("packed", self.packed, torch.uint8, total // 2)
        blocks = ceil_div(total, self.blocksize)
        scale_dtype = torch.float32 if self.nested is None else torch.uint8
        _check_tensor("absmax", self.absmax, scale_dtype, blocks)
        _check_tensor("codebook", self.codebook, torch.float32, CODES)
        tensors = {"absmax": self.absmax, "codebook": self.codebook}
        if self.nested is not None:
            if self.nested.blocksize < 1:
                raise ValueError(
                    f"nested.blocksize must be at least 1, got {self.nested.blocksize}"
                )
            outer = ceil_div(blocks, self.nested.blocksize)
            _check_tensor("nested.absmax", self.nested.absmax, torch.float32, outer)
            _check_tensor("nested.code", self.nested.code, torch.float32, NESTED_CODES)
            _check_tensor("nested.offset", self.nested.offset, torch.float32, 1)
            tensors["nested.absmax"] = self.nested.absmax
            tensors["nested.code"] = self.nested.code
            tensors["nested.offset"] = self.nested.offset
        _check_devices("packed", self.packed, tensors)

    @property
    def device(self) -> torch.device:
        """Where the storage is."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, statistics included."""
        tensors = [self.packed, self.absmax, self.codebook]
        if self.nested is not None:
            tensors += [self.nested.code, self.nested.absmax, self.nested.offset]
        return sum(tensor.nbytes for tensor in tensors)

    def dense(
        self,
        expert_ids: Tensor | range | None = None,
        *,
        dtype: torch.dtype,
        out: Tensor | None = None,
        plan: DequantizePlan | None = None,
    ) -> Tensor:
        """As `StoredExperts.dense`: round(codebook[nibble] * scale), the same on every device."""
        selection = select(expert_ids, self.experts, self.device)
        return dequantize_four_bit(
            self.packed,
            self.absmax,
            self.codebook,
            selection,
            blocksize=self.blocksize,
            nested=self.nested,
            experts=self.experts,
            out=output(out, (selection.count, *self.shape), dtype, self.device),
            plan=plan,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8RowWise(_Stacked):
    """int8 in units of 1/127 of the largest magnitude of a row: q * row_scale / 127.

    data: int8 [experts, d1, d2], contiguous. row_scale: fp32, one per row, experts * d1 elements.

    Raises:
        TypeError, ValueError: a tensor has another dtype, shape or device.
    """

    data: Tensor
    row_scale: Tensor
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        _check_data(self.data, (torch.int8,))
        rows = self.data.shape[0] * self.data.shape[1]
        _check_tensor("row_scale", self.row_scale, torch.float32, rows)
        _check_devices("data", self.data, {"row_scale": self.row_scale})

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, scales included."""
        return self.data.nbytes + self.row_scale.nbytes

    def dense(
        self,
        expert_ids: Tensor | range | None = None,
        *,
        dtype: torch.dtype,
        out: Tensor | None = None,
        plan: DequantizePlan | None = None,
    ) -> Tensor:
        """As `StoredExperts.dense`: round((q * row_scale) * fp32(1/127))."""
        selection = select(expert_ids, self.experts, self.device)
        return dequantize_scaled(
            self.data,
            self.row_scale.view(self.experts, self.shape[0], 1),
            selection,
            rows=1,
            columns=self.shape[1],
            step=INT8_STEP,
            out=output(out, (selection.count, *self.shape), dtype, self.device),
            plan=plan,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Float8(_Stacked):
    """fp8 with one scale per block of `block` = (rows, columns) elements: q * scale.

    data: float8_e4m3fn or float8_e5m2 [experts, d1, d2], contiguous. scale: fp32
    [experts, ceil(d1 / rows), ceil(d2 / columns)], contiguous. `Float8.from_scale` takes the other
    ways of writing scales down: one for all, one per expert, one per row.

    Raises:
        TypeError, ValueError: a tensor has another dtype, shape or device.
    """

    data: Tensor
    scale: Tensor
    block: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        _check_data(self.data, (torch.float8_e4m3fn, torch.float8_e5m2))
        _check_block(self.block)
        check_tensor("scale", self.scale)
        grid = _grid_of(self.shape, self.block)
        if list(self.scale.shape) != [self.experts, *grid]:
            raise ValueError(
                f"blocks of {list(self.block)} in {self.experts} experts of {list(self.shape)} "
                f"need scales of shape {[self.experts, *grid]}, got {list(self.scale.shape)}"
            )
        _check_tensor("scale", self.scale, torch.float32, self.scale.numel())
        _check_devices("data", self.data, {"scale": self.scale})

    @classmethod
    def from_scale(
        cls,
        data: Tensor,
        scale: Tensor,
        *,
        block: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> "Float8":
        """From scales of one element, [experts], [experts, d1], or a grid [experts, g1, g2].

        Args:
            scale: any floating dtype that fp32 holds (float8_e8m0fnu too).
            block: elements per scale of a grid. Without it, or where it does not give the grid's
                shape, the grid must divide (d1, d2).

        Raises:
            TypeError: scale is not floating point.
            ValueError: the shape of scale says nothing that fits the experts.
        """
        _check_data(data, (torch.float8_e4m3fn, torch.float8_e5m2))
        check_tensor("scale", scale)
        if block is not None:
            _check_block(block)
        if not scale.dtype.is_floating_point:
            raise TypeError(f"scale must be floating point, got {scale.dtype}")
        experts, d1, d2 = data.shape
        grid = _grid(scale.detach().to(torch.float32), experts, d1)
        if grid.shape[0] != experts:
            raise ValueError(f"scale is for {grid.shape[0]} experts but there are {experts}")
        if block is None or _grid_of((d1, d2), block) != tuple(grid.shape[1:]):
            if d1 % grid.shape[1] or d2 % grid.shape[2]:
                raise ValueError(
                    f"scales of shape {list(scale.shape)} do not divide experts of shape "
                    f"{[d1, d2]}, and their block is {None if block is None else list(block)}"
                )
            block = (d1 // grid.shape[1], d2 // grid.shape[2])
        return cls(data=data, scale=grid.contiguous(), block=block, dtype=dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, scales included."""
        return self.data.nbytes + self.scale.nbytes

    def dense(
        self,
        expert_ids: Tensor | range | None = None,
        *,
        dtype: torch.dtype,
        out: Tensor | None = None,
        plan: DequantizePlan | None = None,
    ) -> Tensor:
        """As `StoredExperts.dense`: round(q * scale)."""
        selection = select(expert_ids, self.experts, self.device)
        return dequantize_scaled(
            self.data,
            self.scale,
            selection,
            rows=self.block[0],
            columns=self.block[1],
            step=1.0,
            out=output(out, (selection.count, *self.shape), dtype, self.device),
            plan=plan,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense(_Stacked):
    """Experts that are stored as they are used: floating point [experts, d1, d2], any strides.

    Raises:
        TypeError, ValueError: not floating point, or not 3-D.
    """

    data: Tensor

    def __post_init__(self) -> None:
        _check_data(
            self.data, (torch.float32, torch.float16, torch.bfloat16, torch.float64), dense=True
        )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the storage."""
        return self.data.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the storage."""
        return self.data.nbytes

    def dense(
        self,
        expert_ids: Tensor | range | None = None,
        *,
        dtype: torch.dtype,
        out: Tensor | None = None,
    ) -> Tensor:
        """As `StoredExperts.dense`. Without `out` gradients flow back to the storage, and a range
        or None of the same dtype is a view of it."""
        selection = select(expert_ids, self.experts, self.device)
        shape = (selection.count, *self.shape)
        check_dtype("dtype", dtype)
        buffer = None if out is None else output(out, shape, dtype, self.device)
        if selection.ids is None:
            chosen = self.data.narrow(0, selection.first, selection.count)
        else:
            chosen = self.data.index_select(0, selection.ids)
        if buffer is None:
            return chosen.to(dtype)
        return buffer.copy_(chosen.detach())


def _grid_of(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Blocks per expert, along rows and columns."""
    return ceil_div(shape[0], block[0]), ceil_div(shape[1], block[1])


def _grid(scale: Tensor, experts: int, d1: int) -> Tensor:
    if scale.numel() == 1:
        return scale.reshape(1, 1, 1).expand(experts, 1, 1)
    if scale.ndim == 1:
        return scale.reshape(-1, 1, 1)
    if scale.ndim == 2 and scale.shape[1] == d1:
        return scale.unsqueeze(2)
    if scale.ndim != 3:
        raise ValueError(
            f"scale must be one element, [{experts}], [{experts}, {d1}] or [{experts}, g1, g2], "
            f"got shape {list(scale.shape)}"
        )
    return scale


def _check_stack(experts: int, shape: tuple[int, int]) -> None:
    if experts < 1 or len(shape) != 2 or min(shape) < 1:
        raise ValueError(
            f"a stack needs at least one expert of shape [d1, d2], got {experts} of {list(shape)}"
        )


def _check_block(block: tuple[int, int]) -> None:
    if len(block) != 2 or min(block) < 1:
        raise ValueError(f"block must be at least 1 x 1 elements, got {list(block)}")


def _check_data(data: Tensor, dtypes: tuple[torch.dtype, ...], *, dense: bool = False) -> None:
    check_tensor("data", data)
    if data.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"data must be {names}, got {data.dtype}")
    if data.ndim != 3 or min(data.shape) < 1:
        raise ValueError(f"data must be [experts, d1, d2] and not empty, got {list(data.shape)}")
    if not dense and not data.is_contiguous():
        raise ValueError(f"data must be contiguous, got strides {list(data.stride())}")


def _check_tensor(name: str, value: Tensor, dtype: torch.dtype, numel: int) -> None:
    check_tensor(name, value)
    if value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
    if value.numel() != numel:
        raise ValueError(f"{name} must have {numel} elements, got {value.numel()}")
    if not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(value.stride())}")


def _check_devices(name: str, owner: Tensor, tensors: dict[str, Tensor]) -> None:
    for other, value in tensors.items():
        if value.device != owner.device:
            raise ValueError(f"{other} is on {value.device} but {name} is on {owner.device}")
