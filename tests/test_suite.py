"""What a run of the whole suite leaves out, and how many processes it takes."""

import os
import re
import subprocess
import sys
from pathlib import Path

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
