"""Plans: every fact that matters changes them, several always remain, tables are refused aloud."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import scattermoe_lora as sm
from scattermoe_lora import plan_table
from scattermoe_lora._syntax import device_code
from scattermoe_lora.plan import (
    INTERPRETER,
    PATHS,
    check_height,
    fit,
    stage_bytes,
    with_path,
)
from scattermoe_lora.plan_candidates import variations

pytestmark = pytest.mark.correctness
HOPPER = sm.Device(
    name="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    multiprocessors=132,
    shared_memory=232448,
)
SMALL = sm.Device(name="NVIDIA L4", capability=(8, 9), multiprocessors=58, shared_memory=99 * 1024)


def problem(**changes):
    base = sm.Problem(
        sm.Operation.LORA_FORWARD, 16384, 128, 2048, 1536, 16, torch.bfloat16,
        sm.Precision.IEEE, "nk",
    )  # fmt: skip
    return base._replace(**changes)


@pytest.mark.parametrize("device", [HOPPER, SMALL])
@pytest.mark.parametrize("operation", list(sm.Operation))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [1, 16, 256])
def test_several_plans_remain_and_fit(device, operation, dtype, rank):
    asked = problem(operation=operation, dtype=dtype, rank=rank)
    plans = sm.candidates(asked, device)
    assert plans[0] == sm.choose(asked, device)
    assert len(plans) > 1
    for plan in plans:
        for tile in (plan.tile, plan.shrink):
            if tile is not None:
                assert stage_bytes(tile, dtype) * tile.stages <= device.shared_memory


def test_every_fact_that_matters_changes_the_plan():
    base = sm.choose(problem(), HOPPER)
    assert sm.choose(problem(rows=64 * 128), HOPPER) != base
    assert sm.choose(problem(dtype=torch.float32), HOPPER) != base
    assert sm.choose(problem(n=64), HOPPER) != base
    assert sm.choose(problem(n=28672), HOPPER) != base
    assert sm.choose(problem(rank=64), HOPPER) != base
    assert sm.choose(problem(w_map=""), HOPPER) != base
    assert sm.choose(problem(precision=sm.Precision.TF32), HOPPER) != base
    assert sm.choose(problem(), SMALL) != base


def test_a_new_number_of_tokens_in_the_same_bucket_changes_nothing():
    base = sm.choose(problem(rows=16384), HOPPER)
    assert sm.choose(problem(rows=16384 - 128 * 30), HOPPER) == base


def test_tensor_maps_are_planned_only_where_they_exist():
    assert sm.choose(problem(), HOPPER).tile.descriptor
    assert not sm.choose(problem(), SMALL).tile.descriptor
    assert not sm.choose(problem(w_map=""), HOPPER).tile.descriptor


def test_a_table_round_trips_and_wins(tmp_path):
    asked = problem()
    chosen = sm.choose(asked, HOPPER)
    other = replace(chosen, tile=replace(chosen.tile, stages=2))
    path = tmp_path / "table.json"
    plan_table.write_table(path, HOPPER, {plan_table.bucket(asked): other})
    table = plan_table.read_table(path, HOPPER)
    assert table.lookup(asked) == other
    assert table.lookup(asked._replace(rank=9)) == other
    assert table.lookup(asked._replace(n=1024)) is None
    tf32 = asked._replace(precision=sm.Precision.TF32)
    assert table.lookup(tf32).precision is sm.Precision.TF32


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpu": "NVIDIA L4"}, "its gpu is 'NVIDIA L4'"),
        ({"triton": "1.0"}, "its triton is '1.0'"),
        ({"kernels": "0"}, "its kernels is '0'"),
        ({"plans": {"x": {"path": "tiles"}}}, "malformed"),
        ({"plans": 3}, "malformed"),
    ],
)
def test_a_stale_or_malformed_table_is_refused(tmp_path, change, words):
    path = tmp_path / "table.json"
    plan_table.write_table(path, HOPPER, {})
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=words):
        plan_table.read_table(path, HOPPER)


def test_shipped_tables_are_fresh():
    """A table that no longer fits the kernels would be refused on every user's machine."""
    for path in plan_table.SHIPPED.glob("*.json"):
        content = json.loads(path.read_text())
        assert content["kernels"] == plan_table.kernel_fingerprint(), (
            f"{path.name}: run verify tune"
        )
        assert content["plans"]
        assert path.stem == plan_table.gpu_name(replace(HOPPER, name=content["gpu"]))


