"""The truth itself: its gradients, its zeros, its independence of order, and the error models
beside it.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from verify.cases import CASES, SMOKE, Case
from verify.compare import compare
from verify.inputs import DTYPES, make_inputs
from verify.models import Arithmetic, Linear, Rounds, weight_gradients
from verify.numerics import Uncertain, matmul, rounding_variance, spacing, truncated_to_tf32
from verify.references import GatedActivation, Groups, expert_linear, experts_mlp
from verify.routings import RoutingKind
from verify.specs import KERNELS
from verify.specs.common import groups_of
from verify.specs.gradients import EXPERT_WEIGHT_GRAD, LORA_WEIGHT_GRAD
from verify.specs.layer import EXPERTS_MLP
from verify.specs.projection import EXPERT_LINEAR
from verify.specs.rows import COMBINE, GROUP

pytestmark = pytest.mark.correctness

CPU = torch.device("cpu")
TINY = Case(
    name="tiny", tokens=5, experts=3, top_k=2, k_in=4, n_out=3, rank=2, bias=True, gated=True,
    target="SLOT", routing=RoutingKind("first-empty"),
)  # fmt: skip
SMALL = [case for case in CASES if "model" not in case.tags and case.tokens]


def doubles(case: Case) -> dict[str, torch.Tensor]:
    inputs = make_inputs(case, torch.float32, "balanced", CPU)
    names = ("x", "weight", "lora_a", "lora_b", "bias", "gates")
    return {name: inputs[name].double().requires_grad_() for name in names}


def test_gradcheck_of_the_projection_with_an_empty_expert():
    leaves = doubles(TINY)
    index = make_inputs(TINY, torch.float32, "balanced", CPU)["top_k_index"]
    groups = Groups.of(index, TINY.experts)
    assert 0 in groups.counts

    def call(*values):
        tensors = dict(zip(leaves, values, strict=True))
        return expert_linear(tensors, groups, scaling=1.7, source="TOKEN", target="SLOT")

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


@pytest.mark.parametrize(
    "activation",
    [
        GatedActivation(),
        GatedActivation(tanh=True),
        GatedActivation(alpha=1.702, shift=1.0, limit=7.0, interleaved=True),
    ],
    ids=["silu", "gelu", "gpt-oss"],
)
def test_gradcheck_of_the_layer(activation):
    generator = torch.Generator().manual_seed(5)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    index = torch.tensor([[1, 2], [2, 1], [1, 1]])
    groups = Groups.of(index, 3)
    leaves = {"x": drawn(3, 3), "gates": drawn(3, 2)}
    for name, (k, n) in {"up": (3, 4), "down": (2, 3)}.items():
        leaves |= {
            f"weight_{name}": drawn(3, k, n),
            f"lora_a_{name}": drawn(3, 1, k),
            f"lora_b_{name}": drawn(3, n, 1),
            f"bias_{name}": drawn(3, n),
        }

    def call(*values):
        return experts_mlp(dict(zip(leaves, values, strict=True)), groups, activation, scaling=0.7)

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


def test_dropped_rows_are_zero_and_others_do_not_notice():
    index = torch.tensor([[0, 7], [-1, 1], [2, 2]])
    groups = Groups.of(index, 3)
    tensors = {"x": torch.randn(3, 4), "weight": torch.randn(3, 4, 2)}
    y = expert_linear(tensors, groups, scaling=1.0, source="TOKEN", target="SLOT")
    assert (y[[1, 2]] == 0).all()
    for slot, (token, expert) in {0: (0, 0), 3: (1, 1), 4: (2, 2), 5: (2, 2)}.items():
        alone = tensors["x"][token].double() @ tensors["weight"][expert].double()
        torch.testing.assert_close(y[slot], alone)


class Work(TorchDispatchMode):
    """Counts the elements that operations make, and how often the host waits for one."""

    elements = waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        waiting = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.waits += function in waiting
        if isinstance(made, torch.Tensor):
            self.elements += made.numel()
        return made


@pytest.mark.parametrize("tokens", [0, 40])
@pytest.mark.parametrize(
    "spec", [LORA_WEIGHT_GRAD, EXPERT_LINEAR, EXPERTS_MLP], ids=lambda s: s.name
)
def test_the_truth_costs_in_proportion_to_the_experts_and_waits_for_none(spec, tokens):
    """A hundred times more experts with as many rows: a hundred times the elements, at most."""
    found = []
    for experts in (4, 400):
        case = replace(
            TINY, tokens=tokens, experts=experts, source="TOKEN", target="SLOT", gradient="TOKEN",
            k_in=8, n_out=6, routing=RoutingKind("uniform"),
        )  # fmt: skip
        inputs = spec.inputs(case, torch.float32, "balanced", CPU)
        with torch.enable_grad(), Work() as work:
            spec.reference(inputs, Arithmetic())
        found.append(work)
    few, many = found
    assert many.elements <= 100 * few.elements
    assert many.waits == few.waits


def test_row_orders_hold_the_same_rows():
    index = torch.tensor([[2, 0], [1, 2], [0, 9]])
    groups = Groups.of(index, 3)
    assert groups.slots.tolist() == [1, 4, 2, 0, 3]
    assert groups.labels("SLOT").tolist() == [2, 0, 1, 2, 0, 3]
    assert groups.labels("EXPERT").tolist() == [0, 0, 1, 2, 2, 3]
    kept = torch.arange(5.0)[:, None]
    by_slot, by_expert = groups.spread(kept, "SLOT"), groups.spread(kept, "EXPERT")
    assert by_slot[groups.places("SLOT")].equal(by_expert[groups.places("EXPERT")])


@pytest.mark.parametrize("spec", KERNELS, ids=lambda spec: spec.name)
def test_models_have_the_value_of_the_truth(spec):
    """An error model that computes something else would judge by the wrong variances."""
    for case in [case for case in spec.cases if case.tokens and "model" not in case.tags][::6]:
        inputs = spec.inputs(case, torch.float32, spec.modes[0], CPU)
        for name, expected in spec.reference(inputs, Arithmetic()).items():
            model, truth = expected.model.value, expected.value
            assert torch.equal(model.isfinite(), truth.isfinite()), name
            finite = truth.isfinite()
            torch.testing.assert_close(model[finite], truth[finite], msg=f"{name}")


@pytest.mark.parametrize("rounds", Rounds)
def test_variance_predicts_the_error_of_rounding(rounds):
    """Simulated pipelines in bf16 err as much as their model says, within the noise of the
    sample.
    """
    case = next(case for case in SMALL if case.name == "deep")
    inputs = make_inputs(case, torch.bfloat16, "balanced", CPU)
    groups = Groups.of(inputs["top_k_index"], case.experts)
    model = Linear.forward(inputs, groups, Arithmetic(rounds=rounds))
    expected = model.output()

    def stored(value, when):
        return value.bfloat16().double() if when else value

    term, step = rounds is not Rounds.ONCE, rounds is Rounds.PER_STEP
    error = torch.zeros_like(expected.value)
    for expert, rows in enumerate(groups.slices):
        x = inputs["x"][groups.places("TOKEN")[rows]].double()
        low = stored(x @ inputs["lora_a"][expert].double().mT, step)
        low = stored(inputs.scaling * low, when=True)
        base = stored(x @ inputs["weight"][expert].double(), step or term)
        lora = stored(low @ inputs["lora_b"][expert].double().mT, step or term)
        error[rows] = stored(base + lora, when=True) - expected.value[rows]
    ratio = float(error.square().sum() / expected.variance.expand_as(error).sum())
    spread = 6 * (2 / error.numel()) ** 0.5
    assert abs(ratio - 1) < max(spread, 6 * (2 / (error.shape[0] * case.rank)) ** 0.5)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_spacing_is_the_distance_to_the_next_number(dtype):
    limits = torch.finfo(dtype)
    values = torch.tensor(
        [1.0, 1.5, 3.1, 300.0, limits.smallest_normal, limits.smallest_normal / 4]
    )
    values = values.to(dtype)
    up = torch.nextafter(values, torch.full_like(values, torch.inf))
    assert spacing(values.double(), dtype).equal(up.double() - values.double())


def test_stored_zeros_and_exact_inputs_carry_no_error():
    assert rounding_variance(torch.zeros(3, dtype=torch.float64), torch.float16).equal(
        torch.zeros(3, dtype=torch.float64)
    )
    assert float(Uncertain.exact(torch.randn(4)).variance) == 0


def test_tf32_keeps_eleven_bits():
    value = torch.tensor([1 + 2**-10 + 2**-11], dtype=torch.float64)
    assert truncated_to_tf32(value).item() == 1 + 2**-10


def test_rounding_of_an_operand_becomes_shared_error():
    left = Uncertain.exact(torch.randn(5, 4)).rounded(torch.bfloat16)
    right = Uncertain.exact(torch.randn(4, 3))
    found = matmul(left, right)
    by_hand = left.local @ right.value.double().square()
    torch.testing.assert_close(found.shared, by_hand)
    assert found.local.ndim == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("times", [1, 6])
def test_variance_knows_that_equal_rows_err_alike(times, dtype):
    """A token that chooses an expert m times adds m equal errors to its gradients: the sum errs
    m^2 times as much in the square, not m times.
    """
    case = Case(
        name="repeats", tokens=40, experts=2, top_k=times, k_in=24, n_out=20, rank=16,
        target="SLOT", gradient="TOKEN", gated=True, routing=RoutingKind("repeated"),
    )  # fmt: skip
    inputs = make_inputs(case, dtype, "balanced", CPU)
    gates = inputs["gates"][:, :1].expand(-1, times)
    inputs = inputs.having(gates=gates)
    groups = Groups.of(inputs["top_k_index"], case.experts)
    model = weight_gradients(inputs, groups, Arithmetic())["db"].model
    forward = Linear.forward(inputs, groups, Arithmetic())
    gate = gates.reshape(-1)[groups.slots].double()[:, None]
    low = forward.low_rank().value
    error = (gate * low.to(dtype).double()).to(dtype).double() - gate * low
    dy = inputs["dy"][groups.places("TOKEN")].double()
    made = torch.stack([dy[rows].mT @ error[rows] for rows in groups.slices])
    stored = rounding_variance(model.value, inputs.lora_dtype).sum()
    ratio = float((made.square().sum() + stored) / model.variance.sum())
    assert abs(ratio - 1) < 6 * (2 / (case.tokens * case.rank)) ** 0.5


def test_rows_are_equal_where_a_token_chooses_an_expert_twice():
    groups = Groups.of(torch.tensor([[0, 2, 0], [2, 1, 2], [0, 9, 9]]), 3)
    assert groups.slots.tolist() == [0, 2, 6, 4, 1, 3, 5]
    assert groups.repeats.tolist() == [2, 2, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [GROUP, COMBINE], ids=lambda spec: spec.name)
@pytest.mark.parametrize("rows", [1, 40])
def test_products_of_one_factor_may_all_lie_about_midway(spec, dtype, rows):
    """A gate a third of a step above a power of two: with 7 or 10 bits of mantissa all products
    lie a third to two thirds between two numbers, 2.1 times the variance of a rounding.
    """
    sizes = {"tokens": rows, "top_k": 1, "experts": 2, "k_in": 8192, "n_out": 8192, "rank": 2}
    case = replace(SMOKE[0], gated=True, source="SLOT", routing=RoutingKind("uniform"), **sizes)
    inputs = spec.inputs(case, dtype, "balanced", CPU)
    gate = 1 + torch.finfo(dtype).eps / 3
    inputs = inputs.having(gates=torch.full_like(inputs["gates"], gate))
    places = groups_of(inputs).places("SLOT")
    right = {
        "group": lambda: {"rows": (inputs["x"].float() * gate)[places]},
        "combine": lambda: {"out": inputs["y"].float() * gate},
    }
    ((name, found),) = right[spec.name]().items()
    expected = spec.reference(inputs, Arithmetic())[name]
    assert compare(name, found.to(dtype), expected).ok
    assert not compare(name, (found * (1 + torch.finfo(dtype).eps)).to(dtype), expected).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lean", [0.26, 0.49])
def test_all_that_one_gate_multiplies_may_be_rounded_the_same_way(dtype, lean):
    """A gate just above one: a row of dy is multiplied, and most of it loses what the gate adds."""
    sizes = {"tokens": 1, "top_k": 1, "experts": 1, "k_in": 122, "n_out": 512, "rank": 2}
    case = replace(SMOKE[0], gated=True, target="EXPERT", routing=RoutingKind("uniform"), **sizes)
    inputs = EXPERT_WEIGHT_GRAD.inputs(case, dtype, "balanced", CPU)
    gate = 1 + lean * torch.finfo(dtype).eps
    inputs = inputs.having(gates=torch.full_like(inputs["gates"], gate))
    expected = EXPERT_WEIGHT_GRAD.reference(inputs, Arithmetic())["dw"]
    gated = (inputs["dy"].float() * gate).to(dtype)
    right = inputs["x"].float().mT @ gated.float()
    assert compare("dw", right.to(dtype)[None], expected).ok
    assert not compare("dw", (right * 1.02).to(dtype)[None], expected).ok


@pytest.mark.parametrize("length", [64, 2192])
def test_sums_below_the_normal_numbers_may_lose_half_a_step_wherever_they_are_cut_off(length):
    """A tensor core adds 8 products at a time and cuts towards zero to multiples of 2^-149."""
    generator = torch.Generator().manual_seed(5)
    left = torch.randn(32, length, generator=generator, dtype=torch.float64)
    right = torch.randn(length, 32, generator=generator, dtype=torch.float64) * 2.0**-136
    unit = 2.0**-149
    total = torch.zeros(32, 32, dtype=torch.float64)
    for k in range(0, length, 8):
        part = left[:, k : k + 8] @ right[k : k + 8]
        total = torch.trunc((total + part) / unit) * unit
    model = matmul(Uncertain.exact(left), Uncertain.exact(right))
    error = total - model.value

    def share(got: torch.Tensor) -> float:
        """The norm of an error as a share of its limit for so many elements."""
        return float((got.square().sum() / model.variance.sum()).sqrt()) / (1.25 + 8 / 32)

    assert share(error) < 1
    whole = torch.zeros_like(total)
    for k in range(length):
        whole = torch.trunc((whole + torch.outer(left[:, k], right[k])) / unit) * unit
    assert share(8 * (whole - model.value)) > 1
