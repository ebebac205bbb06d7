"""The projection and the layer beside autograd of plain torch, and plans that reach their launches.

The projection runs on small integers, whose sums fp32 holds exactly in any order: its laws are
bitwise.
"""

import pytest
import torch
from torch import Tensor

import scattermoe_lora as sm
from scattermoe_lora.plan import PATHS

pytestmark = pytest.mark.correctness

EXPERTS, TOKENS, TOP_K, K, N, RANK, SCALING = 3, 3, 2, 6, 5, 2, -2.0
TOKEN, SLOT, EXPERT = sm.RowOrder
LEAVES = ("x", "weight", "a", "b", "bias", "gates")


@pytest.fixture(scope="module")
def routing(device) -> sm.Routing:
    """Expert 1 is idle, one slot is nobody's."""
    index = torch.tensor([[2, 0], [0, -1], [2, 2]], device=device)
    return sm.Routing.from_top_k(index, EXPERTS, sentinels=True)


def integers(*shape: int, seed: int, device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).float().to(device)


def operands(routing: sm.Routing, source: sm.RowOrder) -> dict[str, Tensor]:
    shapes = {
        "x": (routing.row_count(source), K),
        "weight": (EXPERTS, K, N),
        "a": (EXPERTS, RANK, K),
        "b": (EXPERTS, N, RANK),
        "bias": (EXPERTS, N),
        "gates": (TOKENS, TOP_K),
    }
    return {
        name: integers(*shape, seed=seed, device=routing.device)
        for seed, (name, shape) in enumerate(shapes.items())
    }


def projection(t: dict, routing, source, target, plans=None) -> Tensor:
    adapter = "a" in t
    return sm.expert_linear(
        t["x"],
        t["weight"],
        routing,
        source=source,
        target=target,
        lora=sm.LoRAWeights(a=t["a"], b=t["b"], scaling=SCALING) if adapter else None,
        bias=t.get("bias"),
        gates=t.get("gates"),
        plans=plans or sm.Plans(),
    )


def reference(t: dict, routing, source, target) -> Tensor:
    """The same from indexing and einsum."""
    rows = {
        TOKEN: torch.arange(TOKENS).repeat_interleave(TOP_K).to(routing.device),
        SLOT: torch.arange(TOKENS * TOP_K, device=routing.device),
        EXPERT: torch.argsort(routing.slots),
    }
    expert = routing.expert_of_row[rows[EXPERT]].long()
    kept, expert = (expert < EXPERTS)[:, None], expert.clamp(max=EXPERTS - 1)
    x = t["x"][rows[source]]
    y = torch.einsum("sk,skn->sn", x, t["weight"][expert])
    if "a" in t:
        low = torch.einsum("sk,srk->sr", x, t["a"][expert])
        y = y + SCALING * torch.einsum("sr,snr->sn", low, t["b"][expert])
    if "bias" in t:
        y = y + t["bias"][expert]
    y = torch.where(kept, y, 0)
    if "gates" in t:
        return (y.view(TOKENS, TOP_K, N) * t["gates"][:, :, None]).sum(1)
    return y if target is SLOT else y[routing.slots]


BARE = ("a", "b", "bias", "gates")
CASES = [
    *((TOKEN, left_out) for left_out in ((), ("gates",), BARE, ("bias", "gates"))),
    (SLOT, ("gates",)),
    (EXPERT, ("gates",)),
    (EXPERT, BARE),
]


@pytest.mark.parametrize(("source", "left_out"), CASES, ids=str)
def test_results_and_gradients_are_those_of_plain_torch(routing, source, left_out):
    t = {n: v for n, v in operands(routing, source).items() if n not in left_out}
    for target in (SLOT,) if "gates" in t or "bias" not in t else (SLOT, EXPERT):
        leaves = {name: value.clone().requires_grad_() for name, value in t.items()}
        expected = reference(leaves, routing, source, target)
        upstream = integers(*expected.shape, seed=9, device=routing.device)
        wanted = torch.autograd.grad(expected, list(leaves.values()), upstream)
        found = projection(leaves, routing, source, target)
        grads = torch.autograd.grad(found, list(leaves.values()), upstream)
        assert torch.equal(found, expected)
        for name, grad, want in zip(leaves, grads, wanted, strict=True):
            assert torch.equal(grad, want), name


