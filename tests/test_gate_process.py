"""Revisions of the package that the gate compares, and what its processes do when they die."""

import subprocess
import sys
from pathlib import Path

import pytest
from virtual_device import cases

import scattermoe_lora
from verify.gate_plant import slow_tree
from verify.gate_process import Trees, digest, tree_of

pytestmark = pytest.mark.correctness

PACKAGE = Path(scattermoe_lora.__path__[0])
SIX = cases(6)
NAME = SIX[2].name


def test_a_revision_is_a_directory_or_what_git_knows(tmp_path):
    repository = tmp_path / "repository"
    (repository / "thing").mkdir(parents=True)
    (repository / "thing" / "__init__.py").write_text("A = 1\n")
    run = ["git", "-C", str(repository), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*run, *words], check=True)
    found = {
        against: tree_of(against, repository, tmp_path / str(place), package="thing")
        for place, against in enumerate([str(repository), str(repository / "thing"), "HEAD"])
    }
    assert len({digest(tree) for tree in found.values()}) == 1
    (repository / "thing" / "__init__.py").write_text("A = 2\n")
    again = tree_of(str(repository), repository, tmp_path / "again", package="thing")
    assert digest(again) != digest(found["HEAD"])
    with pytest.raises(ValueError, match="git has no thing at revision 'absent'"):
        tree_of("absent", repository, tmp_path / "none", package="thing")


def test_processes_that_die_before_the_first_case_say_so_once(tmp_path, monkeypatch):
    trees = Trees(base=tmp_path, head=PACKAGE, device="cpu")
    started = process_starts(monkeypatch)
    visits = list(trees.visit(SIX, 0, None))
    assert [visit.name for visit in visits] == [case.name for case in SIX]
    for visit in visits:
        assert visit.reason.startswith("the process ended with status 1")
        assert "is not a package: it has no __init__.py" in visit.reason
    # What ends it before the first case would end the next one too.
    assert len(started) == 1


def process_starts(monkeypatch):
    """The commands of the processes that are started from here on."""
    started, popen = [], subprocess.Popen

    def start(words, **facts):
        started.append(words)
        return popen(words, **facts)

    monkeypatch.setattr(subprocess, "Popen", start)
    return started


def worker_of(tmp_path, monkeypatch, body):
    """Stands for the process of the gate: its body has a list of waiting cases and `visit(case,
    reason)`.
    """
    script = tmp_path / "worker"
    script.write_text(
        f"#!{sys.executable}\n"
        "import json, sys, time\n"
        "from verify.gate_measure import Visit, case_of_text\n"
        "waiting = [case_of_text(line) for line in sys.stdin]\n"
        "def visit(case, reason=''):\n"
        "    found = Visit(name=case.name, process=0, reason=reason)\n"
        "    print(json.dumps(found.as_json()), flush=True)\n"
        f"print('ready', flush=True)\n{body}"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return Trees(base=tmp_path, head=tmp_path, device="cpu")


def test_a_benchmark_that_ends_its_process_is_the_only_one_lost(tmp_path, monkeypatch):
    trees = worker_of(
        tmp_path,
        monkeypatch,
        f"for case in waiting:\n    if case.name == {NAME!r}: sys.exit(3)\n    visit(case)\n",
    )
    reasons = {visit.name: visit.reason for visit in trees.visit(SIX, 0, None)}
    assert set(reasons) == {case.name for case in SIX}
    assert reasons.pop(NAME) == "the process ended with status 3: "
    assert set(reasons.values()) == {""}


def test_a_benchmark_that_fails_and_then_ends_its_process_loses_no_other(tmp_path, monkeypatch):
    trees = worker_of(
        tmp_path,
        monkeypatch,
        f"for case in waiting:\n    bad = case.name == {NAME!r}\n"
        "    visit(case, 'no answer' if bad else '')\n    if bad: sys.exit(1)\n",
    )
    reasons = {visit.name: visit.reason for visit in trees.visit(SIX, 0, None)}
    assert reasons == {case.name: "no answer" if case.name == NAME else "" for case in SIX}


def test_processes_that_die_share_one_limit_of_time(tmp_path, monkeypatch):
    trees = worker_of(tmp_path, monkeypatch, "time.sleep(0.05)\nsys.exit(3)\n")
    started = process_starts(monkeypatch)
    (visit,) = trees.visit(SIX, 0, 0.01)
    assert visit.reason.startswith("the process ended with status 3")
    assert len(started) == 1
    started.clear()
    assert len(list(trees.visit(SIX[:2], 0, 60.0))) == 2
    limits = [float(words[words.index("--seconds") + 1]) for words in started]
    assert 60.0 >= limits[0] > limits[1]


def test_equal_trees_are_compiled_once(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "__init__.py").write_text("A = 1\n")
    assert Trees(base=PACKAGE, head=PACKAGE, device="cpu").different() == (PACKAGE,)
    assert set(Trees(base=PACKAGE, head=other, device="cpu").different()) == {PACKAGE, other}


def test_a_launcher_that_is_not_known_is_not_planted_in(tmp_path):
    package = tmp_path / "scattermoe_lora"
    package.mkdir()
    (package / "_launch.py").write_text("from typing import Any\n")
    with pytest.raises(ValueError, match="nowhere to plant"):
        slow_tree(package, tmp_path / "out", 10.0)
