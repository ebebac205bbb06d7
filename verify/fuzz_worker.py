"""A process that runs draws one after another, as it is told by JSON lines on its standard input.

It answers on its standard output: first {"hello": facts}, then per draw {"id", "launch"} before its
launch, {"id", "returned"} after that, {"id", "done"} when it is judged, and {"id", "compiled"}
whenever a kernel was. Before each launch a line is
in the journal. When the device is beyond use, the answer says "fatal" and the process ends. What
kernels print goes to standard error.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import torch

from .coverage import features
from .draws import LISTED_ONLY, Draw, Launch, encoded, run_draw
from .environment import environment, prepare_interpreter
from .findings import kind_of
from .inputs import DTYPES, Inputs
from .journal import Journal
from .run import Outcome, Workbench
from .spec import KernelSpec

_PLANS_PER_PATH = 8
_SHARING = 64
"""Launches, about, that share the routings that were built for them."""
_RESERVED = 2**30
"""Bytes that torch may keep for later allocations; more are given back after a draw."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """What a worker process has at hand."""

    lib: ModuleType
    kernels: Mapping[str, KernelSpec]
    device: torch.device
    journal: Journal
    answers: TextIO
    bench: Workbench

    def answer(self, **values: Any) -> None:
        """One line to the parent.

        Raises:
            SystemExit: there is no parent any more. The launch then has no end in the journal, and
                a resumed campaign makes it again.
        """
        try:
            self.answers.write(json.dumps(values) + "\n")
            self.answers.flush()
        except BrokenPipeError:
            raise SystemExit("the campaign is gone") from None

    def run(self, number: int, draw: Draw) -> bool:
        """Run one draw; whether the process can go on."""
        seen: list[Launch] = []

        def announce(launch: Launch) -> None:
            seen[:] = [launch]
            values = launch.draw.as_json()
            self.journal.write(launch=number, draw=values, at=round(time.time(), 3))
            self.answer(id=number, launch=values)

        start = time.monotonic()
        spec = self.kernels[draw.kernel]
        outcome = run_draw(
            self.lib,
            spec,
            draw,
            self.device,
            announce=announce,
            returned=lambda: self.answer(id=number, returned=True),
            bench=self.bench,
        )
        seconds = time.monotonic() - start
        reached: tuple[str, ...] = ()
        if seen:
            launch = seen[0]
            index = launch.inputs["top_k_index"] if self._usable() else torch.empty(0)
            reached = features(launch.draw, launch.plan.plan, index)
        usable = self._usable()
        facts = {
            "kind": kind_of(outcome) if seen else "",
            "outcome": short(outcome),
            "features": reached,
            "seconds": round(seconds, 4),
            "launched": bool(seen),
            "fatal": not usable,
        }
        self.journal.write(done=number, **facts)
        self.answer(id=number, done=facts)
        return usable

    def _usable(self) -> bool:
        """Whether the device still answers."""
        if self.device.type != "cuda":
            return True
        try:
            torch.cuda.synchronize(self.device)
            if torch.cuda.memory_reserved(self.device) > _RESERVED:
                torch.cuda.empty_cache()
        except RuntimeError:
            return False
        return True

    def facts(self, *, pools: bool) -> dict[str, Any]:
        """What the parent must know: how much memory is free, among others; pools: of the plans
        too, which takes a while.
        """
        memory = 0
        if self.device.type == "cuda":
            memory = torch.cuda.mem_get_info(self.device)[0]
        found: dict[str, Any] = {"environment": environment(self.device), "memory": memory}
        if pools:
            found["pools"] = {
                spec.name: plan_pool(self.lib, spec, self.device) for spec in self.kernels.values()
            }
            found["fixed"] = [
                spec.name for spec in self.kernels.values() if is_fixed(spec, self.device)
            ]
        return found


def short(outcome: Outcome) -> dict[str, Any]:
    """What of an outcome is kept in a journal."""
    return {
        "status": outcome.status,
        "ratio": outcome.ratio,
        "measure": outcome.measure,
        "where": dict(outcome.where),
        "reason": outcome.reason,
    }


def is_fixed(spec: KernelSpec, device: torch.device) -> bool:
    """Whether a kernel's inputs exist for its listed cases only."""
    case = replace(spec.cases[0], name="unlisted", tokens=spec.cases[0].tokens + 1)
    try:
        spec.inputs(case, DTYPES["float32"], spec.modes[0], device)
    except (KeyError, ValueError):
        return True
    return False


