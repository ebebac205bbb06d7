"""Both sides of what a kernel does otherwise from some size on, and that size itself.

Heights and widths of tiles are in `test_kernels`, sizes from which a plan changes in `test_plan`,
experts that are summed in parts in `test_gram_parts`, columns summed in halves in `test_laws`.
"""

from dataclasses import replace

import pytest
import torch

import scattermoe_lora as lib
from conftest import DEVICE
from scattermoe_lora.ops.scatter2scatter import EARLY_RANKS, HALVED_FROM
from verify.cases import SMOKE
from verify.routings import RoutingKind, expert_counts
from verify.run import Problem
from verify.specs.linear import LORA_FORWARD, LORA_INPUT_GRAD, SCATTER2SCATTER

pytestmark = pytest.mark.correctness


@pytest.mark.parametrize("step", [-1, 0, 1], ids=["under", "at", "over"])
@pytest.mark.parametrize("spec", [LORA_FORWARD, LORA_INPUT_GRAD], ids=lambda spec: spec.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_around_what_is_loaded_early(spec, step, dtype):
    case = replace(SMOKE[0], tokens=12, rank=EARLY_RANKS.value + step)
    problem = Problem(
        lib=lib, spec=spec, case=case, dtype=dtype, mode="exact", device=torch.device(DEVICE)
    )
    outcomes = list(problem.check(lambda plan: plan.quick and plan.path == "epilogue"))
    assert outcomes
    assert [str(outcome) for outcome in outcomes if outcome.status != "passed"] == []


@pytest.mark.parametrize("source", ["TOKEN", "EXPERT"])
@pytest.mark.parametrize(
    "spec", [SCATTER2SCATTER, LORA_FORWARD, LORA_INPUT_GRAD], ids=lambda spec: spec.name
)
def test_last_tiles_around_half_of_a_tall_one(spec, source):
    """Rows that are gathered by pointers, and those that may come through a tensor map."""
    height, order = HALVED_FROM.value, {"TOKEN": "SLOT"}.get(source, source)
    case = replace(
        SMOKE[0], tokens=9 * height // 2, top_k=1, experts=3, k_in=16, n_out=16, rank=2,
        routing=RoutingKind("boundary", (3 * height // 2,)), source=source, target=order,
    )  # fmt: skip
    problem = Problem(
        lib=lib, spec=spec, case=case, dtype=torch.float32, mode="exact",
        device=torch.device(DEVICE),
    )  # fmt: skip
    inputs = problem.draw()
    tall = {
        plan.label
        for plan in spec.plans(lib, inputs)
        if plan.path in ("tiles", "epilogue") and plan.plan.tile.block_m >= height
    }
    rest = {count % height - height // 2 for count in expert_counts(inputs["top_k_index"], 3)}
    assert rest == {-1, 0, 1}
    outcomes = list(problem.check(lambda plan: plan.label in tall))
    assert outcomes
    assert [str(outcome) for outcome in outcomes if outcome.status != "passed"] == []
