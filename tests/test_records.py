"""`verify records`: a good record passes, and each way to break one is seen."""

import copy
import json
from datetime import UTC, datetime, timedelta

import pytest
import torch
from commands import on_the_cpu
from sample_records import MACHINE, head, outcome

import scattermoe_lora
from verify.qualify import STAGES
from verify.record_check import Sources, inspect
from verify.records import selection_of, summary_of
from verify.run import Outcome, Selection, dtype_name
from verify.specs import KERNELS

pytestmark = pytest.mark.correctness

GPU = "nvidia-h100-80gb-hbm3"
NOW = datetime(2026, 11, 4, 10, tzinfo=UTC)


@pytest.fixture(scope="module")
def sources():
    return Sources.of(scattermoe_lora, KERNELS)


def counted(record):
    """The record with a summary of its outcomes."""
    counts = summary_of(Outcome(**item) for item in record["outcomes"])
    return {**record, "summary": {**counts, "complete": True}}


def made(sources, selection):
    """A good record of a selection."""
    problems = selection.problems(scattermoe_lora, KERNELS, torch.device("cuda"))
    outcomes = [
        outcome(item.spec.name, dtype_name(item.dtype), case=item.case.name, mode=item.mode)
        for item in problems
    ]
    more = {"summary": {}, "selection": selection_of(selection), "outcomes": outcomes}
    hashes = {"fingerprint": dict(sources.fingerprint), "judge": dict(sources.judge)}
    return counted(head("check", **more) | hashes)


@pytest.fixture(scope="module")
def whole(sources):
    return made(sources, Selection(quick=False))


OTHER = "check-model.json"


@pytest.fixture
def small(sources):
    """A good record of one kernel, to be broken."""
    return made(sources, Selection(kernels=("combine",), cases=("smoke",), quick=False))


@pytest.fixture
def judged(tmp_path, sources):
    """Writes records (file name -> values or text) of a GPU and judges them."""

    def judge(records, *, release=False, gpu=GPU):
        (tmp_path / gpu).mkdir()
        for name, values in records.items():
            text = values if isinstance(values, str) else json.dumps(values)
            (tmp_path / gpu / name).write_text(text)
        return inspect(tmp_path, sources, release=release, now=NOW)

    return judge


def split(verdicts):
    """Those of `check`, and the others."""
    mine = [verdict for verdict in verdicts if verdict.record.endswith("/check.json")]
    return mine, [verdict for verdict in verdicts if verdict not in mine]


@pytest.mark.parametrize("release", [False, True])
def test_a_whole_and_fresh_record_is_good(judged, whole, release):
    verdicts = judged({"check.json": whole}, release=release)
    (verdict,), others = split(verdicts)
    assert {(other.state, other.fault) for other in others} <= {("missing", True)}
    assert len(others) == (5 if release else 0)
    assert (verdict.state, verdict.fault, verdict.reason) == ("good", False, "")
    assert verdict.age == "3 d"
    assert verdict.refresh.startswith("python -m verify check --full --device cuda --json ")
    assert verdict.refresh.endswith(f"{GPU}/check.json")


def test_a_selection_is_good_until_a_release(judged, small, tmp_path, sources):
    [verdict] = judged({"check.json": small})
    assert (verdict.state, verdict.fault) == ("good", False)
    assert "kernels, cases" in verdict.reason
    (verdict,), _ = split(inspect(tmp_path, sources, release=True, now=NOW))
    assert (verdict.state, verdict.fault) == ("incomplete", True)


def without(*path):
    def change(record):
        for key in path[:-1]:
            record = record[key]
        del record[path[-1]]

    return change


def put(value, *path):
    def change(record):
        for key in path[:-1]:
            record = record[key]
        record[path[-1]] = value

    return change


