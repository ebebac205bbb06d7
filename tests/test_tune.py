"""`python -m verify tune` where there is no GPU, and what it refuses."""

import pytest
import torch

from verify import cli

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