def test_autocast_takes_projections_and_layers_without_adapters(routing):
    """Operands that bf16 holds exactly, so that casting them first is the definition."""
    t = {name: v for name, v in operands(routing, TOKEN).items() if name in ("x", "weight")}
    second = integers(EXPERTS, N, K, seed=8, device=routing.device)

    def results(dtype: torch.dtype) -> list[Tensor]:
        weights = (torch.cat([t["weight"], t["weight"]], 2), second)
        first, last = (sm.Projection(weight=weight.to(dtype)) for weight in weights)
        x = t["x"].to(dtype)
        gates = torch.ones(TOKENS, TOP_K, device=routing.device)
        activation = sm.Activation()
        return [
            projection({"x": x, "weight": t["weight"].to(dtype)}, routing, TOKEN, SLOT),
            sm.experts_mlp(x, gates, routing, gate_up=first, down=last, activation=activation),
        ]

    with torch.autocast(routing.device.type, dtype=torch.bfloat16):
        cast = results(torch.float32)
    for found, wanted in zip(cast, results(torch.bfloat16), strict=True):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, wanted)


TILE = sm.Tile(block_m=16, block_n=16, block_k=16)


def foreign(operation: sm.Operation) -> sm.Plan:
    """A plan that no launch of the operation takes."""
    path = next(path for path in sm.Path if path not in PATHS[operation])
    return sm.Plan(path=path, tile=TILE, shrink=TILE)


LAUNCHES = {
    "forward": sm.Operation.LORA_FORWARD,
    "input_grad": sm.Operation.LORA_INPUT_GRAD,
    "weight_grad": sm.Operation.LORA_WEIGHT_GRAD,
}


@pytest.mark.parametrize(
    ("name", "adapter"),
    [*((name, True) for name in LAUNCHES), ("forward", False), ("input_grad", False)],
)
def test_a_plan_of_a_projection_reaches_its_launch(routing, name, adapter):
    operation = LAUNCHES[name] if adapter else sm.Operation.SCATTER2SCATTER
    t = operands(routing, TOKEN)
    kept = LEAVES if adapter else ("x", "weight")
    leaves = {n: v.requires_grad_() for n, v in t.items() if n in kept}
    plans = sm.Plans(**{name: foreign(operation)})
    with pytest.raises(ValueError, match=f"{operation.value} has no path"):
        projection(leaves, routing, TOKEN, SLOT, plans).sum().backward()


@pytest.mark.parametrize("name", LAUNCHES)
@pytest.mark.parametrize("where", ["gate_up", "down"])
def test_a_plan_of_the_layer_reaches_its_launch(routing, where, name):
    def weights(k: int, n: int, plans: sm.Plans | None) -> sm.Projection:
        shapes = ((EXPERTS, k, n), (EXPERTS, RANK, k), (EXPERTS, n, RANK))
        weight, a, b = (integers(*s, seed=1, device=routing.device) for s in shapes)
        lora = sm.LoRAWeights(a=a.requires_grad_(), b=b, scaling=1.0)
        return sm.Projection(weight=weight, lora=lora, plans=plans)

    plans = {where: sm.Plans(**{name: foreign(LAUNCHES[name])})}
    x = integers(TOKENS, K, seed=1, device=routing.device).requires_grad_()
    with pytest.raises(ValueError, match=f"{LAUNCHES[name].value} has no path"):
        sm.experts_mlp(
            x,
            integers(TOKENS, TOP_K, seed=2, device=routing.device),
            routing,
            gate_up=weights(K, 2 * N, plans.get("gate_up")),
            down=weights(N, K, plans.get("down")),
            activation=sm.Activation(),
        ).sum().backward()
