"""What must hold of a routed projection and of the layer whatever the reference says.

Bitwise laws run on small integers and one pinned plan per path, where every sum is exact however it
is ordered; those within a limit say which.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import scattermoe_lora as sm
from scattermoe_lora.ops import combine, combine_grad, product, scatter2scatter
from scattermoe_lora.ops import lora as lora_ops
from scattermoe_lora.plan import PATHS, with_path

pytestmark = pytest.mark.correctness

EXPERTS, TOKENS, TOP_K, K, N, RANK = 4, 9, 2, 24, 20, 3
ORDERS = tuple(sm.RowOrder)
PATHS_HERE = tuple(
    path for path in PATHS[sm.Operation.LORA_FORWARD] if path is not sm.Path.GROUPED_MM
)
by_path = pytest.mark.parametrize("path", PATHS_HERE, ids=lambda path: path.value)


def integers(*shape: int, seed: int, limit: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-limit, limit + 1, shape, generator=generator).float()


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A projection of integers, x by token and y by slot."""

    index: Tensor
    x: Tensor
    dy: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor
    bias: Tensor
    scaling: float = 2.0
    experts: int = EXPERTS

    @classmethod
    def drawn(cls, device, **changes) -> "Linear":
        """Expert 2 is idle; some slots are nobody's."""
        generator = torch.Generator().manual_seed(4)
        ids = torch.tensor([0, 1, 3, -1])
        index = ids[torch.randint(0, 4, (TOKENS, TOP_K), generator=generator)]
        tensors = {
            "index": index,
            "x": integers(TOKENS, K, seed=1),
            "dy": integers(TOKENS * TOP_K, N, seed=2),
            "weight": integers(EXPERTS, K, N, seed=3),
            "a": integers(EXPERTS, RANK, K, seed=4, limit=1),
            "b": integers(EXPERTS, N, RANK, seed=5, limit=1),
            "bias": integers(EXPERTS, N, seed=6, limit=9),
        }
        return cls(**{name: value.to(device) for name, value in tensors.items()} | changes)

    @property
    def routing(self) -> sm.Routing:
        return sm.Routing.from_top_k(self.index, self.experts, sentinels=True)

    def run(self, path: sm.Path = sm.Path.EPILOGUE) -> dict[str, Tensor]:
        """y by slot and every gradient, on one path of the products."""
        names = ("x", "weight", "a", "b", "bias")
        leaves = {name: getattr(self, name).detach().requires_grad_() for name in names}
        y = sm.expert_linear(
            leaves["x"],
            leaves["weight"],
            self.routing,
            source=sm.RowOrder.TOKEN,
            target=sm.RowOrder.SLOT,
            lora=sm.LoRAWeights(a=leaves["a"], b=leaves["b"], scaling=self.scaling),
            bias=leaves["bias"],
            plans=self.plans(path),
        )
        grads = torch.autograd.grad(y, list(leaves.values()), self.dy)
        return {"y": y.detach(), **dict(zip(names, grads, strict=True))}

    def plans(self, path: sm.Path) -> sm.Plans:
        """The tiles of the heuristic for one size, whatever the size is."""
        facts = sm.Device.of(self.x.device)
        found = {}
        for name, operation, k, n in (
            ("forward", sm.Operation.LORA_FORWARD, K, N),
            ("input_grad", sm.Operation.LORA_INPUT_GRAD, N, K),
        ):
            problem = sm.Problem(
                operation, TOKENS * TOP_K, EXPERTS, k, n, RANK, torch.float32, sm.Precision.IEEE, ""
            )
            found[name] = with_path(sm.choose(problem, facts), path, problem, facts)
        return sm.Plans(**found)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """Names of what differs in a bit."""
    return [name for name in left if not torch.equal(left[name], right[name])]


def slots_of(tokens: Tensor) -> Tensor:
    return (tokens[:, None] * TOP_K + torch.arange(TOP_K, device=tokens.device)).flatten()


@by_path
def test_permuting_tokens_permutes_what_belongs_to_them(device, path):
    one = Linear.drawn(device)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1)).to(device)
    moved = replace(one, index=one.index[order], x=one.x[order], dy=one.dy[slots_of(order)])
    found, want = moved.run(path), one.run(path)
    want |= {"y": want["y"][slots_of(order)], "x": want["x"][order]}
    assert same(found, want) == []


@by_path
def test_relabelling_experts_with_their_weights_changes_nothing(device, path):
    one = Linear.drawn(device)
    names = torch.tensor([2, 0, 3, 1], device=device)
    back = torch.argsort(names)
    index = torch.where(one.index < 0, one.index, names[one.index.clamp(min=0)])
    tables = {name: getattr(one, name)[back] for name in ("weight", "a", "b", "bias")}
    found, want = replace(one, index=index, **tables).run(path), one.run(path)
    want |= {name: want[name][back] for name in tables}
    assert same(found, want) == []


