"""One process of the gate: measures the cases it reads from its input, a line of JSON each.

`python -m verify.gate_worker --base DIR --head DIR ...` prints a line when it starts to
measure and one visit a line from then on.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from .bench_cases import BenchCase
from .environment import prepare_interpreter


def main(words: Sequence[str] | None = None) -> int:
    """Measure the cases of standard input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--process", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--plant", type=float, default=0.0)
    arguments = parser.parse_args(words)
    device = torch.device(prepare_interpreter(arguments.device))
    from .gate_measure import ARMS, EFFORTS, PRECISIONS, WARM_UP, Pairs, case_of_text
    from .gate_plant import planted_on
    from .gate_process import READY
    from .revision import load
    from .timing import clock_of

    trees = dict(zip(ARMS, (arguments.base, arguments.head, arguments.head), strict=True))
    clock = clock_of(device)
    plant = planted_on(device, clock, arguments.plant)
    pairs = Pairs(
        libs={arm: load(tree, f"gate_{arm}") for arm, tree in trees.items()},
        device=device,
        clock=clock,
        effort=EFFORTS[device.type],
        precision=PRECISIONS[device.type],
        warm_up=WARM_UP[device.type],
        seed=arguments.seed,
        exact=arguments.process == 0 and plant is None,
        plant=plant,
    )
    cases = [case_of_text(line) for line in sys.stdin if line.strip()]
    print(READY, flush=True)  # noqa: T201
    for visit in pairs.visits(_until(arguments.seconds, cases), arguments.process):
        print(json.dumps(visit.as_json()), flush=True)  # noqa: T201
    return 0


def _until(seconds: float | None, cases: Iterable[BenchCase]) -> Iterator[BenchCase]:
    start = time.monotonic()
    for case in cases:
        if seconds is not None and time.monotonic() - start > seconds:
            return
        yield case


if __name__ == "__main__":
    raise SystemExit(main())
