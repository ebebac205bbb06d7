"""The judge is judged: right answers pass, however drawn; each planted error is refused."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import scattermoe_lora as lib
from conftest import DEVICE
from verify import numerics
from verify.cases import Case
from verify.compare import compare
from verify.expected import Expected
from verify.inputs import DTYPES, Inputs, make_inputs
from verify.models import Arithmetic
from verify.references import Groups
from verify.routings import RoutingKind
from verify.run import LEAST_SHARE
from verify.spec import KernelSpec
from verify.specs.gradients import LORA_WEIGHT_GRAD
from verify.specs.layer import EXPERTS_MLP
from verify.specs.linear import LORA_FORWARD, SCATTER2SCATTER
from verify.specs.projection import EXPERT_LINEAR
from verify.specs.rows import COMBINE

pytestmark = pytest.mark.correctness

CPU = torch.device("cpu")
CASE = Case(
    name="judge", tokens=48, experts=6, top_k=2, k_in=512, n_out=96, rank=16, bias=True,
    routing=RoutingKind("holes", (30,)),
)  # fmt: skip
K_TILE = 32


class Simulated:
    """A right LoRA forward in plain torch: fp32 sums, rounded where a kernel rounds; `faults`
    spoil it.
    """

    def __init__(self, inputs: Inputs, *faults: str) -> None:
        self.inputs, self.faults = inputs, faults
        self.groups = Groups.of(inputs["top_k_index"], inputs.case.experts)

    def forward(self) -> dict[str, Tensor]:
        inputs, case = self.inputs, self.inputs.case
        x = inputs["x"][self.groups.places(case.source)]
        y = torch.zeros(x.shape[0], case.n_out, dtype=inputs.dtype)
        t = torch.zeros(x.shape[0], case.rank, dtype=inputs.dtype)
        for expert, rows in enumerate(self.groups.slices):
            y[rows], t[rows] = self._expert(x[rows].float(), expert)
        if "one wrong row" in self.faults:
            y[5] = y[6]
        if "wrong adapter for one row" in self.faults:
            y[:1] = self._expert(x[:1].float(), self._owner(0), adapter=self._owner(0) - 1)[0]
        if "NaN" in self.faults:
            y[7, 3] = torch.nan
        return {
            "y": self.groups.spread(y, case.target),
            "t": self.groups.spread(t, "EXPERT"),
        }

    def _owner(self, row: int) -> int:
        return next(e for e, rows in enumerate(self.groups.slices) if rows.stop > row)

    def _expert(self, x: Tensor, expert: int, adapter: int | None = None) -> tuple[Tensor, Tensor]:
        inputs, faults = self.inputs, self.faults
        adapter = expert if adapter is None else adapter
        weight = inputs["weight"][expert].float()
        factors = (inputs[name][adapter].to(inputs.dtype) for name in ("lora_a", "lora_b"))
        a, b = (factor.float() for factor in factors)
        scaling = inputs.scaling
        if "scaling 1% off" in faults:
            scaling *= 1.01
        if "scaling ignored" in faults:
            scaling = 1.0
        if "last K element lost in the base" in faults:
            weight = weight.clone()
            weight[-1] = 0
        if "last K element lost in the adapter" in faults:
            a = a.clone()
            a[:, -1] = 0
        if "last rank lost" in faults:
            b = b.clone()
            b[:, -1] = 0
        t = (scaling * (x @ a.mT)).to(inputs.dtype)
        y = self._accumulated(x, weight)
        if "LoRA dropped" not in faults:
            y = y + t.float() @ b.mT
        if "bias" in inputs.tensors and "bias dropped" not in faults:
            y = y + inputs["bias"][expert].float()
        return y.to(inputs.dtype), t

    def _accumulated(self, x: Tensor, weight: Tensor) -> Tensor:
        if "16-bit accumulation" not in self.faults:
            return x @ weight
        total = torch.zeros(x.shape[0], weight.shape[1], dtype=self.inputs.dtype)
        for start in range(0, x.shape[1], K_TILE):
            step = x[:, start : start + K_TILE] @ weight[start : start + K_TILE]
            total = (total.float() + step).to(self.inputs.dtype)
        return total.float()


def worst(inputs: Inputs, outputs: dict[str, Tensor], *, exact: bool = False) -> float:
    expected = LORA_FORWARD.reference(inputs, Arithmetic())
    return max(compare(name, outputs[name], expected[name], exact=exact).ratio for name in expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("mode", ["balanced", "lora-only", "exact"])
def test_right_answers_pass(dtype, mode):
    for seed in range(20):
        inputs = make_inputs(CASE, dtype, mode, CPU, seed=seed)
        assert worst(inputs, Simulated(inputs).forward(), exact=mode == "exact") <= 1


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_right_answers_pass_on_parallel_inputs(dtype):
    """Every row of x points the same way, so roundings of one operand move whole vectors
    together.
    """
    for seed in range(20):
        drawn = make_inputs(CASE, dtype, "balanced", CPU, seed=seed)
        parallel = (drawn["x"][:1] * torch.linspace(0.5, 2, CASE.tokens)[:, None]).to(dtype)
        inputs = drawn.having(x=parallel, lora_b=drawn["lora_b"][..., :1].expand(-1, -1, 16))
        assert worst(inputs, Simulated(inputs).forward()) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_right_answers_pass_where_a_kernel_rounds_the_factors(dtype):
    """One rank: all that K roundings of A do to a row of t moves the whole row of y."""
    case = replace(CASE, tokens=200, k_in=40, n_out=48, rank=1, bias=False, lora_dtype="float32")
    for seed in range(20):
        inputs = make_inputs(case, dtype, "balanced", CPU, seed=seed)
        assert worst(inputs, Simulated(inputs).forward()) <= 1


FAULTS = (
    "LoRA dropped",
    "bias dropped",
    "scaling 1% off",
    "scaling ignored",
    "last K element lost in the base",
    "last K element lost in the adapter",
    "last rank lost",
    "one wrong row",
    "wrong adapter for one row",
    "NaN",
)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_errors_are_refused(dtype, fault):
    ratios = []
    for seed in range(5):
        inputs = make_inputs(CASE, dtype, "balanced", CPU, seed=seed)
        ratios.append(worst(inputs, Simulated(inputs, fault).forward()))
    assert min(ratios) > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_16_bit_accumulation_is_refused(dtype):
    assert CASE.k_in >= 16 * K_TILE
    ratios = []
    for seed in range(5):
        inputs = make_inputs(CASE, dtype, "balanced", CPU, seed=seed)
        ratios.append(worst(inputs, Simulated(inputs, "16-bit accumulation").forward()))
    assert min(ratios) > 1


def test_one_unit_in_the_last_place_is_refused_in_exact_mode():
    inputs = make_inputs(CASE, torch.bfloat16, "exact", CPU)
    outputs = Simulated(inputs).forward()
    outputs["y"][0, 0] = torch.nextafter(
        outputs["y"][0, 0], torch.tensor(torch.inf, dtype=torch.bfloat16)
    )
    assert worst(inputs, outputs, exact=True) > 1


def gradients(case: Case) -> tuple[dict[str, Tensor], dict]:
    inputs = LORA_WEIGHT_GRAD.inputs(case, torch.bfloat16, "balanced", CPU)
    expected = LORA_WEIGHT_GRAD.reference(inputs, Arithmetic())
    return {name: item.value.to(item.dtype) for name, item in expected.items()}, expected


@pytest.mark.parametrize("garbage", [1e-30, -0.0, torch.nan], ids=["tiny", "minus zero", "NaN"])
def test_anything_but_zero_for_an_expert_without_rows_is_refused(garbage):
    outputs, expected = gradients(CASE)
    empty = int(expected["da"].zero.reshape(CASE.experts, -1)[:, 0].nonzero()[0])
    assert compare("da", outputs["da"], expected["da"]).ok
    outputs["da"][empty, 2, 3] = garbage
    assert not compare("da", outputs["da"], expected["da"]).ok


def test_a_token_missing_from_one_gradient_is_refused():
    outputs, expected = gradients(CASE)
    inputs = LORA_WEIGHT_GRAD.inputs(CASE, torch.bfloat16, "balanced", CPU)
    groups = Groups.of(inputs["top_k_index"], CASE.experts)
    expert = int(groups.counts.argmax())
    row = groups.bounds[expert]
    lost = inputs["yb"][row].double()[:, None] * inputs["x"][groups.places("TOKEN")[row]].double()
    outputs["da"][expert] -= lost.to(torch.bfloat16)
    assert not compare("da", outputs["da"], expected["da"]).ok


@pytest.mark.parametrize("fault", ["shape", "dtype", "none"])
def test_what_is_no_such_output_is_refused(fault):
    outputs, expected = gradients(CASE)
    wrong = {"shape": outputs["da"].mT, "dtype": outputs["da"].float(), "none": None}[fault]
    assert not compare("da", wrong, expected["da"]).ok


@pytest.mark.parametrize("spoilt", [None, 1.0, torch.inf])
def test_what_is_judged_in_blocks_is_judged_alike(spoilt, monkeypatch):
    inputs = make_inputs(CASE, torch.bfloat16, "balanced", CPU)
    inputs["x"][0, 0] = torch.inf
    got = Simulated(inputs).forward()["y"]
    if spoilt:
        got[11, 4] += spoilt
    expected = LORA_FORWARD.reference(inputs, Arithmetic())["y"]
    whole = compare("y", got, expected)
    monkeypatch.setattr(numerics, "BLOCK", 5 * CASE.n_out)
    assert compare("y", got, expected) == whole
    assert whole.ok == (spoilt is None)


def test_a_failure_names_the_place():
    inputs = make_inputs(CASE, torch.bfloat16, "balanced", CPU)
    outputs = Simulated(inputs).forward()
    outputs["y"][11, 4] += 1
    found = compare("y", outputs["y"], LORA_FORWARD.reference(inputs, Arithmetic())["y"])
    labels = Groups.of(inputs["top_k_index"], CASE.experts).labels(CASE.target)
    assert (found.where["row"], found.where["column"]) == (11, 4)
    assert found.where["expert"] == int(labels[11])
    assert found.where["got"] == pytest.approx(found.where["want"] + 1, rel=0.1)


def test_a_term_that_hides_is_reported():
    inputs = make_inputs(CASE, torch.float32, "balanced", CPU)
    drowned = inputs.having(lora_b=inputs["lora_b"] / 20)
    assert LORA_FORWARD.reference(inputs, Arithmetic())["y"].weakest_share()[1] >= LEAST_SHARE
    term, share = LORA_FORWARD.reference(drowned, Arithmetic())["y"].weakest_share()
    assert term == "lora"
    assert share < LEAST_SHARE


def non_finite(change: Callable[[Tensor], None]) -> bool:
    inputs = make_inputs(CASE, torch.float32, "balanced", CPU)
    inputs["x"][0, 0] = torch.inf
    outputs = Simulated(inputs).forward()
    change(outputs["y"])
    return compare("y", outputs["y"], LORA_FORWARD.reference(inputs, Arithmetic())["y"]).ok


def test_infinity_must_stay_where_the_truth_has_it():
    def spread(y: Tensor) -> None:
        y[~y.isfinite().all(1)] = 0

    assert non_finite(lambda y: None)
    assert not non_finite(spread)


def judged(spec: KernelSpec, right: Inputs, wrong: Inputs) -> dict[str, float]:
    """Output -> ratio, of what the package makes of `wrong` where `right` was asked for."""
    found = spec.run(lib, wrong, None)
    expected = spec.reference(right, Arithmetic())
    return {name: compare(name, found[name], value).ratio for name, value in expected.items()}


PIPELINES = (
    (EXPERT_LINEAR, "gated", ("lora_b", "lora_a")),
    (EXPERT_LINEAR, "plain", ("lora_b", "lora_a")),
    (EXPERTS_MLP, "plain", ("lora_b_up", "lora_a_up", "lora_b_down", "lora_a_down")),
)
by_pipeline = pytest.mark.parametrize(
    ("spec", "name", "factors"), PIPELINES, ids=["gated linear", "linear", "layer"]
)


@by_pipeline
def test_a_scale_two_percent_off_in_one_path_is_refused(spec, name, factors):
    """One factor of an adapter 2% larger is a wrong scale of its path, to every output behind."""
    case = next(case for case in spec.cases if case.name == name)
    dtype = torch.bfloat16
    right = spec.inputs(case, dtype, "balanced", torch.device(DEVICE))
    assert max(judged(spec, right, right).values()) <= 1
    for factor in factors:
        wrong = right.having(**{factor: (right[factor].float() * 1.02).to(dtype)})
        ratios = judged(spec, right, wrong)
        own = f"d{factor}" if spec is EXPERTS_MLP else f"d{factor[-1]}"
        reached = set(ratios) - {own, "dweight", "dbias"}
        reached -= {key for key in ratios if key.startswith(("dweight_", "dbias_"))}
        if factor.endswith("_up"):
            reached -= {"dlora_a_down", "dlora_b_down"}
        if factor.endswith("_down"):
            reached -= {"dlora_a_up", "dlora_b_up"}
        refused = {key for key, ratio in ratios.items() if ratio > 1}
        assert reached <= refused, (factor, reached - refused, ratios)


@by_pipeline
def test_one_lost_row_is_refused_in_every_output(spec, name, factors):
    case = replace(next(case for case in spec.cases if case.name == name), gated=True)
    if spec is EXPERT_LINEAR:
        case = replace(case, target="SLOT", gradient="TOKEN")
    right = spec.inputs(case, torch.bfloat16, "balanced", torch.device(DEVICE))
    gates = right["gates"].clone()
    gates[7, 1] = 0
    ratios = judged(spec, right, right.having(gates=gates))
    assert {name for name, ratio in ratios.items() if ratio <= 1} <= {"dgates"}


def test_rounding_alone_is_no_wrong_factor_however_wide_the_rows():
    """Gates times few different numbers: their roundings repeat along a row, and do not cancel."""
    case = Case(name="wide", tokens=32, experts=4, top_k=2, k_in=16, n_out=28672, target="SLOT")
    for seed in range(6):
        inputs = COMBINE.inputs(case, torch.bfloat16, "balanced", CPU, seed=seed)
        expected = COMBINE.reference(inputs, Arithmetic())["out"]
        rounded = expected.value.float().to(torch.bfloat16)
        assert compare("out", rounded, expected).ratio <= 1
        scaled = (expected.value * 1.0005).float().to(torch.bfloat16)
        assert compare("out", scaled, expected).ratio > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_roundings_of_outer_products_repeat(dtype):
    """With K = 1 a result is a product of two numbers of few mantissas: its rounding comes again
    in every row and column that has the same ones.
    """
    case = Case(name="outer", tokens=160, experts=6, top_k=4, k_in=1, n_out=763, rank=4)
    for seed in range(6):
        inputs = SCATTER2SCATTER.inputs(case, dtype, "balanced", CPU, seed=seed)
        expected = SCATTER2SCATTER.reference(inputs, Arithmetic())["y"]
        assert compare("y", expected.value.to(dtype), expected).ratio <= 1
        scaled = (expected.value * 1.001).to(dtype)
        assert compare("y", scaled, expected).ratio > 1


def test_one_rounding_and_those_of_its_results_may_lean_the_same_way():
    """t = 1.9922 was 1.9957 before it was rounded, and products with it are rounded down, too."""
    case = Case(name="lean", tokens=1, experts=1, top_k=1, k_in=2, n_out=4096, rank=1, scaling=1.0)
    inputs = LORA_WEIGHT_GRAD.inputs(case, torch.bfloat16, "balanced", CPU)
    generator = torch.Generator().manual_seed(3)
    dy = torch.randint(129, 256, (1, 4096), generator=generator) / 128
    factor = torch.tensor([[[255 / 128, 0.0035]]])
    inputs = inputs.having(
        x=torch.ones(1, 2).bfloat16(), lora_a=factor.bfloat16(), dy=dy.bfloat16()
    )
    expected = LORA_WEIGHT_GRAD.reference(inputs, Arithmetic(saved=True))["db"]
    got = (dy.mT * 255 / 128).bfloat16()[None]
    assert (got.double() < expected.value).all()
    assert compare("db", got, expected).ratio <= 1
    assert compare("db", (got.float() * 0.98).bfloat16(), expected).ratio > 1


def test_a_narrowed_factor_errs_alike_in_every_token():
    """An fp32 adapter is read in 16 bits: of two thousand gradients of width 1 each has that
    error, and averaging does not lessen it.
    """
    case = Case(
        name="narrowed", tokens=2000, experts=1, top_k=1, k_in=1, n_out=80, rank=1,
        lora_dtype="float32", values="offset",
    )  # fmt: skip
    for seed in range(12):
        inputs = EXPERT_LINEAR.inputs(case, torch.bfloat16, "balanced", CPU, seed=seed)
        expected = EXPERT_LINEAR.reference(inputs, Arithmetic())["dx"]
        dy = inputs["dy"].double()
        a, b = (inputs[name][0].bfloat16().double() for name in ("lora_a", "lora_b"))
        low = (inputs.scaling * (dy @ b)).bfloat16().double()
        got = (dy @ inputs["weight"][0].double().mT + low @ a).bfloat16()
        assert compare("dx", got, expected).ratio <= 1
        assert compare("dx", (got.double() * 1.05).bfloat16(), expected).ratio > 1


def test_owners_are_given_for_each_vector_of_an_output():
    value, owner = torch.randn(37, dtype=torch.float64), torch.zeros(37, dtype=torch.int64)

    def expected(value: Tensor, owner: Tensor) -> Expected:
        return Expected(
            value=value,
            model=numerics.Uncertain.exact(value),
            dtype=torch.float32,
            expert=owner,
            sources=owner,
            zero=owner.bool(),
        )

    assert expected(value[:, None], owner).vectors(value[:, None]).shape == (37, 1)
    assert expected(value[:0], owner[:1]).vectors(value[:0, None]).shape == (0, 1)
    words = r"expert is given for 37 vectors, and an output of shape \(37,\) has 1 of length 37"
    with pytest.raises(ValueError, match=words):
        expected(value, owner)