@by_path
def test_a_split_batch_is_the_whole(device, path):
    one, cut = Linear.drawn(device), 4
    parts = [
        replace(
            one,
            index=one.index[part],
            x=one.x[part],
            dy=one.dy[part.start * TOP_K : part.stop * TOP_K],
        ).run(path)
        for part in (slice(0, cut), slice(cut, TOKENS))
    ]
    joined = {
        name: torch.cat([part[name] for part in parts])
        if name in ("x", "y")
        else parts[0][name] + parts[1][name]
        for name in parts[0]
    }
    assert same(joined, one.run(path)) == []


@by_path
def test_an_adapter_of_zeros_is_no_adapter(device, path):
    one = Linear.drawn(device)
    bare = sm.expert_linear(
        one.x, one.weight, one.routing, source=sm.RowOrder.TOKEN, target=sm.RowOrder.SLOT,
        bias=one.bias,
    )  # fmt: skip
    for zeros in ({"a": torch.zeros_like(one.a)}, {"b": torch.zeros_like(one.b)}, {"scaling": 0.0}):
        off = replace(one, **zeros)
        y = sm.expert_linear(
            off.x, off.weight, off.routing, source=sm.RowOrder.TOKEN, target=sm.RowOrder.SLOT,
            lora=sm.LoRAWeights(a=off.a, b=off.b, scaling=off.scaling), bias=off.bias,
            plans=off.plans(path),
        )  # fmt: skip
        assert torch.equal(y, bare)


@by_path
def test_powers_of_two_pass_through(device, path):
    one, factor = Linear.drawn(device), 2.0**-9
    want = one.run(path)
    found = replace(one, x=one.x * factor, bias=one.bias * factor).run(path)
    scaled = {"y", "weight", "a", "b"}
    assert same(found, {n: v * factor if n in scaled else v for n, v in want.items()}) == []
    found = replace(one, dy=one.dy * factor).run(path)
    assert same(found, {n: v if n == "y" else v * factor for n, v in want.items()}) == []
    found = replace(one, scaling=one.scaling * factor, a=one.a / factor).run(path)
    want_scaled = want | {"a": want["a"] * factor}
    assert same(found, want_scaled) == []


@by_path
def test_an_expert_does_not_see_the_rows_of_others(device, path):
    one = Linear.drawn(device)
    mine = (one.index == 1).flatten()
    token_is_mine = (one.index == 1).all(1)
    x = torch.where(token_is_mine[:, None] | (one.index == 1).any(1)[:, None], one.x, one.x + 1)
    other = replace(one, x=x, dy=torch.where(mine[:, None], one.dy, 3 - one.dy))
    found, want = other.run(path), one.run(path)
    for name in ("weight", "a", "b", "bias"):
        assert torch.equal(found[name][1], want[name][1]), name
        assert not found[name][2].any(), name
    assert torch.equal(found["y"][mine], want["y"][mine])
    assert not torch.equal(found["a"][0], want["a"][0])


