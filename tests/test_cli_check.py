"""`python -m verify check` as a user runs it: exit status, table, record."""

import argparse
import ast
import dataclasses
import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import on_the_cpu
from rich.console import Console

import scattermoe_lora
from conftest import DEVICE
from verify import cli
from verify.commands.common import Pulse, check_names
from verify.findings import read
from verify.fuzz import Settings
from verify.records import fingerprint, judges, summary_of
from verify.run import Outcome, Problem
from verify.specs import KERNELS

pytestmark = pytest.mark.correctness

ROOT = Path(__file__).parent.parent
PACKAGE = Path(scattermoe_lora.__path__[0])
SUM = "tl.store(ptrs, acc.to(out.ptr.dtype.element_ty), mask=n < N)"
"""The statement of `combine` that a planted fault changes."""
ARGUMENTS = ["--kernels", "combine", "--cases", "plain", "--device", DEVICE]


def run(tmp_path, *extra: str) -> tuple[int, dict]:
    record = tmp_path / "out" / "check.json"
    status = cli.main([*ARGUMENTS, "--json", str(record), *extra])
    return status, json.loads(record.read_text())


def test_check_is_the_default_and_writes_a_record(tmp_path, capsys):
    status, record = run(tmp_path)
    assert status == 0
    assert "combine" in capsys.readouterr().out
    assert record["command"] == "check"
    assert {"schema", "environment", "seed", "started", "seconds", "fingerprint"} <= set(record)
    assert record["environment"]["torch"] == torch.__version__
    assert set(record["fingerprint"]) == {spec.name for spec in KERNELS}
    assert record["judge"] == judges(KERNELS)
    assert record["summary"]["complete"]
    assert record["summary"]["passed"] == len(record["outcomes"]) > 0
    keys = {"kernel", "path", "plan", "case", "dtype", "status", "ratio", "measure", "where"}
    assert all(keys <= set(outcome) for outcome in record["outcomes"])


def test_selection_by_dtype_and_mode(tmp_path):
    _, record = run(tmp_path, "--full", "--dtypes", "float16", "--modes", "exact")
    assert {(o["dtype"], o["mode"]) for o in record["outcomes"]} == {("float16", "exact")}


def test_a_failure_sets_the_exit_status_and_is_one_line(tmp_path, capsys, monkeypatch):
    judged = Problem._judged

    def broken(self, plan, inputs, expected, outputs, problems):
        outputs = {name: value * 1.01 for name, value in outputs.items()}
        return judged(self, plan, inputs, expected, outputs, problems)

    monkeypatch.setattr(Problem, "_judged", broken)
    status, record = run(tmp_path, "--dtypes", "float32", "--modes", "balanced")
    assert status == 1
    assert record["summary"]["failed"] == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("failed:")]
    assert len(lines) == 1
    for word in ("combine", "plain", "float32", "x its limit", "expert", "row", "got", "want"):
        assert word in lines[0]


def test_a_failure_is_written_and_rerun_by_the_command_it_names(tmp_path):
    """A wrong kernel beside a copy of the package; the command is the one that was printed."""
    (tmp_path / "verify").symlink_to(ROOT / "verify")
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name)
    kernel = tmp_path / PACKAGE.name / "ops" / "rows.py"
    right = kernel.read_text()
    assert right.count(SUM) == 1
    kernel.write_text(right.replace(SUM, SUM.replace("acc", "(acc * 1.25)")))

    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)

    wanted = ["--dtypes", "float32", "--modes", "balanced", "--seed", "3"]
    ran = run(sys.executable, "-m", "verify", *ARGUMENTS, *wanted, "--failures", "failures")
    assert ran.returncode == 1, ran.stderr
    (line,) = [text for text in ran.stdout.splitlines() if text.startswith("failed:")]
    (file,) = (tmp_path / "failures").iterdir()
    _, *command = shlex.split(line.rpartition("; rerun: ")[2])
    assert command[:3] == ["-m", "verify", "replay"]
    assert (tmp_path / command[3]).samefile(file)
    again = run(sys.executable, *command)
    assert again.returncode == 1, again.stdout + again.stderr
    assert "still fails, wrong" in again.stdout
    reason = json.loads(file.read_text())["outcome"]["reason"]
    assert reason in line
    assert again.stdout.count(reason) == 2, "as it was met, and as it fails now"
    kernel.write_text(right)
    mended = run(sys.executable, *command)
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert "passed now" in mended.stdout


