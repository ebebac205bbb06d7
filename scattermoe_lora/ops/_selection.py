"""Which experts of a stored stack a launch decodes, and the buffer that it decodes them into."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .._arguments import check_dtype
from .._interpreter import INTERPRETED

MAX_SELECTED = 65535
"""Experts per launch: the second axis of a CUDA grid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """`count` experts: those named by `ids`, or `first`, `first + 1`, ... where ids is None."""

    ids: Tensor | None
    first: int
    count: int


def select(expert_ids: Tensor | range | None, experts: int, device: torch.device) -> Selection:
    """The experts that a caller asked for: all (None), a range of step 1, or ids in any order.

    Ids on a CPU are checked. Ids on a GPU are not, which would synchronise with the host: what a
    kernel makes of an id outside [0, experts) is NaN, and it reads nothing out of bounds.

    Raises:
        TypeError: ids that are not integers.
        ValueError: wrong shape, device or step, or a checked id outside [0, experts).
    """
    if expert_ids is None:
        return _counted(Selection(ids=None, first=0, count=experts))
    if isinstance(expert_ids, range):
        return _counted(_from_range(expert_ids, experts))
    if not isinstance(expert_ids, Tensor):
        raise TypeError(
            f"expert_ids must be a tensor, a range or None, got {type(expert_ids).__name__}"
        )
    if expert_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"expert_ids must be int64 or int32, got {expert_ids.dtype}")
    if expert_ids.ndim != 1:
        raise ValueError(f"expert_ids must be [selected], got shape {list(expert_ids.shape)}")
    if expert_ids.device != device:
        raise ValueError(f"expert_ids is on {expert_ids.device} but the experts are on {device}")
    if device.type == "cpu" and expert_ids.numel():
        low, high = (int(value) for value in torch.aminmax(expert_ids))
        _check_bounds(low, high, experts)
    return _counted(Selection(ids=expert_ids.contiguous(), first=0, count=expert_ids.numel()))


def output(
    out: Tensor | None,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`out` after checking that it can take [selected, d1, d2] of `dtype`, or a new buffer.

    Raises:
        TypeError: dtype is not float32, float16 or bfloat16, or not that of `out`.
        ValueError: `out` has another shape or device, is not contiguous, or requires a gradient.
    """
    check_dtype("dtype", dtype)
    if out is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if out.dtype != dtype:
        raise TypeError(f"out is {out.dtype} but {dtype} was asked for")
    if tuple(out.shape) != shape:
        raise ValueError(f"out has shape {list(out.shape)} but the experts need {list(shape)}")
    if out.device != device:
        raise ValueError(f"out is on {out.device} but the experts are on {device}")
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {list(out.stride())}")
    if out.requires_grad:
        raise ValueError("out requires a gradient, and decoding overwrites it")
    return out


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Makes `device` the one that kernels are launched on."""
    if INTERPRETED or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _from_range(expert_ids: range, experts: int) -> Selection:
    if expert_ids.step != 1:
        raise ValueError(f"a range of experts must have step 1, got {expert_ids.step}")
    if len(expert_ids) == 0:
        return Selection(ids=None, first=0, count=0)
    _check_bounds(expert_ids[0], expert_ids[-1], experts)
    return Selection(ids=None, first=expert_ids.start, count=len(expert_ids))


def _check_bounds(low: int, high: int, experts: int) -> None:
    if low < 0 or high >= experts:
        worst = low if low < 0 else high
        raise ValueError(f"expert_ids holds {worst}, but experts are 0 to {experts - 1}")


def _counted(selection: Selection) -> Selection:
    if selection.count > MAX_SELECTED:
        raise ValueError(
            f"{selection.count} experts were selected, but one launch decodes at most "
            f"{MAX_SELECTED}"
        )
    return selection