def test_a_shipped_table_is_used_on_its_gpu(tmp_path, monkeypatch):
    """Where the machine has no table of its own, and runs the Triton that the plans are for."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for path in (Path(sm.__file__).parent / "plans").glob("*.json"):
        content = json.loads(path.read_text())
        monkeypatch.setattr(plan_table.triton, "__version__", f"{content['triton']}.0")
        # No launch asks for this device, whose answer is remembered.
        device = replace(HOPPER, name=content["gpu"], multiprocessors=0)
        table = plan_table.installed_table(device)
        assert table.source == str(path)
        assert table.plans.keys() == content["plans"].keys()


KERNEL = """
@triton.jit(do_not_specialize=["n"])
def kernel(x, n):
    "Doubles."
    tl.store(x, tl.load(x) * 2)  # twice


def launch(x):
    kernel[(1,)](x, 1)
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("kernel[(1,)](x, 1)", "kernel[(2,)](x, 1)", True),
        ("Doubles.", "Times two.", True),
        ("  # twice", "", True),
        ("* 2", "* 3", False),
        ('["n"]', "[]", False),
        ("def kernel", "def other", False),
    ],
)
def test_a_table_is_of_device_code_alone(old, new, same):
    assert old in KERNEL
    assert (device_code(KERNEL) == device_code(KERNEL.replace(old, new))) is same


SCATTER, SHRINK, FORWARD, INPUT_GRAD, WEIGHT_GRAD, FULL_GRAD = sm.Operation
FULL = torch.float32
MEASURED = [
    # operation, rows per expert, other changes; block_m, block_n, block_k, warps, stages
    (FORWARD, 1, {}, (16, 256, 64, 4, 4)),
    (FORWARD, 64, {}, (64, 256, 64, 4, 4)),
    (FORWARD, 128, {}, (128, 256, 64, 8, 4)),
    (INPUT_GRAD, 1024, {}, (128, 256, 64, 8, 4)),
    (SCATTER, 2048, {}, (128, 256, 64, 8, 3)),
    (FORWARD, 1, {"n": 1}, (16, 16, 64, 4, 4)),
    (FORWARD, 1, {"dtype": FULL}, (16, 64, 32, 4, 3)),
    (FORWARD, 2048, {"dtype": FULL}, (64, 64, 32, 4, 3)),
    (FORWARD, 2048, {"dtype": FULL, "n": 1}, (64, 16, 32, 4, 3)),
    (SHRINK, 1, {}, (16, 16, 64, 4, 4)),
    (SHRINK, 2048, {"rank": 256}, (64, 64, 64, 4, 4)),
    (WEIGHT_GRAD, 128, {}, (32, 16, 128, 4, 2)),
    (WEIGHT_GRAD, 2048, {}, (32, 16, 128, 4, 2)),
    (WEIGHT_GRAD, 256, {"rank": 256, "k": 1}, (32, 128, 16, 4, 2)),
    (WEIGHT_GRAD, 256, {"dtype": FULL}, (32, 16, 64, 4, 2)),
    (FULL_GRAD, 256, {"n": 1}, (64, 16, 128, 4, 3)),
    (FULL_GRAD, 256, {"dtype": FULL}, (32, 64, 64, 4, 3)),
]


def numbers(tile):
    return tile.block_m, tile.block_n, tile.block_k, tile.warps, tile.stages


