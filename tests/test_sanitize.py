"""compute-sanitizer: found or not, read, split; and launches in any order of the grid."""

import contextlib
import json
import random
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

import scattermoe_lora
from scattermoe_lora._interpreter import INTERPRETED
from verify.cases import tagged
from verify.fuzz_worker import is_fixed, plan_pool
from verify.run import Problem, guarded_run
from verify.sanitize import (
    NOT_OURS,
    TOOLS,
    Job,
    Sanitizer,
    jobs_of,
    open_jobs,
    parsed,
    tool_path,
    unavailable,
)
from verify.specs import KERNELS
from verify.specs.glu import GLU_FORWARD
from verify.specs.linear import SCATTER2SCATTER

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")

CLEAN = """========= COMPUTE-SANITIZER
========= ERROR SUMMARY: 0 errors
"""
WILD = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at product_kernel+0x340 in product.py:93
=========     by thread (0,0,0) in block (3,0,0)
=========     Address 0x7f1 is out of bounds
=========
========= ERROR SUMMARY: 64 errors
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at a+0x10 and Read access at a+0x20
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""
FAKE = """#!{python}
import json, sys
arguments = sys.argv[1:]
tool, file = arguments[1], arguments[arguments.index("verify.sanitize_worker") + 1]
draws = json.load(open(file))
open({log!r}, "a").write(f"{{tool}} {{len(draws)}}\\n")
wrong = sum(d["dtype"] == "float16" and tool == "memcheck" for d in draws)
if any(d["dtype"] == "bfloat16" and tool == "synccheck" for d in draws):
    sys.exit("killed")
print("========= COMPUTE-SANITIZER")
if wrong:
    print("========= Invalid __global__ write of size 2 bytes")
print(f"========= ERROR SUMMARY: {{wrong}} errors")
"""


@pytest.fixture(scope="module")
def jobs() -> tuple[Job, ...]:
    kernels = (SCATTER2SCATTER, GLU_FORWARD)
    pools = {spec.name: plan_pool(scattermoe_lora, spec, CPU, most=0) for spec in kernels}
    return jobs_of(kernels, pools, [])


@pytest.mark.correctness
def test_memcheck_sees_every_plan_and_the_others_every_kind_of_load(jobs):
    pool = plan_pool(scattermoe_lora, SCATTER2SCATTER, CPU, most=0)
    offered = {(p["dtype"], p["path"], p["label"]) for p in pool if not p["unavailable"]}
    plans = {
        tool: {
            (job.draw.dtype, job.draw.path, job.draw.label)
            for job in jobs
            if job.tool == tool and job.draw.kernel == "scatter2scatter"
        }
        for tool in TOOLS
    }
    assert plans["memcheck"] == offered
    loads = {p["plan"]["fields"]["tile"]["fields"]["descriptor"] for p in pool}
    for tool in TOOLS[1:]:
        assert 0 < len(plans[tool]) < len(offered)
        assert len(plans[tool]) >= len(loads)


@pytest.mark.correctness
@pytest.mark.parametrize(
    ("text", "errors", "words"),
    [(CLEAN, 0, ""), (WILD, 64, "Invalid __global__ read"), (RACE, 2, "Race reported")],
)
def test_what_the_tool_says_is_read(text, errors, words):
    report = parsed(text, status=0)
    assert (report.errors, report.finished) == (errors, True)
    assert report.first.startswith(words) or words in report.first


@pytest.mark.correctness
def test_a_process_that_ends_without_a_summary_is_no_pass():
    report = parsed("Segmentation fault", status=139)
    assert not report.finished
    assert "status 139: Segmentation fault" in report.first
    assert not parsed(CLEAN, status=1).finished


@pytest.mark.correctness
def test_the_tool_is_looked_for_in_the_usual_places(tmp_path):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    assert tool_path({"PATH": str(tool.parent)}) == tool
    assert tool_path({"PATH": "", "CUDA_HOME": str(tmp_path)}) == tool
    assert "there is none" in unavailable(CPU, tool)
    assert "CUDA toolkit" in unavailable(torch.device("cuda"), None)
    assert unavailable(torch.device("cuda"), tool) == ""


@pytest.mark.correctness
@pytest.mark.parametrize("processes", [1, 3])
def test_each_report_is_traced_to_its_launch(jobs, tmp_path, processes):
    tool, log = tmp_path / "compute-sanitizer", tmp_path / "log"
    tool.write_text(FAKE.format(python=sys.executable, log=str(log)))
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    dtypes = ("float32", "float16", "bfloat16")
    base = next(job for job in jobs if job.draw.kernel == "glu_forward")
    mine = [
        Job(tool=tool_name, draw=replace(base.draw, dtype=dtype))
        for tool_name in ("memcheck", "racecheck", "synccheck")
        for dtype in dtypes
    ]
    found = {
        outcome.key: outcome
        for outcome in Sanitizer(path=tool, device="cpu", batch=3, processes=processes).run(mine)
    }
    assert len(found) == len(mine)
    outcomes = [found[job.key] for job in mine]
    status = {(outcome.mode, outcome.dtype): outcome.status for outcome in outcomes}
    wrong = {key: value for key, value in status.items() if value != "passed"}
    assert wrong == {("memcheck", "float16"): "failed", ("synccheck", "bfloat16"): "error"}
    assert "1 errors, the first: Invalid __global__ write" in outcomes[1].reason
    assert "memcheck 3" in log.read_text().splitlines()
    assert log.read_text().count("racecheck") == 1
    assert open_jobs(mine, outcomes[:4]) == tuple(mine[4:])


