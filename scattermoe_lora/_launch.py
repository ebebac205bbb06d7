"""Launching a kernel without Triton's own dispatch, which costs more than the kernel's launch.

Triton looks at every argument of every launch to find the compiled variant: 38 us on an H100's host,
against 16 us for launching a variant at hand. A Launcher remembers the variant for operands of the
same form: dtypes, strides, sizes of the model, launch constants, and 16-byte alignment. Arguments
that depend on the number of tokens or active experts are not part of the form, and the kernels
do not specialise on them.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ._interpreter import INTERPRETED


class Launcher:
    """Launches one kernel. runtime: names of the arguments that no variant depends on."""

    __slots__ = ("_kernel", "_runtime", "_variants")

    def __init__(self, kernel: triton.JITFunction, runtime: tuple[str, ...] = ()) -> None:
        self._kernel = kernel
        self._runtime = frozenset(kernel.arg_names.index(name) for name in runtime)
        self._variants: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        device: torch.device,
        args: tuple[Any, ...],
        *,
        warps: int,
        stages: int = 3,
        **constants: Any,
    ) -> None:
        """Launch on the current stream of `device`; constants in the order of the kernel's signature."""
        if INTERPRETED or device.index == torch.cuda.current_device():
            self._launch(grid, device, args, warps, stages, constants)
            return
        with torch.cuda.device(device):
            self._launch(grid, device, args, warps, stages, constants)

    def _launch(
        self,
        grid: tuple[int, ...],
        device: torch.device,
        args: tuple[Any, ...],
        warps: int,
        stages: int,
        constants: dict[str, Any],
    ) -> None:
        form: list[Any] = [device.index, warps, stages, *constants.values()]
        pointers = 0
        for index, arg in enumerate(args):
            if index not in self._runtime:
                pointers |= describe(arg, form)
        key = tuple(form)
        variant = self._variants.get(key)
        if variant is not None and not pointers & 15:
            variant[(*grid, 1, 1)[:3]](*args, *constants.values())
            return
        if list(constants) != self._kernel.arg_names[len(args) :]:
            raise AssertionError(
                f"constants {list(constants)} do not follow the arguments in order"
            )
        variant = self._kernel[grid](*args, **constants, num_warps=warps, num_stages=stages)
        if not INTERPRETED and not pointers & 15:
            self._variants[key] = variant


def describe(arg: Any, form: list[Any]) -> int:
    """Append what a variant depends on to `form`; returns the bits of the addresses, or-ed."""
    if isinstance(arg, Tensor):
        form.append(arg.dtype)
        return arg.data_ptr()
    if isinstance(arg, tuple):
        pointers = 0
        for part in arg:
            pointers |= describe(part, form)
        return pointers
    if isinstance(arg, TensorDescriptor):
        form.append((arg.base.dtype, *arg.block_shape))
        return 0
    form.append(arg)
    return 0
