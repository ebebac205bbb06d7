"""Compiling for architectures that are not at hand, and how many variants a plan compiles."""

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from verify.ahead import ARCHITECTURES, serialised
from verify.commands.compile import Baseline, _outcome, _resumed
from verify.compile_check import PACKAGE, QWEN3, jobs
from verify.compile_demands import most_stack, over_limits
from verify.uniform_registers import misread

pytestmark = [pytest.mark.correctness, pytest.mark.compile]

KERNEL = {"kernel": "k", "registers": 255, "stack": 0, "shared": 0, "matrix": {}}


def asked(**options):
    """The options of the command, at their defaults but for these."""
    return argparse.Namespace(**{"accept": False, "full": False, "baseline": None, **options})


# Triton interprets in this process, so others compile.
SWEEP = """
import importlib, json, sys
from dataclasses import replace
from verify import compile_check as check
from verify.ahead import ARCHITECTURES, compiling

lib = importlib.import_module(check.PACKAGE)
importlib.import_module(check.PACKAGE + ".quant")
hopper, answer = ARCHITECTURES[90], {}
base = replace(check.QWEN3, k=256, n=128, experts=16, top_k=2, tokens=1024)
wanted = json.loads(sys.argv[1])
jobs = [check.Job(architecture=90, operation=o, path=p, shape=base) for o, p in wanted]
shapes = [
    replace(base, tokens=tokens, experts=experts)
    for tokens in (1, 2, 7, 16, 100, 512, 4096)
    for experts in (16, 23)
]
with compiling(lib, hopper) as found:
    for job in jobs:
        plan = None
        if job.path != "default":
            plan = check._plans(lib, job.operation, job.path, base, hopper)[0]
        found.clear()
        for shape in shapes:
            swept = replace(job, shape=shape)
            if plan is None:
                check._call_plain(lib, swept)
            else:
                check._call_planned(lib, swept, plan)
        variants = {(item.kernel, item.key) for item in found}
        answer[f"{job.operation} {job.path}"] = sorted(name for name, _ in variants)
json.dump(answer, sys.stdout)
"""
SWEPT = {
    ("scatter2scatter", "tiles"): ["scatter2scatter_kernel"],
    ("lora_forward", "epilogue"): ["scatter2scatter_kernel"] * 2,
    ("lora_forward", "fused"): ["fused_kernel"],
    ("lora_forward", "split"): ["scatter2scatter_kernel"] * 3,
    ("lora_input_grad", "epilogue"): ["scatter2scatter_kernel"] * 2,
    ("lora_weight_grad", "recompute"): ["recompute_kernel"] * 2,
    ("expert_weight_grad", "gram"): ["gram_kernel"],
    ("shrink", "tiles"): ["scatter2scatter_kernel"],
    ("lora_weight_grad", "gram"): ["add_parts_kernel", "gram_kernel"],
    ("group", "default"): ["group_kernel"],
    ("combine", "default"): ["combine_kernel"],
    ("combine_grad", "default"): ["combine_grad_kernel"],
    ("expert_bias_grad", "default"): ["expert_bias_grad_kernel"],
    ("glu_forward", "default"): ["glu_forward_kernel"],
    ("glu_backward", "default"): ["glu_backward_kernel"],
    ("dequantize_four_bit", "default"): ["dequantize_four_bit_kernel"],
    ("dequantize_scaled", "default"): ["dequantize_scaled_kernel"],
    ("routing", "default"): ["count_kernel", "place_kernel", "row_tiles_kernel"],
}


def compiled(*words, check=True):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", *words]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert not check or ran.returncode == 0, ran.stderr[-2000:]
    return ran


def test_tokens_and_experts_need_no_other_variant():
    ran = compiled("-c", SWEEP, json.dumps([list(key) for key in SWEPT]))
    assert json.loads(ran.stdout) == {" ".join(key): names for key, names in SWEPT.items()}


