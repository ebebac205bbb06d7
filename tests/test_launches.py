"""What a call launches: what it was asked for, for somebody, as torch's settings say now."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import scattermoe_lora as sm
from scattermoe_lora._launch import Launch

pytestmark = pytest.mark.correctness

EXPERTS, TOKENS, TOP_K, K, N, RANK = 3, 5, 2, 16, 8, 2
TOKEN, SLOT, _ = sm.RowOrder
PRODUCT, GRAM, BIAS = "scatter2scatter_kernel", "gram_kernel", "expert_bias_grad_kernel"
COMBINE, GLU = "combine_kernel", "glu_backward_kernel"


@dataclass(frozen=True, kw_only=True)
class Noted:
    """One launch."""

    name: str
    grid: tuple[int, int, int]
    precision: str | None


@pytest.fixture
def launched(monkeypatch) -> list[Noted]:
    """Every launch of a product, a gradient or an activation, in order."""
    found: list[Noted] = []
    launch = Launch.__call__

    def noted(self, grid, *arguments) -> None:
        name, precision = self.kernel.__name__, self.constants.get("PRECISION")
        found.append(Noted(name=name, grid=grid, precision=precision))
        launch(self, grid, *arguments)

    monkeypatch.setattr(Launch, "__call__", noted)
    return found


def integers(*shape: int, device) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-2, 3, shape, generator=generator).float().to(device)


def routing_of(tokens: int, device) -> sm.Routing:
    index = torch.tensor([[0, 2], [2, 0], [0, 0], [2, -1], [2, 2]], device=device)[:tokens]
    return sm.Routing.from_top_k(index, EXPERTS, sentinels=True)


def projection(tokens: int, device) -> dict[str, Tensor]:
    return {
        "x": integers(tokens, K, device=device),
        "weight": integers(EXPERTS, K, N, device=device),
        "a": integers(EXPERTS, RANK, K, device=device),
        "b": integers(EXPERTS, N, RANK, device=device),
        "bias": integers(EXPERTS, N, device=device),
        "gates": integers(tokens, TOP_K, device=device),
    }


def layer(tokens: int, device) -> dict[str, Tensor]:
    made = {
        "x": integers(tokens, K, device=device),
        "gates": integers(tokens, TOP_K, device=device),
        "weight1": integers(EXPERTS, K, 2 * N, device=device),
        "a1": integers(EXPERTS, RANK, K, device=device),
        "b1": integers(EXPERTS, 2 * N, RANK, device=device),
        "bias1": integers(EXPERTS, 2 * N, device=device),
        "weight2": integers(EXPERTS, N, K, device=device),
        "a2": integers(EXPERTS, RANK, N, device=device),
        "b2": integers(EXPERTS, K, RANK, device=device),
        "bias2": integers(EXPERTS, K, device=device),
    }
    return {name: value / 8 for name, value in made.items()}


def forward(t: dict[str, Tensor], routing: sm.Routing) -> Tensor:
    """A gated projection, or the layer."""
    if "weight" in t:
        lora = sm.LoRAWeights(a=t["a"], b=t["b"], scaling=2.0)
        return sm.expert_linear(
            t["x"], t["weight"], routing, source=TOKEN, target=SLOT, lora=lora, bias=t["bias"],
            gates=t["gates"],
        )  # fmt: skip
    parts = [
        sm.Projection(
            weight=t[f"weight{n}"],
            lora=sm.LoRAWeights(a=t[f"a{n}"], b=t[f"b{n}"], scaling=2.0),
            bias=t[f"bias{n}"],
        )
        for n in "12"
    ]
    return sm.experts_mlp(
        t["x"], t["gates"], routing, gate_up=parts[0], down=parts[1], activation=sm.Activation()
    )


FIRST = [PRODUCT, PRODUCT, GLU]
"""What every gradient behind the layer's first projection takes: of down's input, of the gate."""
BACKWARD = {
    projection: {
        "x": [PRODUCT, PRODUCT, COMBINE],
        "weight": [GRAM],
        "a": [PRODUCT, GRAM],
        "b": [PRODUCT, GRAM],
        "bias": [BIAS],
        "gates": ["combine_grad_kernel"],
    },
    layer: {
        "x": [*FIRST, PRODUCT, PRODUCT, COMBINE],
        "gates": FIRST,
        "weight1": [*FIRST, GRAM],
        "a1": [*FIRST, PRODUCT, GRAM],
        "b1": [*FIRST, PRODUCT, GRAM],
        "bias1": [*FIRST, BIAS],
        "weight2": [*FIRST, GRAM],
        "a2": [*FIRST, GRAM],
        "b2": [*FIRST, GRAM],
        "bias2": [*FIRST, BIAS],
    },
}


@pytest.mark.parametrize(
    ("make", "trained"),
    [(make, name) for make, kernels in BACKWARD.items() for name in kernels],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_gradient_that_nobody_asks_for_is_not_computed(launched, device, make, trained):
    t = make(TOKENS, device)
    t[trained].requires_grad_()
    out = forward(t, routing_of(TOKENS, device))
    launched.clear()
    out.backward(torch.ones_like(out))
    assert [launch.name for launch in launched] == BACKWARD[make][trained]


@pytest.mark.parametrize("make", [projection, layer])
def test_no_grid_is_empty_where_there_are_no_tokens(launched, device, make):
    """The interpreter runs an empty grid as nothing; CUDA refuses it."""
    leaves = {name: value.requires_grad_() for name, value in make(0, device).items()}
    out = forward(leaves, routing_of(0, device))
    out.backward(torch.ones_like(out))
    assert [launch for launch in launched if min(launch.grid) < 1] == []
    assert GRAM in {launch.name for launch in launched}


@pytest.mark.parametrize("make", [projection, layer])
def test_every_launch_takes_the_precision_that_torch_has_now(launched, device, make):
    leaves = {name: value.requires_grad_() for name, value in make(TOKENS, device).items()}
    routing, before = routing_of(TOKENS, device), torch.get_float32_matmul_precision()
    try:
        for setting, precision in (("highest", "ieee"), ("high", "tf32")):
            torch.set_float32_matmul_precision(setting)
            launched.clear()
            out = forward(leaves, routing)
            out.backward(torch.ones_like(out))
            taken = {(launch.name, launch.precision) for launch in launched if launch.precision}
            assert taken == {(PRODUCT, precision), (GRAM, precision)}
    finally:
        torch.set_float32_matmul_precision(before)
