"""Launching a kernel without Triton's own dispatch, which costs more than the kernel's launch.

Triton looks at every argument of every launch to find the compiled variant: 38 us on an H100's
host, against 16 us for launching a variant at hand. A Launch is a kernel with its constants for
operands of one form, and remembers the variant. Callers keep one Launch for each form. Arguments
that depend on the number of tokens or active experts are no part of the form, because the kernels
do not specialise on them.
"""

from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import driver

from ._interpreter import INTERPRETED


class Launch:
    """A kernel for operands of one form: dtypes, strides, whether an operand is there, and every
    number that the kernel may specialise on. The caller keeps forms apart.

    constants: in the order of the kernel's signature, after the arguments.
    """

    __slots__ = ("_values", "_variants", "constants", "kernel", "options")

    def __init__(
        self, kernel: triton.JITFunction, *, warps: int, stages: int = 3, **constants: Any
    ) -> None:
        self.kernel = kernel
        self.constants = constants
        self.options = {"num_warps": warps, "num_stages": stages}
        self._values = tuple(constants.values())
        self._variants: dict[int | None, Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        device: torch.device,
        args: tuple[Any, ...],
        pointers: int,
    ) -> None:
        """Launch on the current stream of `device`.

        pointers: the addresses of the tensors, or-ed; the variant is remembered for 16-byte aligned
            ones.
        """
        if INTERPRETED or device.index == torch.cuda.current_device():
            self._launch(grid, device.index, args, pointers)
            return
        with torch.cuda.device(device):
            self._launch(grid, device.index, args, pointers)

    def _launch(
        self, grid: tuple[int, int, int], index: int | None, args: tuple[Any, ...], pointers: int
    ) -> None:
        variant = self._variants.get(index)
        if variant is None or pointers & 15:
            variant = self._dispatched(grid, args)
            if not INTERPRETED and not pointers & 15:
                self._variants[index] = variant
        elif knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:
            variant[grid](*args, *self._values)
        else:
            # What variant[grid] does where no profiler listens, in Triton 3.6 to 3.9.
            stream = driver.active.get_current_stream(index)
            function, metadata = variant.function, variant.packed_metadata
            variant.run(*grid, stream, function, metadata, None, None, None, *args, *self._values)

    def _dispatched(self, grid: tuple[int, int, int], args: tuple[Any, ...]) -> Any:
        """The variant that Triton finds or compiles, launched."""
        if list(self.constants) != self.kernel.arg_names[len(args) :]:
            raise AssertionError(
                f"constants {list(self.constants)} do not follow the arguments in order"
            )
        return self.kernel[grid](*args, **self.constants, **self.options)
