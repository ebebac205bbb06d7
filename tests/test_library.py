"""The registered operators: schema, fakes, gradients, torch.compile."""

import dataclasses

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

import scattermoe_lora as sm
from scattermoe_lora.autograd import ExpertLinear
from scattermoe_lora.layers.experts_mlp import ExpertsMLP
from scattermoe_lora.quant import Dense, StoredWeight

pytestmark = pytest.mark.correctness
OPERATORS = torch.ops.scattermoe_lora


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """What other tests compiled of the same code would count towards Dynamo's limit."""
    torch.compiler.reset()


def draw(device, *, bias: bool = False) -> dict:
    """Operands of a small layer, each requiring a gradient but the base weights."""
    torch.manual_seed(7)
    experts, tokens, top_k, hidden, width, rank = 4, 6, 2, 32, 16, 5

    def normal(*shape, grad=True):
        return torch.randn(*shape, device=device).requires_grad_(grad)

    return {
        "index": torch.randint(0, experts, (tokens, top_k), device=device),
        "experts": experts,
        "x": normal(tokens, hidden),
        "gates": torch.rand(tokens, top_k, device=device).requires_grad_(),
        "w1": normal(experts, 2 * width, hidden, grad=False),
        "w2": normal(experts, hidden, width, grad=False),
        "a1": normal(experts, rank, hidden),
        "b1": normal(experts, 2 * width, rank),
        "a2": normal(experts, rank, width),
        "b2": normal(experts, hidden, rank),
        "bias1": normal(experts, 2 * width) if bias else None,
        "bias2": normal(experts, hidden) if bias else None,
    }


def layer(t: dict, x, gates, index):
    """The expert MLP as a function of what changes from step to step."""
    routing = sm.Routing.from_top_k(index, t["experts"])
    first = sm.LoRAWeights(a=t["a1"], b=t["b1"], scaling=1.3)
    second = sm.LoRAWeights(a=t["a2"], b=t["b2"], scaling=-0.5)
    gate_up = sm.Projection(weight=t["w1"].mT, lora=first, bias=t["bias1"])
    down = sm.Projection(weight=t["w2"].mT, lora=second, bias=t["bias2"])
    return sm.experts_mlp(x, gates, routing, gate_up=gate_up, down=down, activation=sm.Activation())


def projection(t: dict, x, gates, index):
    """One gated projection."""
    routing = sm.Routing.from_top_k(index, t["experts"])
    return sm.expert_linear(
        x,
        t["w1"].mT,
        routing,
        source=sm.RowOrder.TOKEN,
        target=sm.RowOrder.SLOT,
        lora=sm.LoRAWeights(a=t["a1"], b=t["b1"], scaling=1.3),
        bias=t["bias1"],
        gates=gates,
    )


