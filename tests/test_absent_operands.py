"""An operand that is absent is one that changes nothing: coefficients of one, a bias of zeros.

On small integers every sum is exact, so that the results are the same bits.
"""

import pytest
import torch

import scattermoe_lora as sm
from scattermoe_lora import ops
from scattermoe_lora.plan import PATHS

pytestmark = pytest.mark.correctness

EXPERTS, TOKENS, TOP_K, K, N, RANK = 3, 7, 2, 24, 20, 3
ROWS = TOKENS * TOP_K
TOKEN, SLOT, EXPERT = sm.RowOrder


def integers(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-2, 3, shape, generator=generator).float()


@pytest.fixture(scope="module")
def given(device) -> dict:
    """Operands by name; some slots are nobody's."""
    index = torch.tensor([[0, 1], [2, 0], [1, -1], [2, 2], [0, 2], [-1, 1], [1, 0]])
    given = {
        "x": integers(TOKENS, K),
        "weight": integers(EXPERTS, K, N),
        "dy": integers(ROWS, N),
        "rows": integers(ROWS, K),
        "xa": integers(ROWS, RANK),
        "yb": integers(ROWS, RANK) + 1,
        "h": integers(ROWS, 2 * N),
    }
    given = {name: value.to(device) for name, value in given.items()}
    a, b = integers(EXPERTS, RANK, K).to(device), integers(EXPERTS, N, RANK).to(device)
    return {
        **given,
        "lora": sm.LoRAWeights(a=a, b=b, scaling=2.0),
        "routing": sm.Routing.from_top_k(index.to(device), EXPERTS, sentinels=True),
    }


def scatter2scatter(t, **operands):
    return ops.scatter2scatter(
        t["x"], t["weight"], t["routing"], source=TOKEN, target=SLOT, **operands
    )


def lora_forward(t, **operands):
    return ops.lora_forward(
        t["x"], t["weight"], t["lora"], t["routing"], source=TOKEN, target=EXPERT, **operands
    )


def lora_input_grad(t, **operands):
    return ops.lora_input_grad(
        t["dy"], t["weight"], t["lora"], t["routing"], source=SLOT, target=TOKEN, **operands
    )


def lora_weight_grad(t, **operands):
    return ops.lora_weight_grad(
        t["x"], t["dy"], t["xa"], t["yb"], t["lora"], t["routing"],
        x_order=TOKEN, dy_order=SLOT, **operands,
    )  # fmt: skip


def expert_weight_grad(t, **operands):
    return ops.expert_weight_grad(
        t["x"], t["dy"], t["routing"], x_order=TOKEN, dy_order=SLOT, **operands
    )


def expert_bias_grad(t, **operands):
    return ops.expert_bias_grad(t["dy"], t["routing"], dy_order=SLOT, **operands)


def shrink(t, **operands):
    return ops.shrink(t["x"], t["lora"].a, t["routing"], scaling=2.0, source=TOKEN, **operands)


def group(t, **operands):
    return ops.group(t["x"], t["routing"], source=TOKEN, **operands)


def combine(t, **operands):
    return ops.combine(t["rows"], t["routing"], **operands)


def glu_backward(t, **operands):
    return ops.glu_backward(t["h"], t["dy"], t["routing"], ops.Activation(), **operands)


def same(one, other) -> bool:
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    return all(torch.equal(left, right) for left, right in pairs)


SCALED = (
    scatter2scatter, lora_forward, lora_input_grad, lora_weight_grad, expert_weight_grad,
    expert_bias_grad, shrink, group,
)  # fmt: skip
named = {"ids": lambda function: function.__name__}


@pytest.mark.parametrize("function", SCALED, **named)
def test_no_coefficients_are_coefficients_of_one(given, device, function):
    ones = torch.ones(TOKENS, TOP_K, device=device)
    assert same(function(given), function(given, row_scale=ones))
    assert not same(function(given), function(given, row_scale=2 * ones))


@pytest.mark.parametrize("function", [combine, glu_backward], **named)
def test_no_gates_are_gates_of_one(given, device, function):
    ones = torch.ones(TOKENS, TOP_K, device=device)
    assert same(function(given), function(given, gates=ones))
    assert not same(function(given), function(given, gates=2 * ones))


@pytest.mark.parametrize("function", [scatter2scatter, lora_forward], **named)
def test_no_bias_is_a_bias_of_zeros(given, device, function):
    zeros = torch.zeros(EXPERTS, N, device=device)
    assert same(function(given), function(given, bias=zeros))
    assert not same(function(given), function(given, bias=zeros + 1))


@pytest.mark.parametrize("path", PATHS[sm.Operation.LORA_FORWARD], ids=str)
def test_absent_operands_are_the_same_on_every_path(given, device, path):
    tile = sm.Tile(block_m=16, block_n=16, block_k=16)
    plan = sm.Plan(path=path, tile=tile, shrink=tile)
    if path is sm.Path.GROUPED_MM:
        with pytest.raises(ValueError, match="needs bfloat16 on CUDA"):
            lora_forward(given, plan=plan)
        return
    zeros, ones = torch.zeros(EXPERTS, N, device=device), torch.ones(ROWS, device=device)
    assert same(
        lora_forward(given, plan=plan), lora_forward(given, plan=plan, bias=zeros, row_scale=ones)
    )
