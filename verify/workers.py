"""The parent's side of worker processes: start, tell, listen, and know how one ended."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .draws import Draw

_ROOT = Path(__file__).resolve().parent.parent
_TAIL = 600
_JUDGING = 4
"""The judge may take so many times as long as a launch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How a worker is started. pools: whether it says which plans there are."""

    device: str
    journal: Path
    log: Path
    tree: str = ""
    kernels: tuple[str, ...] = ()
    pools: bool = False

    def command(self) -> list[str]:
        """Its command line."""
        words = [sys.executable, "-m", "verify.fuzz_worker", "--device", self.device]
        words += ["--journal", str(self.journal), "--kernels", ",".join(self.kernels)]
        if self.tree:
            words += ["--tree", self.tree]
        return [*words, "--pools"] if self.pools else words


@dataclass(slots=True, kw_only=True)
class Process:
    """A running worker. draw: what it was told to run last; launched: with which plan, once that
    is known. allowed: seconds for the step that it is at, until `deadline`.
    """

    start: Start
    popen: subprocess.Popen[bytes]
    number: int = 0
    draw: Draw | None = None
    launched: Draw | None = None
    patience: float = float("inf")
    allowed: float = float("inf")
    deadline: float = float("inf")
    ready: bool = False
    ended: bool = False
    _partial: bytes = field(default=b"", repr=False)

    @classmethod
    def launch(cls, start: Start, *, patience: float) -> "Process":
        """Start a worker, which has `patience` seconds to say hello."""
        start.log.parent.mkdir(parents=True, exist_ok=True)
        search = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(word for word in search if word)}
        with start.log.open("ab") as log:
            popen = subprocess.Popen(
                start.command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=variables,
                start_new_session=True,
            )
        assert popen.stdout is not None
        os.set_blocking(popen.stdout.fileno(), False)
        return cls(start=start, popen=popen, allowed=patience, deadline=time.monotonic() + patience)

    @property
    def idle(self) -> bool:
        """Whether it waits for a draw."""
        return self.ready and self.draw is None and not self.ended

    def tell(self, number: int, draw: Draw, *, patience: float) -> None:
        """Hand it a draw, which it has `patience` seconds to prepare, as many for every kernel that
        it compiles and for the launch, and _JUDGING times as many to judge it.
        """
        assert self.popen.stdin is not None
        self.number, self.draw, self.launched = number, draw, None
        self.patience = patience
        self._wait_again()
        line = json.dumps({"id": number, "draw": draw.as_json()}) + "\n"
        try:
            self.popen.stdin.write(line.encode())
            self.popen.stdin.flush()
        except BrokenPipeError:
            self.ended = True

    def progressed(self, message: Mapping[str, Any]) -> bool:
        """Whether a message says only that a draw got further; it has its time anew then."""
        if "launch" in message:
            self.launched = Draw.from_json(message["launch"])
        elif "compiled" not in message and "returned" not in message:
            return False
        self._wait_again(_JUDGING if "returned" in message else 1)
        return True

    def _wait_again(self, times: int = 1) -> None:
        self.allowed = times * self.patience
        self.deadline = time.monotonic() + self.allowed

    def read(self) -> list[dict[str, Any]]:
        """What it said since; `ended` is set at the end of its output."""
        assert self.popen.stdout is not None
        while True:
            try:
                found = os.read(self.popen.stdout.fileno(), 1 << 16)
            except BlockingIOError:
                break
            if not found:
                self.ended = True
                break
            self._partial += found
        *lines, self._partial = self._partial.split(b"\n")
        return [json.loads(line) for line in lines if line]

    @property
    def late(self) -> bool:
        """Whether its time is over."""
        return time.monotonic() > self.deadline

    def how_late(self) -> str:
        """In words: the time that it had for its last step."""
        return f"no answer within {self.allowed:g} s"

    def kill(self) -> None:
        """End it, whatever it does."""
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.close()

    def close(self) -> int:
        """Let it end; returns its exit status, negative for a signal."""
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.close()
        try:
            status = self.popen.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(self.popen.pid, signal.SIGKILL)
            status = self.popen.wait()
        self.popen.stdout.close()
        self.ended = True
        return status

    def how_it_ended(self) -> str:
        """In words: the signal or status, and the last it printed."""
        status = self.close()
        if status < 0:
            text = f"the process was ended by {signal.Signals(-status).name}"
        else:
            text = f"the process ended with status {status}"
        tail = self.start.log.read_text(errors="replace")[-_TAIL:]
        words = " ".join(tail.split())
        return f"{text}; it printed: {words}" if words else text


def listen(processes: Sequence[Process], seconds: float) -> Iterable[Process]:
    """Wait until one of the processes says something, at most so long; returns those that did."""
    with selectors.DefaultSelector() as selector:
        for process in processes:
            if not process.ended:
                selector.register(process.popen.stdout, selectors.EVENT_READ, process)  # type: ignore[arg-type]
        if not selector.get_map():
            time.sleep(min(seconds, 0.05))
            return []
        return [key.data for key, _ in selector.select(seconds)]
