"""Records of the gate: which of them stand for a success."""

import json

import pytest
from sample_records import head

from verify.record_check import Sources, inspect

pytestmark = pytest.mark.correctness


@pytest.mark.parametrize(
    ("command", "facts", "state"),
    [
        ("gate", {}, "good"),
        ("gate", {"regression": 2}, "failed"),
        ("gate", {"ambiguous": 1}, "incomplete"),
        ("gate", {"invalid": ["a peer took 2 ms"]}, "incomplete"),
        ("gate", {"benchmarks": 59}, "incomplete"),
        ("gate", {"complete": False}, "incomplete"),
        ("gate-planted", {"regression": 60}, "good"),
        ("gate-planted", {"regression": 59}, "failed"),
        ("gate-planted", {"regression": 0, "benchmarks": 0}, "failed"),
        ("gate-planted", {"regression": 5, "benchmarks": 5}, "good"),
        ("gate-samples", {}, "good"),
        ("gate-samples", {"rates": None}, "incomplete"),
        ("gate-samples", {"benchmarks": 59}, "incomplete"),
    ],
)
def test_only_a_record_of_a_whole_success_is_a_good_one(tmp_path, command, facts, state):
    machine = tmp_path / "nvidia-h100-80gb-hbm3"
    machine.mkdir()
    summary = {"regression": 0, "ambiguous": 0, "invalid": [], "complete": True, "benchmarks": 60}
    whole = {"fingerprint": {}, "plant": 3.0, "rates": {"power": 1.0}}
    summary |= {key: value for key, value in facts.items() if key in summary}
    record = head(command, summary=summary) | whole
    record |= {key: value for key, value in facts.items() if key in whole}
    (machine / f"{command}.json").write_text(json.dumps(record))
    sources = Sources(fingerprint={}, judge={}, enumerate=lambda selection: frozenset())
    verdicts = inspect(tmp_path, sources, release=True)
    (found,) = [item for item in verdicts if item.record.endswith(f"/{command}.json")]
    assert (found.state, found.fault) == (state, state != "good")
    option = {
        "gate": "--against main",
        "gate-samples": "--calibrate",
        "gate-planted": "--against . --plant 3",
    }[command]
    assert f"gate {option} --device cuda" in found.refresh
