"""Findings: failures as files that `python -m verify replay FILE` reruns exactly."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .draws import Draw
from .records import SCHEMA, plain, write_json
from .run import Outcome, Problem

KINDS = ("wrong", "error", "compile", "memory", "crash", "hang")
"""wrong: the judge refused an output. error: an exception. compile: the kernel did not compile or
fit.
memory: it ran out of memory. crash: the process or its CUDA context died. hang: no answer in
time."""

_COMPILING = (
    "CompilationError",
    "CompileTimeAssertion",
    "OutOfResources",
    "PTXASError",
    "NoTriton",
)
_CONTEXT = ("CUDA error", "illegal memory access", "an illegal instruction", "misaligned address")


def kind_of(outcome: Outcome) -> str:
    """The kind of finding that an outcome is; empty for one that is none."""
    if outcome.ok:
        return ""
    if outcome.status == "failed":
        return "wrong"
    if "OutOfMemory" in outcome.reason or "out of memory" in outcome.reason:
        return "memory"
    if any(word in outcome.reason for word in _COMPILING):
        return "compile"
    if any(word in outcome.reason for word in _CONTEXT):
        return "crash"
    return "error"


def signature(draw: Draw, kind: str, outcome: Mapping[str, Any]) -> str:
    """What findings of one cause have in common: kernel, path, kind and the words of the reason."""
    words = [draw.kernel, draw.path, kind]
    if kind == "wrong":
        where = outcome.get("where") or {}
        words += [str(outcome.get("measure")), str(where.get("output", ""))]
    elif kind in ("error", "compile"):
        text = re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?", "#", str(outcome.get("reason", "")))
        words.append(text[:160])
    return "|".join(words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A failure. draw: the smallest launch known to fail so; first: the one it was met with.

    times: how often its signature was met. shrunk: attempts at a smaller launch, 0 while none was
    made.
    reproduced: whether the first launch failed again when it was repeated, None if that was not
    tried.
    """

    kind: str
    signature: str
    draw: Draw
    first: Draw
    outcome: Mapping[str, Any]
    times: int = 1
    shrunk: int = 0
    reproduced: bool | None = None
    seconds: float = 0.0
    tree: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def met(cls, kind: str, draw: Draw, outcome: Mapping[str, Any], **facts: Any) -> "Finding":
        """A finding as it was met."""
        name = signature(draw, kind, outcome)
        return cls(kind=kind, signature=name, draw=draw, first=draw, outcome=dict(outcome), **facts)

    @property
    def file_name(self) -> str:
        """Where it is written, within the directory of its campaign."""
        digest = hashlib.sha256(self.signature.encode()).hexdigest()[:8]
        return f"{self.kind}-{self.draw.kernel}-{digest}.json"

    def as_json(self) -> dict[str, Any]:
        """Plain values, the ones that `replay` reads among them."""
        return {
            "schema": SCHEMA,
            "command": "finding",
            "kind": self.kind,
            "signature": self.signature,
            "draw": self.draw.as_json(),
            "first": self.first.as_json(),
            "outcome": dict(self.outcome),
            "times": self.times,
            "shrunk": self.shrunk,
            "reproduced": self.reproduced,
            "seconds": round(self.seconds, 3),
            "tree": self.tree,
            "environment": dict(self.environment),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Finding":
        """The finding that `as_json` wrote.

        Raises:
            ValueError: it is none.
        """
        if values.get("command") != "finding" or values.get("schema") != SCHEMA:
            raise ValueError(
                f"not a finding of schema {SCHEMA}: command {values.get('command')!r}, "
                f"schema {values.get('schema')!r}"
            )
        keys = ("kind", "signature", "outcome", "times", "shrunk", "reproduced", "seconds", "tree")
        return cls(
            draw=Draw.from_json(values["draw"]),
            first=Draw.from_json(values["first"]),
            environment=values["environment"],
            **{key: values[key] for key in keys},
        )

    def line(self) -> str:
        """In one line."""
        reason = str(self.outcome.get("reason", ""))
        times = f" ({self.times} times)" if self.times > 1 else ""
        return f"{self.kind}: {self.draw}{times}: {reason[:300]}"


def write(directory: Path, finding: Finding, *, name: str = "") -> Path:
    """Write a finding; returns its file, which is named after its signature unless stated."""
    path = directory / (name or finding.file_name)
    write_json(path, plain(finding.as_json()))
    return path


def read(path: Path) -> Finding:
    """The finding in a file.

    Raises:
        ValueError: there is none; the message says why.
    """
    try:
        return Finding.from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be replayed: {type(error).__name__}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be replayed: {error}") from error


def write_failure(
    directory: Path,
    outcome: Outcome,
    problem: Problem,
    *,
    environment: Mapping[str, Any] | None = None,
) -> Path:
    """Write an outcome of `check` that is not ok, so that `replay` can rerun it; returns the
    file.
    """
    draw = Draw(
        kernel=outcome.kernel,
        case=problem.case,
        dtype=outcome.dtype,
        mode=outcome.mode,
        seed=problem.seed,
        path=outcome.path,
        label=outcome.plan if outcome.path else "",
    )
    kind = kind_of(outcome) or "error"
    finding = Finding.met(kind, draw, outcome.as_json(), environment=environment or {})
    words = json.dumps(draw.as_json(), sort_keys=True)
    digest = hashlib.sha256(words.encode()).hexdigest()[:8]
    return write(
        directory, finding, name=f"{finding.kind}-{draw.kernel}-{draw.case.name}-{digest}.json"
    )
