"""Each combination that is known to be bad is named, with what to do; its neighbours are not."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from verify.doctor import Facts, Gpu, diagnose, gather

pytestmark = pytest.mark.correctness

H100 = Gpu(name="H100", capability=(9, 0), shared_memory=227 * 1024, memory=80 * 2**30)
GOOD = Facts(
    python="3.12.1",
    versions={
        "torch": "2.13.0+cu130", "triton": "3.7.1", "numpy": "2.4.6", "transformers": "5.23.0",
        "peft": "0.21.2",
    },
    cuda="13.0",
    gpus=(H100,),
    nvidia=True,
)  # fmt: skip
NO_GPU = replace(GOOD, gpus=(), nvidia=False, cuda="", interpret="1")


BNB = {"bitsandbytes": "0.48.2"}
B200 = replace(H100, name="B200", capability=(10, 0))


def having(facts: Facts, **versions: str | None) -> Facts:
    merged = {**facts.versions, **versions}
    return replace(facts, versions={name: text for name, text in merged.items() if text})


def test_a_good_machine_is_called_good():
    assert {item.status for item in diagnose(GOOD)} == {"good"}
    assert {item.status for item in diagnose(NO_GPU)} == {"good", "note"}


@pytest.mark.parametrize(
    ("facts", "status", "words"),
    [
        (having(NO_GPU, triton="3.6.0"), "bad", "run-time bounds under numpy 2.4.6"),
        (having(GOOD, torch="2.10.0"), "bad", "2.10.0 is older than 2.11"),
        (having(GOOD, torch="2.13.0a1", triton="3.6.0"), "bad", "built against Triton 3.7"),
        (having(GOOD, triton="3.9.0"), "note", "built against Triton 3.7"),
        (having(GOOD, triton=None), "bad", "not installed"),
        (having(NO_GPU, numpy=None), "bad", "interpreter needs it"),
        (having(GOOD, transformers="5.16.2"), "bad", "5.16.2 is older than 5.17"),
        (having(GOOD, peft="0.19.0"), "bad", "other shapes"),
        (having(GOOD, peft="0.18.0"), "bad", "older than 0.18.1"),
        (having(GOOD, peft="0.18.1"), "note", "refuses PEFT older than 0.20"),
        (having(GOOD, peft="0.20.0", **BNB), "note", "never trains"),
        (having(GOOD, peft="0.21.2", **BNB), "note", "second training step raises"),
        (having(GOOD, peft="0.18.1", **BNB), "note", "merging changes nothing"),
        (having(GOOD, peft="0.22.0", **BNB), "note", "merging changes nothing"),
        (having(GOOD, **BNB), "note", "leaves fused experts in 16 bit"),
        (NO_GPU, "note", "bit patterns of bf16"),
        (having(NO_GPU, triton="3.9.0"), "note", "bit patterns of bf16"),
        (having(GOOD, triton="3.10.0", torch="2.14.0"), "note", "newer than 3.9"),
        (having(GOOD, torch="2.11.0", triton="3.6.0"), "note", "compiles some LoRA products"),
        (having(GOOD, torch="2.11.0", triton="3.6.0", **BNB), "note", "(2.13 takes bytes)"),
        (replace(having(GOOD, bitsandbytes="0.50.2"), avx512=True), "note", "15 to 30%"),
        (replace(having(GOOD, bitsandbytes="0.49.0"), avx512=True), "note", "AVX-512"),
        (replace(GOOD, interpret="1"), "bad", "thousand times slower"),
        (replace(GOOD, gpus=()), "bad", "sees no device"),
        (replace(GOOD, gpus=(replace(H100, capability=(7, 5)),)), "bad", "7.5"),
        (replace(GOOD, gpus=(replace(H100, capability=(8, 6)),)), "note", "no tensor maps"),
        (replace(GOOD, gpus=(replace(H100, shared_memory=99 * 1024),)), "note", "99 KB"),
    ],
)
def test_what_is_known_to_be_wrong_is_named(facts, status, words):
    (found,) = [item for item in diagnose(facts) if words in item.found]
    assert found.status == status
    assert found.advice


@pytest.mark.parametrize(
    "facts",
    [
        having(NO_GPU, triton="3.6.0", numpy="2.3.5"),
        replace(having(GOOD, torch="2.11.0", triton="3.6.0"), gpus=(B200,)),
        having(GOOD, torch="2.12.0"),
        having(GOOD, peft="0.20.0"),
        having(GOOD, peft="0.18.1", transformers="5.17.0"),
        having(GOOD, peft="0.22.0"),
        having(GOOD, peft=None, transformers=None, bitsandbytes="0.50.2"),
        replace(having(GOOD, peft=None, transformers=None, bitsandbytes="0.48.2"), avx512=True),
        replace(having(GOOD, peft=None, transformers=None, bitsandbytes="0.51.0"), avx512=True),
        replace(GOOD, gpus=(replace(H100, capability=(12, 0)),)),
    ],
)
def test_neighbours_of_what_is_wrong_are_good(facts):
    assert {item.status for item in diagnose(facts)} <= (
        {"good"} if facts.gpus else {"good", "note"}
    )
    notes = [item.subject for item in diagnose(facts) if item.status == "note"]
    # That there is none, and of the interpreter that runs instead.
    assert len(notes) == (0 if facts.gpus else 2), notes


def test_the_command_says_what_this_machine_has(tmp_path):
    record = tmp_path / "doctor.json"
    ran = subprocess.run(
        [sys.executable, "-m", "verify", "doctor", "--json", str(record)],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    values = json.loads(record.read_text())
    assert ran.returncode == int(values["summary"]["bad"] > 0)
    assert f"torch {gather().versions['torch']}" in ran.stdout
    assert "torch" in {item["subject"] for item in values["found"]}