def value_and_gradients(function, t: dict) -> list[torch.Tensor]:
    """The result and the gradient of every operand that has one."""
    leaves = [v for v in t.values() if isinstance(v, torch.Tensor) and v.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    out = function(t, t["x"], t["gates"], t["index"])
    out.square().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("function", [projection, layer])
def test_compiled_equals_eager_bitwise(function, bias, device):
    t = draw(device, bias=bias)
    eager = value_and_gradients(function, t)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    traced = value_and_gradients(compiled, t)
    assert len(eager) == len(traced) > 2
    for expected, got in zip(eager, traced, strict=True):
        assert torch.equal(expected, got)


@pytest.mark.parametrize(
    ("function", "alone"),
    [(projection, "a1"), (projection, "b1"), *((layer, f"{f}{n}") for n in "12" for f in "ab")],
)
def test_one_factor_alone_is_trained_when_compiled(function, alone, device):
    """Its gradient comes with that of the other factor, which nobody asked for."""
    t = draw(device)
    for name, value in t.items():
        if isinstance(value, torch.Tensor):
            t[name] = value.detach().requires_grad_(name == alone)
    eager = value_and_gradients(function, t)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    traced = value_and_gradients(compiled, t)
    assert len(eager) == len(traced) == 2
    for expected, got in zip(eager, traced, strict=True):
        assert torch.equal(expected, got)


@pytest.mark.parametrize(
    ("function", "name", "shape", "words"),
    [
        (projection, "w1", (4, 32, 40), "weight takes inputs of width 40 but x has 32"),
        (projection, "a1", (4, 5, 40), "lora.a takes inputs of width 40 but x has width 32"),
        (layer, "w1", (4, 32, 40), "gate_up.weight takes inputs of width 40 but hidden has 32"),
        (
            layer,
            "a2",
            (4, 5, 40),
            r"down.lora.a takes inputs of width 40 but the act\w+ has width 16",
        ),
        (layer, "bias2", (4, 40), r"down.bias must have shape \[4, 32\], got \[4, 40\]"),
    ],
    ids=["linear weight", "linear factor", "layer weight", "layer factor", "layer bias"],
)
def test_a_compiled_call_refuses_what_an_eager_one_does(function, name, shape, words, device):
    t = draw(device, bias=True)
    for key, value in t.items():
        t[key] = value.detach() if isinstance(value, torch.Tensor) else value
    t[name] = torch.ones(shape, device=device)
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        with pytest.raises(ValueError, match=words):
            call(t, t["x"], t["gates"], t["index"])


@pytest.mark.parametrize("compiling", [False, True])
def test_stacks_of_tensors_are_traced_and_those_in_blocks_are_not(device, monkeypatch, compiling):
    t = draw(device)
    routing = sm.Routing.from_top_k(t["index"], t["experts"])
    monkeypatch.setattr(sm.Routing, "from_top_k", lambda *arguments: routing)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(ExpertLinear, "apply", lambda *arguments: "eager")
    monkeypatch.setattr(ExpertsMLP, "apply", lambda *arguments: "eager")
    for name in ("expert_linear", "experts_mlp"):
        monkeypatch.setattr(OPERATORS, name, lambda *arguments: ["traced"])
    traced = {(): (True, True), ("w1",): (False, False), ("w2",): (True, False)}
    traced[("w1", "w2")] = (False, False)
    for names, expected in traced.items():
        # `layer` and `projection` hand on the mT of what they are given.
        stored = {n: StoredWeight(stored=Dense(data=t[n]), transposed=False) for n in names}
        for function, is_traced in zip((projection, layer), expected, strict=True):
            found = function({**t, **stored}, t["x"], t["gates"], t["index"])
            assert found == ("traced" if compiling and is_traced else "eager")


@pytest.mark.parametrize("function", [projection, layer])
def test_compiled_under_autocast_equals_eager(function, device):
    t = draw(device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        eager = function(t, t["x"], t["gates"], t["index"])
        traced = compiled(t, t["x"], t["gates"], t["index"])
    assert traced.dtype == eager.dtype == torch.bfloat16
    assert torch.equal(traced, eager)


@pytest.mark.parametrize(
    ("part", "path"), [("projection", "tiles"), ("gate_up", "tiles"), ("down", "epilogue")]
)
def test_stated_plans_are_not_dropped_by_tracing(part, path, device):
    t = draw(device)
    routing = sm.Routing.from_top_k(t["index"], t["experts"])
    plan = sm.Plan(path=sm.Path(path), tile=sm.Tile(block_m=16, block_n=16, block_k=16))
    stated = sm.Plans(forward=plan)
    lora = sm.LoRAWeights(a=t["a1"], b=t["b1"], scaling=1.3)

    def projected(x):
        orders = {"source": sm.RowOrder.TOKEN, "target": sm.RowOrder.SLOT}
        return sm.expert_linear(x, t["w1"].mT, routing, lora=lora, plans=stated, **orders)

    def through_layer(x):
        parts = {
            "gate_up": sm.Projection(weight=t["w1"].mT, lora=lora),
            "down": sm.Projection(weight=t["w2"].mT),
        }
        parts[part] = dataclasses.replace(parts[part], plans=stated)
        return sm.experts_mlp(x, t["gates"], routing, **parts, activation=sm.Activation())

    function = projected if part == "projection" else through_layer
    for call in (function, torch.compile(function, backend="aot_eager")):
        with pytest.raises(ValueError, match=f"has no path '{path}'"):
            call(t["x"])


@pytest.mark.parametrize("function", [projection, layer])
def test_stored_experts_break_the_graph_and_give_the_same(function, device):
    t = draw(device)
    stored = {n: StoredWeight(stored=Dense(data=t[n]), transposed=False) for n in ("w1", "w2")}
    eager = value_and_gradients(function, {**t, **stored})
    traced = value_and_gradients(torch.compile(function, backend="aot_eager"), {**t, **stored})
    assert len(eager) == len(traced) > 2
    for expected, got in zip(eager, traced, strict=True):
        assert torch.equal(expected, got)


def test_operators_pass_opcheck(device):
    t = draw(device)
    routing = sm.Routing.from_top_k(t["index"], t["experts"])
    torch.library.opcheck(OPERATORS.route.default, (t["index"], t["experts"]))
    weight = t["w1"].mT.detach().requires_grad_()
    adapter = (t["a1"], t["b1"])
    orders = ("token", "slot")
    operands = (t["x"], weight, *adapter, None, t["gates"])
    torch.library.opcheck(
        OPERATORS.expert_linear.default, (*operands, *routing.parts, 1.3, *orders)
    )
    operands = (t["x"], t["gates"], t["w1"].mT, *adapter, None, t["w2"].mT, None, None, None)
    torch.library.opcheck(
        OPERATORS.experts_mlp.default,
        (*operands, *routing.parts, 1.3, 1.0, *sm.Activation().parts),
    )


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_operators_are_like_their_operands(adapter_dtype, device):
    """Shapes and dtypes, by which the fakes know them."""
    t = draw(device, bias=True)
    for name, value in t.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            dtype = adapter_dtype if name in ("a1", "b1", "a2", "b2") else torch.bfloat16
            t[name] = value.detach().to(dtype)
    parts = sm.Routing.from_top_k(t["index"], t["experts"]).parts
    first = (t["w1"].mT, t["a1"], t["b1"], t["bias1"])
    operands = (t["x"], t["gates"], *first, t["w2"].mT, t["a2"], t["b2"], t["bias2"])
    told = (*parts, 1.3, -0.5, *sm.Activation().parts)
    out, *made = OPERATORS.experts_mlp(*operands, *told)
    grads = OPERATORS.experts_mlp_backward(out, *operands, *made, *told, [True] * 10)
    for grad, operand in zip(grads, operands, strict=True):
        assert (grad.shape, grad.dtype) == (operand.shape, operand.dtype)
    operands, told = (t["x"], *first, t["gates"]), (*parts, 1.3, "token", "slot")
    out, *made = OPERATORS.expert_linear(*operands, *told)
    grads = OPERATORS.expert_linear_backward(out, *operands, *made, *told, [True] * 6)
    for grad, operand in zip(grads, operands, strict=True):
        assert (grad.shape, grad.dtype) == (operand.shape, operand.dtype)


def test_fakes_know_which_gradients_are_empty(device):
    """Where one operand alone wants one; a factor brings the other's along."""
    t = draw(device)
    t = {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in t.items()}
    parts = sm.Routing.from_top_k(t["index"], t["experts"]).parts
    first = (t["w1"].mT, t["a1"], t["b1"], None)
    calls = {
        "expert_linear": ((t["x"], *first, t["gates"]), (*parts, 1.3, "token", "slot")),
        "experts_mlp": (
            (t["x"], t["gates"], *first, t["w2"].mT, t["a2"], t["b2"], None),
            (*parts, 1.3, -0.5, *sm.Activation().parts),
        ),
    }
    for name, (operands, told) in calls.items():
        out, *made = getattr(OPERATORS, name)(*operands, *told)
        backward = getattr(OPERATORS, f"{name}_backward")
        for wanted in range(len(operands)):
            needs = [place == wanted for place in range(len(operands))]
            given = (out, *operands, *made, *told, needs)
            real = [grad.shape for grad in backward(*given)]
            with FakeTensorMode() as mode:
                faked = backward(*tree_map_only(torch.Tensor, mode.from_tensor, given))
            assert real == [grad.shape for grad in faked]
            assert real[wanted].numel() == (
                0 if operands[wanted] is None else operands[wanted].numel()
            )


@pytest.mark.gpu
def test_a_captured_step_replays_new_data_and_routing(device):
    """No host synchronisation anywhere in forward and backward: capture fails on one."""
    t = draw(device)
    leaves = [t["x"], t["gates"], t["a1"], t["b1"], t["a2"], t["b2"]]
    upstream = torch.randn(t["x"].shape, device=device)

    def step():
        out = layer(t, t["x"], t["gates"], t["index"])
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            t["x"].normal_()
            t["index"].random_(0, t["experts"])
        graph.replay()
        for expected, got in zip(step(), captured, strict=True):
            assert torch.equal(expected, got)


@pytest.mark.gpu
def test_nothing_waits_for_the_device(device):
    t = draw(device)
    value_and_gradients(layer, t)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradients(layer, t)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("function", [projection, layer])
def test_the_gradient_of_no_tokens_is_traced(function, device):
    t = draw(device)
    none = {n: t[n][:0] for n in ("x", "gates", "index")}
    eager = value_and_gradients(function, {**t, **none})
    traced = value_and_gradients(
        torch.compile(function, fullgraph=True, backend="aot_eager"), {**t, **none}
    )
    assert len(eager) == len(traced) > 2
    for expected, got in zip(eager, traced, strict=True):
        assert torch.equal(expected, got)
