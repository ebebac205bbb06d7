"""A finding rerun in a process of its own, so that a crash or a hang is an answer too."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .draws import Draw
from .findings import Finding
from .workers import Process, Start, listen

_STARTING = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of a launch: the kind of finding it is, if any, and its outcome."""

    kind: str
    draw: Draw
    outcome: Mapping[str, Any]


def replayed(
    finding: Finding, *, device: str, tree: str, patience: float, directory: Path
) -> Answer:
    """Run the smallest launch of a finding again.

    Raises:
        RuntimeError: its process could not be started, or could not make the launch.
    """
    start = Start(
        device=device,
        journal=directory / "journal.jsonl",
        log=directory / "worker.log",
        tree=tree,
        kernels=(finding.draw.kernel,),
    )
    process = Process.launch(start, patience=_STARTING)
    try:
        return _run(process, finding.draw, patience)
    finally:
        process.kill()


def _run(process: Process, draw: Draw, patience: float) -> Answer:
    while not (process.ended or process.late):
        for speaker in listen([process], max(min(process.deadline - time.monotonic(), 1.0), 0.0)):
            for message in speaker.read():
                if "hello" in message:
                    process.ready = True
                    process.tell(1, draw, patience=patience)
                elif not process.progressed(message):
                    facts = message["done"]
                    if not facts["launched"] and draw.path:
                        reason = facts["outcome"]["reason"]
                        raise RuntimeError(f"the launch could not be made: {reason}")
                    return Answer(
                        kind=facts["kind"] if facts["launched"] else "error",
                        draw=process.launched or draw,
                        outcome=facts["outcome"],
                    )
    if not process.ready:
        raise RuntimeError(f"its process did not start: {process.how_it_ended()}")
    late = not process.ended
    if late:
        process.kill()
    reason = process.how_late() if late else process.how_it_ended()
    outcome = {"status": "error", "reason": reason}
    return Answer(kind="hang" if late else "crash", draw=process.launched or draw, outcome=outcome)