@pytest.mark.parametrize(("operation", "rows", "changes", "wanted"), MEASURED)
def test_the_heuristic_takes_the_tiles_that_were_measured_to_be_best(
    operation, rows, changes, wanted
):
    asked = problem(**{"operation": operation, "rows": rows * 128, **changes})
    assert numbers(sm.choose(asked, HOPPER).tile) == wanted
    assert numbers(sm.choose(asked._replace(rows=rows * 128 + 127), HOPPER).tile) == wanted


@pytest.mark.parametrize(
    ("operation", "rows", "wanted"),
    [
        (FORWARD, 1, (16, 128, 128, 4, 3)),
        (FORWARD, 2048, (128, 128, 128, 4, 3)),
        (SHRINK, 2048, (128, 16, 256, 4, 3)),
        (WEIGHT_GRAD, 2048, (128, 16, 128, 4, 3)),
        (FULL_GRAD, 1, (16, 128, 128, 4, 3)),
    ],
)
def test_the_interpreter_gets_few_large_tiles(operation, rows, wanted):
    asked = problem(operation=operation, rows=rows * 128)
    chosen = sm.choose(asked, INTERPRETER)
    assert numbers(chosen.tile) == wanted
    small = sm.choose(asked._replace(k=1, n=1, rank=1), INTERPRETER).tile
    assert (small.block_n, small.block_k) == (16, 16)
    assert chosen.tile.x_descriptor is chosen.tile.descriptor is (operation is FORWARD)
    bare = sm.choose(asked._replace(w_map=""), INTERPRETER).tile
    assert bare.x_descriptor is bare.descriptor is False


def test_wide_products_gather_where_rows_come_through_a_tensor_map():
    wide = problem(n=8192)
    assert sm.choose(wide, HOPPER).gather
    assert not sm.choose(wide._replace(n=8191), HOPPER).gather
    assert not sm.choose(wide._replace(w_map=""), HOPPER).gather
    assert not sm.choose(wide, SMALL).gather
    assert not sm.choose(wide, INTERPRETER).gather


def test_a_path_brings_the_shrink_that_it_needs():
    for operation, paths in PATHS.items():
        asked = problem(operation=operation)
        base = sm.choose(asked, HOPPER)
        for path in paths:
            plan = with_path(replace(base, shrink=None), path, asked, HOPPER)
            assert plan.path is path
            assert (plan.shrink is None) is (path not in (sm.Path.EPILOGUE, sm.Path.SPLIT))
            assert with_path(base, path, asked, HOPPER).shrink in (base.shrink, plan.shrink)


@pytest.mark.parametrize("memory", [20, 48, 99, 160, 227])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tile_that_does_not_fit_loses_stages_first_and_no_more_than_it_must(memory, dtype):
    device = replace(HOPPER, shared_memory=memory * 1024)
    asked = problem(dtype=dtype)
    tile = sm.Tile(block_m=128, block_n=256, block_k=64, warps=8, stages=4)
    room = device.shared_memory - 8 * 1024
    steps = [
        *(replace(tile, stages=stages) for stages in (4, 3, 2)),
        *(replace(tile, stages=2, block_n=n) for n in (128, 64, 32)),
        *(replace(tile, stages=2, block_n=32, block_k=k) for k in (32, 16)),
    ]
    fitting = [step for step in steps if stage_bytes(step, dtype) * step.stages <= room]
    assert fit(tile, asked, device) == (fitting or steps[-1:])[0]
    edge = stage_bytes(tile, dtype) * 4 + 8 * 1024
    assert fit(tile, asked, replace(device, shared_memory=edge)) == tile
    assert fit(tile, asked, replace(device, shared_memory=edge - 1)).stages == 3
    assert stage_bytes(tile, dtype) == (128 + 256) * 64 * dtype.itemsize


