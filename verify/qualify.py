"""What a person runs on a GPU that nobody has tried: every command as a stage, one file to send
back.

A stage is a command line of verify in a process of its own, so that one that dies takes nothing
with it.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .records import SCHEMA, write_json

STAGES = ("doctor", "compile", "check", "check-plans", "fuzz", "sanitize", "tune", "bench")
"""Names of all stages, in order."""
STATUSES = ("passed", "failed", "unavailable", "waiting")
"""waiting: not run yet, or its time was over before it had done all."""
_NO_FAULT = (0, 2)
_TAIL = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One command. accepted: exit statuses that are no failure. needs: why it matters, in words."""

    name: str
    words: tuple[str, ...]
    purpose: str
    accepted: tuple[int, ...] = (0,)
    unavailable: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a stage. tail: the end of what it printed."""

    name: str
    status: str
    seconds: float = 0.0
    code: int | None = None
    words: tuple[str, ...] = ()
    tail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Minutes for the stages that take as long as they are given."""

    fuzz: float = 5.0
    tune: float = 8.0
    bench: float = 10.0


def stages_of(
    directory: Path,
    *,
    device: str,
    known: Iterable[str],
    budget: Budget,
    seed: int,
    architecture: int | None = None,
) -> tuple[Stage, ...]:
    """The stages in order, of the commands that exist here; records go to `directory`.

    architecture: the number (90 for sm_90) of which every plan is compiled; without one the usual
    plans of every architecture are.
    """
    place = ("--device", device)
    common = (*place, "--seed", str(seed))
    own = ("--full", "--parts", "kernels", "--arch", str(architecture)) if architecture else ()

    def record(name: str) -> tuple[str, ...]:
        return ("--json", str(directory / f"{name}.json"))

    every = (
        Stage(
            name="doctor",
            words=("doctor", *place, *record("doctor")),
            purpose="versions and devices",
        ),
        Stage(
            name="compile",
            words=(
                *("compile", "--no-baseline", *own, *record("compile")),
                *("--resume", str(directory / "compile.json")),
            ),
            purpose="every plan compiles within the limits of the device",
        ),
        Stage(
            name="check",
            words=("check", "--quick", *common, *record("check")),
            purpose="every kernel and path is right, in every case",
        ),
        Stage(
            name="check-plans",
            words=("check", "--full", "--cases", "tails,holes", *common, *record("check-plans")),
            purpose="so is every plan, in every dtype",
        ),
        Stage(
            name="fuzz",
            words=(
                *("fuzz", *common, "--minutes", f"{budget.fuzz:g}", *record("fuzz")),
                *("--directory", str(directory / f"fuzz-{time.strftime('%Y%m%d-%H%M%S')}")),
            ),
            purpose="so are launches that nobody listed",
        ),
        Stage(
            name="sanitize",
            words=("sanitize", *place, *record("sanitize"), "--resume", "--minutes", "10"),
            purpose="no access is out of bounds",
            unavailable=(2,),
        ),
        Stage(
            name="tune",
            words=(
                *("tune", *place, "--minutes", f"{budget.tune:g}", *record("tune")),
                *("--table", str(directory / "plans.json")),
            ),
            purpose="a plan table for this GPU",
        ),
        Stage(
            name="bench",
            words=(
                *("bench", *common, "--minutes", f"{budget.bench:g}", "--quick"),
                *(*record("bench"), "--resume"),
            ),
            purpose="how fast it is",
        ),
    )
    return tuple(stage for stage in every if stage.words[0] in set(known))


def shortcomings(facts: Mapping[str, Any], *, shared_memory: int | None = None) -> list[str]:
    """What a GPU cannot do, from `capability` and `shared_memory` (bytes per block), in
    sentences.
    """
    found = []
    capability = tuple(int(part) for part in str(facts["capability"]).split("."))
    shared = min(facts["shared_memory"], shared_memory or facts["shared_memory"])
    if capability < (8, 0):
        found.append(
            "no bf16 tensor cores, and Triton does not support it: nothing here will be fast"
        )
    if capability < (9, 0):
        found.append("no tensor maps: weights and rows are loaded through pointers")
    if capability < (8, 9):
        found.append("no fp8 conversion in hardware: fp8 experts are decoded in software")
    if shared < 160 * 1024:
        found.append(
            f"{shared // 1024} KB of shared memory per block: the 128 x 256 tiles with four stages "
            "of a data centre GPU do not fit, and smaller ones are used"
        )
    return found


