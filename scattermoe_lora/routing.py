"""Which row of a routed product belongs to which expert.

A layer call routes `tokens` tokens to `top_k` experts each. Slot `s = t * top_k + j` is the j-th
choice of token t. Sorting the slots by expert gives the rows of the routed products:

    top_k_index = [[1, 0], [1, 2]], 3 experts
    slots         = [1, 0, 2, 3]          row -> slot, experts ascending, ties in slot order
    expert_of_row = [0, 1, 1, 2]
    offsets       = [0, 1, 3, 4]          rows offsets[e] .. offsets[e + 1] belong to expert e

Slots whose expert is outside [0, experts) come last (expert_of_row = experts) and belong to nobody:
rows offsets[experts] .. rows are dropped.
"""

import enum
import numbers
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._row_tiles import row_tiles
from ._sort import sort_by_expert

INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class RowOrder(enum.Enum):
    """How the rows of an operand are laid out."""

    __hash__ = object.__hash__

    TOKEN = "token"
    """[tokens, ...]: row t is token t; each row is used by `top_k` slots."""
    SLOT = "slot"
    """[tokens * top_k, ...]: row s is slot s."""
    EXPERT = "expert"
    """[tokens * top_k, ...]: row i is slot `slots[i]`; the rows of an expert are contiguous."""


@dataclass(frozen=True, slots=True)
class Routing:
    """The rows of one layer call, sorted by expert, on the device; built without a host sync.

    slots: int64 [rows], row -> slot.
    expert_of_row: int32 [rows], ascending, `experts` for dropped rows.
    offsets: int32 [experts + 1].
    tiles: int32 [entries, 4], see `_row_tiles`.
    """

    slots: Tensor
    expert_of_row: Tensor
    offsets: Tensor
    tiles: Tensor
    tokens: int
    top_k: int
    experts: int
    rows: int = field(init=False)
    """Number of rows, tokens * top_k, dropped ones included."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", self.tokens * self.top_k)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
        """The fields in order, as an operator's plain arguments."""
        tensors = (self.slots, self.expert_of_row, self.offsets, self.tiles)
        return (*tensors, self.tokens, self.top_k, self.experts)

    @property
    def device(self) -> torch.device:
        """The device that every tensor of this routing is on."""
        return self.slots.device

    def row_count(self, order: RowOrder) -> int:
        """Rows of an operand laid out in `order`."""
        return self.tokens if order is RowOrder.TOKEN else self.rows

    def fan_out(self, order: RowOrder) -> int:
        """Slots per operand row: slot s reads row s // fan_out (TOKEN and SLOT orders)."""
        return self.top_k if order is RowOrder.TOKEN else 1

    @classmethod
    def from_top_k(
        cls,
        top_k_index: Tensor,
        experts: int,
        *,
        sentinels: bool = False,
        validate: bool = False,
    ) -> "Routing":
        """Sort the choices `top_k_index` (integer [tokens, top_k]) by expert.

        Args:
            sentinels: ids outside [0, experts) are meant (expert parallelism): no id is checked.
            validate: check the ids on a GPU as well, which synchronises with the host. Ids on a
                CPU are checked without, except under torch.compile.

        Slots whose id is outside [0, experts) and was not checked are dropped.

        Raises:
            TypeError: `top_k_index` is not an integer tensor.
            ValueError: wrong shape, `top_k` larger than `experts`, or a checked id outside
                [0, experts).
        """
        experts = _count("experts", experts)
        _check_top_k(top_k_index, experts, sentinels=sentinels)
        tokens, top_k = top_k_index.shape
        if torch.compiler.is_compiling():
            operator = getattr(torch.ops, __name__.partition(".")[0]).route
            slots, expert_of_row, offsets, tiles = operator(top_k_index, experts)
            return cls(slots, expert_of_row, offsets, tiles, tokens, top_k, experts)
        if not sentinels and (validate or top_k_index.device.type == "cpu"):
            _check_values(top_k_index, experts)
        rows = sort_by_expert(top_k_index.reshape(-1).contiguous(), experts)
        return cls(*rows, tokens, top_k, experts)

    @classmethod
    def from_sorted(
        cls,
        expert_of_row: Tensor,
        slots: Tensor,
        *,
        top_k: int,
        experts: int,
        validate: bool | None = None,
    ) -> "Routing":
        """A routing from rows that are sorted already: the expert and the slot of each.

        Args:
            expert_of_row: [rows], ascending from 0; `experts` or more for dropped rows.
            slots: [rows], each of 0 to rows - 1 once. Other values make kernels write elsewhere.
            validate: whether to check the values, which synchronises with the host on a GPU. Unless
                stated, those on a CPU are checked, except under torch.compile.

        Raises:
            TypeError: an argument is not an integer tensor.
            ValueError: shapes differ, the number of rows is not a multiple of `top_k`, or a checked
                value is none of those above.
        """
        top_k, experts = _count("top_k", top_k), _count("experts", experts)
        _check_sorted(expert_of_row, slots, top_k, experts)
        if validate is None:
            validate = slots.device.type == "cpu" and not torch.compiler.is_compiling()
        if validate:
            _check_sorted_values(expert_of_row, slots)
        keys = expert_of_row.long().clamp(max=experts).to(torch.int32)
        bounds = torch.arange(experts + 1, dtype=torch.int32, device=slots.device)
        offsets = torch.searchsorted(keys, bounds, out_int32=True)
        return cls(
            slots=slots.to(torch.int64, copy=True).contiguous(),
            expert_of_row=keys,
            offsets=offsets,
            tiles=row_tiles(offsets, rows=slots.numel(), experts=experts),
            tokens=slots.numel() // top_k,
            top_k=top_k,
            experts=experts,
        )