def test_variations_are_other_tiles_that_fit():
    tile = sm.Tile(block_m=64, block_n=64, block_k=32, warps=4, stages=3)
    found = [numbers(other)[1:] for other in variations(tile, problem(), HOPPER)]
    assert found == [
        (64, 32, 4, 2), (64, 32, 4, 4), (32, 32, 4, 3), (32, 32, 4, 3), (64, 64, 4, 2),
        (64, 32, 8, 3),
    ]  # fmt: skip
    thin = replace(tile, block_n=16, warps=8, stages=1)
    found = [numbers(other)[1:] for other in variations(thin, problem(), HOPPER)]
    assert found == [(16, 32, 8, 2), (16, 64, 8, 2), (16, 32, 4, 1)]
    plans = sm.candidates(problem(), HOPPER)
    assert len(set(plans)) == len(plans)


@pytest.mark.parametrize("rank", [1, 16, 64, 65, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("device", [HOPPER, SMALL], ids=["large", "small"])
def test_a_kernel_with_the_whole_rank_keeps_its_accumulators_in_registers(device, dtype, rank):
    asked = problem(rank=rank, dtype=dtype)
    held = max(16, 1 << (rank - 1).bit_length())
    tile = with_path(sm.choose(asked, device), sm.Path.RECOMPUTE, asked, device).tile
    assert not tile.descriptor
    assert not tile.x_descriptor
    assert tile.warps == (8 if rank > 64 else 4)
    assert tile.block_m == (64 if dtype.itemsize == 2 else 32)
    room = 192 * 32 * tile.warps // tile.block_m
    assert tile.block_n + held <= room or tile.block_n == 16
    assert 2 * tile.block_n + held > room or tile.block_n == (128 if dtype.itemsize == 2 else 64)
    assert (tile.block_k, tile.stages <= 3) == (32, True)

    def used(stages: int) -> int:
        step = (tile.block_m + tile.block_n + held) * 32 * dtype.itemsize
        return step * stages + held * tile.block_n * dtype.itemsize

    assert used(tile.stages) <= device.shared_memory or tile.stages == 1
    assert tile.stages == 3 or used(tile.stages + 1) > device.shared_memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 64, 2**17])
def test_low_rank_products_through_pointers_stay_below_wgmma_on_sm_90(rows, dtype):
    """What ptxas of CUDA 12.8 compiles wrongly is neither chosen nor tried."""
    asked = problem(rows=rows, dtype=dtype, w_map="")
    plans = (sm.choose(asked, HOPPER), *sm.candidates(asked, HOPPER))
    assert all(plan.tile.block_m <= 32 for plan in plans)
    mapped = asked._replace(w_map="nk")
    plans = sm.candidates(mapped, HOPPER)
    assert all(plan.tile.block_m <= 32 for plan in plans if plan.path is sm.Path.FUSED)
    tallest = max(plan.tile.block_m for plan in plans)
    newer = replace(HOPPER, capability=(10, 0))
    assert max(plan.tile.block_m for plan in sm.candidates(asked, newer)) >= tallest
    assert (tallest > 32) == (rows > 64)


@pytest.mark.parametrize(("rows", "steps"), [(8 * 128, {16}), (64 * 128, {16, 32, 64, 128})])
def test_gradients_are_tried_in_steps_of_up_to_twice_the_rows_of_an_expert(rows, steps):
    """The limit of products through pointers is none of theirs: their rows are reduced over."""
    asked = problem(operation=WEIGHT_GRAD, rows=rows, w_map="")
    first, *others = [plan.tile.block_m for plan in sm.candidates(asked, HOPPER)]
    assert first == 32
    assert set(others) == {*steps, 32}