@dataclass(slots=True)
class Qualification:
    """Runs stages, and keeps `qualify.json` up to date; stages that passed before are not run
    again, unless other words are asked of them now.

    only: names of the stages to be run now, all unless stated; the others wait or stay as they are.
    """

    directory: Path
    stages: tuple[Stage, ...]
    environment: Mapping[str, Any]
    limits: Sequence[str] = ()
    missing: Sequence[str] = ()
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    seed: int = 0
    only: Sequence[str] = ()

    @property
    def asked(self) -> tuple[Stage, ...]:
        """The stages to be run now."""
        return tuple(stage for stage in self.stages if stage.name in self.only or not self.only)

    @property
    def file(self) -> Path:
        """The file to send back."""
        return self.directory / "qualify.json"

    def resume(self) -> None:
        """Take over what passed before: on the same GPU, with the same software but for the
        operating system's, and with the same sources and options.
        """
        if not self.file.is_file():
            return
        known = json.loads(self.file.read_text())
        if known.get("fingerprint") != self.fingerprint:
            return
        if _software(known.get("environment", {})) != _software(self.environment):
            return
        asked = {stage.name: _asked(stage.words) for stage in self.asked}
        for values in known["stages"]:
            name, words = values["name"], _asked(values["words"])
            if values["status"] == "passed" and asked.get(name, words) == words:
                self.results[values["name"]] = Result(**{**values, "words": tuple(values["words"])})

    def run(self, tell: Callable[[Stage], None]) -> None:
        """Run what has not passed yet, in order; a failed doctor does not stop the others."""
        for stage in self.asked:
            if stage.name in self.results:
                continue
            tell(stage)
            result = run_stage(stage)
            if result.status != "unavailable" and result.code in _NO_FAULT and self._cut(stage):
                result = replace(result, status="waiting")
            self.results[stage.name] = result
            self.write(complete=False)
        self.write(complete=True)

    def _cut(self, stage: Stage) -> bool:
        """Whether the record of a stage says that more was to be done."""
        file = self.directory / f"{stage.name}.json"
        if not file.is_file():
            return False
        return json.loads(file.read_text()).get("summary", {}).get("complete") is False

    def write(self, *, complete: bool) -> dict[str, Any]:
        """The record, with those of the stages in it, so that one file tells all."""
        results = [
            self.results.get(stage.name, Result(name=stage.name, status="waiting"))
            for stage in self.stages
        ]
        counts = {status: sum(r.status == status for r in results) for status in STATUSES}
        record = {
            "schema": SCHEMA,
            "command": "qualify",
            "environment": dict(self.environment),
            "seed": self.seed,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            "seconds": round(sum(result.seconds for result in results), 1),
            "fingerprint": dict(self.fingerprint),
            "summary": {**counts, "complete": complete and not counts["waiting"]},
            "cannot": list(self.limits),
            "commands_missing": list(self.missing),
            "stages": [{**asdict(result), "words": _portable(result.words)} for result in results],
            "records": self._records(),
        }
        write_json(self.file, record)
        return record

    def _records(self) -> dict[str, Any]:
        """The records of the stages; of a check only what is not fine."""
        found = {}
        for name in self.results:
            file = self.directory / f"{name}.json"
            if not file.is_file():
                continue
            values = json.loads(file.read_text())
            if "outcomes" in values:
                wrong = [o for o in values["outcomes"] if o["status"] != "passed"]
                values = values | {"outcomes": wrong}
            found[name] = values
        table = self.directory / "plans.json"
        if table.is_file():
            found["plans"] = json.loads(table.read_text())
        return found


def _software(environment: Mapping[str, Any]) -> dict[str, Any]:
    """What of an environment decides what kernels do; the release of its system does not."""
    return {name: value for name, value in environment.items() if name != "platform"}


def _portable(words: Sequence[str]) -> list[str]:
    """The words of a stage, whose files are named as they are called within the directory."""
    return [Path(word).name if os.sep in word else word for word in words]


def _asked(words: Sequence[str]) -> list[str]:
    """Those, without the directory that is made for the stage alone."""
    words = _portable(words)
    place = words.index("--directory") if "--directory" in words else len(words)
    return [*words[:place], *words[place + 2 :]]


def run_stage(stage: Stage) -> Result:
    """Run one stage to its end, showing what it prints."""
    start = time.monotonic()
    command = [sys.executable, "-m", "verify", *stage.words]
    root = Path(__file__).resolve().parent.parent
    process = subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    text = ""
    try:
        for line in process.stdout:
            sys.stderr.write(line)
            text = (text + line)[-_TAIL:]
        code = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    status = "passed" if code in stage.accepted else "failed"
    if code in stage.unavailable:
        status = "unavailable"
    return Result(
        name=stage.name,
        status=status,
        seconds=round(time.monotonic() - start, 1),
        code=code,
        words=stage.words,
        tail=text if status != "passed" else "",
    )
