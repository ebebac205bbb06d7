"""What the judge allows where errors have a common cause, and what it holds while it finds out."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from verify.calibrate import linear, weight_grad
from verify.cases import Case
from verify.compare import compare
from verify.expected import Expected
from verify.inputs import Inputs
from verify.models import Arithmetic
from verify.numerics import BLOCK, Uncertain, freedom
from verify.references import Groups
from verify.routings import RoutingKind
from verify.specs.glu import activation_of
from verify.specs.gradients import LORA_WEIGHT_GRAD
from verify.specs.layer import EXPERTS_MLP
from verify.specs.linear import LORA_FORWARD, SCATTER2SCATTER
from verify.specs.projection import EXPERT_LINEAR
from verify.specs.rows import COMBINE

pytestmark = pytest.mark.correctness

DTYPE = torch.float16
CLIPPED = Case(
    name="clipped", tokens=4000, experts=1, top_k=1, k_in=16, n_out=24, rank=2,
    routing=RoutingKind("uniform"), source="TOKEN", target="SLOT", gradient="TOKEN", gated=True,
    values="offset",
)  # fmt: skip
"""One expert with so many rows that all but common errors average away, under a clip at 2.5."""
PARALLEL = replace(
    CLIPPED, name="drawn", tokens=5737, experts=4, top_k=4, k_in=127, n_out=80, rank=1,
    routing=RoutingKind("boundary", (128, 0)), values="normal",
)  # fmt: skip
"""Rank 1: what the one element of its intermediate errs by moves a whole row along one line."""


def drawn(case: Case, seed: int) -> Inputs:
    return EXPERTS_MLP.inputs(case, DTYPE, "balanced", torch.device("cpu"), seed=seed)


def right(inputs: Inputs) -> dict[str, Tensor]:
    """Result and gradient of the gates as a right kernel has them: rounded where one rounds."""
    case, exact = inputs.case, {name: value.double() for name, value in inputs.tensors.items()}
    activation = activation_of(case)
    groups = Groups.of(inputs["top_k_index"], case.experts)
    y = torch.zeros(case.rows, case.k_in, dtype=torch.float64)
    products = torch.zeros(case.rows, dtype=torch.float64)

    def rounded(value: Tensor) -> Tensor:
        return value.to(DTYPE).double()

    for expert, rows in enumerate(groups.slices):
        slots = groups.slots[rows]
        (w1, a1, b1), (w2, a2, b2) = (
            [exact[f"{part}_{name}"][expert] for part in ("weight", "lora_a", "lora_b")]
            for name in ("up", "down")
        )
        x, dout = (exact[name][slots // case.top_k] for name in ("x", "dout"))
        h = rounded(x @ w1 + rounded(inputs.scaling * x @ a1.mT) @ b1.mT)
        act = activation(*activation.halves(h))
        stored = rounded(act)
        y[slots] = rounded(stored @ w2 + rounded(inputs.scaling * stored @ a2.mT) @ b2.mT)
        dact = rounded(dout @ w2.mT + rounded(inputs.scaling * dout @ b2) @ a2)
        products[slots] = (act * dact).sum(1)
    choices = y.view(case.tokens, case.top_k, case.k_in)
    out = (exact["gates"][..., None] * choices).sum(1)
    return {"out": out.to(DTYPE), "dgates": products.view(case.tokens, case.top_k).float()}


@pytest.mark.parametrize(
    ("case", "seed"),
    [
        (replace(CLIPPED, seed=3), 0),
        (replace(CLIPPED, seed=8), 0),
        (replace(CLIPPED, seed=18), 0),
        (PARALLEL, 2768),
    ],
    ids=["clipped-3", "clipped-8", "clipped-18", "parallel"],
)
def test_right_results_pass_and_a_fault_of_0_2_percent_does_not(case, seed):
    assert (activation_of(case).limit == 2.5) == (case.name == "clipped")
    inputs = drawn(case, seed)
    expected = EXPERTS_MLP.reference(inputs, Arithmetic())
    for name, value in right(inputs).items():
        found = compare(name, value, expected[name])
        assert found.ok, str(found)
        wrong = compare(name, (1.002 * value.double()).to(value.dtype), expected[name])
        assert not wrong.ok
        assert wrong.measure == "slope"


@pytest.mark.parametrize("spec", [SCATTER2SCATTER, LORA_FORWARD], ids=lambda spec: spec.name)
def test_equal_rows_that_err_alike_are_few_when_factors_are_fitted(spec):
    """Eleven choices of one expert by each of twelve tokens: twelve roundings, not 132."""
    case = replace(
        PARALLEL, tokens=12, experts=14, top_k=11, k_in=96, n_out=1, rank=1, target="EXPERT",
        routing=RoutingKind("repeated"), gated=False, gradient="",
    )  # fmt: skip
    slopes, faults = [], []
    for seed in range(120):
        inputs = spec.inputs(case, DTYPE, "balanced", torch.device("cpu"), seed=seed)
        expected = spec.reference(inputs, Arithmetic())["y"]
        results = (expected.value, 1.02 * expected.value)
        right, wrong = (compare("y", y.to(DTYPE), expected) for y in results)
        slopes.append(right.ratios["slope"])
        faults.append(wrong.ratios["slope"])
    assert 0.3 < max(slopes) < 0.8
    assert min(faults) > 1


@pytest.mark.parametrize("gated", [False, True])
def test_each_rounding_of_a_row_may_push_a_parallel_line_as_far_as_it_can(gated):
    """Rows of one token have one x: dA gets all that the roundings of their yb, and of its product
    with a gate, err by along it.
    """
    case = replace(
        PARALLEL, tokens=48, experts=64, top_k=2, k_in=200, n_out=200, rank=32, gradient="",
        target="EXPERT", routing=RoutingKind("repeated"), gated=gated,
    )  # fmt: skip
    found, device = [], torch.device("cpu")
    for seed in range(4):
        inputs = LORA_WEIGHT_GRAD.inputs(case, torch.bfloat16, "balanced", device, seed=seed)
        expected = LORA_WEIGHT_GRAD.reference(inputs, Arithmetic())
        for name, got in weight_grad(inputs).items():
            found.append(compare(name, got, expected[name]).ratios["row"])
    assert 0.6 < max(found) < 1


@pytest.mark.parametrize(
    ("changes", "dtype", "seed"),
    [
        (
            {"tokens": 37, "top_k": 2, "rank": 6, "routing": RoutingKind("holes", (36,)),
             "source": "EXPERT", "weight_layout": "transposed", "values": "offset", "bias": True},
            torch.float16, 6651,
        ),
        (
            {"tokens": 137, "experts": 36, "top_k": 6, "rank": 64,
             "routing": RoutingKind("repeated")},
            torch.bfloat16, 39372,
        ),
    ],
    ids=["rows about one offset", "equal rows"],
)  # fmt: skip
def test_what_a_factor_is_rounded_by_reaches_all_rows_of_its_expert(changes, dtype, seed):
    """And pushes the lines of dA and dB one way where these rows are much alike."""
    drawn = replace(
        PARALLEL, k_in=96, n_out=80, target="EXPERT", gradient="", gated=False, scaling=0.25,
        lora_dtype="float32",
    )  # fmt: skip
    case = replace(drawn, **changes)
    inputs = EXPERT_LINEAR.inputs(case, dtype, "balanced", torch.device("cpu"), seed=seed)
    expected, got = EXPERT_LINEAR.reference(inputs, Arithmetic()), linear(inputs)
    rows = [compare(name, got[name], expected[name]).ratios["row"] for name in ("da", "db")]
    assert 0.3 < max(rows) < 1


@pytest.mark.parametrize(
    ("truth", "got", "right"),
    [
        (65504.0, torch.inf, True),
        (65519.0, torch.inf, True),
        (65600.0, 65504.0, True),
        (-65519.0, -torch.inf, True),
        (65100.0, torch.inf, False),
        (66000.0, 65504.0, False),
        (65519.0, torch.nan, False),
        (65519.0, -torch.inf, False),
        (65600.0, 65000.0, False),
        (1.0, torch.inf, False),
    ],
)
def test_what_lies_beside_the_largest_number_may_overflow_or_not(truth, got, right):
    """The rounding of fp16 there has a standard deviation of 32 / sqrt(12): 16 of them are 148."""
    value = torch.ones(8, 16, dtype=torch.float64)
    value[3, 5] = truth
    labels = torch.zeros(8, dtype=torch.int64)
    expected = Expected(
        value=value,
        model=Uncertain.exact(value).rounded(DTYPE),
        dtype=DTYPE,
        expert=labels,
        sources=labels + 1,
        zero=labels > 0,
    )
    result = value.to(DTYPE)
    result[3, 5] = got
    assert compare("y", result, expected).ok == right


class Largest(TorchDispatchMode):
    """The most elements of a tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.elements = max(self.elements, made.numel())
        return made