@pytest.mark.correctness
def test_what_torch_does_by_itself_is_not_watched_and_told(jobs):
    base = next(job for job in jobs if job.draw.kernel == "scatter2scatter")
    mine = [replace(base, tool=tool, draw=replace(base.draw, path=path)) for tool, path in NOT_OURS]
    outcomes = list(Sanitizer(path=Path("/nowhere"), device="cpu").run(mine))
    assert [outcome.key for outcome in outcomes] == [job.key for job in mine]
    assert {outcome.status for outcome in outcomes} == {"unavailable"}
    assert "torch._grouped_mm" in outcomes[0].reason


@pytest.mark.correctness
def test_who_stops_asking_stops_the_processes(jobs, tmp_path):
    tool, started = tmp_path / "compute-sanitizer", tmp_path / "started"
    tool.write_text(
        f"#!/bin/sh\ncase $2 in memcheck) echo '{CLEAN}' ;; *) touch {started}; sleep 99; esac\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    base = next(job for job in jobs if job.draw.kernel == "glu_forward")
    mine = [replace(base, tool=name) for name in ("racecheck", "memcheck", "synccheck")]
    outcomes = Sanitizer(path=tool, device="cpu", batch=1, processes=2).run(mine)
    start, patience = time.monotonic(), 60
    assert next(outcomes).status == "passed"
    while not started.exists():
        time.sleep(0.01)
    outcomes.close()
    assert time.monotonic() - start < patience


@pytest.mark.correctness
def test_a_process_that_fails_without_a_word_of_the_tool_says_why():
    report = parsed(f"ValueError: no such plan\n{CLEAN}", status=1)
    assert not report.finished
    assert "status 1" in report.first
    assert "ValueError: no such plan" in report.first


def test_the_watched_process_launches_what_it_is_told(jobs, tmp_path):
    file = tmp_path / "draws.json"
    draws = [job.draw for job in jobs if job.draw.kernel == "glu_forward"][:2]
    file.write_text(json.dumps([draw.as_json() for draw in draws]))
    command = [sys.executable, "-m", "verify.sanitize_worker", str(file), "cpu"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    file.write_text(json.dumps([replace(draws[0], path="sideways").as_json()]))
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 1


def test_without_a_gpu_it_says_so(tmp_path):
    record = tmp_path / "sanitize.json"
    ran = subprocess.run(
        [sys.executable, "-m", "verify", "sanitize", "--device", "cpu", "--json", str(record)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 2
    assert "unavailable" in ran.stdout
    values = json.loads(record.read_text())
    assert values["summary"]["unavailable"] == len(KERNELS) * len(TOOLS)


@contextlib.contextmanager
def grid_order(order: str):
    """Run the programs of every launch in reverse, or in an order of their own."""
    builder = interpreter.interpreter_builder
    plain = type(builder).set_grid_idx

    def place(x: int, y: int, z: int) -> None:
        width, height, depth = builder.grid_dim
        total = width * height * depth
        turn = (x * height + y) * depth + z
        if order == "reversed":
            turn = total - 1 - turn
        else:
            places = list(range(total))
            random.Random(total).shuffle(places)
            turn = places[turn]
        plain(builder, turn // (height * depth), turn // depth % height, turn % depth)

    builder.set_grid_idx = place
    try:
        yield
    finally:
        del builder.set_grid_idx


ordered = pytest.mark.skipif(
    not INTERPRETED, reason="the interpreter alone runs programs in an order that is asked for"
)


@triton.jit
def racing_kernel(out):
    """Every program writes the same place."""
    tl.store(out, tl.program_id(0))


@ordered
@pytest.mark.correctness
def test_a_race_shows_in_another_order():
    found = set()
    for order in (contextlib.nullcontext(), grid_order("reversed"), grid_order("shuffled")):
        out = torch.zeros(1, dtype=torch.int32)
        with order:
            racing_kernel[(5,)](out)
        found.add(int(out))
    assert len(found) > 1


@ordered
@pytest.mark.correctness
@pytest.mark.parametrize("spec", KERNELS, ids=lambda spec: spec.name)
def test_kernels_do_not_depend_on_the_order_of_their_programs(spec):
    names = {case.name for case in tagged("smoke")}
    case = next((case for case in spec.cases if case.name in names), spec.cases[0])
    dtype = torch.float32 if torch.float32 in spec.dtypes else spec.dtypes[0]
    problem = Problem(
        lib=scattermoe_lora, spec=spec, case=case, dtype=dtype, mode=spec.modes[0], device=CPU
    )
    inputs = problem.draw()
    plans = [plan for plan in spec.plans(scattermoe_lora, inputs) if not plan.unavailable]
    by_path = {plan.path: plan for plan in plans}
    for plan in by_path.values():
        found = []
        for order in (contextlib.nullcontext(), grid_order("reversed"), grid_order("shuffled")):
            with order:
                outputs, problems = guarded_run(scattermoe_lora, spec, inputs, plan.plan)
            assert problems == ()
            found.append(outputs)
        for other in found[1:]:
            for name, value in found[0].items():
                assert torch.equal(value, other[name]), f"{plan.path}: {name}"


@pytest.mark.correctness
def test_kernels_with_cases_of_their_own_keep_them():
    for spec in KERNELS:
        if is_fixed(spec, CPU):
            pools = {spec.name: plan_pool(scattermoe_lora, spec, CPU, most=0)}
            cases = {job.draw.case for job in jobs_of([spec], pools, [spec.name])}
            assert cases <= set(spec.cases)
