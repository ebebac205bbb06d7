"""Every kernel, path and boundary agrees with its reference; bad input is refused; paths agree
bitwise.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import scattermoe_lora as lib
from conftest import DEVICE
from verify.captured import FAMILIES
from verify.cases import CASES, EDGES, LAYOUTS, VALUES
from verify.coverage import boundaries, tails
from verify.findings import read, write_failure
from verify.inputs import DTYPES
from verify.report import failure_line
from verify.routings import KINDS, expert_counts
from verify.run import Outcome, Problem, Selection, dtype_name, guarded_run
from verify.spec import KernelSpec
from verify.specs import KERNELS
from verify.specs.linear import LORA_FORWARD, SCATTER2SCATTER
from verify.strategies import cases

pytestmark = pytest.mark.correctness

QUICK = Selection(quick=True).problems(lib, KERNELS, torch.device(DEVICE))


def told(problem: Problem, outcomes: Iterable[Outcome], directory: Path) -> str:
    """What is not right, a line each that ends with the command which reruns it."""
    return "\n".join(
        failure_line(
            outcome,
            f"python -m verify replay {write_failure(directory, outcome, problem)} "
            f"--device {DEVICE}",
        )
        for outcome in outcomes
        if not outcome.ok
    )


def name(problem: Problem) -> str:
    words = (problem.spec.name, problem.case.name, dtype_name(problem.dtype), problem.mode)
    return "-".join(words)


@pytest.mark.parametrize("problem", QUICK, ids=name)
def test_kernel_agrees_with_its_reference(problem, tmp_path):
    outcomes = list(problem.check(lambda plan: plan.quick))
    assert outcomes
    assert all(outcome.ok for outcome in outcomes), told(problem, outcomes, tmp_path)


def test_a_failure_is_told_whole_and_can_be_rerun(tmp_path):
    problem = replace(QUICK[-1], spec=replace(QUICK[-1].spec, run=lambda lib, inputs, plan: {}))
    outcomes = list(problem.check(lambda plan: plan.quick))
    *lines, last = told(problem, outcomes, tmp_path).splitlines()
    assert len(lines) + 1 == len(list(tmp_path.iterdir())) == len(outcomes)
    file = Path(last.split("; rerun: python -m verify replay ")[1].split()[0])
    assert read(file).draw.case == problem.case


TILED = {spec.name: spec for spec in KERNELS if spec.name in {o.value for o in lib.Operation}}
ROWS = {"no rows", "empty expert", "one row", "under", "at", "over", "part of a tile"}
WIDTHS = {f"{name} {kind}" for name in "KN" for kind in ("even", "below", "tail")}


@pytest.mark.parametrize("kernel", TILED)
def test_the_quick_selection_meets_every_path_and_both_sides_of_every_boundary(kernel):
    """Counts of rows around the height of a tile, widths around its blocks, ranks around 16."""
    spec, met, reasons = TILED[kernel], defaultdict(set), defaultdict(set)
    for problem in QUICK:
        if problem.spec is not spec:
            continue
        case = problem.case
        inputs = spec.inputs(case, problem.dtype, problem.mode, torch.device("cpu"))
        counts = expert_counts(inputs["top_k_index"], case.experts)
        for plan in spec.plans(lib, inputs):
            if plan.unavailable:
                reasons[plan.path].add(plan.unavailable)
            elif plan.quick:
                met[plan.path] |= {
                    *boundaries(counts, plan.plan.tile),
                    *tails(case, plan.plan.tile),
                }
    paths = {path.value for path in lib.plan.PATHS[lib.Operation(kernel)]}
    assert paths == set(met) | set(reasons)
    assert set(reasons) <= {"grouped_mm"}
    for path, words in met.items():
        wanted = ROWS | WIDTHS | {"R even", "R below", "R tail"}
        assert wanted <= words, (path, sorted(wanted - words))


PIPELINES = {"expert_linear", "experts_mlp"}


def is_linear(spec) -> bool:
    """Whether a kernel has the cases of all linear problems, or nearly so for a reason told."""
    shared = {case.name for case in EDGES} <= {case.name for case in spec.cases}
    return shared or spec.name in ("group", "experts_mlp")


LINEAR = tuple(spec for spec in KERNELS if is_linear(spec))


def test_kernels_of_linear_problems_have_the_cases_of_all():
    products = {"scatter2scatter", "shrink", "lora_forward", "lora_input_grad"}
    gradients = {"lora_weight_grad", "expert_weight_grad", "expert_bias_grad", "combine_grad"}
    others = {"combine", "glu_forward", "glu_backward", "expert_linear"}
    assert products | gradients | others <= {spec.name for spec in LINEAR}


@pytest.mark.parametrize("spec", LINEAR, ids=lambda spec: spec.name)
def test_every_kind_of_routing_layout_and_value_is_met(spec):
    """By the quick selection; of pipelines, whose kernels meet all of them, by the full one."""
    cases = [problem.case for problem in QUICK if problem.spec is spec]
    layouts, values = set(LAYOUTS), set(VALUES)
    routings, adapters = set(KINDS), {"same", "float32"}
    if spec.name in PIPELINES:
        cases = [case for case in spec.cases if "model" not in case.tags]
    if spec.name == "experts_mlp":
        # Products of two projections overflow, and the layer checks no strided or fp32 operand
        # that its projections do not.
        layouts, adapters = {"contiguous", "transposed"}, {"same"}
        values -= {"huge-x", "huge-dy", "tiny-x"}
    if spec.name == "group":
        values, routings = values - {"tiny-dy"}, routings - {"only"}
    assert {case.weight_layout for case in cases} >= layouts
    assert {case.x_layout for case in cases} >= layouts
    assert {case.values for case in cases} >= values
    assert {case.routing.name for case in cases} >= routings
    assert {case.lora_dtype for case in cases} >= adapters
    assert {case.family for case in cases} >= {"", *FAMILIES}
    sizes = [(case.k_in % 2, case.n_out % 2, case.rank % 2) for case in cases]
    assert {(0, 0, 0), (0, 0, 1)} <= set(sizes)
    assert (1, 1, 1) in sizes or spec.name in ("experts_mlp", "glu_forward", "glu_backward")


@pytest.mark.parametrize("values", [kind for kind in VALUES if kind != "normal"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_kind_of_value_is_what_its_name_says(values, dtype):
    """In the storage type of the operands: a kind that fell out would test nothing."""
    finfo = torch.finfo(dtype)
    (case, *_) = (case for case in CASES if case.values == values)
    inputs = LORA_FORWARD.inputs(case, dtype, "balanced", torch.device("cpu"))
    kind, _, name = values.partition("-")
    if kind in ("tiny", "huge"):
        sizes = inputs[name].float().abs()
        if kind == "tiny":
            assert ((sizes > 0) & (sizes < finfo.smallest_normal)).float().mean() > 0.5
        else:
            assert sizes.max() > finfo.max / 2**10
            assert torch.isfinite(sizes).all()
    elif kind == "scales":
        norms = inputs["weight"].float().flatten(1).abs().amax(1)
        assert norms.max() / norms.min() > 2.0**6
    elif kind == "not":
        bad = [(~torch.isfinite(inputs[name])).any(1).sum() for name in ("x", "dy")]
        assert bad[0] == 2
        assert bad[1] == (0 if case.drops else 2)
        assert inputs["x"].isnan().any()
        assert inputs["x"].isinf().any()
    else:
        assert inputs["x"].float().mean() > 0.5


@pytest.mark.parametrize(
    ("spec", "bad"),
    [(spec, bad) for spec in KERNELS for bad in spec.bad_inputs],
    ids=lambda value: getattr(value, "name", None),
)
def test_bad_input_is_refused_before_anything_runs(spec: KernelSpec, bad):
    case = spec.cases[0]
    inputs = spec.inputs(case, torch.float32, "balanced", torch.device(DEVICE))
    with pytest.raises(bad.error) as raised:
        bad.call(lib, inputs)
    assert [word for word in bad.words if word not in str(raised.value)] == []


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("spec", [s for s in KERNELS if "exact" in s.modes], ids=lambda s: s.name)
def test_paths_agree_bitwise_in_exact_arithmetic(spec, dtype):
    case = next(case for case in spec.cases if "smoke" in case.tags)
    inputs = spec.inputs(case, dtype, "exact", torch.device(DEVICE))
    plans = [plan for plan in spec.plans(lib, inputs) if plan.quick and not plan.unavailable]
    outputs = [guarded_run(lib, spec, inputs, plan.plan)[0] for plan in plans]
    for other in outputs[1:]:
        for output, value in outputs[0].items():
            assert torch.equal(value, other[output]), output


@pytest.mark.parametrize("spec", KERNELS, ids=lambda spec: spec.name)
def test_repeated_runs_agree_bitwise(spec):
    case = next(case for case in spec.cases if "smoke" in case.tags)
    dtype = spec.dtypes[-1]
    inputs = spec.inputs(case, dtype, spec.modes[0], torch.device(DEVICE))
    plan = spec.plans(lib, inputs)[0].plan
    first, second = (guarded_run(lib, spec, inputs, plan)[0] for _ in range(2))
    for output, value in first.items():
        assert torch.equal(value.nan_to_num(), second[output].nan_to_num()), output


@given(case=cases(), dtype=st.sampled_from(list(DTYPES.values())), spec=st.sampled_from((0, 1)))
def test_any_small_problem(tmp_path_factory, case, dtype, spec):
    kernel = (SCATTER2SCATTER, LORA_FORWARD)[spec]
    mode = "exact" if case.seed % 2 else "balanced"
    problem = Problem(
        lib=lib, spec=kernel, case=case, dtype=dtype, mode=mode, device=torch.device(DEVICE)
    )
    first = next(iter(problem.check(lambda plan: plan.quick)))
    harmless = first.ok or "could not see it lost" in first.reason
    assert harmless, told(problem, [first], tmp_path_factory.mktemp("failures"))