@pytest.fixture(scope="module")
def accepted(tmp_path_factory):
    """A baseline of the cheapest operation on two architectures."""
    path = tmp_path_factory.mktemp("baseline") / "compile.json"
    compiled(*command(path), "--accept")
    return path


def command(path):
    words = ["-m", "verify", "compile", "--arch", "80", "90", "--operations", "combine"]
    return (*words, "--jobs", "1", "--baseline", str(path))


def test_what_was_accepted_is_found_again(accepted, tmp_path):
    ran = compiled(*command(accepted), "--json", str(tmp_path / "compile.json"))
    record = json.loads((tmp_path / "compile.json").read_text())
    assert ran.returncode == 0
    assert record["summary"]["passed"] == record["summary"]["total"] == 2
    assert record["summary"]["complete"]


@pytest.mark.parametrize(("name", "value"), [("registers", 255), ("stack", 64), ("matrix", {})])
def test_a_difference_fails(accepted, tmp_path, name, value):
    baseline = json.loads(accepted.read_text())
    job, (kernel,) = next(iter(baseline["kernels"].items()))
    kernel[name] = {"HGMMA": 7} if name == "matrix" else value
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(baseline))
    ran = compiled(*command(changed), check=False)
    assert ran.returncode == 1
    assert job in ran.stdout
    assert name in ran.stdout


@pytest.mark.parametrize("number", ARCHITECTURES)
def test_the_full_matrix_has_every_candidate_of_an_architecture_once(number):
    lib = importlib.import_module(PACKAGE)
    short, full = list(jobs([number], full=False)), list(jobs([number], full=True))
    assert len(short) <= 50
    assert full[: len(short)] == short
    assert max(Counter(job.key for job in full).values()) == 1
    assert {job.shape.rank for job in full if job.operation == "scatter2scatter"} == {QWEN3.rank}
    for dtype in ("bfloat16", "float32"):
        problem = lib.Problem(
            operation=lib.Operation.LORA_FORWARD, rows=QWEN3.rows, experts=QWEN3.experts,
            k=QWEN3.k, n=QWEN3.n, rank=QWEN3.rank, dtype=getattr(torch, dtype),
            precision=lib.Precision.IEEE, w_map="nk",
        )  # fmt: skip
        plans = lib.candidates(problem, ARCHITECTURES[number].device(lib))
        wanted = Counter(plan.path.value for plan in plans if plan.path is not lib.Path.GROUPED_MM)
        made = Counter(
            job.path
            for job in full
            if job.operation == "lora_forward"
            and (job.shape.name, job.shape.tokens) == (QWEN3.name, QWEN3.tokens)
            and (job.shape.rank, job.shape.dtype) == (QWEN3.rank, dtype)
        )
        assert all(made[path] >= count for path, count in wanted.items())
        assert set(wanted) == {"epilogue", "fused", "split"}


@pytest.mark.parametrize(("beyond", "words"), [(True, ""), (False, "is not in the baseline")])
def test_plans_beyond_the_baseline_are_held_to_the_demands_alone(beyond, words):
    job = next(iter(jobs([80], full=False)))
    done = Future()
    done.set_result(([KERNEL], []))
    baseline = Baseline(path=Path("compile.json"), values={"another job": []}, whole=True)
    found = _outcome(job, done, baseline, asked(full=beyond))
    assert found["status"] == ("failed" if words else "passed")
    assert found["reason"].endswith(words)


@pytest.mark.parametrize("number", ARCHITECTURES)
def test_a_kernel_that_keeps_more_than_expected_on_a_stack_is_refused(number):
    job = next(iter(jobs([number], full=False)))
    limit, room = most_stack(number), ARCHITECTURES[number].shared_memory
    assert not over_limits(job, [KERNEL | {"stack": limit, "shared": room}])
    (problem,) = over_limits(job, [KERNEL | {"stack": limit + 8}])
    assert f"keeps {limit + 8} bytes" in problem
    assert f"at most {limit}" in problem
    (problem,) = over_limits(job, [KERNEL | {"shared": room + 1}])
    assert f"needs {room + 1} bytes of shared memory" in problem