HEAD = ("schema", "command", "environment", "seed", "started", "seconds", "fingerprint", "summary")
MALFORMED = {
    **{f"no {key}": without(key) for key in (*HEAD, "outcomes", "selection")},
    **{f"null {key}": put(None, key) for key in (*HEAD, "outcomes", "selection")},
    **{f"outcome without {key}": without("outcomes", 0, key) for key in outcome("", "")},
    "another schema": put(2, "schema"),
    "schema is a truth value": put(json.loads("true"), "schema"),
    "another command": put("bench", "command"),
    "no time": put("yesterday", "started"),
    "no time zone": put("2026-11-01T10:00:00", "started"),
    "made by the interpreter": put({**MACHINE, "interpreted": True}, "environment"),
    "made on another GPU": put({**MACHINE, "device": "NVIDIA L4"}, "environment"),
    "an outcome is no object": put("passed", "outcomes", 0),
    "an unknown status": put("fine", "outcomes", 0, "status"),
    "unavailable without a reason": put("unavailable", "outcomes", 0, "status"),
    "a number for a name": put(3, "outcomes", 0, "kernel"),
    "a key that no outcome has": put(1, "outcomes", 0, "colour"),
    "an outcome is there twice": lambda r: r["outcomes"].append(r["outcomes"][0]),
    "summary counts more": put(10**6, "summary", "passed"),
    "summary lacks a count": without("summary", "errors"),
    "summary without complete": without("summary", "complete"),
    "selection without quick": without("selection", "quick"),
    "selection of more": put([], "selection", "plans"),
    "kernels are no list": put("combine", "selection", "kernels"),
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)
def test_malformed(judged, small, change):
    broken = copy.deepcopy(small)
    change(broken)
    [verdict] = judged({"check.json": broken})
    assert (verdict.state, verdict.fault) == ("malformed", True)
    assert verdict.reason


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
def test_what_is_no_record_is_malformed(judged, text):
    [verdict] = judged({"check.json": text})
    assert (verdict.state, verdict.fault) == ("malformed", True)


@pytest.mark.parametrize("status", ["failed", "error"])
def test_a_failure_counts(judged, small, status):
    small["outcomes"][1] |= {"status": status, "reason": "wrong"}
    [verdict] = judged({"check.json": counted(small)})
    assert (verdict.state, verdict.fault) == ("failed", True)
    assert "combine" in verdict.reason


def test_unavailable_with_a_reason_is_good(judged, small):
    small["outcomes"][1] |= {"status": "unavailable", "reason": "no tensor maps"}
    [verdict] = judged({"check.json": counted(small)})
    assert verdict.state == "good"


def interrupted(record):
    record["summary"]["complete"] = False
    return record


def one_less(record):
    del record["outcomes"][3]
    return counted(record)


def one_more(record):
    record["outcomes"][3] |= {"case": "a case of old"}
    return counted(record)


def nothing(record):
    record["outcomes"] = []
    record["selection"]["kernels"] = ["nobody"]
    return counted(record)


def wider(record):
    record["selection"]["kernels"] = []
    return record


@pytest.mark.parametrize("change", [interrupted, one_less, one_more, nothing, wider])
def test_incomplete(judged, small, change):
    [verdict] = judged({"check.json": change(small)})
    assert (verdict.state, verdict.fault) == ("incomplete", True)


@pytest.mark.parametrize("change", [lambda record: record, interrupted])
def test_another_check_is_judged_alike_and_refreshed_with_its_selection(judged, small, change):
    record = change(small)
    found = {
        v.record.rpartition("/")[2]: v for v in judged(dict.fromkeys(("check.json", OTHER), record))
    }
    own, other = found["check.json"], found[OTHER]
    assert (own.state, own.reason) == (other.state, other.reason)
    assert not other.fault
    assert "check --full --kernels combine --cases smoke --device cuda" in other.refresh


def test_one_problem_missing_of_all_is_named(judged, whole):
    short = {**whole, "outcomes": whole["outcomes"][1:]}
    gone = whole["outcomes"][0]
    [verdict] = judged({"check.json": counted(short)})
    assert verdict.state == "incomplete"
    assert f"1 missing: {gone['kernel']} {gone['case']} {gone['dtype']}" in verdict.reason


