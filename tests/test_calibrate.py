"""The calibration: right simulated kernels raise no alarm, and faults that matter are seen."""

import dataclasses

import pytest
import torch

from verify import calibrate
from verify.cli import main
from verify.commands.calibrate import detection, markdown
from verify.inputs import DTYPES
from verify.references import Groups

pytestmark = pytest.mark.correctness

GROSS = (
    "last element of K missed, base",
    "wrong adapter for all rows",
    "scaling not applied",
    "LoRA term lost",
    "bias lost",
    "gates lost",
)


@pytest.mark.parametrize("seed", range(12))
def test_right_results_raise_no_alarm(seed):
    tally = calibrate.simulated_tally(seed)
    assert tally.alarms == ()
    assert tally.worst <= 1
    assert tally.groups > 0


@pytest.mark.parametrize("fault", GROSS)
@pytest.mark.parametrize("seed", [0, 1])
def test_gross_faults_are_seen(fault, seed):
    found = calibrate.detected(fault, seed)
    assert found["seen"]
    assert found["effect"] > 0


@pytest.mark.parametrize("name", sorted(calibrate.FAULTS))
def test_every_fault_changes_something(name):
    assert calibrate.FAULTS[name] != calibrate.RIGHT
    assert any(calibrate.detected(name, seed)["effect"] > 0 for seed in range(3))


def test_a_fault_of_no_rows_is_none():
    case = calibrate.drawn_case(5)
    inputs = calibrate.LORA_FORWARD.inputs(case, torch.float32, "balanced", calibrate.CPU)
    same = dataclasses.replace(calibrate.RIGHT, base_factor=1.0, stray_base=0)
    right, again = calibrate.forward(inputs), calibrate.forward(inputs, same)
    assert all(torch.equal(right[name], again[name]) for name in right)


def test_the_next_expert_owns_just_the_strays():
    fault = dataclasses.replace(calibrate.RIGHT, stray_base=2, stray_lora=3)
    owners = list(calibrate._owners(slice(10, 15), 3, 4, fault))
    assert owners == [(slice(10, 12), 0, 0), (slice(12, 13), 3, 0), (slice(13, 15), 3, 3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_truncation_never_grows_a_value(dtype):
    value = torch.randn(1000)
    fault = dataclasses.replace(calibrate.RIGHT, truncated=True)
    cut = calibrate._rounded(value, dtype, fault).float()
    assert bool((cut.abs() <= value.abs()).all())
    assert not torch.equal(cut, value.to(dtype).float())


def test_drawn_cases_are_seeded_and_differ():
    assert calibrate.drawn_case(3) == calibrate.drawn_case(3)
    assert len({calibrate.drawn_case(seed).shape for seed in range(20)}) > 15
    deep = calibrate.drawn_case(3, deep=True)
    assert deep.k_in >= 16 * 64
    assert deep.gated
    assert deep.bias


def test_every_dtype_is_calibrated():
    assert len(DTYPES) == 3
    index = torch.zeros(4, 1, dtype=torch.int64)
    assert Groups.of(index, 2).rows == 4


def test_the_table_counts_what_was_seen():
    found = [
        {"fault": "a", "effect": 0.5, "ratio": 3.0, "measure": "row", "seen": True},
        {"fault": "a", "effect": 0.1, "ratio": 0.5, "measure": "whole", "seen": False},
    ]
    (row,) = detection(found)
    assert (row["cases"], row["seen"], row["measure"]) == (2, 1, "row")
    assert "| a | 3.0e-01 | 1 of 2 | row |" in markdown({"detection": [row]})


def test_what_another_seed_found_is_neither_kept_nor_lost(tmp_path):
    words = ["calibrate", "--no-kernels", "--groups", "1", "--draws", "1"]
    path = tmp_path / "calibrate.json"
    path.write_text('{"seed": 3, "tallies": {}, "faults": {}}')
    with pytest.raises(
        SystemExit, match=r"^--resume: .*calibrate.json has seed 3, and --seed is 4"
    ):
        main([*words, "--resume", str(path), "--seed", "4"])
    assert path.read_text() == '{"seed": 3, "tallies": {}, "faults": {}}'