def plan_pool(
    lib: ModuleType, spec: KernelSpec, device: torch.device, *, most: int = _PLANS_PER_PATH
) -> list[dict[str, Any]]:
    """The plans that a campaign draws from: a bounded set per dtype and path, found on a few
    cases.
    """
    pool: dict[tuple[str, str, str], dict[str, Any]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for dtype, inputs in _anchors(spec, device):
        for plan in spec.plans(lib, inputs):
            key = (dtype, plan.path, plan.label)
            known = pool.get(key)
            if known is not None:
                known["unavailable"] = known["unavailable"] and plan.unavailable
                continue
            if 0 < most <= sizes.get(key[:2], 0):
                continue
            sizes[key[:2]] = sizes.get(key[:2], 0) + 1
            pool[key] = {
                "dtype": dtype,
                "path": plan.path,
                "label": plan.label,
                "plan": encoded(lib, plan.plan),
                "unavailable": plan.unavailable,
            }
    return list(pool.values())


def _anchors(spec: KernelSpec, device: torch.device) -> Iterator[tuple[str, Inputs]]:
    small = [case for case in spec.cases if not case.tags & LISTED_ONLY] or spec.cases[:1]
    cases = list(small[:: max(len(small) // 3, 1)])[:3]
    if device.type == "cuda" and not is_fixed(spec, device):
        sizes: dict[str, Any] = {"k_in": 512, "n_out": 512, "experts": 4, "top_k": 2, "rank": 16}
        for tokens in (1024, 128, 16):
            for layout in ("transposed", "contiguous"):
                name = f"anchor-{tokens}-{layout}"
                wide = replace(small[0], name=name, tokens=tokens, weight_layout=layout, **sizes)
                cases.append(wide)
    for dtype in spec.dtypes:
        for case in cases:
            name = next(name for name, value in DTYPES.items() if value == dtype)
            yield name, spec.inputs(case, dtype, "balanced", device)


def package_of(tree: str) -> ModuleType:
    """The package under test: the installed one, or a copy of the one whose directory is `tree`."""
    from .commands.common import package
    from .revision import load

    return load(Path(tree), "tree_under_test") if tree else package()


def main() -> int:
    """Serve draws until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--tree", default="")
    parser.add_argument("--kernels", default="")
    parser.add_argument("--pools", action="store_true")
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepare_interpreter("cpu" if arguments.device == "cpu" else arguments.device)
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    from triton import knobs

    from .specs import KERNELS

    wanted = [name for name in arguments.kernels.split(",") if name]
    worker = Worker(
        lib=package_of(arguments.tree),
        kernels={spec.name: spec for spec in KERNELS if not wanted or spec.name in wanted},
        device=torch.device(arguments.device),
        journal=Journal(arguments.journal),
        answers=answers,
        bench=Workbench(),
    )
    number = 0

    def compiled(**facts: object) -> None:
        worker.answer(id=number, compiled=str(facts["repr"]).partition("[")[0])

    knobs.runtime.jit_post_compile_hook = compiled
    worker.answer(hello=worker.facts(pools=arguments.pools))
    for line in sys.stdin:
        message = json.loads(line)
        number = message["id"]
        if not worker.run(message["id"], Draw.from_json(message["draw"])):
            return 3
        if message["id"] % _SHARING == 0:
            worker = replace(worker, bench=Workbench())
    return 0


if __name__ == "__main__":
    sys.exit(main())