@pytest.mark.parametrize(
    "change",
    [
        put("0123456789abcdef", "fingerprint", "combine"),
        without("fingerprint", "combine"),
    ],
    ids=["changed", "new"],
)
def test_stale(judged, small, change):
    change(small)
    [verdict] = judged({"check.json": small})
    assert (verdict.state, verdict.fault) == ("stale", True)
    assert "1 of 1 kernels changed since: combine" in verdict.reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("0123456789abcdef", "judge", "combine"), "the judge has changed since, of combine"),
        (without("judge"), "it does not say which judge it had"),
        (put("0123456789abcdef", "judge", "group"), ""),
    ],
    ids=["changed", "unknown", "of another kernel"],
)
def test_an_older_judge_is_named_and_counts_for_a_release(
    judged, small, change, words, tmp_path, sources
):
    change(small)
    [verdict] = judged({"check.json": small})
    assert (verdict.state, verdict.fault) == ("good", False)
    assert verdict.reason.endswith(words or "kernels, cases")
    (verdict,), _ = split(inspect(tmp_path, sources, release=True, now=NOW))
    assert verdict.state == ("stale" if words else "incomplete")


def test_what_judges_a_kernel_is_its_entry_and_the_comparing(sources):
    assert set(sources.judge) == set(sources.fingerprint)
    assert sources.judge["combine"] == sources.judge["group"]
    assert len(set(sources.judge.values())) > 3


@pytest.mark.parametrize(
    "change",
    [
        put("0123456789abcdef", "fingerprint", "group"),
        put("0123456789abcdef", "fingerprint", "a_kernel_of_old"),
        without("fingerprint", "group"),
    ],
    ids=["changed", "gone", "new"],
)
def test_a_kernel_that_was_not_selected_makes_nothing_stale(judged, small, change):
    change(small)
    [verdict] = judged({"check.json": small})
    assert (verdict.state, verdict.fault) == ("good", False)


def test_missing(judged, tmp_path, sources, small):
    for directory in (tmp_path, tmp_path / "nowhere"):
        [verdict] = inspect(directory, sources)
        assert (verdict.state, verdict.fault, verdict.age) == ("missing", True, "-")
    (tmp_path / "nvidia-l4").mkdir()
    states = {verdict.record: verdict.state for verdict in judged({"check.json": small})}
    assert states == {f"{GPU}/check.json": "good", "nvidia-l4/check.json": "missing"}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (put("0123456789abcdef", "fingerprint", "combine"), False),
        (put([], "selection", "kernels"), False),
        (put(2, "schema"), True),
    ],
    ids=["stale", "incomplete", "malformed"],
)
def test_one_gpu_with_a_good_check_suffices_until_a_release(
    judged, small, tmp_path, sources, change, fault
):
    other = copy.deepcopy(small)
    other["environment"]["device"] = "NVIDIA L4"
    change(other)
    alone = judged({"check.json": other}, gpu="nvidia-l4")
    assert [verdict.fault for verdict in alone] == [True]
    beside = {v.record: v.fault for v in judged({"check.json": small})}
    assert beside == {f"{GPU}/check.json": False, "nvidia-l4/check.json": fault}
    released = inspect(tmp_path, sources, release=True, now=NOW)
    assert {verdict.fault for verdict in released} == {True}


def test_other_records_are_demanded_only_for_a_release(judged, whole, tmp_path, sources):
    today = dict(sources.fingerprint)
    others = {
        **{
            f"{name}.json": head(name, summary={}) | {"fingerprint": today}
            for name in ("bench", "gate", "sanitize")
        },
        "gate-samples.json": head("gate-samples", summary={}, rates={}) | {"fingerprint": today},
        "mutants.json": head("mutants", summary={"complete": True}),
        "train.json": head("train", summary={"complete": False}) | {"fingerprint": today},
        "compile-3.6.0.json": head("compile", summary={}) | {"fingerprint": {}},
    }
    wanted = {"bench": "good", "gate": "good", "sanitize": "good", "gate-samples": "incomplete"}
    wanted |= {"mutants": "stale", "train": "incomplete", "compile-3.6.0": "good"}
    for release in (False, True):
        if release:
            verdicts = inspect(tmp_path, sources, release=True, now=NOW)
        else:
            verdicts = judged({"check.json": whole, **others})
        found = {v.record: (v.state, v.fault) for v in verdicts if "check" not in v.record}
        assert found == {
            f"{GPU}/{name}.json": (state, release and state != "good")
            for name, state in wanted.items()
        }
        assert all(verdict.days == timedelta(days=3).days for verdict in verdicts)