@pytest.mark.parametrize("changed", ["", "failed", "triton", "fingerprint", "baseline", "limit"])
def test_a_record_is_taken_up_where_it_found_a_job_right(tmp_path, changed):
    """What it compiled is judged again, by today's baseline and limits."""
    head = {"environment": {"triton": "3.6.0"}, "fingerprint": {"routing": "a"}}
    job = next(iter(jobs([80], full=False)))
    kernel = KERNEL | {"stack": 1000 if changed == "limit" else 0}
    status = "failed" if changed == "failed" else "passed"
    record = {**head, "outcomes": [{"job": job.key, "status": status, "kernels": [kernel]}]}
    other = KERNEL | {"registers": 7 if changed == "baseline" else KERNEL["registers"]}
    base = other | {"stack": kernel["stack"]}
    baseline = Baseline(path=Path("b.json"), values={job.key: [base]}, whole=True)
    if changed == "triton":
        record["environment"] = {"triton": "3.9.0"}
    if changed == "fingerprint":
        record["fingerprint"] = {"routing": "b"}
    path = tmp_path / "compile.json"
    path.write_text(json.dumps(record))
    found = _resumed(path, head, [job], baseline, asked())
    assert list(found) == ([] if changed in ("failed", "triton", "fingerprint") else [job.key])
    words = {"baseline": "registers 255, baseline 7", "limit": "keeps 1000 bytes"}.get(changed, "")
    assert all(
        item["status"] == ("failed" if words else "passed") and words in item["reason"]
        for item in found.values()
    )


def test_an_interpreting_process_refuses():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    words = [sys.executable, "-m", "verify", "compile", "--arch", "90"]
    ran = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode != 0
    assert "TRITON_INTERPRET" in ran.stderr


@pytest.mark.parametrize(("waiting", "expected"), [((False, True), False), ((True, True), True)])
def test_products_that_wait_one_by_one_are_seen(waiting, expected):
    """Two warpgroup products in one group: the last of them waits, or ptxas made both wait."""
    sass = "\n".join(
        f"HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24{', gsb0' if wait else ''} ;"
        for wait in waiting
    )
    ptx = "wgmma.mma_async.sync\n" * 2 + "wgmma.commit_group.sync.aligned;\n"
    assert serialised(sass, ptx) is expected


SOUND = """
    /*0040*/              ULDC.64 UR8, c[0x0][0x208] ;
    /*0050*/              LDG.E R11, desc[UR8][R4.64+0x8] ;
    /*0060*/              UIADD3 UR14, UP1, UR10, 0x2, URZ ;
    /*0070*/              HGMMA.64x32x16.F32 R24, gdesc[UR12].tnspB, R24 ;
    /*0080*/              HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR6], R24, gsb0 ;
    /*0090*/              ULDC.64 UR8, c[0x0][0x240] ;
    /*00a0*/              UIADD3 UR14, UP0, UR8, 0x40, URZ ;
"""


@pytest.mark.parametrize(
    ("sound", "wrong"),
    [
        ("UIADD3 UR14, UP1, UR10, 0x2, URZ", "UIADD3 UR14, UP0, UR8, 0x40, URZ"),
        ("gdesc[UR12].tnspB", "gdesc[UR6].tnspB"),
        ("gdesc[UR6], R24, gsb0", "gdesc[UR8], R24, gsb0"),
    ],
    ids=["base", "described", "left-in-registers"],
)
def test_a_register_that_ptxas_mistook_is_seen(sound, wrong):
    """Global memory's pair of registers, read as if it described an operand in shared memory."""
    assert misread(SOUND) == ()
    (found,) = misread(SOUND.replace(sound, wrong))
    assert wrong in found
