"""An operand may lie in a wider tensor: what lies between its elements is never read."""

import pytest
import torch
from torch import Tensor

import scattermoe_lora as sm

pytestmark = pytest.mark.correctness

EXPERTS, HIDDEN, WIDTH, RANK = 3, 20, 12, 3
WIDTHS = {"gate_up": (HIDDEN, 2 * WIDTH), "down": (WIDTH, HIDDEN)}


def among_rows(value: Tensor) -> Tensor:
    """Every other row of a tensor whose other rows are poisoned."""
    wide = poisoned(value, value.shape[0] * 2, *value.shape[1:])
    return wide[::2].copy_(value)


def among_columns(value: Tensor) -> Tensor:
    """Every third column, from the second on."""
    wide = poisoned(value, *value.shape[:-1], value.shape[-1] * 3)
    return wide[..., 1::3].copy_(value)


def poisoned(value: Tensor, *shape: int) -> Tensor:
    return value.new_full(shape, float("nan") if value.is_floating_point() else 0)


def drawn(device, tokens, top_k):
    generator = torch.Generator().manual_seed(tokens + top_k)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device)

    tensors = {"hidden": normal(tokens, HIDDEN), "gates": normal(tokens, top_k)}
    for name, (k, n) in WIDTHS.items():
        tensors[f"{name}.weight"] = normal(EXPERTS, k, n)
        tensors[f"{name}.a"] = normal(EXPERTS, RANK, k)
        tensors[f"{name}.b"] = normal(EXPERTS, n, RANK)
        tensors[f"{name}.bias"] = normal(EXPERTS, n)
    keys = torch.rand(tokens, EXPERTS, generator=generator)
    tensors["index"] = keys.topk(top_k).indices.to(device)
    tensors["dout"] = normal(tokens, HIDDEN)
    return tensors


def step(tensors: dict[str, Tensor]) -> list[Tensor]:
    """The layer's result and the gradient of every floating operand."""
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in tensors.items()
        if name not in ("index", "dout")
    }

    def projection(name: str) -> sm.Projection:
        lora = sm.LoRAWeights(a=leaves[f"{name}.a"], b=leaves[f"{name}.b"], scaling=1.5)
        weight, bias = leaves[f"{name}.weight"], leaves[f"{name}.bias"]
        return sm.Projection(weight=weight, lora=lora, bias=bias)

    out = sm.experts_mlp(
        leaves["hidden"],
        leaves["gates"],
        sm.Routing.from_top_k(tensors["index"], EXPERTS),
        gate_up=projection("gate_up"),
        down=projection("down"),
        activation=sm.Activation(),
    )
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), tensors["dout"])]


@pytest.mark.parametrize("gap", [among_rows, among_columns])
@pytest.mark.parametrize(("tokens", "top_k"), [(5, 1), (1, 2), (4, 2)])
def test_a_layer_reads_no_gap_of_any_operand(device, tokens, top_k, gap):
    """A single choice or a single token makes a matrix that is flat as it lies, gaps included."""
    tensors = drawn(device, tokens, top_k)
    got = step({name: gap(value) for name, value in tensors.items()})
    for result, expected in zip(got, step(tensors), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["expert_of_row", "slots"])
def test_a_sorted_routing_reads_no_gap(device, name):
    ids = torch.tensor([0, 0, 1, 2, 2, 3], device=device)
    slots = torch.tensor([4, 1, 0, 5, 2, 3], device=device)
    given = {"expert_of_row": ids, "slots": slots}
    want = sm.Routing.from_sorted(**given, top_k=2, experts=EXPERTS)
    got = sm.Routing.from_sorted(
        **{**given, name: among_columns(given[name])}, top_k=2, experts=EXPERTS
    )
    x = torch.randn(3, 8, device=device)
    weight = torch.randn(EXPERTS, 8, 4, device=device)
    orders = {"source": sm.RowOrder.TOKEN, "target": sm.RowOrder.SLOT}
    results = [sm.expert_linear(x, weight, routing, **orders) for routing in (want, got)]
    assert torch.equal(*results)
    for field in ("slots", "expert_of_row", "offsets"):
        assert torch.equal(getattr(got, field), getattr(want, field))
