"""What must hold of a routed projection and of the layer whatever the reference says.

Bitwise laws run on small integers and one pinned plan per path, where every sum is exact however it
is ordered; those within a limit say which.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import scattermoe_lora as sm
from scattermoe_lora.ops import lora as lora_ops
from scattermoe_lora.ops import product, scatter2scatter
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
