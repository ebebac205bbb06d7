"""The command line: `python -m verify [command] ...`; without a command it is `check`.

A command is a module `verify.commands.<name>` with `add_arguments(parser)` and
`main(arguments) -> int`.
Modules are imported when their command is run: what imports Triton waits until the device is
chosen.
"""

import argparse
import importlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

COMMANDS: dict[str, str] = {
    "bench": "times against the floor and the peers, only of what is right",
    "check": "every kernel and path against its reference (the default)",
    "calibrate": "how often the judge is wrong about right kernels, and what errors it sees",
    "compile": "plans of every architecture, compiled without a GPU, against a baseline",
    "doctor": "versions and devices, and what is known to be wrong with them",
    "fuzz": "kernels on launches that nobody listed, for a time or until stopped",
    "gate": "whether kernels got slower than at another revision",
    "mutants": "wrong kernels, and which of them the judge sees",
    "qualify": "everything, stage by stage, on a GPU that nobody has tried",
    "records": "whether the committed records are there, whole and fresh",
    "replay": "findings of fuzz and failures of check, rerun exactly",
    "report": "all records as one HTML page or Markdown, which is printed unless a file is named",
    "sanitize": "kernels under compute-sanitizer",
    "train": "a small model trained on text, ours against transformers' eager experts",
    "tune": "the fastest right plan of every problem, written as a table",
}
DEFAULT = "check"


class TerminatedError(KeyboardInterrupt):
    """This process was told to end, by SIGTERM."""


@contextmanager
def terminable() -> Iterator[None]:
    """In the main thread, SIGTERM raises `TerminatedError`, once: what must be done in the end,
    is. Other threads are told nothing.
    """
    told = False

    def tell(*_: Any) -> None:
        nonlocal told
        if not told:
            told = True
            raise TerminatedError

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, tell)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status, that of the signal where it was ended by one."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words.insert(0, DEFAULT)
    parser = argparse.ArgumentParser(prog="python -m verify", description=__doc__.split("\n")[0])
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if words[0] == name:
            command = importlib.import_module(f"{__package__}.commands.{name}")
            command.add_arguments(subparser)
            subparser.set_defaults(run=command.main)
    parsed = parser.parse_args(words)
    try:
        with terminable():
            return parsed.run(parsed)
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)  # noqa: T201
        terminated = isinstance(error, TerminatedError)
        return 128 + (signal.SIGTERM if terminated else signal.SIGINT)
