"""Problems checked in several processes: the interpreter uses one core, and on a GPU references
and compiling take longer than kernels.

On a GPU only as many problems are under way as its memory has room for.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

import torch

from .cases import Case
from .children import pool
from .environment import prepare_interpreter
from .run import Outcome, Problem, ProblemName, Selection

_FEW = 24
"""Fewer problems than this are done before a second process has started."""
_ALIVE: Mapping[str, tuple[float, float, float, float]] = {
    "routing": (0.5, 0.5, 0, 0.6),
    "scatter2scatter": (3, 18, 2, 3),
    "shrink": (3, 2, 2, 14),
    "lora_forward": (3, 22, 2, 15),
    "lora_input_grad": (22, 7, 2, 15),
    "lora_weight_grad": (3, 7, 2, 12),
    "expert_weight_grad": (3, 7, 18, 2),
    "expert_bias_grad": (2, 7, 2, 2),
    "group": (14, 2, 2, 2),
    "combine": (2, 10, 2, 2),
    "combine_grad": (2, 5, 2, 2),
    "glu_forward": (1, 8, 1, 2),
    "glu_backward": (2, 16, 1, 4),
    "expert_linear": (12, 17, 12, 12),
    "experts_mlp": (30, 16, 25, 26),
}
"""What a check holds at a time, as fp64 tensors [rows, K], [rows, N], [experts, K, N], and of rank
columns for each row and each line of the experts: counted in fp32, rounded up.
"""
_UNKNOWN = tuple(max(counts) for counts in zip(*_ALIVE.values(), strict=True))
_SHARE = 0.85
"""Share of a GPU's free memory that problems may take; contexts of processes need some too."""


def footprint(kernel: str, case: Case) -> int:
    """Bytes that checking a kernel on a case may take at a time: its reference with the variances,
    and the judge.
    """
    sizes = (
        case.rows * case.k_in,
        case.rows * case.n_out,
        case.experts * case.k_in * case.n_out,
        case.rank * (case.rows + case.experts * (case.k_in + case.n_out)),
    )
    alive = _ALIVE.get(kernel, _UNKNOWN)
    return int(8 * sum(count * size for count, size in zip(alive, sizes, strict=True)))


def room(device: torch.device) -> float:
    """Bytes that problems may take at a time on a device, of what is free; what a CPU lacks, its
    system swaps.
    """
    if device.type != "cuda":
        return math.inf
    return _SHARE * torch.cuda.mem_get_info(device)[0]


def admitted(
    waiting: Sequence[list[int]], running: float, free: int, space: float, size: Callable[..., int]
) -> list[list[int]]:
    """The batches of `waiting` that may start, in order: at most `free`, none that would take more
    than `space` beside the `running` bytes. Where nothing runs, the first may always.
    """
    chosen: list[list[int]] = []
    for batch in waiting:
        if len(chosen) == free:
            break
        if running + size(batch) <= space or not running:
            chosen.append(batch)
            running += size(batch)
    return chosen


def checked(
    problems: Sequence[Problem], selection: Selection, *, workers: int
) -> Iterator[tuple[Problem, Sequence[Outcome]]]:
    """Some problems of a selection with their outcomes, in the order in which they are done.

    Problems of one case go to one process, which builds their routing once.
    """
    if workers < 2 or len(problems) < _FEW:
        for problem in problems:
            yield problem, list(problem.check(selection.wants))
        return
    order = sorted(range(len(problems)), key=lambda index: problems[index].case.shape)
    batches = [
        list(group) for _, group in itertools.groupby(order, lambda i: problems[i].case.shape)
    ]
    device = problems[0].device

    def size(batch: list[int]) -> int:
        return max(footprint(problems[i].spec.name, problems[i].case) for i in batch)

    def named(batch: list[int]) -> list[ProblemName]:
        return [problems[i].name for i in batch]

    space = room(device)
    waiting = sorted(batches, key=size, reverse=True)
    running: dict[Future[list[list[Outcome]]], list[int]] = {}
    with pool(workers, _start, str(device)) as executor:
        while waiting or running:
            taken = sum(size(batch) for batch in running.values())
            for batch in admitted(waiting, taken, workers - len(running), space, size):
                waiting.remove(batch)
                running[executor.submit(_check, selection, str(device), named(batch))] = batch
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                for index, outcomes in zip(running.pop(future), future.result(), strict=True):
                    yield problems[index], outcomes


def _start(device: str) -> None:
    prepare_interpreter(device)
    torch.set_num_threads(1)


def _check(selection: Selection, device: str, names: list[ProblemName]) -> list[list[Outcome]]:
    from .commands.common import package
    from .specs import KERNELS

    every = selection.problems(package(), KERNELS, torch.device(device))
    problems = {problem.name: problem for problem in every}
    found = [list(problems[name].check(selection.wants)) for name in names]
    if torch.device(device).type == "cuda":
        # Other processes are promised this memory.
        torch.cuda.empty_cache()
    return found