def test_failures_are_written_beside_the_record(tmp_path, monkeypatch):
    def raises(lib, inputs, plan):
        raise RuntimeError("nothing works")

    combine = next(spec for spec in KERNELS if spec.name == "combine")
    monkeypatch.setattr("verify.specs.KERNELS", (dataclasses.replace(combine, run=raises),))
    _, record = run(tmp_path)
    files = sorted((tmp_path / "out" / "failures").iterdir())
    assert len(files) == len(record["outcomes"]) > 1
    met = {(f.draw.dtype, f.draw.mode) for f in map(read, files)}
    assert met == {(o["dtype"], o["mode"]) for o in record["outcomes"]}


def test_what_passes_writes_no_failure(tmp_path):
    run(tmp_path)
    assert not (tmp_path / "out" / "failures").exists()


def test_an_error_in_a_kernel_is_an_outcome(tmp_path, monkeypatch):
    def raises(lib, inputs, plan):
        raise RuntimeError("out of\n memory")

    problem = next(spec for spec in KERNELS if spec.name == "combine")
    broken = dataclasses.replace(problem, run=raises)
    monkeypatch.setattr("verify.specs.KERNELS", (broken,))
    status, record = run(tmp_path)
    assert status == 1
    assert {outcome["status"] for outcome in record["outcomes"]} == {"error"}
    assert record["outcomes"][0]["reason"] == "RuntimeError: out of memory"


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (("fuzz", "--seconds", "0"), "--seconds: 0 is not above 0"),
        (("fuzz", "--minutes", "-5"), "--minutes: -5 is not above 0"),
        (("fuzz", "--workers", "0"), "--workers: 0 is not at least 1"),
        (("calibrate", "--groups", "0"), "--groups: 0 is not at least 1"),
        (("gate", "--processes", "-1"), "--processes: -1 is not at least 1"),
        (("check", "--workers", "1.5"), "--workers: invalid count value: '1.5'"),
        (("tune", "--rounds", "0"), "--rounds: 0 is not at least 1"),
        (("tune", "--jobs", "-1"), "--jobs: -1 is below 0"),
        (("fuzz", "--seconds", "1", "--sanitize", "-1"), "--sanitize: -1 is below 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_amount_of_nothing_is_refused(capsys, words, refusal):
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    assert ended.value.code == 2
    assert refusal in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_command_has_no_option_that_it_does_not_use(command):
    module = importlib.import_module(f"verify.commands.{command}")
    parser = argparse.ArgumentParser(add_help=False)
    module.add_arguments(parser)
    read = {
        node.attr
        for node in ast.walk(ast.parse(Path(module.__file__).read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "arguments"
    }
    assert {action.dest for action in parser._actions} == read


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("compile", "--device"),
        ("compile", "--seed"),
        ("doctor", "--seed"),
        ("records", "--device"),
        ("records", "--seed"),
        ("replay", "--seed"),
        ("report", "--device"),
        ("report", "--seed"),
        ("sanitize", "--seed"),
        ("tune", "--seed"),
    ],
)
def test_what_decides_nothing_is_no_option(capsys, command, option):
    words = [command, *(["file.json"] if command == "replay" else []), f"{option}=1"]
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert f"unrecognized arguments: {option}=1" in capsys.readouterr().err


def test_a_time_is_given_in_one_unit(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["fuzz", "--seconds", "5", "--minutes", "1"])
    assert ended.value.code == 2
    assert "--minutes: not allowed with argument --seconds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        ("bench --resume", "--resume keeps what --json FILE has, and there is no --json"),
        ("sanitize --resume", "--resume keeps what --json FILE has, and there is no --json"),
        ("bench --list --seed 3 --quick", "--list makes no use of --seed 3, --quick"),
        ("bench --list --no-peers", "--list makes no use of --no-peers"),
        (
            "compile --parts footprint --operations combine group --full",
            "--parts footprint makes no use of --operations combine,group, --full",
        ),
        (
            "compile --operations combine --footprint a.json",
            "compiling kernels alone makes no use of --footprint a.json",
        ),
        (
            "compile --no-baseline --baseline a.json",
            "--no-baseline makes no use of --baseline a.json",
        ),
        ("gate --list --against main", "--list makes no use of --against main"),
        ("gate --rates a.json --plant 5", "--rates makes no use of --plant 5.0"),
        (
            "gate --write-slow-tree a --plant 5 --names b",
            "--write-slow-tree makes no use of --names b",
        ),
        ("gate --against main --draws 5", "what computes no --rates makes no use of --draws 5"),
        (
            "gate --calibrate --accept launches",
            "--calibrate makes no use of --accept launches",
        ),
        ("mutants --full --seed 3", "--full makes no use of --seed 3"),
        ("mutants --full --per-kernel 2", "--full makes no use of --per-kernel 2"),
        (
            "qualify --stages check,fuzz --tune-minutes 3",
            "--stages check,fuzz makes no use of --tune-minutes 3.0",
        ),
    ],
    ids=str,
)
def test_an_option_that_would_do_nothing_is_refused(tmp_path, monkeypatch, words, refusal):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^{re.escape(refusal)}$"):
        cli.main(words.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (("--seed", "4"), "seed 3, and 4"),
        (("--kernels", "group"), "kernels combine, and group"),
        (("--tree", "/"), "tree of this package, and /"),
        (("--device", DEVICE), "devices cuda:7, and (cpu|cuda:)"),
    ],
)
def test_a_campaign_that_is_resumed_stays_what_it_is(tmp_path, words, difference):
    file = tmp_path / "campaign.json"
    settings = Settings(devices=("cuda:7",), seed=3, kernels=("combine",))
    file.write_text(json.dumps(dataclasses.asdict(settings)))
    before = file.read_text()
    with pytest.raises(SystemExit, match=f"^--resume: the campaign .* has {difference}.* asked"):
        cli.main(["fuzz", "--seconds", "1", "--resume", str(tmp_path), *words])
    assert [found.name for found in tmp_path.iterdir()] == [file.name]
    assert file.read_text() == before


