"""Compiles what benchmarks will launch, in several processes at once, before anything is timed.

Every process runs each distinct problem once; Triton's cache on disk carries the result over.
"""

import hashlib
import importlib
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path

import torch

from .bench_arms import arm_of
from .bench_cases import BenchCase, multiplied_as
from .bench_inputs import draw
from .children import cores, pool
from .revision import load

PROCESSES = 12
"""More do not fit beside each other on a GPU of 80 GB."""


def compile_ahead(
    cases: Iterable[BenchCase],
    device: torch.device,
    *,
    processes: int = PROCESSES,
    tree: Path | None = None,
) -> Iterator[tuple[str, int, str]]:
    """Run each problem once, spread over processes; yields (problem, cases run, error) as they end.

    Problems that differ only in their routing compile the same kernels. tree: the directory of the
    package where it is not the installed one.
    """
    jobs: dict[BenchCase, dict[BenchCase, None]] = {}
    for case in cases:
        plain = replace(case, routing="balanced")
        job = replace(
            plain, kind="layer", what="step", projection="", tokens=case.tokens, rank=case.rank
        )
        jobs.setdefault(job, {})[plain] = None
    workers = max(1, min(processes, len(jobs), cores() - 1))
    with pool(workers) as executor:
        waiting = {
            executor.submit(run_once, tuple(found), str(device), tree): job.name
            for job, found in jobs.items()
        }
        for done in as_completed(waiting):
            error = done.exception()
            count = 0 if error else done.result()
            yield waiting[done], count, "" if error is None else f"{type(error).__name__}: {error}"


def run_once(cases: tuple[BenchCase, ...], device: str, tree: Path | None = None) -> int:
    """Run every case once in this process; how many ran. One that fails will fail again when it is
    timed.
    """
    lib = importlib.import_module("scattermoe_lora")
    if tree is not None:
        name = f"ahead_{hashlib.sha256(str(tree).encode()).hexdigest()[:8]}"
        lib = sys.modules.get(name) or load(tree, name)
    target, drawn, ran = torch.device(device), None, 0
    for case in cases:
        try:
            if drawn is None or drawn.case != case.inputs_key:
                drawn = None
                drawn = draw(case, target)
            with multiplied_as(case.dtype):
                arm_of(lib, case, drawn).results()
        except Exception:  # noqa: BLE001 - reported when it is timed
            continue
        ran += 1
    if target.type == "cuda":
        torch.cuda.synchronize(target)
    return ran
