"""Plans: every fact that matters changes them, several always remain, tables are refused aloud."""

import json
from dataclasses import replace

import pytest
import torch

import scattermoe_lora as sm
from scattermoe_lora import plan_table
from scattermoe_lora.plan import stage_bytes

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