def test_how_a_campaign_is_run_may_change_where_it_is_resumed(tmp_path, monkeypatch):
    class StartedError(Exception):
        pass

    def start(directory, settings, kernels):
        raise StartedError(settings)

    monkeypatch.setattr("verify.fuzz.Campaign", start)
    settings = Settings(devices=("cuda:7",), seed=3, kernels=("combine",), patience=5.0)
    (tmp_path / "campaign.json").write_text(json.dumps(dataclasses.asdict(settings)))

    def resumed(*words: str) -> Settings:
        with pytest.raises(StartedError) as started:
            cli.main(["fuzz", "--seconds", "1", "--resume", str(tmp_path), *words])
        return started.value.args[0]

    assert resumed() == settings
    assert resumed("--seed", "3", "--kernels", "combine") == settings
    changed = resumed("--workers", "2", "--patience", "7", "--shrink-seconds", "9")
    assert changed == dataclasses.replace(settings, workers=2, patience=7.0, shrink_seconds=9.0)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(SystemExit, match=r"nonsense is none of .*scatter2scatter"):
        cli.main(["--kernels", "nonsense", "--device", DEVICE])


@pytest.mark.parametrize("option", [("--paths", "nonsense"), ("--modes", "lora-only")])
def test_nothing_selected_is_no_success_and_leaves_records_alone(tmp_path, capsys, option):
    file = tmp_path / "check.json"
    file.write_text("{}")
    with pytest.raises(SystemExit, match="nothing was selected"):
        cli.main([*ARGUMENTS, "--json", str(file), *option])
    assert file.read_text() == "{}"
    assert "passed" not in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device that is asked for is there")