@by_path
@pytest.mark.parametrize("name", ["x", "dy"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_what_is_not_finite_stays_in_its_row_and_its_experts(device, path, name, value):
    one = Linear.drawn(device)
    token = int((one.index >= 0).all(1).nonzero()[0])
    row = token if name == "x" else token * TOP_K
    spoilt = getattr(one, name).clone()
    spoilt[row, 5] = value
    found, want = replace(one, **{name: spoilt}).run(path), one.run(path)
    slots = slots_of(torch.tensor([token], device=device)) if name == "x" else torch.tensor([row])
    hit = {"y": slots.tolist(), "x": []} if name == "x" else {"y": [], "x": [token]}
    owners = set(one.index.flatten()[slots.to(device)].tolist())
    for output in ("y", "x"):
        for place, (have, should) in enumerate(zip(found[output], want[output], strict=True)):
            if place in hit[output]:
                assert not torch.isfinite(have).any(), (output, place)
            else:
                assert torch.equal(have, should), (output, place)
    for output in ("weight", "a", "b", "bias"):
        for expert in range(EXPERTS):
            if expert not in owners:
                assert torch.equal(found[output][expert], want[output][expert]), (output, expert)
    seen = {
        expert for expert in range(EXPERTS) if not torch.isfinite(found["weight"][expert]).all()
    }
    assert seen == owners


def test_all_paths_agree_bitwise_on_integers(device):
    found = [Linear.drawn(device).run(path) for path in PATHS_HERE]
    assert len(found) > 1
    for other in found[1:]:
        assert same(found[0], other) == []


class Gathered(Linear):
    """Rows are copied into expert order before they are multiplied."""

    def plans(self, path: sm.Path) -> sm.Plans:
        plans = super().plans(path)
        return sm.Plans(
            forward=replace(plans.forward, gather=True),
            input_grad=replace(plans.input_grad, gather=True),
        )


def test_rows_that_are_copied_first_are_the_same_rows(device, monkeypatch):
    copies, copied = [], product.group
    monkeypatch.setattr(product, "group", lambda *a, **k: copies.append(k) or copied(*a, **k))
    one, want = Gathered.drawn(device), Linear.drawn(device).run()
    assert not copies
    assert same(one.run(), want) == []
    assert [made["source"] for made in copies] == [sm.RowOrder.TOKEN, sm.RowOrder.SLOT]
    plan = replace(one.plans(sm.Path.EPILOGUE).forward, path=sm.Path.TILES)
    orders = {"source": sm.RowOrder.TOKEN, "target": sm.RowOrder.SLOT}
    y = scatter2scatter(one.x, one.weight, one.routing, **orders, plan=plan)
    assert len(copies) == 3
    plain = scatter2scatter(
        one.x, one.weight, one.routing, **orders, plan=replace(plan, gather=False)
    )
    assert torch.equal(y, plain)
    assert len(copies) == 3


@pytest.mark.parametrize("spare", [0, 1], ids=["at the threshold", "below it"])
def test_columns_that_are_summed_in_halves_are_the_same_columns(device, monkeypatch, spare):
    one, width = Linear.drawn(device), 512
    weight = integers(EXPERTS, width, N, seed=15).to(device)
    lora = sm.LoRAWeights(
        a=integers(EXPERTS, RANK, width, seed=16).to(device), b=one.b, scaling=2.0
    )
    launches = []
    launch = lora_ops.launch_product
    monkeypatch.setattr(
        lora_ops, "launch_product", lambda *a, **k: launches.append(a[1].shape) or launch(*a, **k)
    )

    def run() -> Tensor:
        launches.clear()
        dx, _ = lora_ops.lora_input_grad(
            one.dy, weight, lora, one.routing, source=sm.RowOrder.SLOT, target=sm.RowOrder.TOKEN,
            plan=one.plans(sm.Path.EPILOGUE).input_grad,
        )  # fmt: skip
        return dx

    whole = run()
    assert launches.count((EXPERTS, N, width)) == 1
    size = TOKENS * TOP_K * width * whole.itemsize
    monkeypatch.setattr(lora_ops, "HALVED_BYTES", size + spare)
    assert torch.equal(run(), whole)
    assert launches.count((EXPERTS, N, width // 2)) == (0 if spare else 2)


def laid_out(rows: Tensor, order: sm.RowOrder, routing: sm.Routing) -> Tensor:
    """Rows by slot in another order of rows."""
    return rows if order is sm.RowOrder.SLOT else rows[routing.slots]


@pytest.mark.parametrize("source", ORDERS, ids=lambda order: order.value)
@pytest.mark.parametrize("target", ORDERS[1:], ids=lambda order: order.value)
@pytest.mark.parametrize("adapter", [False, True], ids=["bare", "adapter"])
def test_rows_in_any_order_are_the_same_rows(device, source, target, adapter):
    one = Linear.drawn(device, index=Linear.drawn(device).index.clamp(min=0))
    routing = one.routing
    lora = sm.LoRAWeights(a=one.a, b=one.b, scaling=2.0) if adapter else None

    def run(x: Tensor, source: sm.RowOrder, target: sm.RowOrder) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        y = sm.expert_linear(x, one.weight, routing, source=source, target=target, lora=lora)
        (dx,) = torch.autograd.grad(y, x, laid_out(one.dy, target, routing))
        return y.detach(), dx

    want, want_dx = run(one.x, sm.RowOrder.TOKEN, sm.RowOrder.SLOT)
    x = one.x
    if source is not sm.RowOrder.TOKEN:
        x = laid_out(one.x.repeat_interleave(TOP_K, 0), source, routing)
    y, dx = run(x, source, target)
    assert torch.equal(y, laid_out(want, target, routing))
    if source is sm.RowOrder.EXPERT:
        dx = torch.empty_like(dx).index_copy(0, routing.slots, dx)
    if source is not sm.RowOrder.TOKEN:
        dx = dx.unflatten(0, (TOKENS, TOP_K)).sum(1)
    assert torch.equal(dx, want_dx)


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
    y = integers(TOKENS * TOP_K, 7, seed=12).to(device)
    gates = integers(TOKENS, TOP_K, seed=13).to(device)
    dout = integers(TOKENS, 7, seed=14).to(device)
    out = combine(y, operands.routing, gates=gates)
    dgates = combine_grad(y, dout, operands.routing)
    assert torch.equal((out * dout).sum(), (gates * dgates).sum())
    assert torch.equal(combine(y, operands.routing), combine(y, operands.routing, gates=gates**0))
