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
RUN = ROOT / ".ci" / "run"
SCRIPTS = (*FILES, RUN)
CPU, GPU = (ROOT / ".github" / "workflows" / name for name in ("cpu.yml", "gpu.yml"))


def commands_of(file: Path) -> list[list[str]]:
    """The words of every `python -m verify`, that of `check` added where it is left out."""
    text = file.read_text().replace('"$python"', "python").replace("\\\n", " ")
    found = [line.split() for line in re.findall(r"python -m verify (.+)", text)]
    return [words if not words[0].startswith("-") else ["check", *words] for words in found]


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
@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_what_is_run_exists(file):
    text = file.read_text()
    assert {words[0] for words in commands_of(file)} <= set(COMMANDS)
    for path in re.findall(r"tests/[\w/]+\.py", text):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"uses: (\./\S+)", text):
        assert (ROOT / path).is_file(), path


@pytest.mark.correctness
def test_the_script_and_the_workflows_ask_for_the_same():
    """What a merge is held to on a CPU, here and there; what needs a GPU, there."""
    here = {words[0] for words in commands_of(RUN)}
    cpu = {words[0] for words in commands_of(CPU)}
    gpu = {words[0] for words in commands_of(GPU)}
    assert here >= {"check", "compile", "mutants"}
    assert cpu - {"doctor", "report"} >= here
    assert gpu >= {"check", "gate", "fuzz", "doctor", "report"}
    peft = set(re.findall(r"tests/test_\w+\.py", RUN.read_text()))
    assert peft <= set(re.findall(r"tests/test_\w+\.py", CPU.read_text()))


@pytest.mark.correctness
def test_the_compiled_baseline_is_of_the_triton_that_is_installed_there():
    text = CPU.read_text()
    job = text[text.index("\n  compile:") : text.index("\n  mutants:")]
    (version,) = re.findall(r"triton==([\d.]+)", job)
    assert (ROOT / "verify" / "baselines" / f"compile-{version}.json").is_file()


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
    for command, *words in (words for file in SCRIPTS for words in commands_of(file)):
        used.setdefault(command, set()).update(w for w in words if w.startswith("--"))
    for command in used:
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