@pytest.mark.parametrize("path", [sm.Path.EPILOGUE, sm.Path.FUSED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_stated_plan_that_would_be_compiled_wrongly_is_refused(path, dtype):
    """A tile of 64 rows over pointers; 32 rows, a tensor map, no LoRA, and other GPUs are taken."""
    asked = problem(dtype=dtype, w_map="")
    right = with_path(sm.choose(asked, HOPPER), path, asked, HOPPER)
    check_height(right, dtype, 16, HOPPER)
    tall = replace(right, tile=replace(right.tile, block_m=64))
    words = "64 rows per tile.*H100.*through pointers is compiled right with at most 32"
    with pytest.raises(ValueError, match=words):
        check_height(tall, dtype, 16, HOPPER)
    check_height(tall, dtype, 0, HOPPER)
    check_height(tall, dtype, 16, SMALL)
    check_height(tall, torch.float32, 16, HOPPER)
    check_height(replace(tall, path=sm.Path.SPLIT), dtype, 16, HOPPER)
    check_height(replace(tall, tile=replace(tall.tile, descriptor=True)), dtype, 16, HOPPER)


@pytest.mark.parametrize("layout", ["", "nk"])
@pytest.mark.parametrize("rank", [1, 16, 128])
def test_no_candidate_is_refused(layout, rank):
    asked = problem(w_map=layout, rank=rank)
    for plan in sm.candidates(asked, HOPPER):
        check_height(plan, asked.dtype, rank, HOPPER)


def test_a_bucket_is_a_model_size_and_powers_of_two():
    words = "lora_forward bfloat16 m128 k2048 n1536 r16 nk"
    assert plan_table.bucket(problem()) == words
    assert plan_table.bucket(problem(rank=3, rows=65 * 128)) == words
    assert plan_table.bucket(problem(rank=17)) == words.replace("r16", "r32")
    assert plan_table.bucket(problem(rank=0, w_map="")) == (
        words.replace("r16", "r0").replace("nk", "pointers")
    )


def test_this_machines_table_wins_over_the_shipped_one_and_both_over_the_heuristic(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setattr(plan_table, "SHIPPED", tmp_path / "shipped")
    device = replace(HOPPER, name=" A (new)  GPU-7! ")
    asked, fresh = problem(), itertools.count()

    def installed():
        # The answer is remembered by device: another number of multiprocessors is another device.
        return plan_table.installed_table(replace(device, multiprocessors=next(fresh)))

    assert not installed().plans
    tuned = plan_table.tuned_path(device)
    assert tuned == tmp_path / ".cache/scattermoe_lora/plans/a-new-gpu-7.json"
    shipped = tmp_path / "shipped" / "a-new-gpu-7.json"
    for path, stages in ((shipped, 2), (tuned, 1)):
        chosen = sm.choose(asked, device)
        plan = replace(chosen, tile=replace(chosen.tile, stages=stages))
        plan_table.write_table(path, device, {plan_table.bucket(asked): plan})
        assert installed().lookup(asked) == plan
        assert installed().source == str(path)
    tuned.write_text("{}")
    with pytest.warns(UserWarning, match="is not used: it is malformed"):
        assert installed().source == str(shipped)
    assert plan_table.installed_table(INTERPRETER) is plan_table.EMPTY


def test_a_launch_takes_the_plan_of_the_table_and_else_of_the_heuristic(monkeypatch):
    asked = problem()
    other = replace(sm.choose(asked, INTERPRETER), gather=True)
    table = plan_table.PlanTable(plans={plan_table.bucket(asked): other})
    monkeypatch.setattr(plan_table, "installed_table", lambda facts: table)

    def taken(n: int) -> sm.Plan:
        operation, _, experts, k, _, rank, dtype, precision, layout = asked
        find = plan_table.plan_for.__wrapped__
        cpu = torch.device("cpu")
        return find(operation, 128, experts, k, n, rank, dtype, precision, layout, cpu)

    assert taken(asked.n) == other
    assert taken(512) == sm.choose(asked._replace(n=512), INTERPRETER)


@pytest.mark.parametrize("operation", [FORWARD, WEIGHT_GRAD])
def test_no_candidate_of_a_gpu_has_more_accumulators_than_registers(operation):
    """192 of the 255 registers of a thread."""
    found = [plan.tile for plan in sm.candidates(problem(operation=operation), HOPPER)]
    assert len(found) > 3
    for tile in found:
        height = tile.block_k if operation is WEIGHT_GRAD else tile.block_m
        assert height * tile.block_n <= 192 * 32 * tile.warps, tile
