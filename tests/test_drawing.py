"""What a campaign draws is what the package takes, and a worker has time to compile it."""

import subprocess
import time
from dataclasses import replace

import pytest
import torch

from verify.cases import SMOKE
from verify.draws import Draw
from verify.routings import RoutingKind
from verify.shrink import possible
from verify.specs.gradients import LORA_WEIGHT_GRAD
from verify.workers import Process, Start

pytestmark = pytest.mark.correctness

CPU = torch.device("cpu")
DRAW = Draw(kernel="scatter2scatter", case=SMOKE[0], dtype="float32", mode="balanced")


def test_what_the_package_refuses_is_not_drawn():
    """More choices than experts, without ids that stand for no expert."""
    crowded = replace(SMOKE[0], experts=2, top_k=3)
    kinds = ("uniform", "alternating", "one", "repeated", "sentinels", "all-sentinels")
    allowed = [kind for kind in kinds if possible(replace(crowded, routing=RoutingKind(kind)))]
    assert allowed == ["all-sentinels"]
    assert all(possible(replace(SMOKE[0], routing=RoutingKind(kind))) for kind in kinds)


@pytest.mark.parametrize("operand", ["x", "dy"])
@pytest.mark.parametrize("scaling", [1.7, 16.0, -16.0])
def test_huge_values_stay_finite_on_the_way(operand, scaling):
    """The rank-R intermediate is stored, too: an infinity in it would be no fault of a kernel."""
    case = replace(SMOKE[0], values=f"huge-{operand}", scaling=scaling)
    for dtype in (torch.float16, torch.bfloat16):
        inputs = LORA_WEIGHT_GRAD.inputs(case, dtype, "balanced", CPU)
        assert all(inputs[name].isfinite().all() for name in ("x", "dy", "xa", "yb"))


def test_a_worker_that_compiles_gets_its_time_anew(tmp_path):
    start = Start(device="cpu", journal=tmp_path / "journal", log=tmp_path / "log")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(["cat"], start_new_session=True, **pipes) as popen:
        process = Process(start=start, popen=popen)
        process.tell(1, DRAW, patience=0.1)
        time.sleep(0.11)
        assert process.late
        process.patience = 60.0
        process.wait_again()
        assert not process.late
        process.kill()
