"""What a campaign draws is what the package takes, and each step of a worker has its time."""

import random
import subprocess
import time
from dataclasses import replace

import pytest
import torch

import scattermoe_lora as sm
from verify.cases import SMOKE
from verify.drawing import INTERPRETER, Drawing
from verify.draws import Draw, encoded, plan_of, run_draw
from verify.fuzz_worker import is_fixed
from verify.models import Arithmetic
from verify.routings import RoutingKind
from verify.shrink import possible
from verify.specs import KERNELS
from verify.specs.gradients import LORA_WEIGHT_GRAD
from verify.specs.linear import SCATTER2SCATTER
from verify.workers import Process, Start

pytestmark = pytest.mark.correctness

CPU = torch.device("cpu")
SPECS = {spec.name: spec for spec in KERNELS}
DRAW = Draw(kernel="scatter2scatter", case=SMOKE[0], dtype="float32", mode="balanced")


def test_what_the_package_refuses_is_not_drawn():
    """More choices than experts, without ids that stand for no expert."""
    crowded = replace(SMOKE[0], experts=2, top_k=3)
    kinds = ("uniform", "alternating", "one", "repeated", "sentinels", "all-sentinels")
    allowed = [kind for kind in kinds if possible(replace(crowded, routing=RoutingKind(kind)))]
    assert allowed == ["all-sentinels"]
    assert all(possible(replace(SMOKE[0], routing=RoutingKind(kind))) for kind in kinds)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_kernel_is_defined_for_what_is_drawn(name):
    """And for its listed cases, which are drawn from."""
    spec = SPECS[name]
    assert all(spec.admits(case) for case in spec.cases)
    pool = {"dtype": "float32", "path": "", "plan": None, "label": "", "unavailable": ""}
    drawing = Drawing(
        kernels={name: spec},
        pools={name: [pool]},
        fixed=frozenset({name} if is_fixed(spec, CPU) else ()),
        limits=replace(INTERPRETER, tokens=12, width=20, work=2e4),
        random=random.Random(7),
    )
    for _ in range(40):
        draw = drawing.fresh()
        inputs = spec.inputs(draw.case, torch.float32, draw.mode, CPU, seed=draw.seed)
        with torch.enable_grad():
            assert spec.reference(inputs, Arithmetic())
        assert spec.admits(drawing.resized(drawing.varied(draw)).case)


@pytest.mark.parametrize("operand", ["x", "dy"])
@pytest.mark.parametrize("scaling", [0.25, 1.7, 16.0, -16.0])
@pytest.mark.parametrize("sizes", [{}, {"k_in": 1, "n_out": 400, "rank": 1}, {"tokens": 3000}])
def test_huge_values_stay_finite_on_the_way(operand, scaling, sizes):
    """The rank-R intermediate is stored, too, and before it is scaled it is a sum in fp32: an
    infinity in either would be no fault of a kernel. Nor would one in the sum of a bias's gradient.
    """
    case = replace(SMOKE[0], values=f"huge-{operand}", scaling=scaling, bias=True, **sizes)
    for dtype in (torch.float16, torch.bfloat16):
        inputs = LORA_WEIGHT_GRAD.inputs(case, dtype, "balanced", CPU)
        assert all(inputs[name].isfinite().all() for name in ("x", "dy", "xa", "yb"))
        sums = [inputs["yb"].abs().max() / abs(scaling)]
        sums += [inputs["dy"].float().cumsum(0).abs().max()]
        assert all(torch.tensor(float(each), dtype=torch.float32).isfinite() for each in sums)
        assert float(sums[1]) < torch.finfo(dtype).max


@pytest.mark.parametrize("height", [32, 64])
def test_a_plan_without_its_tensor_map_is_no_taller_than_those_offered(height):
    """What is right with a tensor map may be compiled wrongly over pointers."""
    inputs = SCATTER2SCATTER.inputs(SMOKE[0], torch.float16, "balanced", CPU)
    (offered, *_) = SCATTER2SCATTER.plans(sm, inputs)
    pointers = replace(offered.plan.tile, descriptor=False, x_descriptor=False, block_m=32)
    spec = replace(
        SCATTER2SCATTER,
        plans=lambda *_: (replace(offered, plan=replace(offered.plan, tile=pointers)),),
    )
    mapped = replace(offered.plan, tile=replace(pointers, descriptor=True, block_m=height))
    draw = replace(DRAW, path="tiles", plan=encoded(sm, mapped), dtype="float16")
    assert plan_of(sm, spec, inputs, draw).plan.tile == pointers


@pytest.mark.parametrize(
    ("message", "seconds"),
    [
        ({"compiled": "product_kernel"}, 60),
        ({"launch": DRAW.as_json()}, 60),
        ({"returned": True}, 240),
    ],
)
def test_each_step_has_its_own_time_and_the_judge_four_times_as_much(message, seconds, tmp_path):
    start = Start(device="cpu", journal=tmp_path / "journal", log=tmp_path / "log")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(["cat"], start_new_session=True, **pipes) as popen:
        process = Process(start=start, popen=popen)
        process.tell(1, DRAW, patience=0.1)
        time.sleep(0.11)
        assert process.late
        process.patience = 60.0
        assert not process.progressed({"done": {}})
        assert process.late
        now = time.monotonic()
        assert process.progressed({"id": 1, **message})
        assert now + seconds <= process.deadline <= time.monotonic() + seconds
        process.kill()


def test_a_draw_says_when_it_is_launched_and_when_the_launch_is_done(device):
    said = []
    outcome = run_draw(
        sm,
        SCATTER2SCATTER,
        DRAW,
        device,
        announce=lambda launch: said.append(launch.draw.kernel),
        returned=lambda: said.append("returned"),
    )
    assert outcome.status == "passed"
    assert said == ["scatter2scatter", "returned"]
