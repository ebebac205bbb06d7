"""`python -m verify tune` where there is no GPU, what it refuses, and plans for all row counts."""

import json

import pytest
import torch

from verify import cli
from verify.tune import Finding, Target, settle

pytestmark = [
    pytest.mark.correctness,
    pytest.mark.skipif(torch.cuda.is_available(), reason="tune would time this GPU"),
]


def test_no_table_of_the_interpreter_is_kept_unless_its_place_is_stated(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="tune times plans on a GPU, and there is none"):
        cli.main(["tune"])
    assert not list(tmp_path.rglob("*.json"))


def test_dtypes_that_are_not_known_are_refused():
    with pytest.raises(SystemExit, match="--dtypes: int3 is none of float32"):
        cli.main(["tune", "--dtypes", "int3", "--table", "table.json"])


def test_sizes_that_are_no_numbers_are_refused(capsys):
    with pytest.raises(SystemExit) as refused:
        cli.main(["tune", "--tokens", "many", "--table", "table.json"])
    assert refused.value.code == 2
    assert "--tokens" in capsys.readouterr().err


def finding(rows: int, operation: str = "lora_forward", **times: float) -> Finding:
    """A finding of a bucket, with the milliseconds of plans by name."""
    plan = min(times, key=times.__getitem__)
    return Finding(
        target=Target(
            operation=operation, model="m", projection="down", tokens=rows, rank=16,
            dtype=torch.bfloat16,
        ),
        bucket=f"{operation} bfloat16 m{rows} k64 n32 r16 nk",
        plan=plan,
        ms=times[plan],
        heuristic_ms=2.0,
        tried=len(times),
        wrong=(),
        times=times,
    )  # fmt: skip


def test_row_counts_share_a_plan_that_costs_little_in_each():
    few, many = finding(64, a=1.0, b=1.02, c=1.5), finding(256, a=4.9, b=4.1, c=4.0)
    assert [(f.plan, f.ms) for f in settle([few, many])] == [("b", 1.02), ("b", 4.1)]
    assert [f.bucket for f in settle([many, few])] == [many.bucket, few.bucket]


@pytest.mark.parametrize(
    "other",
    [
        finding(256, a=4.9, b=4.2, c=4.0),
        finding(256, c=4.0),
        finding(256, "lora_input_grad", a=4.9, b=4.1, c=4.0),
    ],
    ids=["too slow", "not a candidate", "another product"],
)
def test_what_costs_more_or_is_another_product_keeps_its_own_plan(other):
    few = finding(64, a=1.0, b=1.02, c=1.5)
    assert settle([few, other]) == [few, other]


def test_of_plans_that_cost_little_in_each_the_cheapest_in_all_is_taken():
    few, many = finding(64, a=1.0, b=1.01, c=1.02), finding(256, a=4.1, b=4.0, c=4.02)
    assert [f.plan for f in settle([few, many])] == ["b", "b"]


def test_a_search_that_was_stopped_says_so(tmp_path):
    file = tmp_path / "tune.json"
    words = ["tune", "--table", str(tmp_path / "t.json"), "--json", str(file), "--jobs", "0"]
    cli.main([*words, "--rounds", "1", "--minutes", "0.0001"])
    record = json.loads(file.read_text())
    assert record["plans"] == []
    assert record["summary"]["complete"] is False
