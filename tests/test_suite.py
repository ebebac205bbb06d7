"""What a run of the whole suite leaves out, and how many processes it takes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_what_a_machine_cannot_run_is_deselected_with_a_count(tmp_path):
    for name in ("conftest.py", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    marks = ("gpu", "gpu", "multi_gpu", "bench", "correctness")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_marks.py").write_text(
        "import pytest\n"
        + "".join(f"@pytest.mark.{m}\ndef test_{i}(): pass\n" for i, m in enumerate(marks))
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", tmp_path]
    variables = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}

    def outcome(*options: str) -> str:
        return subprocess.run(
            [*command, *options],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    whole, one = outcome(), outcome("tests/test_marks.py")
    for text in (whole, one):
        assert "2 gpu tests deselected: no CUDA device is in use" in text
        assert "1 multi_gpu tests deselected" in text
        assert "1 bench tests deselected" in text
    assert "1 passed, 4 deselected" in one
    benchmarks = (outcome("--benchmark-disable"), outcome("-m", "bench"))
    assert "2 passed, 3 deselected" in benchmarks[0]
    assert "1 passed, 4 deselected" in benchmarks[1]
    found = [re.search(r"\d+ workers? \[", text) is not None for text in (whole, one, *benchmarks)]
    assert found == [True, False, False, False]


@pytest.mark.correctness
@pytest.mark.parametrize("ci", [{}, {"CI": "true"}], ids=["by hand", "in CI"])
def test_what_a_search_finds_is_kept_and_tried_first(tmp_path, ci):
    """By the profile `fuzz`; `gate` draws the same examples each time and keeps nothing."""
    for name in ("conftest.py", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_search.py").write_text(
        "from hypothesis import given\n"
        "from hypothesis import strategies as st\n"
        "@given(st.integers(0, 10**9))\n"
        "def test_small(value):\n"
        "    print('tried', value)\n"
        "    assert value < 12345\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", tmp_path]
    variables = {name: value for name, value in os.environ.items() if name != "CI"} | ci
    variables |= {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}

    def tried(profile: str) -> list[str]:
        ran = subprocess.run(
            [*command, "--profile", profile, "tests/test_search.py"],
            cwd=tmp_path, env=variables, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ran.returncode == 1, ran.stdout + ran.stderr
        assert "value=12345," in ran.stdout
        return re.findall(r"^tried (\d+)$", ran.stdout, re.MULTILINE)

    tried("gate")
    assert not (tmp_path / ".hypothesis" / "examples").exists()
    assert tried("fuzz")[0] != "12345"
    assert any((tmp_path / ".hypothesis" / "examples").iterdir())
    assert tried("fuzz")[0] == "12345"