@pytest.mark.parametrize("lacking", [(), ("bench",), ("check", "tune")])
def test_a_qualification_without_a_stage_is_not_whole(judged, small, sources, lacking):
    stages = [{"name": name, "status": "passed"} for name in STAGES if name not in lacking]
    record = head("qualify", summary={"complete": True, "failed": 0}, stages=stages)
    record["fingerprint"] = dict(sources.fingerprint)
    verdicts = judged({"check.json": small, "qualify.json": record})
    _, (verdict,) = split(verdicts)
    assert verdict.state == ("incomplete" if lacking else "good")
    assert verdict.reason == (f"not run: {', '.join(lacking)}" if lacking else "")
    assert not verdict.fault


def test_a_release_names_the_records_that_it_lacks(judged, whole):
    verdicts = judged({"check.json": whole}, release=True)
    missing = {v.record.rpartition("/")[2]: v.refresh for v in verdicts if v.state == "missing"}
    assert set(missing) == {
        *("bench.json", "gate.json", "gate-samples.json", "mutants.json", "sanitize.json"),
    }
    assert "verify mutants --full --device cuda --json" in missing["mutants.json"]
    assert "verify gate --calibrate --device cuda --json" in missing["gate-samples.json"]


@pytest.mark.parametrize(
    ("command", "counts"),
    [
        ("bench", {"measured": 134, "failed": 1}),
        ("sanitize", {"passed": 9, "failed": 0, "errors": 2}),
        ("mutants", {"killed": 166, "survived": 1}),
        ("fuzz", {"cases": 6000, "findings": 1}),
        ("calibrate", {"groups": 100_000, "alarms": 1}),
        ("tune", {"tuned": 47, "wrong": 1}),
    ],
)
@pytest.mark.parametrize("release", [False, True])
def test_a_failure_of_another_command_fails_a_release(
    judged, whole, tmp_path, sources, command, counts, release
):
    values = head(command, summary=counts) | {"fingerprint": dict(sources.fingerprint)}
    name = f"{command}.json"
    verdicts = judged({"check.json": whole, name: values}, release=release)
    (found,) = [v for v in verdicts if v.record.endswith(f"/{name}")]
    assert (found.state, found.fault) == ("failed", release)
    first, *_ = counts
    values["summary"] = dict.fromkeys(counts, 0) | {first: counts[first]}
    (tmp_path / GPU / name).write_text(json.dumps(values))
    verdicts = inspect(tmp_path, sources, release=release, now=NOW)
    (found,) = [v for v in verdicts if v.record.endswith(f"/{name}")]
    assert (found.state, found.fault) == ("good", False)


def test_other_records_are_well_formed(judged, whole):
    bad = head("fuzz", summary={})
    del bad["environment"]
    verdicts = judged({"check.json": whole, "fuzz.json": bad})
    assert {v.record: (v.state, v.fault) for v in verdicts} == {
        f"{GPU}/check.json": ("good", False),
        f"{GPU}/fuzz.json": ("malformed", True),
    }


def test_the_command(tmp_path, judged, whole, capsys):
    record, words = tmp_path / "out.json", ["records", "--directory", str(tmp_path)]
    assert on_the_cpu(words) == 1
    assert "no GPU has records" in capsys.readouterr().out
    judged({"check.json": whole, "bench.json": head("bench", summary={})})
    assert on_the_cpu([*words, "--json", str(record)]) == 0
    assert "stale" in capsys.readouterr().out
    listed = json.loads(record.read_text())["records"]
    assert [item["state"] for item in listed] == ["stale", "good"]
    assert on_the_cpu([*words, "--release"]) == 1
