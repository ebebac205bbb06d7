"""Failure files of `check`: written, reread, rerun."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import scattermoe_lora
from verify.cases import SMOKE
from verify.draws import run_draw
from verify.findings import read, write_failure
from verify.run import Problem
from verify.specs.glu import GLU_FORWARD

ROOT = Path(__file__).parent.parent


def wrong_run(lib, inputs, plan):
    outputs = GLU_FORWARD.run(lib, inputs, plan)
    return {name: value * 1.5 for name, value in outputs.items()}


@pytest.fixture
def failure(tmp_path, device) -> Path:
    """The file of a check that fails with a kernel that is wrong here, and is right when it is
    rerun.
    """
    spec = replace(GLU_FORWARD, run=wrong_run)
    problem = Problem(
        lib=scattermoe_lora, spec=spec, case=SMOKE[1], dtype=torch.float32, mode="balanced",
        device=device, seed=4,
    )  # fmt: skip
    (outcome,) = problem.check()
    assert outcome.status == "failed"
    return write_failure(tmp_path / "failures", outcome, problem)


@pytest.mark.correctness
def test_a_failure_file_holds_the_launch(failure, device):
    finding = read(failure)
    assert (finding.kind, finding.draw.kernel, finding.draw.seed) == ("wrong", "glu_forward", 4)
    assert finding.draw.case == SMOKE[1]
    launches = []
    spec = replace(GLU_FORWARD, run=wrong_run)
    again = run_draw(scattermoe_lora, spec, finding.draw, device, announce=launches.append)
    assert again.reason == finding.outcome["reason"]
    assert len(launches) == 1


@pytest.mark.correctness
def test_two_failures_have_two_files(failure, tmp_path, device):
    spec = replace(GLU_FORWARD, run=wrong_run)
    problem = Problem(
        lib=scattermoe_lora, spec=spec, case=SMOKE[1], dtype=torch.float16, mode="balanced",
        device=device, seed=4,
    )  # fmt: skip
    (outcome,) = problem.check()
    other = write_failure(tmp_path / "failures", outcome, problem)
    assert sorted((tmp_path / "failures").iterdir()) == sorted([failure, other])


@pytest.mark.correctness
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot be replayed"),
        ('{"schema": 1, "command": "check"}', "not a finding"),
        ('{"schema": 99, "command": "finding"}', "schema 99"),
    ],
)
def test_what_is_no_finding_is_refused(tmp_path, text, words):
    file = tmp_path / "some.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        read(file)


def test_replay_tells_what_passes_from_what_cannot_be_run(failure, tmp_path):
    values = json.loads(failure.read_text())
    values["draw"]["label"] = "no such plan"
    impossible = tmp_path / "impossible.json"
    impossible.write_text(json.dumps(values))
    for file, status, words in ((failure, 0, "passed now"), (impossible, 2, "does not offer")):
        ran = subprocess.run(
            [sys.executable, "-m", "verify", "replay", str(file), "--device", "cpu"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ran.returncode == status, ran.stdout + ran.stderr
        assert words in ran.stdout.replace("\n", " ")
