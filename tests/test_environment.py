"""The choice of device, and what records say of a machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from verify import environment
from verify.cli import COMMANDS

pytestmark = pytest.mark.correctness

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("name", "directory"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("AMD Instinct MI300X (gfx942)", "amd-instinct-mi300x-gfx942"),
    ],
)
def test_the_directory_of_a_gpu_is_its_name(name, directory):
    assert environment.gpu_directory_name(name) == directory


def test_the_environment_of_a_record_is_json_and_names_its_software(device):
    facts = environment.environment(device)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["torch"] == torch.__version__
    assert facts.keys() >= {"python", "triton", "numpy", "cuda", "driver", "device", "capability"}
    assert (facts["driver"] is None) == (device.type == "cpu")


def run(script: str, **variables: str) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", script],
        env=kept | variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_choice_is_made_before_triton_is_imported():
    ran = run(
        "import os, sys; from verify.environment import prepare_interpreter\n"
        "assert prepare_interpreter('cpu') == 'cpu' and 'triton' not in sys.modules\n"
        "print(os.environ['TRITON_INTERPRET'])"
    )
    assert ran.stdout.strip() == "1", ran.stderr


def test_commands_leave_triton_to_the_choice_of_the_device():
    ran = run(
        "import importlib, sys; from verify.cli import COMMANDS\n"
        "for name in COMMANDS:\n"
        "    importlib.import_module(f'verify.commands.{name}')\n"
        "    assert 'triton' not in sys.modules, name\n"
        "print(len(COMMANDS))"
    )
    assert ran.stdout.split() == [str(len(COMMANDS))], ran.stderr


def test_a_choice_that_comes_too_late_is_refused():
    ran = run(
        "import triton; from verify.environment import prepare_interpreter\n"
        "prepare_interpreter('cpu')"
    )
    assert "triton was imported before" in ran.stderr


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="'cuda:0' was asked for"):
        environment.prepare_interpreter("cuda:0")
