"""Stages: which there are, what is run again, what is said of a GPU."""

import argparse
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from verify.commands.qualify import too_large
from verify.qualify import (
    STAGES,
    Budget,
    Qualification,
    Result,
    Stage,
    run_stage,
    shortcomings,
    stages_of,
)

ROOT = Path(__file__).parent.parent
COMMANDS = ("doctor", "compile", "check", "fuzz", "sanitize", "tune", "bench", "report")


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Names of the stages that were run; all pass, and none does anything."""
    names: list[str] = []

    def passed(stage: Stage) -> Result:
        names.append(stage.name)
        return Result(name=stage.name, status="passed", words=stage.words)

    monkeypatch.setattr("verify.qualify.run_stage", passed)
    return names


@pytest.mark.correctness
def test_stages_are_the_commands_that_exist_in_order(tmp_path):
    made = stages_of(tmp_path, device="cuda", known=COMMANDS, budget=Budget(fuzz=2.5), seed=3)
    assert [stage.name for stage in made] == list(STAGES)
    fuzz = next(stage for stage in made if stage.name == "fuzz")
    assert fuzz.words[fuzz.words.index("--minutes") + 1] == "2.5"
    fewer = stages_of(tmp_path, device="cuda", known=("check", "fuzz"), budget=Budget(), seed=0)
    assert [stage.name for stage in fewer] == ["check", "check-plans", "fuzz"]


@pytest.mark.correctness
@pytest.mark.parametrize("architecture", [90, None])
def test_every_plan_is_compiled_where_the_architecture_is_known(tmp_path, architecture):
    made = stages_of(
        *(tmp_path,), device="cuda", known=COMMANDS, budget=Budget(), seed=0,
        architecture=architecture,
    )  # fmt: skip
    words = next(stage for stage in made if stage.name == "compile").words
    assert ("--full" in words) == (architecture is not None)
    assert str(architecture) in words or architecture is None


@pytest.mark.correctness
def test_every_stage_is_a_command_line_that_verify_reads(tmp_path):
    made = stages_of(
        *(tmp_path,), device="cpu", known=COMMANDS, budget=Budget(), seed=3, architecture=90
    )
    for stage in made:
        parser = argparse.ArgumentParser(exit_on_error=False)
        importlib.import_module(f"verify.commands.{stage.words[0]}").add_arguments(parser)
        parsed = parser.parse_args(stage.words[1:])
        assert parsed.json == tmp_path / f"{stage.name}.json"


@pytest.mark.correctness
@pytest.mark.parametrize(
    ("capability", "memory", "limit", "words"),
    [
        ("7.5", 64, None, "no bf16 tensor cores"),
        ("8.6", 99, None, "99 KB of shared memory"),
        ("8.6", 99, None, "no tensor maps"),
        ("9.0", 227, 99, "99 KB of shared memory"),
        ("8.0", 163, None, "fp8"),
    ],
)
def test_what_a_gpu_cannot_do_is_said(capability, memory, limit, words):
    facts = {"capability": capability, "shared_memory": memory * 1024}
    found = shortcomings(facts, shared_memory=limit and limit * 1024)
    assert any(words in sentence for sentence in found)
    assert shortcomings({"capability": "9.0", "shared_memory": 227 * 1024}) == []


@pytest.mark.correctness
@pytest.mark.parametrize("kilobytes", [99, 163, 227])
def test_every_plan_fits_the_shared_memory_of_a_small_gpu(kilobytes):
    assert too_large(kilobytes * 1024, (8, 6)) == []
    found = too_large(1024, (8, 6))
    assert len(found) > 1
    for sentence in found:
        assert re.search(r"offered Tile\(.*needs (\d+) bytes.*a block has 1024$", sentence)


def test_stages_that_passed_are_not_run_again(tmp_path):
    ran = []

    def qualification(environment: str) -> Qualification:
        stages = (
            Stage(name="doctor", words=("doctor", "--json", str(tmp_path / "doctor.json")),
                  purpose="", accepted=(0, 1)),
            Stage(name="check", words=("check", "--kernels", "nonsense"), purpose=""),
        )  # fmt: skip
        facts = {"device": environment, "platform": f"release {len(ran)}"}
        made = Qualification(tmp_path, stages, facts, ["slow"], ["tune"])
        made.resume()
        made.run(lambda stage: ran.append(stage.name))
        return made

    first = qualification("a")
    assert ran == ["doctor", "check"]
    assert [result.status for result in first.results.values()] == ["passed", "failed"]
    record = json.loads(first.file.read_text())
    assert record["summary"] == {
        "passed": 1, "failed": 1, "unavailable": 0, "waiting": 0, "complete": True,
    }  # fmt: skip
    assert (record["cannot"], record["commands_missing"]) == (["slow"], ["tune"])
    assert "nonsense is none of" in record["stages"][1]["tail"]
    assert record["records"]["doctor"]["command"] == "doctor"
    qualification("a")
    assert ran == ["doctor", "check", "check"]
    qualification("b")
    assert ran[3:] == ["doctor", "check"]


@pytest.mark.correctness
def test_stages_of_which_more_is_asked_now_are_run_again(tmp_path, monkeypatch, ran):
    def again(*, seed: int = 0, tune: float = 8.0, place: Path = tmp_path / "one") -> list[str]:
        ran.clear()
        stages = stages_of(place, device="cpu", known=COMMANDS, budget=Budget(tune=tune), seed=seed)
        made = Qualification(place, stages, {}, seed=seed)
        made.resume()
        made.run(lambda stage: None)
        assert json.loads(made.file.read_text())["seed"] == seed
        return list(ran)

    monkeypatch.setattr("verify.qualify.time.strftime", lambda *words: f"another {len(ran)}")
    assert again() == list(STAGES)
    assert again() == []
    assert again(tune=9.0) == ["tune"]
    assert again(tune=9.0, seed=3) == ["check", "check-plans", "fuzz", "bench"]
    (tmp_path / "one").rename(tmp_path / "other")
    assert again(tune=9.0, seed=3, place=tmp_path / "other") == []
    assert str(tmp_path) not in (tmp_path / "other" / "qualify.json").read_text()


@pytest.mark.correctness
@pytest.mark.parametrize(
    ("code", "complete", "status"),
    [(0, False, "waiting"), (2, False, "waiting"), (1, False, "failed"), (0, True, "passed")],
)
def test_a_stage_whose_time_was_over_goes_on_when_it_is_run_again(
    tmp_path, monkeypatch, code, complete, status
):
    stages = (Stage(name="bench", words=("bench",), purpose=""),)

    def ended(stage: Stage) -> Result:
        record = {"summary": {"complete": complete}}
        (tmp_path / f"{stage.name}.json").write_text(json.dumps(record))
        status = "failed" if code else "passed"
        return Result(name=stage.name, status=status, code=code, words=stage.words)

    monkeypatch.setattr("verify.qualify.run_stage", ended)
    first = Qualification(tmp_path, stages, {})
    first.run(lambda stage: None)
    assert first.results["bench"].status == status
    assert json.loads(first.file.read_text())["summary"][status] == 1
    again = Qualification(tmp_path, stages, {})
    again.resume()
    assert set(again.results) == ({"bench"} if status == "passed" else set())


@pytest.mark.correctness
def test_a_record_of_some_stages_says_that_the_others_wait(tmp_path, ran):
    """Whatever is asked of those: what passed stays, and what is new waits."""

    def some(*only: str, minutes: str) -> dict[str, object]:
        stages = (
            Stage(name="doctor", words=("doctor",), purpose=""),
            Stage(name="fuzz", words=("fuzz", "--minutes", minutes), purpose=""),
        )
        made = Qualification(tmp_path, stages, {}, only=only)
        made.resume()
        made.run(lambda stage: None)
        return json.loads(made.file.read_text())["summary"]

    found = some("fuzz", minutes="1")
    assert (found["passed"], found["waiting"], found["complete"]) == (1, 1, False)
    found = some("doctor", minutes="5")
    assert (found["passed"], found["waiting"], found["complete"]) == (2, 0, True)
    assert ran == ["fuzz", "doctor"]
    some(minutes="5")
    assert ran == ["fuzz", "doctor", "fuzz"]


@pytest.mark.correctness
def test_an_interrupted_run_keeps_the_stages_before(tmp_path, monkeypatch):
    ran: list[str] = []

    def ended(stage: Stage) -> Result:
        ran.append(stage.name)
        if ran == ["doctor", "check"]:
            raise KeyboardInterrupt
        return Result(name=stage.name, status="passed", words=stage.words)

    def qualification() -> Qualification:
        names = ("doctor", "check", "fuzz")
        stages = tuple(Stage(name=name, words=(name,), purpose="") for name in names)
        made = Qualification(tmp_path, stages, {})
        made.resume()
        return made

    monkeypatch.setattr("verify.qualify.run_stage", ended)
    with pytest.raises(KeyboardInterrupt):
        qualification().run(lambda stage: None)
    record = json.loads((tmp_path / "qualify.json").read_text())
    assert not record["summary"]["complete"]
    assert (record["summary"]["passed"], record["summary"]["waiting"]) == (1, 2)
    qualification().run(lambda stage: None)
    assert ran == ["doctor", "check", "check", "fuzz"]


def test_a_stage_that_cannot_be_run_here_is_no_failure():
    words = ("sanitize", "--device", "cpu", "--kernels", "glu_forward")
    result = run_stage(Stage(name="sanitize", words=words, purpose="", unavailable=(2,)))
    assert result.status == "unavailable"
    assert "there is none" in result.tail


def test_the_command_says_what_it_wrote(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "verify", "qualify", "--device", "cpu", "--stages", "doctor",
         "--directory", str(tmp_path), "--shared-memory", str(99 * 1024),
         "--seed", "2", "--json", str(tmp_path / "copy.json")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    record = json.loads((tmp_path / "qualify.json").read_text())
    assert json.loads((tmp_path / "copy.json").read_text()) == record
    assert record["seed"] == 2
    assert ran.returncode == record["summary"]["failed"]
    assert record["summary"]["waiting"] == len(record["stages"]) - 1
    assert not record["summary"]["complete"]
    assert "more to do: compile, check" in ran.stdout
    assert str(tmp_path / "qualify.json") in ran.stdout
    assert "no GPU" in ran.stdout