def _check_top_k(top_k_index: Tensor, experts: int, *, sentinels: bool) -> None:
    if not isinstance(top_k_index, Tensor):
        raise TypeError(f"top_k_index must be a tensor, got {type(top_k_index).__name__}")
    _check_integers("top_k_index", top_k_index)
    if top_k_index.ndim != 2:
        raise ValueError(
            f"top_k_index must be [tokens, top_k], got shape {list(top_k_index.shape)}"
        )
    if experts < 1:
        raise ValueError(f"experts must be at least 1, got {experts}")
    tokens, top_k = top_k_index.shape
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got top_k_index of shape {[tokens, top_k]}")
    if top_k > experts and not sentinels:
        raise ValueError(f"top_k_index chooses {top_k} experts per token, but there are {experts}")
    if tokens * top_k >= 2**31:
        raise ValueError(f"{tokens} tokens x {top_k} choices exceed 2^31 - 1 rows")


def _check_integers(name: str, value: Tensor) -> None:
    if value.dtype not in INDEX_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in INDEX_DTYPES)
        raise TypeError(f"{name} must hold integers, got {value.dtype}; {names} are taken")


def _count(name: str, value: Any) -> Any:
    """An int of any integer, those of numpy too; a symbolic one as it is."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral | torch.SymInt):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    return value if isinstance(value, torch.SymInt) else int(value)


def _check_values(top_k_index: Tensor, experts: int) -> None:
    if top_k_index.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(top_k_index))
    if low < 0 or high >= experts:
        worst = low if low < 0 else high
        raise ValueError(
            f"top_k_index holds expert {worst}, but experts are 0 to {experts - 1}; "
            "pass sentinels=True if such slots are to be dropped"
        )


def _check_sorted(expert_of_row: Tensor, slots: Tensor, top_k: int, experts: int) -> None:
    for name, value in (("expert_of_row", expert_of_row), ("slots", slots)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        _check_integers(name, value)
        if value.ndim != 1:
            raise ValueError(f"{name} must be [rows], got shape {list(value.shape)}")
    if expert_of_row.device != slots.device:
        raise ValueError(
            f"expert_of_row is on {expert_of_row.device} but slots is on {slots.device}"
        )
    if expert_of_row.numel() != slots.numel():
        raise ValueError(
            f"expert_of_row has {expert_of_row.numel()} rows but slots has {slots.numel()}"
        )
    if top_k < 1 or experts < 1:
        raise ValueError(f"top_k and experts must be at least 1, got {top_k} and {experts}")
    if slots.numel() % top_k:
        raise ValueError(f"{slots.numel()} rows are not a multiple of top_k = {top_k}")


def _check_sorted_values(expert_of_row: Tensor, slots: Tensor) -> None:
    rows = slots.numel()
    if rows == 0:
        return
    if (lowest := int(expert_of_row[0])) < 0:
        raise ValueError(f"expert_of_row begins with {lowest}, but experts are numbered from 0")
    falling = (expert_of_row[1:] < expert_of_row[:-1]).nonzero()
    if falling.numel():
        row = int(falling[0]) + 1
        raise ValueError(
            f"expert_of_row must be ascending, but is {int(expert_of_row[row])} in row {row} after "
            f"{int(expert_of_row[row - 1])}"
        )
    low, high = (int(value) for value in torch.aminmax(slots))
    if low < 0 or high >= rows:
        raise ValueError(f"slots holds {low if low < 0 else high}, but slots are 0 to {rows - 1}")
    times = torch.bincount(slots.long(), minlength=rows)
    if int(times.max()) > 1:
        slot = int(times.argmax())
        raise ValueError(f"slots holds {slot} {int(times[slot])} times, but each slot is one row")
