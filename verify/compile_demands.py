"""What is demanded of compiled kernels, and how they differ from a baseline."""

from collections.abc import Iterable, Mapping
from typing import Any

from .ahead import ARCHITECTURES, Compiled
from .compile_check import Job

_COMPARED = ("kernel", "registers", "stack", "shared", "matrix")
_FROM_SHARED_MEMORY = (90, 100)
"""Architectures whose products read their operands from shared memory."""


def most_stack(architecture: int) -> int:
    """Bytes that a thread may keep on a stack.

    Where products read their operands from shared memory kernels keep at most 24 (Triton 3.6), and
    64 are allowed. Elsewhere fragments of the operands take registers beside the accumulators:
    tiles with 128 accumulators per thread keep up to 280 bytes, and 320 are allowed.
    """
    return 64 if architecture in _FROM_SHARED_MEMORY else 320


def over_limits(job: Job, kernels: Iterable[Mapping[str, Any]]) -> list[str]:
    """Kernels that take more of a multiprocessor than its architecture has, or than is expected."""
    architecture, most = ARCHITECTURES[job.architecture], most_stack(job.architecture)
    found = []
    for kernel in kernels:
        name = f"{job.key}: {kernel['kernel']}"
        if kernel["shared"] > architecture.shared_memory:
            found.append(
                f"{name} needs {kernel['shared']} bytes of shared memory, but {architecture.name} "
                f"has {architecture.shared_memory}"
            )
        if kernel["stack"] > most:
            found.append(
                f"{name} keeps {kernel['stack']} bytes per thread on a stack, at most {most} are "
                f"expected of {architecture.name}"
            )
    return found


def demands(job: Job, compiled: Compiled) -> list[str]:
    """What is wrong with the instructions of a compiled kernel, whatever the baseline says."""
    problems = []
    narrow = job.shape.dtype != "float32"
    if narrow and compiled.dots and not compiled.matrix:
        problems.append(f"has {compiled.dots} products but no tensor-core instruction")
    if compiled.serialised:
        problems.append("waits for every warpgroup product by itself, which costs up to a quarter")
    if compiled.misread:
        problems.append(f"computes nonsense: ptxas mistook a register in {compiled.misread[0]}")
    return problems


def differences(job: Job, found: list[dict[str, Any]], base: list[dict[str, Any]]) -> list[str]:
    """How the kernels of a job differ from the baseline."""
    if [item["kernel"] for item in found] != [item["kernel"] for item in base]:
        names = [item["kernel"] for item in found]
        return [f"{job.key}: launches {names}, baseline {[item['kernel'] for item in base]}"]
    return [
        f"{job.key}: {new['kernel']}: {name} {new[name]}, baseline {old[name]}"
        for new, old in zip(found, base, strict=True)
        for name in _COMPARED
        if new[name] != old[name]
    ]
