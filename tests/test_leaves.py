"""What is trained and what is kept: each leaf of the layer and of a projection by itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import scattermoe_lora as sm
from scattermoe_lora.ops import combine, combine_grad

pytestmark = pytest.mark.correctness

EXPERTS, TOKENS, TOP_K, RANK = 4, 9, 2, 3
LEAVES = ("x", "gates", "w1", "a1", "b1", "bias1", "w2", "a2", "b2", "bias2")
PROJECTION_LEAVES = ("x", "weight", "a", "b", "bias", "gates")


class Operands:
    """Real-valued operands of a layer whose every leaf may be trained alone."""

    def __init__(self, device, adapter_dtype=torch.float32, bias_dtype=torch.float32):
        generator = torch.Generator().manual_seed(6)

        def normal(*shape, dtype=torch.float32):
            return torch.randn(shape, generator=generator).to(device, dtype)

        hidden, width = 20, 12
        index = torch.randint(0, EXPERTS, (TOKENS, TOP_K), generator=generator).to(device)
        self.routing = sm.Routing.from_top_k(index, EXPERTS)
        self.tensors = {
            "x": normal(TOKENS, hidden),
            "gates": normal(TOKENS, TOP_K),
            "w1": normal(EXPERTS, hidden, 2 * width),
            "a1": normal(EXPERTS, RANK, hidden, dtype=adapter_dtype),
            "b1": normal(EXPERTS, 2 * width, RANK, dtype=adapter_dtype),
            "bias1": normal(EXPERTS, 2 * width, dtype=bias_dtype),
            "w2": normal(EXPERTS, width, hidden),
            "a2": normal(EXPERTS, RANK + 1, width, dtype=adapter_dtype),
            "b2": normal(EXPERTS, hidden, RANK + 1, dtype=adapter_dtype),
            "bias2": normal(EXPERTS, hidden, dtype=bias_dtype),
        }
        self.dout = normal(TOKENS, hidden)

    def layer(self, t: dict[str, Tensor]) -> Tensor:
        first = sm.LoRAWeights(a=t["a1"], b=t["b1"], scaling=0.6)
        second = sm.LoRAWeights(a=t["a2"], b=t["b2"], scaling=-1.1)
        return sm.experts_mlp(
            t["x"],
            t["gates"],
            self.routing,
            gate_up=sm.Projection(weight=t["w1"], lora=first, bias=t["bias1"]),
            down=sm.Projection(weight=t["w2"], lora=second, bias=t["bias2"]),
            activation=sm.Activation(),
        )

    def linear(self, t: dict[str, Tensor], *, gated: bool = True) -> Tensor:
        """The second projection alone, from tokens."""
        return sm.expert_linear(
            t["x"][:, :12].contiguous(),
            t["weight"],
            self.routing,
            source=sm.RowOrder.TOKEN,
            target=sm.RowOrder.SLOT,
            lora=sm.LoRAWeights(a=t["a"], b=t["b"], scaling=-1.1),
            bias=t["bias"],
            gates=t["gates"] if gated else None,
        )

    @property
    def projection(self) -> dict[str, Tensor]:
        t = self.tensors
        return {"x": t["x"], "weight": t["w2"], "a": t["a2"], "b": t["b2"], "bias": t["bias2"]} | {
            "gates": t["gates"]
        }


def gradients(
    call: Callable[[dict[str, Tensor]], Tensor],
    tensors: dict[str, Tensor],
    trained: tuple[str, ...],
    upstream: Tensor,
) -> dict[str, Tensor | None]:
    """Leaf -> its gradient, of those that are trained."""
    leaves = {
        name: value.detach().clone().requires_grad_(name in trained)
        for name, value in tensors.items()
    }
    call(leaves).backward(upstream)
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("trained", LEAVES)
def test_each_gradient_of_the_layer_alone_is_the_one_among_all(device, trained):
    operands = Operands(device)
    every = gradients(operands.layer, operands.tensors, LEAVES, operands.dout)
    alone = gradients(operands.layer, operands.tensors, (trained,), operands.dout)
    assert [name for name, grad in alone.items() if grad is not None] == [trained]
    assert torch.equal(alone[trained], every[trained])


@pytest.mark.parametrize("trained", PROJECTION_LEAVES)
def test_each_gradient_of_a_projection_alone_is_the_one_among_all(device, trained):
    operands = Operands(device)
    tensors = operands.projection
    every = gradients(operands.linear, tensors, PROJECTION_LEAVES, operands.dout)
    alone = gradients(operands.linear, tensors, (trained,), operands.dout)
    assert [name for name, grad in alone.items() if grad is not None] == [trained]
    assert torch.equal(alone[trained], every[trained])


def test_one_projection_may_go_without_adapter_and_bias(device):
    """What is left out adds nothing: the layer is that with zeros in its place."""
    operands = Operands(device)
    for name, other in (("1", "2"), ("2", "1")):
        zeros = {
            key: torch.zeros_like(value) if key in (f"b{name}", f"bias{name}") else value
            for key, value in operands.tensors.items()
        }
        t = operands.tensors
        parts = {}
        for key, scaling in (("1", 0.6), ("2", -1.1)):
            adapter = sm.LoRAWeights(a=t[f"a{key}"], b=t[f"b{key}"], scaling=scaling)
            kept = key == other
            parts[key] = sm.Projection(
                weight=t[f"w{key}"],
                lora=adapter if kept else None,
                bias=t[f"bias{key}"] if kept else None,
            )
        x = t["x"].clone().requires_grad_()
        out = sm.experts_mlp(
            x, t["gates"], operands.routing, gate_up=parts["1"], down=parts["2"],
            activation=sm.Activation(),
        )  # fmt: skip
        out.backward(operands.dout)
        with_zeros = gradients(operands.layer, zeros, ("x",), operands.dout)["x"]
        assert torch.equal(out, operands.layer(zeros))
        assert torch.equal(x.grad, with_zeros)


def saved_bytes(call: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward of a call."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    assert out.requires_grad
    return sum(kept.values())


def test_rows_before_gating_are_kept_for_trained_gates_alone(device):
    operands = Operands(device)
    leaves = {name: value.clone() for name, value in operands.projection.items()}
    leaves["a"].requires_grad_()
    frozen = saved_bytes(lambda: operands.linear(leaves))
    leaves["gates"].requires_grad_()
    trained = saved_bytes(lambda: operands.linear(leaves))
    assert trained - frozen == 4 * TOKENS * TOP_K * operands.dout.shape[1]


def test_the_input_is_kept_for_trained_weights_alone(device):
    operands = Operands(device)
    leaves = {name: value.clone() for name, value in operands.projection.items()}
    leaves["bias"].requires_grad_()
    frozen = saved_bytes(lambda: operands.linear(leaves))
    leaves["a"].requires_grad_()
    assert saved_bytes(lambda: operands.linear(leaves)) - frozen == 4 * TOKENS * 12


@pytest.mark.parametrize("kind", ["linear", "layer"])
@pytest.mark.parametrize("adapter", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_autocast_casts_all_but_fp32_adapters(device, kind, adapter):
    """Everything is cast to bf16 first: the same bits as operands that were cast by hand."""
    operands = Operands(device, adapter_dtype=adapter)
    call = getattr(operands, kind)
    given = operands.tensors if kind == "layer" else operands.projection
    fp32 = ("gates", "bias", "bias1", "bias2")
    kept = fp32 if adapter is not torch.float32 else (*fp32, "a", "b", "a1", "b1", "a2", "b2")
    by_hand = {name: v if name in kept else v.bfloat16() for name, v in given.items()}
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        found = call(given)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, call(by_hand))


def test_gradients_come_in_the_dtype_of_their_leaves(device):
    operands = Operands(device, adapter_dtype=torch.float32, bias_dtype=torch.float64)
    half = {"x": torch.float16, "w1": torch.float16, "w2": torch.float16, "gates": torch.bfloat16}
    tensors = {name: v.to(half.get(name, v.dtype)) for name, v in operands.tensors.items()}
    found = gradients(operands.layer, tensors, LEAVES, operands.dout.half())
    assert {name: grad.dtype for name, grad in found.items()} == {
        name: value.dtype for name, value in tensors.items()
    }


def test_gates_are_summed_over_slots_only(device):
    operands = Operands(device)
    t = operands.tensors
    with pytest.raises(ValueError, match="target must be SLOT, got EXPERT"):
        sm.expert_linear(
            t["x"], t["w1"], operands.routing, source=sm.RowOrder.TOKEN,
            target=sm.RowOrder.EXPERT, gates=t["gates"],
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"got RowOrder\.TOKEN"):
        sm.expert_linear(
            t["x"], t["w1"], operands.routing, source=sm.RowOrder.TOKEN, target=sm.RowOrder.TOKEN
        )


def test_gates_are_linear_and_their_gradient_is_the_row(device):
    """combine is bilinear in y and gates, so that its derivative is itself with one of them."""
    operands = Operands(device)
    generator = torch.Generator().manual_seed(12)
    shapes = ((TOKENS * TOP_K, 7), (TOKENS, TOP_K), (TOKENS, 7))
    y, gates, dout = (
        torch.randint(-2, 3, shape, generator=generator).float().to(device) for shape in shapes
    )
    out = combine(y, operands.routing, gates=gates)
    dgates = combine_grad(y, dout, operands.routing)
    assert torch.equal((out * dout).sum(), (gates * dgates).sum())
    assert torch.equal(combine(y, operands.routing), combine(y, operands.routing, gates=gates**0))
