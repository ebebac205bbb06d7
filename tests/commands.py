"""Commands of `verify` on the CPU, also where Triton was imported to compile for a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import DEVICE
from verify.cli import main

ROOT = Path(__file__).parent.parent


def on_the_cpu(words):
    """The exit status of a command whose device is the CPU.

    It runs in this process where kernels are interpreted here, and otherwise in one of its own.
    """
    if DEVICE == "cpu":
        return main(words)
    ran = _apart(words)
    print(ran.stdout, end="")  # noqa: T201 - for capsys, as if it had run here
    assert ran.returncode in (0, 1, 2), ran.stderr
    return ran.returncode


def refused_on_the_cpu(words):
    """The sentence with which such a command is refused."""
    if DEVICE == "cpu":
        with pytest.raises(SystemExit) as refused:
            main(words)
        return str(refused.value)
    ran = _apart(words)
    assert ran.returncode == 1, ran.stdout
    return ran.stderr.strip().splitlines()[-1]


def _apart(words):
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-m", "verify", *words],
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        check=False,
    )