@pytest.mark.parametrize("command", ["check", "doctor", "fuzz", "replay", "tune"])
@pytest.mark.parametrize("device", ["cuda", "nonsense"])
def test_a_device_that_is_not_there_is_refused_in_a_sentence(tmp_path, command, device):
    words = [command, "--device", device, "--json", str(tmp_path / "record.json")]
    with pytest.raises(SystemExit, match=f"^--device: device '{device}' was asked for"):
        cli.main([*words, *(["file.json"] if command == "replay" else [])])
    assert not list(tmp_path.iterdir())


def test_summary_counts_every_status():
    statuses = ("passed", "failed", "error", "unavailable", "passed")
    blank = dict.fromkeys(("kernel", "path", "plan", "case", "dtype", "mode"), "")
    counted = summary_of(Outcome(**blank, status=status) for status in statuses)
    assert counted == {"passed": 2, "failed": 1, "errors": 1, "unavailable": 1, "total": 5}


def test_fingerprint_sees_code_and_imports_but_no_docstrings(tmp_path):
    package = tmp_path / "package"
    (package / "ops").mkdir(parents=True)
    (package / "base.py").write_text("VALUE = 1\n")
    kernel = package / "ops" / "kernel.py"
    kernel.write_text('"""Old words."""\nfrom ..base import VALUE\n')
    before = fingerprint(package, "ops/kernel.py")
    kernel.write_text('"""New words."""\nfrom ..base import VALUE  # comment\n')
    assert fingerprint(package, "ops/kernel.py") == before
    (package / "base.py").write_text("VALUE = 2\n")
    assert fingerprint(package, "ops/kernel.py") != before


def test_names_of_dtypes_may_be_short(tmp_path):
    words = ["--kernels", "combine", "--cases", "smoke", "--device", "cpu", "--json"]
    for names in ("bf16,fp32", "bfloat16,float32"):
        on_the_cpu([*words, str(tmp_path / names), "--dtypes", names])
    short, long = (json.loads(path.read_text()) for path in sorted(tmp_path.iterdir()))
    assert short["selection"]["dtypes"] == long["selection"]["dtypes"] == ["bfloat16", "float32"]


def test_of_many_names_the_nearest_are_listed():
    known = ["smoke", *(f"case-{number}" for number in range(200))]
    with pytest.raises(SystemExit, match=r"^--cases: smok is none of 201 names; near it: smoke$"):
        check_names("cases", ["smok"], known)
    with pytest.raises(SystemExit, match=r"^--cases: \? is none of 201 names$"):
        check_names("cases", ["?"], known)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_long_run_says_how_far_it_is_where_nobody_sees_a_bar(terminal):
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal)
    late, early = Pulse(console, seconds=0.0), Pulse(console, seconds=60.0)
    for done in (1, 2):
        late(f"{done} of [2]")
        early("too early")
    assert text.getvalue() == ("" if terminal else "1 of [2]\n2 of [2]\n")


def test_what_a_resumed_check_takes_over_is_told(tmp_path, capsys):
    file = tmp_path / "out" / "check.json"
    _, record = run(tmp_path, "--resume", str(file))
    words = " ".join(capsys.readouterr().err.split())
    assert f"there is no {file} to go on with: everything is checked" in words
    count = len({tuple(o[k] for k in ("case", "dtype", "mode")) for o in record["outcomes"]})
    run(tmp_path, "--resume", str(file))
    words = " ".join(capsys.readouterr().err.split())
    assert f"{count} of {count} problems are taken over from {file}" in words


@pytest.mark.parametrize("named", [False, True])
def test_an_interrupted_check_says_how_to_go_on(tmp_path, monkeypatch, capsys, named):
    def interrupted(problems, selection, *, workers):
        yield problems[0], list(problems[0].check(selection.wants))
        raise KeyboardInterrupt

    monkeypatch.setattr("verify.parallel.checked", interrupted)
    file = tmp_path / "check.json"
    words = ["--kernels", "combine", "--device", DEVICE, *(["--json", str(file)] if named else [])]
    assert cli.main(words) == 130
    told = capsys.readouterr().err
    if named:
        assert f"--resume {file} go on" in told
        assert not json.loads(file.read_text())["summary"]["complete"]
    else:
        assert "with --json FILE, --resume FILE goes on" in told
