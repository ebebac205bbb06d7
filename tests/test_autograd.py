"""Laws of the differentiable projection and layer, and the faults that such code had elsewhere."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import scattermoe_lora as sm
from scattermoe_lora.plan import current_precision, with_path
from scattermoe_lora.quant import ActiveExperts, Dense, StoredWeight

pytestmark = pytest.mark.correctness
EXPERTS, TOKENS, TOP_K, HIDDEN, WIDTH, RANK = 4, 9, 2, 32, 16, 3


class Layer:
    """Operands of a small expert MLP with adapters on both projections, in one dtype."""

    def __init__(self, device, dtype=torch.float32, adapter_dtype=None, index=None):
        torch.manual_seed(11)
        adapter_dtype = adapter_dtype or dtype

        def normal(*shape, scale=1.0, kind=dtype):
            return (torch.randn(*shape, device=device) * scale).to(kind)

        self.index = torch.randint(0, EXPERTS, (TOKENS, TOP_K), device=device)
        if index is not None:
            self.index = index.to(device)
        tokens = self.index.shape[0]
        self.x = normal(tokens, HIDDEN).requires_grad_()
        self.gates = torch.rand(tokens, TOP_K, device=device).requires_grad_()
        self.w1 = normal(EXPERTS, 2 * WIDTH, HIDDEN, scale=HIDDEN**-0.5)
        self.w2 = normal(EXPERTS, HIDDEN, WIDTH, scale=WIDTH**-0.5)
        factors = [
            normal(EXPERTS, RANK, HIDDEN, scale=HIDDEN**-0.5, kind=adapter_dtype),
            normal(EXPERTS, 2 * WIDTH, RANK, kind=adapter_dtype),
            normal(EXPERTS, RANK, WIDTH, scale=WIDTH**-0.5, kind=adapter_dtype),
            normal(EXPERTS, HIDDEN, RANK, kind=adapter_dtype),
        ]
        self.factors = [factor.requires_grad_() for factor in factors]

    @property
    def leaves(self):
        return [self.x, self.gates, *self.factors]

    def loras(self):
        a1, b1, a2, b2 = self.factors
        return sm.LoRAWeights(a=a1, b=b1, scaling=1.3), sm.LoRAWeights(a=a2, b=b2, scaling=-0.7)

    def routing(self, **options):
        return sm.Routing.from_top_k(self.index, EXPERTS, **options)

    def __call__(self, x=None, weights=None, routing=None, loras=None):
        first, second = weights or (self.w1.mT, self.w2.mT)
        lora1, lora2 = loras or self.loras()
        return sm.experts_mlp(
            self.x if x is None else x,
            self.gates,
            routing or self.routing(),
            gate_up=sm.Projection(weight=first, lora=lora1),
            down=sm.Projection(weight=second, lora=lora2),
            activation=sm.Activation(),
        )

    def gradients(self, out, upstream=None):
        upstream = torch.ones_like(out) if upstream is None else upstream
        return torch.autograd.grad(out, self.leaves, upstream, retain_graph=True)


def all_equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_second_backward_over_a_retained_graph_gives_the_same(device):
    layer = Layer(device)
    out = layer()
    upstream = torch.randn_like(out)
    assert all_equal(layer.gradients(out, upstream), layer.gradients(out, upstream))


def test_runs_repeat_bitwise(device):
    layer = Layer(device, torch.float16)
    first, second = layer(), layer()
    upstream = torch.randn_like(first)
    assert torch.equal(first, second)
    assert all_equal(layer.gradients(first, upstream), layer.gradients(second, upstream))


def gated_projection(layer, path):
    """The first projection alone, its choices summed, on a path of forward and input gradient."""

    def plan(operation, k, n):
        problem = sm.Problem(
            operation, TOKENS * TOP_K, EXPERTS, k, n, RANK, layer.x.dtype,
            current_precision(layer.x.dtype), "",
        )  # fmt: skip
        facts = sm.Device.of(layer.x.device)
        return with_path(sm.choose(problem, facts), path, problem, facts)

    plans = sm.Plans(
        forward=plan(sm.Operation.LORA_FORWARD, HIDDEN, 2 * WIDTH),
        input_grad=plan(sm.Operation.LORA_INPUT_GRAD, 2 * WIDTH, HIDDEN),
    )
    return sm.expert_linear(
        layer.x,
        layer.w1.mT,
        layer.routing(),
        source=sm.RowOrder.TOKEN,
        target=sm.RowOrder.SLOT,
        lora=layer.loras()[0],
        gates=layer.gates,
        plans=plans,
    )


@pytest.mark.parametrize("path", [sm.Path.EPILOGUE, sm.Path.FUSED, sm.Path.SPLIT])
def test_a_backward_changes_nothing_that_the_next_one_reads(device, path):
    layer = Layer(device)
    out = gated_projection(layer, path)
    upstream = torch.randn_like(out)
    leaves = layer.leaves[:4]
    kept = [value.detach().clone() for value in (out, upstream, *leaves)]
    first, second = (
        torch.autograd.grad(out, leaves, upstream, retain_graph=True) for _ in range(2)
    )
    assert all_equal(first, second)
    assert all_equal(kept, (out, upstream, *leaves))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(device, reentrant):
    layer = Layer(device)
    plain = layer()
    upstream = torch.randn_like(plain)
    expected = layer.gradients(plain, upstream)
    again = checkpoint(layer, layer.x, use_reentrant=reentrant)
    again.backward(upstream)
    got = [leaf.grad for leaf in layer.leaves]
    assert torch.equal(plain, again)
    assert all_equal(expected, got)


def test_stride_zero_and_transposed_gradients_are_read_right(device):
    layer = Layer(device)
    out = layer()
    row = torch.randn(HIDDEN, device=device)
    expanded = row.expand(TOKENS, HIDDEN)
    assert all_equal(layer.gradients(out, expanded), layer.gradients(out, expanded.contiguous()))
    scalar = torch.tensor(0.5, device=device).expand(TOKENS, HIDDEN)
    assert all_equal(layer.gradients(out, scalar), layer.gradients(out, scalar.contiguous()))
    turned = torch.randn(HIDDEN, TOKENS, device=device).mT
    assert all_equal(layer.gradients(out, turned), layer.gradients(out, turned.contiguous()))


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_of_a_projection_may_have_any_strides(device, gated):
    layer = Layer(device)
    out = sm.expert_linear(
        layer.x, layer.w1.mT, layer.routing(), source=sm.RowOrder.TOKEN, target=sm.RowOrder.SLOT,
        lora=layer.loras()[0], gates=layer.gates if gated else None,
    )  # fmt: skip
    rows, width = out.shape
    leaves = layer.leaves[:4] if gated else [layer.x, *layer.factors[:2]]
    given = (
        torch.randn(width, device=device).expand(rows, width),
        torch.randn(width, rows, device=device).mT,
        torch.randn(2 * rows, width, device=device)[::2],
    )
    for upstream in given:
        found, wanted = (
            torch.autograd.grad(out, leaves, dout, retain_graph=True)
            for dout in (upstream, upstream.contiguous())
        )
        assert all_equal(found, wanted), upstream.stride()


def test_a_frozen_base_gets_no_gradient_and_a_trainable_one_does(device):
    layer = Layer(device)
    w1 = layer.w1.clone().requires_grad_()
    out = layer(weights=(w1.mT, layer.w2.mT))
    out.sum().backward()
    assert w1.grad is not None
    assert w1.grad.shape == w1.shape
    assert layer.w2.grad is None


def test_only_what_is_asked_is_returned(device):
    layer = Layer(device)
    for leaf in layer.leaves[1:]:
        leaf.requires_grad_(requires_grad=False)
    layer().sum().backward()
    assert layer.x.grad is not None
    assert all(leaf.grad is None for leaf in layer.leaves[1:])


@pytest.mark.parametrize("path", [sm.Path.EPILOGUE, sm.Path.FUSED, sm.Path.SPLIT])
def test_fp32_adapters_train_in_fp32_beside_16_bit_activations(device, path):
    layer = Layer(device, torch.float16, torch.float32)
    routing = layer.routing()
    lora = layer.loras()[0]
    problem = sm.Problem(
        sm.Operation.LORA_FORWARD, routing.rows, EXPERTS, HIDDEN, 2 * WIDTH, RANK,
        torch.float16, current_precision(torch.float16), "nk",
    )  # fmt: skip
    facts = sm.Device.of(torch.device(device))
    plan = next(plan for plan in sm.candidates(problem, facts) if plan.path is path)
    out = sm.expert_linear(
        layer.x,
        layer.w1.mT,
        routing,
        source=sm.RowOrder.TOKEN,
        target=sm.RowOrder.SLOT,
        lora=lora,
        plans=sm.Plans(forward=plan),
    )
    out.float().square().sum().backward()
    assert out.dtype == torch.float16
    for factor in layer.factors[:2]:
        assert factor.grad.dtype == torch.float32
        assert factor.grad.abs().sum() > 0


def test_backward_under_autocast_has_the_dtypes_of_the_leaves(device):
    layer = Layer(device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        out = layer()
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(leaf.grad.dtype == leaf.dtype for leaf in layer.leaves)


@pytest.mark.parametrize("kind", ["projection", "layer"])
@pytest.mark.parametrize(
    ("adapter", "within"),
    [(torch.float16, True), (torch.float32, False)],
    ids=["float16, backward within", "float32, backward outside"],
)
def test_gradients_under_autocast_are_those_of_operands_cast_by_hand(device, kind, adapter, within):
    layer = Layer(device, torch.float32, adapter)

    def call(dtype):
        loras = [
            lora if dtype is None or adapter is torch.float32 else replace(
                lora, a=lora.a.to(dtype), b=lora.b.to(dtype)
            )
            for lora in layer.loras()
        ]  # fmt: skip
        x, *weights = (
            value if dtype is None else value.to(dtype) for value in (layer.x, layer.w1, layer.w2)
        )
        if kind == "layer":
            return layer(x=x, weights=[weight.mT for weight in weights], loras=loras)
        return sm.expert_linear(
            x, weights[0].mT, layer.routing(), source=sm.RowOrder.TOKEN, target=sm.RowOrder.SLOT,
            lora=loras[0], gates=layer.gates,
        )  # fmt: skip

    leaves = layer.leaves[: 6 if kind == "layer" else 4]
    autocast = torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
    with autocast:
        found = call(None)
    upstream = torch.randn_like(found)
    with autocast if within else nullcontext():
        grads = torch.autograd.grad(found, leaves, upstream)
    assert all_equal(grads, torch.autograd.grad(call(torch.bfloat16), leaves, upstream))
    assert all(grad.any() for grad in grads)


def test_a_rank_without_rows_still_gets_zero_gradients(device):
    layer = Layer(device, index=torch.full((TOKENS, TOP_K), -1))
    out = layer(routing=layer.routing(sentinels=True))
    out.sum().backward()
    assert not out.any()
    assert all(not factor.grad.any() for factor in layer.factors)
    assert not layer.x.grad.any()


def test_no_tokens_give_empty_results_and_zero_gradients(device):
    layer = Layer(device, index=torch.empty((0, TOP_K), dtype=torch.int64))
    out = layer()
    out.sum().backward()
    assert out.shape == (0, HIDDEN)
    assert all(not factor.grad.any() for factor in layer.factors)


def test_precision_of_fp32_products_follows_torch_at_each_launch():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert current_precision(torch.float32) is sm.Precision.TF32
        torch.set_float32_matmul_precision("highest")
        assert current_precision(torch.float32) is sm.Precision.IEEE
    finally:
        torch.set_float32_matmul_precision(before)


def test_compaction_slices_both_adapters_or_either(device):
    """Fewer experts than the adapters were made for: each projection keeps its own slices."""
    index = torch.tensor([[3, 1]] * TOKENS)
    layer = Layer(device, index=index)
    whole = layer()
    active = ActiveExperts.of(layer.routing())
    first, second = layer.loras()
    parts = (layer.w1[active.ids].mT, layer.w2[active.ids].mT)
    compact = layer(
        weights=parts, routing=active.routing, loras=(active.lora(first), active.lora(second))
    )
    upstream = torch.randn_like(whole)
    assert torch.equal(whole, compact)
    assert all_equal(layer.gradients(whole, upstream), layer.gradients(compact, upstream))


@pytest.mark.parametrize("adapted", ["gate_up", "down"])
def test_compaction_slices_the_only_adapter_there_is(device, adapted):
    layer = Layer(device, index=torch.tensor([[3, 1]] * TOKENS))
    active = ActiveExperts.of(layer.routing())
    kept = slice(0, 2) if adapted == "gate_up" else slice(2, 4)

    def run(routing, weights, slices):
        parts = {
            name: sm.Projection(weight=weight.mT, lora=slices(lora) if name == adapted else None)
            for name, weight, lora in zip(("gate_up", "down"), weights, layer.loras(), strict=True)
        }
        out = sm.experts_mlp(layer.x, layer.gates, routing, **parts, activation=sm.Activation())
        leaves = [layer.x, layer.gates, *layer.factors[kept]]
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    whole = run(layer.routing(), (layer.w1, layer.w2), lambda lora: lora)
    parts = [weight[active.ids] for weight in (layer.w1, layer.w2)]
    assert all_equal(whole, run(active.routing, parts, active.lora))


@pytest.mark.parametrize("autocast", [False, True])
def test_decoded_experts_are_not_kept_for_the_backward(device, autocast):
    layer = Layer(device)
    stored = [
        StoredWeight(stored=Dense(data=weight.half()), transposed=True)
        for weight in (layer.w1, layer.w2)
    ]
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=autocast),
    ):
        layer(weights=stored)
        sm.expert_linear(
            layer.x, stored[0], layer.routing(), source=sm.RowOrder.TOKEN,
            target=sm.RowOrder.SLOT, lora=layer.loras()[0],
        )  # fmt: skip
    factors = {factor.shape for factor in layer.factors}
    assert factors <= {tensor.shape for tensor in kept}
    assert {tensor.shape for tensor in kept if tensor.ndim == 3} == factors


@pytest.mark.parametrize("experts_per_block", [1, 3, None])
def test_stored_experts_equal_dense_ones_bitwise(device, experts_per_block):
    layer = Layer(device)
    dense = layer()
    upstream = torch.randn_like(dense)
    budgets = [
        None if experts_per_block is None else experts_per_block * 4 * weight[0].numel()
        for weight in (layer.w1, layer.w2)
    ]
    stored = [
        StoredWeight(stored=Dense(data=weight), transposed=True, budget_bytes=budget)
        for weight, budget in zip((layer.w1, layer.w2), budgets, strict=True)
    ]
    out = layer(weights=stored)
    assert torch.equal(dense, out)
    assert all_equal(layer.gradients(dense, upstream), layer.gradients(out, upstream))


def test_an_expert_that_no_block_may_hold_is_refused(device):
    layer = Layer(device)
    stored = StoredWeight(stored=Dense(data=layer.w1), transposed=True, budget_bytes=64)
    with pytest.raises(ValueError, match=r"4096 bytes .* 64 bytes"):
        layer(weights=(stored, layer.w2.mT))


BAD = {
    "x is float64": (lambda t: {"x": t.x.double()}, TypeError, "float64"),
    "x of other dtype": (lambda t: {"x": t.x.half()}, TypeError, "float32 but hidden is"),
    "x too narrow": (
        lambda t: {"x": t.x[:, :-1]},
        ValueError,
        f"{HIDDEN} but hidden has {HIDDEN - 1}",
    ),
    "x too short": (lambda t: {"x": t.x[:-1]}, ValueError, f"{TOKENS - 1} rows"),
    "weights swapped": (
        lambda t: {"weights": (t.w2.mT, t.w1.mT)},
        ValueError,
        "twice the input",
    ),
    "experts missing": (
        lambda t: {"weights": (t.w1[1:].mT, t.w2.mT)},
        ValueError,
        f"{EXPERTS - 1} experts but the routing has {EXPERTS}",
    ),
    "adapters swapped": (
        lambda t: {"loras": t.loras()[::-1]},
        ValueError,
        f"width {WIDTH} but hidden has width {HIDDEN}",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_operands_are_refused_with_both_numbers(device, name):
    change, error, words = BAD[name]
    layer = Layer(device)
    with pytest.raises(error, match=words):
        layer(**change(layer))


def test_rank_mismatch_and_unknown_experts_are_refused(device):
    a = torch.randn(EXPERTS, 4, HIDDEN, device=device)
    b = torch.randn(EXPERTS, WIDTH, 5, device=device)
    with pytest.raises(ValueError, match=r"rank 4 but lora\.b has rank 5"):
        sm.LoRAWeights(a=a, b=b, scaling=1.0)
    index = torch.tensor([[0, EXPERTS]], device=device)
    with pytest.raises(ValueError, match=rf"expert {EXPERTS}, but experts are 0 to {EXPERTS - 1}"):
        sm.Routing.from_top_k(index, EXPERTS, validate=True)
    with pytest.raises(ValueError, match="3 experts per token, but there are 2"):
        sm.Routing.from_top_k(torch.zeros((1, 3), dtype=torch.int64, device=device), 2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        sm.Routing.from_top_k(index, 0)
    with pytest.raises(TypeError, match="integers"):
        sm.Routing.from_top_k(index.float(), EXPERTS)


def test_a_rank_with_fewer_experts_than_choices_keeps_its_own_rows(device):
    index = torch.tensor([[0, 5, 7], [6, 1, -1]], device=device)
    routing = sm.Routing.from_top_k(index, 2, sentinels=True)
    assert routing.offsets.tolist() == [0, 1, 2]
    assert routing.slots[:2].tolist() == [0, 4]
    with pytest.raises(ValueError, match="3 experts per token, but there are 2"):
        sm.Routing.from_top_k(index, 2)
