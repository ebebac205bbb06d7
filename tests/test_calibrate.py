"""The calibration: right simulated kernels raise no alarm, and faults that matter are seen."""

import dataclasses
import json

import pytest
import torch

from conftest import DEVICE
from verify import calibrate
from verify.cases import SMOKE
from verify.cli import main
from verify.commands.calibrate import detection, markdown
from verify.inputs import DTYPES
from verify.references import Groups
from verify.specs import KERNELS

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
    summary = {"groups": 123_456, "groups_of_kernels": 1_000, "alarms": 2, "worst": 0.789}
    sentence, _, *table = markdown({"detection": [row], "summary": summary}).splitlines()
    assert sentence == (
        "2 alarms on 123,456 groups of right results (1,000 of kernels); the largest error is "
        "0.79 of its limit"
    )
    assert table[-1] == "| a | 3.0e-01 | 1 of 2 | row |"
    assert len({line.count("|") for line in table}) == 1


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Calibrates with one case and one fault; returns the record, and how many problems it ran."""
    combine = next(spec for spec in KERNELS if spec.name == "combine")
    combine = dataclasses.replace(combine, cases=SMOKE[:1])
    monkeypatch.setattr("verify.specs.KERNELS", (combine,))
    monkeypatch.setattr(calibrate, "FAULTS", {"bias lost": calibrate.FAULTS["bias lost"]})
    judged, tally = [], calibrate.kernel_tally

    def counted(lib, problem):
        judged.append(problem)
        return tally(lib, problem)

    monkeypatch.setattr(calibrate, "kernel_tally", counted)

    def calibrated(*words: str) -> tuple[dict, int]:
        judged.clear()
        path = tmp_path / "calibrate.json"
        words = ("--groups", "1", "--draws", "1", "--device", DEVICE, *words)
        assert main(["calibrate", "--resume", str(path), *words]) == 0
        return json.loads(path.read_text()), len(judged)

    return calibrated


@pytest.mark.parametrize(
    ("part", "key", "kept"),
    [
        ("summary", "groups", True),
        ("fingerprint", "combine", False),
        ("environment", "device", False),
        ("environment", "triton", False),
    ],
)
def test_what_other_kernels_or_another_machine_did_is_not_kept(run, tmp_path, part, key, kept):
    first, judged = run()
    assert judged == len(first["tallies"]) > 1
    first[part][key] = "another"
    first["tallies"]["simulated 7"] = {"groups": 5, "worst": 0.5, "alarms": []}
    (tmp_path / "calibrate.json").write_text(json.dumps(first))
    again, rerun = run()
    assert rerun == (0 if kept else judged)
    # References of a GPU differ from run to run in the last bit.
    for item in first["tallies"].values():
        item["worst"] = pytest.approx(item["worst"], rel=1e-6)
    assert again["tallies"] == first["tallies"]
    assert again["faults"] == first["faults"]
    assert again["summary"]["groups"] == again["summary"]["groups_of_kernels"] + 5


def test_the_rates_are_written_for_a_readme(run, tmp_path):
    record, _ = run("--markdown", str(tmp_path / "new" / "rates.md"))
    assert (tmp_path / "new" / "rates.md").read_text() == markdown(record) + "\n"


def test_what_another_seed_found_is_neither_kept_nor_lost(tmp_path):
    words = ["calibrate", "--no-kernels", "--groups", "1", "--draws", "1"]
    path = tmp_path / "calibrate.json"
    path.write_text('{"seed": 3, "tallies": {}, "faults": {}}')
    with pytest.raises(
        SystemExit, match=r"^--resume: .*calibrate.json has seed 3, and --seed is 4"
    ):
        main([*words, "--resume", str(path), "--seed", "4"])
    assert path.read_text() == '{"seed": 3, "tallies": {}, "faults": {}}'
