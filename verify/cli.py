"""The command line: `python -m verify [command] ...`; without a command it is `check`.

A command is a module `verify.commands.<name>` with `add_arguments(parser)` and
`main(arguments) -> int`.
Modules are imported when their command is run: what imports Triton waits until the device is
chosen.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

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
    "report": "one HTML page, and Markdown, of all records",
    "sanitize": "kernels under compute-sanitizer",
    "train": "a small model trained on text, ours against transformers' eager experts",
    "tune": "the fastest right plan of every problem, written as a table",
}
DEFAULT = "check"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
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
        return parsed.run(parsed)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        return 130