@pytest.mark.parametrize("top_k", [1, 2, 9])
def test_products_below_the_normal_numbers_are_rounded_once_each_in_a_sum(top_k):
    """fp32 rows of subnormal numbers, multiplied by their gates and summed in fp32."""
    case = replace(
        PARALLEL, tokens=6304, experts=107, top_k=top_k, rank=16, routing=RoutingKind("uniform"),
        gradient="", values="tiny-x",
    )  # fmt: skip
    inputs = COMBINE.inputs(case, torch.float32, "balanced", torch.device("cpu"), seed=0)
    expected = COMBINE.reference(inputs, Arithmetic())["out"]
    out = torch.zeros(case.tokens, case.n_out)
    for choice, gates in zip(
        inputs["y"].view(case.tokens, top_k, -1).unbind(1), inputs["gates"].unbind(1), strict=True
    ):
        out = out + gates[:, None] * choice
    found = compare("out", out, expected)
    assert 0.1 < found.ratios["row"] < 0.6, str(found)
    assert not compare("out", 1.00001 * out, expected).ok


def test_degrees_of_freedom_take_no_square_of_the_rows():
    rows, width = 5000, 3
    generator = torch.Generator().manual_seed(0)
    variance = torch.rand(2, rows, generator=generator, dtype=torch.float64)
    right = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    with Largest() as largest:
        found = freedom(variance, right)
    assert largest.elements <= BLOCK < rows**2
    # || sum_k v[k] r[k] r[k]^T ||^2 is the sum of v[i] v[j] (r[i] r[j])^2.
    spread = torch.einsum("mk,ki,kj->mij", variance, right, right)
    energy = torch.einsum("mii->m", spread)
    torch.testing.assert_close(found, energy.square() / spread.square().sum((1, 2)))
    parallel = torch.ones(rows, width, dtype=torch.float64)
    torch.testing.assert_close(freedom(variance, parallel), torch.ones(2, dtype=torch.float64))
    whole, alike = torch.eye(4, dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
    torch.testing.assert_close(freedom(alike, whole), torch.tensor([4.0], dtype=torch.float64))
