"""Autocast casts what is a number and refuses codes; no gradient loses precision to it."""

import pytest
import torch

import scattermoe_lora as sm

pytestmark = pytest.mark.correctness
EXPERTS, TOKENS, TOP_K, HIDDEN, INNER = 3, 4, 2, 8, 6
INDEX = torch.tensor([[0, 1], [1, 0], [1, 2], [2, 1]])
CODES = [torch.int8, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.float64, torch.complex64]


def ones(*shape):
    return torch.ones(*shape)


def projected(x, weight, lora=None):
    routing = sm.Routing.from_top_k(INDEX, EXPERTS)
    return sm.expert_linear(
        x, weight, routing, lora=lora, source=sm.RowOrder.TOKEN, target=sm.RowOrder.SLOT
    )


def layer(x, gates, w1, w2, *, lora=None, bias=None, index=INDEX):
    routing = sm.Routing.from_top_k(index, EXPERTS, sentinels=True)
    return sm.experts_mlp(
        x, gates, routing, gate_up=sm.Projection(weight=w1, lora=lora),
        down=sm.Projection(weight=w2, bias=bias), activation=sm.Activation(),
    )  # fmt: skip


@pytest.mark.parametrize("cast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_codes_are_no_weights_under_autocast_either(dtype, cast):
    """At face value they would be weights without their scales."""
    x, gates = ones(TOKENS, HIDDEN), ones(TOKENS, TOP_K)
    w1, w2 = ones(EXPERTS, HIDDEN, 2 * INNER), ones(EXPERTS, INNER, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        for name, call in (
            ("weight", lambda: projected(x, w1.to(dtype))),
            ("x", lambda: projected(x.to(dtype), w1)),
            (r"gate_up\.weight", lambda: layer(x, gates, w1.to(dtype), w2)),
            (r"down\.weight", lambda: layer(x, gates, w1, w2.to(dtype))),
            ("hidden", lambda: layer(x.to(dtype), gates, w1, w2)),
        ):
            with pytest.raises(TypeError, match=rf"^{name} .*{dtype}"):
                call()


@pytest.mark.parametrize("cast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64], ids=str)
def test_nor_are_they_factors(dtype, cast):
    x, gates = ones(TOKENS, HIDDEN), ones(TOKENS, TOP_K)
    w1, w2 = ones(EXPERTS, HIDDEN, 2 * INNER), ones(EXPERTS, INNER, HIDDEN)
    a, b = ones(EXPERTS, 2, HIDDEN).to(dtype), ones(EXPERTS, 2 * INNER, 2).to(dtype)
    lora = sm.LoRAWeights(a=a, b=b, scaling=1.0)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        with pytest.raises(TypeError, match=rf"^lora.*{dtype}"):
            projected(x, w1, lora)
        with pytest.raises(TypeError, match=rf"^gate_up\.lora.*{dtype}"):
            layer(x, gates, w1, w2, lora=lora)


@pytest.mark.parametrize("cast", [False, True], ids=["plain", "autocast"])
def test_nor_are_codes_biases_or_gates(cast):
    x, gates = ones(TOKENS, HIDDEN), ones(TOKENS, TOP_K)
    w1, w2 = ones(EXPERTS, HIDDEN, 2 * INNER), ones(EXPERTS, INNER, HIDDEN)
    bias, codes = ones(EXPERTS, HIDDEN), torch.float8_e5m2
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        with pytest.raises(TypeError, match=r"^down\.bias must be floating point of 16 bits"):
            layer(x, gates, w1, w2, bias=bias.to(codes))
        with pytest.raises(TypeError, match=r"^gates must be floating point of 16 bits"):
            layer(x, gates.to(codes), w1, w2, bias=bias)


def test_gradients_of_gates_do_not_change_with_autocast_in_backward():
    """<b2, dout> is 2^20 here: more than fp16 holds, where autocast would round it."""
    gates = ones(TOKENS, TOP_K).requires_grad_()
    bias = torch.full((EXPERTS, HIDDEN), 128.0)
    w1, w2 = ones(EXPERTS, HIDDEN, 2 * INNER), ones(EXPERTS, INNER, HIDDEN)
    with torch.autocast("cpu", torch.float16):
        out = layer(torch.zeros(TOKENS, HIDDEN), gates, w1, w2, bias=bias)
        out.backward(torch.full_like(out, 1024.0))
    assert torch.equal(gates.grad, torch.full_like(gates, 2.0**20))


def test_what_a_bias_holds_that_nobody_uses_reaches_no_gradient():
    index = torch.tensor([[0, -1], [1, 0], [5, 1], [0, 1]])
    gates = ones(TOKENS, TOP_K).requires_grad_()
    bias = torch.zeros(EXPERTS, HIDDEN)
    bias[2] = float("nan")
    w1, w2 = ones(EXPERTS, HIDDEN, 2 * INNER), ones(EXPERTS, INNER, HIDDEN)
    layer(ones(TOKENS, HIDDEN), gates, w1, w2, bias=bias, index=index).sum().backward()
    dropped = (index < 0) | (index >= EXPERTS)
    assert torch.equal(gates.grad == 0, dropped)
    assert gates.grad.isfinite().all()


def test_a_layer_is_as_wide_as_its_input_and_has_gates():
    x, gates = ones(TOKENS, HIDDEN), ones(TOKENS, TOP_K)
    w1, w2 = ones(EXPERTS, HIDDEN, 2 * INNER), ones(EXPERTS, INNER, HIDDEN + 1)
    with pytest.raises(ValueError, match=f"{HIDDEN + 1}, which must be the width {HIDDEN} of hi"):
        layer(x, gates, w1, w2)
    with pytest.raises(TypeError, match="gates must be a tensor, got NoneType"):
        layer(x, None, w1, w2[..., :-1])
