"""A check that goes on where a record ends."""

import json

import pytest

from conftest import DEVICE
from verify import cli
from verify.records import summary_of, write_json
from verify.resume import kept
from verify.run import Outcome

pytestmark = pytest.mark.correctness


def outcome(case: str, *, kernel: str = "combine", path: str = "", status: str = "passed") -> dict:
    """One outcome of a made-up problem."""
    reason = "" if status == "passed" else "made up"
    return Outcome(
        kernel=kernel, path=path, plan="default", case=case, dtype="float32", mode="balanced",
        status=status, ratio=0.5, measure="row", reason=reason,
    ).as_json()  # fmt: skip


def record_of(
    *outcomes: dict, seed: int = 0, driver: str = "1", code: str = "a", cases=(), quick=False
) -> dict:
    """A record of such outcomes; `combine` has the code that is stated, `group` always the same."""
    counts = summary_of(Outcome(**values) for values in outcomes)
    return {
        "schema": 1, "command": "check", "seed": seed, "started": "2026-01-01T00:00:00+00:00",
        "fingerprint": {"combine": code, "group": "g"}, "environment": {"driver": driver},
        "selection": {"cases": list(cases), "quick": quick}, "seconds": 3.0,
        "outcomes": list(outcomes),
        "summary": {**counts, "complete": True},
    }  # fmt: skip


def cases_kept(tmp_path, record: dict, today: dict, *cases: str) -> list[tuple[str, str]]:
    file = tmp_path / "check.json"
    write_json(file, record)
    problems = {
        (name, case, "float32", "balanced") for name in ("combine", "group") for case in cases
    }
    outcomes, seconds = kept(file, today, problems)
    assert seconds == 3
    return [(item.kernel, item.case) for item in outcomes]


def test_what_passed_and_is_still_asked_for_is_kept(tmp_path):
    record = record_of(outcome("a"), outcome("b", status="failed"), outcome("gone"))
    assert cases_kept(tmp_path, record, record_of(), "a", "b", "new") == [("combine", "a")]


def test_one_failed_path_leaves_its_problem_open(tmp_path):
    record = record_of(outcome("a", path="x"), outcome("a", path="y", status="error"), outcome("b"))
    assert cases_kept(tmp_path, record, record_of(), "a", "b") == [("combine", "b")]


def test_a_kernel_that_changed_is_checked_anew(tmp_path):
    record = record_of(outcome("a"), outcome("a", kernel="group"))
    assert cases_kept(tmp_path, record, record_of(code="b"), "a") == [("group", "a")]


@pytest.mark.parametrize(
    ("then", "now"), [("a", "b"), ("a", None), (None, "a")], ids=["changed", "unknown", "unsaid"]
)
def test_what_another_judge_passed_is_checked_anew(tmp_path, then, now):
    record, today = record_of(outcome("a"), outcome("a", kernel="group")), record_of()
    for values, judge in ((record, then), (today, now)):
        values["judge"] = {"group": "g"} | ({} if judge is None else {"combine": judge})
    assert cases_kept(tmp_path, record, today, "a") == [("group", "a")]


@pytest.mark.parametrize(
    ("today", "words"),
    [
        (record_of(seed=1), r"made with --seed 0, and this run has --seed 1: state what it was"),
        (record_of(driver="2"), "it was made with driver 1, and this run has 2"),
        (record_of(cases=["edge"]), "made with no --cases, and this run has --cases edge: state"),
        (record_of(quick=True), "made with no --quick, and this run has --quick: state"),
    ],
)
def test_another_run_is_not_mixed_in(tmp_path, today, words):
    with pytest.raises(ValueError, match=words):
        cases_kept(tmp_path, record_of(outcome("a")), today, "a")


def test_a_record_that_lost_a_part_is_refused(tmp_path):
    file = tmp_path / "check.json"
    file.write_text("{}")
    with pytest.raises(SystemExit, match=r"^--resume: .*check\.json: the record lacks schema"):
        cli.main(["--kernels", "combine", "--device", DEVICE, "--resume", str(file)])
    assert file.read_text() == "{}"


def test_the_command_runs_what_is_open_and_keeps_the_rest(tmp_path):
    file = tmp_path / "record.json"
    words = ["--kernels", "combine", "--cases", "plain", "--device", DEVICE, "--json", str(file)]
    assert cli.main(words) == 0
    whole = json.loads(file.read_text())
    first, second, *others = whole["outcomes"]
    edited = [{**first, "ratio": 0.123}, {**second, "status": "failed", "reason": "made up"}]
    counts = summary_of(Outcome(**values) for values in edited)
    summary = {**whole["summary"], **counts, "complete": False}
    write_json(file, {**whole, "seconds": 100.0, "outcomes": edited, "summary": summary})
    assert cli.main([*words, "--resume", str(file)]) == 0
    after = json.loads(file.read_text())
    assert after["seconds"] > 100
    assert after["summary"]["passed"] == len(whole["outcomes"]) == len(after["outcomes"])
    assert after["outcomes"][0]["ratio"] == 0.123
    found = {json.dumps(item, sort_keys=True) for item in after["outcomes"][1:]}
    assert found == {json.dumps(item, sort_keys=True) for item in (second, *others)}
