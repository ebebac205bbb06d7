"""Workflows: valid, bounded, without more rights than they need, and of commands that exist."""

import argparse
import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from verify.cli import COMMANDS

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
LATER = frozenset({"gate", "records", "train"})
"""Commands that DESIGN names and that may still be missing while the package is built."""


def workflow(file: Path) -> dict:
    """A workflow; YAML reads the key `on` as true."""
    values = yaml.safe_load(file.read_text())
    return {"on" if key is True else key: value for key, value in values.items()}


@pytest.mark.correctness
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_job_is_bounded_and_reads_only(file):
    values = workflow(file)
    assert values["permissions"] == {"contents": "read"}
    for name, job in values["jobs"].items():
        assert "uses" in job or job["timeout-minutes"] <= 90, name
        assert "permissions" not in job


@pytest.mark.correctness
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_run_exists(file):
    text = file.read_text()
    commands = set(re.findall(r"python -m verify (?!-)(\w+)", text))
    assert commands <= set(COMMANDS) | LATER
    for path in re.findall(r"tests/[\w/]+\.py", text):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"uses: (\./\S+)", text):
        assert (ROOT / path).is_file(), path


@pytest.mark.correctness
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_no_expression_is_pasted_into_a_shell(file):
    """What an outsider can choose (titles, branch names) reaches a script through the
    environment.
    """
    for job in workflow(file)["jobs"].values():
        for step in job.get("steps", ()):
            pasted = re.findall(r"\$\{\{\s*([\w.-]+)", step.get("run", ""))
            assert all(name.startswith("matrix.") for name in pasted), step


@pytest.mark.correctness
def test_code_of_forks_meets_no_runner_of_ours():
    job = workflow(ROOT / ".github" / "workflows" / "gpu-types.yml")["jobs"]["gpu"]
    assert "head.repo.full_name == github.repository" in job["if"]
    for file in FILES:
        assert "pull_request_target" not in file.read_text()


@pytest.mark.correctness
def test_the_options_that_workflows_use_are_offered():
    used: dict[str, set[str]] = {}
    for file in FILES:
        for line in re.findall(r"python -m verify (.+(?:\\\n.+)*)", file.read_text()):
            words = line.replace("\\\n", " ").split()
            command = words[0] if not words[0].startswith("-") else "check"
            used.setdefault(command, set()).update(w for w in words if w.startswith("--"))
    for command in used.keys() & COMMANDS.keys():
        parser = argparse.ArgumentParser()
        importlib.import_module(f"verify.commands.{command}").add_arguments(parser)
        offered = parser.format_help()
        for option in used[command]:
            assert option in offered, f"{command} has no {option}"


def test_actionlint_is_content():
    tool = shutil.which("actionlint")
    if tool is None:
        pytest.skip("actionlint is not installed")
    ran = subprocess.run([tool, *FILES], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout
