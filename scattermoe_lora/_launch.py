"""Launching a kernel without Triton's own dispatch, which costs more than the kernel's launch.

Triton looks at every argument of every launch to find the compiled variant: 38 us on an H100's
host, against 16 us for launching a variant at hand. A Launcher remembers the variant for operands
of the same form. Arguments that depend on the number of tokens or active experts are no part of the
form, because the kernels do not specialise on them.
"""

from typing import Any

import torch
import triton

from ._interpreter import INTERPRETED


class Launcher:
    """Launches one kernel; remembers the variant that Triton compiled for operands of one form."""

    __slots__ = ("_kernel", "_variants")

    def __init__(self, kernel: triton.JITFunction) -> None:
        self._kernel = kernel
        self._variants: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        device: torch.device,
        args: tuple[Any, ...],
        *,
        form: tuple[Any, ...],
        pointers: int,
        warps: int,
        stages: int = 3,
        **constants: Any,
    ) -> None:
        """Launch on the current stream of `device`.

        form: all that the variant depends on besides the constants: dtypes, strides, whether an
            operand is there, and every number that the kernel may specialise on.
        pointers: the addresses of the tensors, or-ed; variants are remembered for 16-byte aligned
            ones.
        constants: in the order of the kernel's signature, after the arguments.
        """
        if INTERPRETED or device.index == torch.cuda.current_device():
            self._launch(grid, device, args, form, pointers, warps, stages, constants)
            return
        with torch.cuda.device(device):
            self._launch(grid, device, args, form, pointers, warps, stages, constants)

    def _launch(
        self,
        grid: tuple[int, int, int],
        device: torch.device,
        args: tuple[Any, ...],
        form: tuple[Any, ...],
        pointers: int,
        warps: int,
        stages: int,
        constants: dict[str, Any],
    ) -> None:
        values = tuple(constants.values())
        key = (form, values, warps, stages, device.index)
        variant = self._variants.get(key)
        if variant is not None and not pointers & 15:
            variant[grid](*args, *values)
            return
        if list(constants) != self._kernel.arg_names[len(args) :]:
            raise AssertionError(
                f"constants {list(constants)} do not follow the arguments in order"
            )
        variant = self._kernel[grid](*args, **constants, num_warps=warps, num_stages=stages)
        if not INTERPRETED and not pointers & 15:
            self._variants[key] = variant
