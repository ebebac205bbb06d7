"""The machine behind `pytest --benchmark-compare`, on the CPU: what it measures and compares."""

import functools
from pathlib import Path

import pytest
import torch
from virtual_device import DEQUANT

import scattermoe_lora
from conftest import DEVICE
from verify import benchmark_device
from verify.bench_arms import Arm, arm_of
from verify.benchmark_device import ThisMachine
from verify.gate import Gate
from verify.gate_process import digest
from verify.statistics import UNMEASURED, Rule

pytestmark = [
    pytest.mark.correctness,
    pytest.mark.skipif(
        DEVICE != "cpu", reason="measures on the CPU, where Triton may not interpret"
    ),
]

PACKAGE = Path(scattermoe_lora.__path__[0])
EXPLAINED = {
    *("name", "tflops", "gb_per_s", "of_floor", "floor_ms", "path", "plan", "peak_bytes"),
    *("launches", "host_ms", "wall_ms", "first_call_s"),
}


@pytest.fixture
def machine():
    return ThisMachine(torch.device("cpu"))


def test_a_benchmark_is_measured_and_explained(machine, monkeypatch):
    first, again = machine.measure(DEQUANT), machine.measure(DEQUANT)
    for measured in (first, again):
        assert not measured.problem
        assert min(measured.samples) > 0
        assert measured.info.keys() == EXPLAINED
        assert measured.info["name"] == DEQUANT.name


def test_one_that_is_wrong_has_no_times_and_does_not_end_the_others(machine, monkeypatch):
    def wrong(lib, case, drawn):
        arm = arm_of(lib, case, drawn)
        return Arm(call=lambda: [value + 1e-3 for value in arm.call()], outputs=arm.outputs)

    with monkeypatch.context() as patched:
        patched.setattr("verify.bench.arm_of", wrong)
        measured = machine.measure(DEQUANT)
    assert measured.problem.startswith("failed: dense errs by")
    assert not measured.samples
    assert machine.measure(DEQUANT).samples


def test_a_revision_is_compared_in_a_process_of_its_own(machine, monkeypatch, tmp_path):
    base = machine.tree(str(PACKAGE), tmp_path / "scratch" / "base")
    assert digest(base) == digest(machine.sources())
    once = functools.partial(Gate, rule=Rule(stages=(1,)))
    monkeypatch.setattr(benchmark_device, "Gate", once)
    told = []
    results, invalid = machine.compare(base, [DEQUANT], seconds=300.0, say=told.append)
    (result,) = results
    assert (result.name, result.processes, result.bits) == (DEQUANT.name, 1, {})
    assert told == ["gate: process 1"]
    assert list(invalid) == []


def test_a_revision_that_cannot_run_is_unmeasured(machine, tmp_path):
    base = machine.tree(str(PACKAGE), tmp_path / "scratch" / "base")
    (base / "quant" / "__init__.py").write_text("raise ImportError('planted')\n")
    results, _ = machine.compare(base, [DEQUANT], seconds=300.0, say=lambda text: None)
    assert [result.decision for result in results] == [UNMEASURED]
    assert "planted" in results[0].reason


def test_without_a_gpu_none_is_named(machine):
    assert machine.gpu == ""
    assert set(machine.facts()) == {"torch", "triton", "cuda", "driver"}
    with pytest.raises(ValueError, match="git has no scattermoe_lora"):
        machine.tree("no-such-revision", Path("nowhere"))
