"""Compiling what the package launches for any NVIDIA architecture, on a machine without a GPU.

The package's own launchers are called with operands whose storage is never touched; a launch
compiles its kernel for the stated architecture and does not run it. So signatures, specialisation
and constants are the real ones. The process must not interpret.
"""

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from .uniform_registers import misread

WARP = 32
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_WARPGROUP = re.compile(r"\bHGMMA\b[^;]*")
_MATRIX = re.compile(r"\b([HIDQO]G?MMA|UTC[A-Z]*MMA)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """An architecture by its number; shared_memory is what a block may ask for, in bytes."""

    number: int
    example: str
    multiprocessors: int
    shared_memory: int

    @property
    def name(self) -> str:
        """sm_90."""
        return f"sm_{self.number}"

    def device(self, lib: ModuleType) -> Any:
        """The facts that plans are chosen by."""
        return lib.Device(
            name=self.example,
            capability=divmod(self.number, 10),
            multiprocessors=self.multiprocessors,
            shared_memory=self.shared_memory,
        )


ARCHITECTURES: Mapping[int, Architecture] = {
    number: Architecture(
        number=number, example=example, multiprocessors=count, shared_memory=memory * 1024
    )
    for number, example, count, memory in (
        (80, "NVIDIA A100-SXM4-80GB", 108, 163),
        (86, "NVIDIA A10G", 80, 99),
        (89, "NVIDIA L40S", 142, 99),
        (90, "NVIDIA H100 80GB HBM3", 132, 227),
        (100, "NVIDIA B200", 148, 227),
        (120, "NVIDIA GeForce RTX 5090", 170, 99),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """One compiled kernel: resources per thread or block in bytes, matrix instructions by name."""

    kernel: str
    registers: int
    stack: int
    shared: int
    matrix: Mapping[str, int]
    cubin: int
    key: str = field(repr=False, default="")
    """Hash of source, signature, constants and options: equal for one variant."""
    ptx: str = field(repr=False, default="")
    dots: int = 0
    serialised: bool = False
    """Whether ptxas waits for every warpgroup product by itself (its remark C7510 or C7515)."""
    misread: tuple[str, ...] = ()
    """Instructions that take a wrong uniform register, see `uniform_registers`."""

    def as_json(self) -> dict[str, Any]:
        """What a baseline keeps; the size of the cubin is not compared."""
        return {
            "kernel": self.kernel,
            "registers": self.registers,
            "stack": self.stack,
            "shared": self.shared,
            "matrix": dict(self.matrix),
            "cubin": self.cubin,
        }


class _StatedDriver:
    """Stands for a GPU of the stated architecture; nothing can be run on it."""

    def __init__(self, number: int) -> None:
        self._number = number

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._number, WARP)

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, device: int) -> int:
        del device
        return 0


@contextmanager
def compiling(lib: ModuleType, architecture: Architecture) -> Iterator[list[Compiled]]:
    """Within it, launches of `lib` compile for the architecture, into the list, and run nothing.

    Raises:
        RuntimeError: Triton interprets in this process.
    """
    if _module(lib, "_interpreter").REQUESTED:
        raise RuntimeError("Triton interprets in this process: unset TRITON_INTERPRET to compile")
    triton.knobs.compilation.disable_line_info = True
    driver.set_active(_StatedDriver(architecture.number))
    found: list[Compiled] = []

    known: dict[str, Compiled] = {}

    def compiled(kernel: Any, grid: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        built = kernel.run(*args, grid=grid, warmup=True, **options)
        key = str(built.metadata.hash)
        if key not in known:
            known[key] = _facts(kernel, built)
        found.append(known[key])

    with redirected(lib, compiled):
        yield found


Launched = Callable[[Any, Any, tuple[Any, ...], dict[str, Any]], None]
"""Told of a launch: its kernel, grid, arguments, and constants with options."""


@contextmanager
def redirected(lib: ModuleType, launched: Launched) -> Iterator[None]:
    """Within it, launches of `lib` are told to `launched` and run nothing."""
    launch = _module(lib, "_launch")

    def call(
        self: Any,
        grid: tuple[int, int, int],
        device: object,
        args: tuple[Any, ...],
        pointers: int,
    ) -> None:
        del device, pointers
        launched(self.kernel, grid, args, {**self.constants, **self.options})

    class Bound:
        def __init__(self, kernel: Any) -> None:
            self._kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def run(*args: Any, **options: Any) -> None:
                launched(self._kernel, grid, args, options)

            return run

    changes: list[tuple[Any, str, Any]] = [(launch.Launch, "__call__", call)]
    prefix = f"{lib.__name__}."
    for name, module in list(sys.modules.items()):
        if not name.startswith(prefix):
            continue
        if hasattr(module, "require_supported"):
            changes.append((module, "require_supported", lambda *facts: None))
        if hasattr(module, "on_device"):
            changes.append((module, "on_device", lambda device: nullcontext()))
            kernels = [key for key in vars(module) if key.endswith("_kernel")]
            changes.extend((module, key, Bound(getattr(module, key))) for key in kernels)
    with changed(changes):
        yield


@contextmanager
def changed(changes: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Attributes (owner, name, value) that differ within it."""
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)


def _module(lib: ModuleType, name: str) -> Any:
    return sys.modules[f"{lib.__name__}.{name}"]


def _facts(kernel: Any, built: Any) -> Compiled:
    cubin, ptx = built.asm["cubin"], built.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    return Compiled(
        kernel=kernel.__name__,
        registers=_number(r"REG:(\d+)", usage),
        stack=_number(r"STACK:(\d+)", usage),
        shared=int(built.metadata.shared),
        matrix=dict(sorted(Counter(_MATRIX.findall(sass)).items())),
        cubin=len(cubin),
        key=str(built.metadata.hash),
        ptx=ptx,
        dots=built.asm["ttir"].count("tt.dot "),
        serialised=serialised(sass, ptx),
        misread=misread(sass),
    )


def serialised(sass: str, ptx: str) -> bool:
    """Whether more warpgroup products wait than the PTX has groups of them, in proportion.

    The PTX commits products in groups; in SASS the last of a group carries `gsb0`. ptxas gives it
    to every one of them where something else writes their accumulators.
    """
    products = _WARPGROUP.findall(sass)
    waiting = sum("gsb0" in product for product in products)
    stated, groups = ptx.count("wgmma.mma_async"), ptx.count("wgmma.commit_group")
    return waiting * stated > groups * len(products)


def _run(tool: str, *arguments: str) -> str:
    found = _TOOLS / tool
    if not found.exists():
        raise RuntimeError(f"this Triton has no {tool}: {found} does not exist")
    command = [str(found), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"cuobjdump said nothing of {pattern}")
    return int(match.group(1))
