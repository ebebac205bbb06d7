"""Launches and bytes of benchmark cases, counted without a GPU, and what a change of them does."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import scattermoe_lora
from verify.ahead import ARCHITECTURES
from verify.bench_arms import budget_of, decoding_of
from verify.bench_cases import KINDS, PROJECTIONS, SHAPES, WHATS, BenchCase, by_projection
from verify.bench_inputs import draw
from verify.commands.compile import Baseline
from verify.footprint import (
    ALLOCATED,
    counted,
    differences,
    footprint_of,
    grouped,
    operands,
    ungrouped,
)
from verify.revision import edited, unload

pytestmark = [pytest.mark.correctness, pytest.mark.compile]

ROOT = Path(__file__).parent.parent
PACKAGE = Path(scattermoe_lora.__path__[0])
HOPPER = ARCHITECTURES[90]
QWEN = SHAPES["qwen3-30b"]


def case_of(kind, what, **fields) -> BenchCase:
    projection = PROJECTIONS[0] if by_projection(kind, what) else ""
    fields = {"shape": SHAPES["tiny"], "tokens": 16, "rank": 4, **fields}
    return BenchCase(kind=kind, what=what, projection=projection, **fields)


def rounded(count: int) -> int:
    return -(-count // ALLOCATED) * ALLOCATED


@pytest.mark.parametrize("kind", KINDS)
def test_operands_are_those_that_benchmarks_draw(kind):
    for what in WHATS[kind]:
        case = case_of(kind, what)
        drawn, made = draw(case, torch.device("cpu")), operands(case)
        assert made.case == drawn.case
        for own, other in [
            (made.tensors, drawn.tensors),
            *((made.stored[name], drawn.stored[name]) for name in drawn.stored),
        ]:
            assert set(own) == set(other)
            for name, value in other.items():
                facts = (value.shape, value.stride(), value.dtype)
                assert (own[name].shape, own[name].stride(), own[name].dtype) == facts, name


def test_peak_counts_what_is_alive_and_the_sum_all_of_it():
    def call():
        first = torch.empty(1000)
        view = first.view(10, 100)
        del first
        second = torch.empty(3)
        del view
        return torch.zeros(500), second

    found = counted(scattermoe_lora, HOPPER, lambda: call)
    sizes = [rounded(4 * count) for count in (1000, 3, 500)]
    assert (found.allocations, found.allocated_bytes) == (3, sum(sizes))
    assert found.peak_bytes == sizes[0] + sizes[1]
    assert found.launches == {"aten.zeros": 1}


def test_what_holds_nothing_is_not_counted():
    found = counted(scattermoe_lora, HOPPER, lambda: lambda: torch.empty(9, device="meta").mul(2))
    assert (found.allocations, found.launches) == (0, {})


def test_what_existed_before_is_not_counted_and_what_is_written_is():
    before = torch.ones(64, 64)
    found = counted(scattermoe_lora, HOPPER, lambda: lambda: before.view(-1).mul_(2))
    assert found.launches == {"aten.mul_": 1}
    assert (found.allocations, found.peak_bytes) == (0, 0)


@pytest.mark.parametrize("tokens", [2048, 8192])
@pytest.mark.parametrize("rank", [16, 64])
def test_a_projection_allocates_its_results_alone(tokens, rank):
    case = case_of("projection", "forward", shape=QWEN, tokens=tokens, rank=rank)
    found = footprint_of(scattermoe_lora, case, HOPPER)
    rows = tokens * QWEN.top_k
    widths = (2 * QWEN.intermediate, rank)
    assert found.allocated_bytes == sum(rounded(2 * rows * width) for width in widths)
    assert found.peak_bytes == found.allocated_bytes
    assert found == footprint_of(scattermoe_lora, case, HOPPER)


@pytest.mark.parametrize("what", ["chunked", "full"])
@pytest.mark.parametrize("model", ["qwen3-30b", "mixtral"])
def test_decoded_experts_take_what_was_allowed(what, model):
    case = case_of("qlora-layer", what, shape=SHAPES[model], tokens=2048, rank=16)
    for name, arm in decoding_of(scattermoe_lora, case, operands(case)).items():
        found = counted(scattermoe_lora, HOPPER, lambda arm=arm: arm.call)
        budget, stack = budget_of(case, name), 2 * case.shape.experts
        stack *= math.prod(case.shape.widths(name))
        assert found.peak_bytes == stack if budget is None else budget / 2 < found.peak_bytes
        assert budget is None or found.peak_bytes <= budget
        assert found.allocations == 1


def test_a_plan_of_the_architecture_is_used():
    """Only a GPU with tensor maps has plans that copy rows into expert order first."""
    case = case_of("projection", "forward", shape=SHAPES["mixtral"], tokens=2048, rank=16)
    names = {
        number: set(footprint_of(scattermoe_lora, case, ARCHITECTURES[number]).launches)
        for number in (80, 90)
    }
    assert names[90] - names[80] == {"group_kernel"}


SORT = "        rows = sort_by_expert("
PLANTED = {
    "launch": (
        f"{SORT}top_k_index.reshape(-1).contiguous(), experts)\n{SORT}",
        "count_kernel is launched 2 times, 1 in the baseline",
    ),
    "allocation": (
        f"        spare = torch.empty(4096, device=top_k_index.device)\n{SORT}",
        "3 tensors are allocated, 2 in the baseline",
    ),
    "host": (
        f"        top_k_index.max().item()\n{SORT}",
        "aten._local_scalar_dense is launched 1 times, 0 in the baseline",
    ),
}


def planted(name: str) -> str:
    source = (PACKAGE / "routing.py").read_text()
    assert source.count(SORT) == 1
    return source.replace(SORT, PLANTED[name][0])


@pytest.mark.parametrize("name", PLANTED)
def test_an_extra_launch_allocation_or_wait_is_a_difference(name):
    case = case_of("kernel", "sort", shape=QWEN, tokens=2048, rank=0)
    before = footprint_of(scattermoe_lora, case, HOPPER).as_json()
    lib = edited(PACKAGE, {"routing.py": planted(name)}, f"planted_{name}")
    try:
        after = footprint_of(lib, case, HOPPER).as_json()
    finally:
        unload(lib.__name__)
    assert differences("sort", before, before) == []
    assert f"sort: {PLANTED[name][1]}" in differences("sort", after, before)


def test_a_baseline_keeps_every_footprint():
    base = footprint_of(scattermoe_lora, case_of("layer", "step"), HOPPER)
    other = replace(base, peak_bytes=base.peak_bytes + ALLOCATED)
    found = {"sm_80 a": base, "sm_90 a": other, "sm_100 a": base, "sm_90 b": base}
    found = {key: value.as_json() for key, value in found.items()}
    assert len(grouped(found)["a"]) == 2
    assert ungrouped(grouped(found)) == found


WAITS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "item")
"""Operations of torch whose result the host has to know."""
STEPS = [(kind, what) for kind in KINDS for what in WHATS[kind] if what != "selective"]


@pytest.mark.parametrize(("kind", "what"), STEPS)
def test_no_step_waits_for_the_device(kind, what):
    """Only where the experts in use alone are decoded does the host ask which they are."""
    launches = footprint_of(scattermoe_lora, case_of(kind, what), HOPPER).launches
    assert [name for name in launches if any(wait in name for wait in WAITS)] == []


def test_a_step_that_asks_for_the_active_experts_is_seen_to_wait():
    launches = footprint_of(scattermoe_lora, case_of("qlora-layer", "selective"), HOPPER).launches
    assert any("nonzero" in name for name in launches)


def test_what_nobody_makes_any_more_is_a_problem(tmp_path):
    baseline = Baseline(path=tmp_path / "some.json", values={"a": 1, "b": 2}, whole=True)
    assert baseline.gone({"a": 1}) == ["b: is in the baseline and no longer made"]
    assert baseline.accepted({"a": 3}) == {"a": 3}
    part = replace(baseline, whole=False)
    assert part.gone({"a": 1}) == []
    assert part.accepted({"a": 3}) == {"a": 3, "b": 2}


def test_the_command_fails_on_a_planted_launch_until_it_is_accepted(tmp_path):
    """Run beside a copy of the package, one architecture of it."""
    (tmp_path / "verify").symlink_to(ROOT / "verify")
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name)

    def run(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "verify", "compile", "--parts", "footprint"]
        command += ["--arch", "90", "--footprint", str(tmp_path / "footprint.json"), *words]
        environment = {**os.environ, "TRITON_INTERPRET": "0"}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    nothing = run()
    assert nothing.returncode == 1
    assert "there is no baseline" in nothing.stderr
    assert run("--accept").returncode == 0
    (tmp_path / PACKAGE.name / "routing.py").write_text(planted("launch"))
    ran = run("--json", str(tmp_path / "record.json"))
    assert ran.returncode == 1, ran.stderr
    name = "layer.step.qwen3-30b.t2048.r16.balanced"
    assert f"sm_90 {name}: count_kernel is launched 2 times, 1 in the baseline" in ran.stdout
    record = json.loads((tmp_path / "record.json").read_text())
    sorting = {item["job"] for item in record["outcomes"] if "layer" in item["operation"]}
    failed = {item["job"] for item in record["outcomes"] if item["status"] == "failed"}
    assert failed == sorting | {"sm_90 kernel.sort.qwen3-30b.t2048.balanced"}
