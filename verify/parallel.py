"""Problems checked in several processes, for the interpreter, which uses one core."""

import itertools
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait

import torch

from .environment import prepare_interpreter
from .run import Outcome, Problem, Selection

_FEW = 24
"""Fewer problems than this are done before a second process has started."""


def checked(
    problems: Sequence[Problem], selection: Selection, *, workers: int
) -> Iterator[tuple[Problem, Sequence[Outcome]]]:
    """Every problem with its outcomes, in the order in which they are done.

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
    device = str(problems[0].device)
    # Not forked: torch's threads and Triton's state do not survive that.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start, (device,))
    try:
        waiting: dict[Future[list[list[Outcome]]], list[int]] = {
            pool.submit(_check, selection, device, batch): batch for batch in batches
        }
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                for index, outcomes in zip(waiting.pop(future), future.result(), strict=True):
                    yield problems[index], outcomes
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start(device: str) -> None:
    prepare_interpreter(device)
    torch.set_num_threads(1)


def _check(selection: Selection, device: str, indices: list[int]) -> list[list[Outcome]]:
    from .commands.common import package
    from .specs import KERNELS

    problems = selection.problems(package(), KERNELS, torch.device(device))
    return [list(problems[index].check(selection.wants)) for index in indices]
