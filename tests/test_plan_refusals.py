"""What is no plan, no problem and no plan of a projection: refused where it is stated."""

import pytest
import torch

import scattermoe_lora as sm
from scattermoe_lora import ops
from scattermoe_lora._launch import Launch
from scattermoe_lora.plan import INTERPRETER

pytestmark = pytest.mark.correctness
TILE = sm.Tile(block_m=16, block_n=16, block_k=16)
GRAM = sm.Plan(path=sm.Path.GRAM, tile=TILE)
EPILOGUE = sm.Plan(path=sm.Path.EPILOGUE, tile=TILE, shrink=TILE)
PROBLEM = sm.Problem(
    sm.Operation.LORA_FORWARD, 64, 4, 16, 16, 4, torch.float32, sm.Precision.IEEE, "nk"
)

PLANS = {
    "path": ({"path": "epilogue"}, "the path of a plan must be of type Path, got str"),
    "tile": ({"tile": (16, 16, 16)}, "the tile of a plan must be of type Tile, got tuple"),
    "shrink": ({"shrink": 16}, "the shrink tile of a plan must be of type Tile, got int"),
    "precision": ({"precision": "ieee"}, "precision of a plan must be of type Precision, got str"),
}


@pytest.mark.parametrize(("wrong", "words"), PLANS.values(), ids=PLANS)
def test_a_plan_is_of_the_types_that_it_states(wrong, words):
    with pytest.raises(TypeError, match=words):
        sm.Plan(**{"path": sm.Path.TILES, "tile": TILE, **wrong})


PATHS = [
    ("forward", GRAM, True, "lora_forward has no path 'gram'; it has epilogue, fused, split, g"),
    ("forward", EPILOGUE, False, "scatter2scatter has no path 'epilogue'; it has tiles, grouped"),
    ("input_grad", GRAM, True, "lora_input_grad has no path 'gram'; it has epilogue, fused"),
    ("input_grad", EPILOGUE, False, "scatter2scatter has no path 'epilogue'; it has tiles, gr"),
    ("weight_grad", EPILOGUE, True, "lora_weight_grad has no path 'epilogue'; it has gram, rec"),
]


@pytest.mark.parametrize(("name", "plan", "adapted", "words"), PATHS)
def test_a_path_that_a_projection_does_not_have_is_refused_before_its_forward(
    name, plan, adapted, words, monkeypatch
):
    launched = []
    monkeypatch.setattr(Launch, "__call__", lambda self, *facts: launched.append(self))
    plans, lora = sm.Plans(**{name: plan}), LORA if adapted else None
    with pytest.raises(ValueError, match=words):
        sm.expert_linear(X, W, ROUTING, lora=lora, plans=plans, **FORWARD)
    part = sm.Projection(weight=W, lora=lora, plans=plans)
    down = sm.Projection(weight=torch.ones(2, 2, 4))
    with pytest.raises(ValueError, match=words):
        sm.experts_mlp(
            X, torch.ones(2, 1), ROUTING, gate_up=part, down=down, activation=sm.Activation()
        )
    assert not launched


@pytest.mark.parametrize("name", ["forward", "input_grad", "weight_grad"])
def test_a_name_is_no_plan(name):
    with pytest.raises(TypeError, match=f"the plan of {name} must be of type Plan, got str"):
        sm.Plans(**{name: "tiles"})


PROBLEMS = {
    "operation": ({"operation": "shrink"}, TypeError, "operation of a problem must be of type Op"),
    "precision": ({"precision": "ieee"}, TypeError, "must be of type Precision, got str"),
    "dtype's name": ({"dtype": "float32"}, TypeError, "must be of type dtype, got str"),
    "dtype": ({"dtype": torch.float64}, TypeError, "float32, float16 or bfloat16, got torch.flo"),
    "rows": ({"rows": -1}, ValueError, "rows of a problem must be at least 0, got -1"),
    "experts": ({"experts": 0}, ValueError, "experts of a problem must be at least 1, got 0"),
    "k": ({"k": 0}, ValueError, "k of a problem must be at least 1, got 0"),
    "n": ({"n": 0}, ValueError, "n of a problem must be at least 1, got 0"),
    "rank": ({"rank": -1}, ValueError, "rank of a problem must be at least 0, got -1"),
    "layout": ({"w_map": "xx"}, ValueError, "w_map must be 'nk', 'kn' or '', got 'xx'"),
}


@pytest.mark.parametrize(("wrong", "error", "words"), PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("function", [sm.choose, sm.candidates])
def test_a_problem_that_cannot_be_is_refused(function, wrong, error, words):
    with pytest.raises(error, match=words):
        function(PROBLEM._replace(**wrong), INTERPRETER)


@pytest.mark.parametrize("function", [sm.choose, sm.candidates])
def test_what_is_no_problem_or_no_device_is_refused(function):
    with pytest.raises(TypeError, match=r"facts that Device\.of tells of a device, got device"):
        function(PROBLEM, torch.device("cpu"))
    with pytest.raises(TypeError, match="problem must be of type Problem, got tuple"):
        function(tuple(PROBLEM), INTERPRETER)


def test_sizes_of_one_are_a_problem():
    least = PROBLEM._replace(rows=0, experts=1, k=1, n=1, rank=0)
    assert sm.candidates(least, INTERPRETER)[0] == sm.choose(least, INTERPRETER)


ROUTING = sm.Routing.from_top_k(torch.tensor([[0], [1]]), 2)
X, W = torch.ones(2, 4), torch.ones(2, 4, 4)
LORA = sm.LoRAWeights(a=torch.ones(2, 1, 4), b=torch.ones(2, 4, 1), scaling=1.0)
TOKEN, SLOT = sm.RowOrder.TOKEN, sm.RowOrder.SLOT
FORWARD = {"source": TOKEN, "target": SLOT}
GRADIENT = {"x_order": SLOT, "dy_order": SLOT}
OPERATIONS = {
    "scatter2scatter": lambda: ops.scatter2scatter(X, W, ROUTING, plan="tiles", **FORWARD),
    "lora_forward": lambda: ops.lora_forward(X, W, LORA, ROUTING, plan="tiles", **FORWARD),
    "lora_input_grad": lambda: ops.lora_input_grad(X, W, LORA, ROUTING, plan="tiles", **FORWARD),
    "shrink": lambda: ops.shrink(X, LORA.a, ROUTING, scaling=1.0, source=TOKEN, plan="tiles"),
    "lora_weight_grad": lambda: ops.lora_weight_grad(
        X, X, X[:, :1], X[:, :1], LORA, ROUTING, plan="gram", **GRADIENT
    ),
    "expert_weight_grad": lambda: ops.expert_weight_grad(X, X, ROUTING, plan="gram", **GRADIENT),
}


@pytest.mark.parametrize("call", OPERATIONS.values(), ids=OPERATIONS)
def test_operations_take_plans_alone(call):
    with pytest.raises(TypeError, match=r"^plan must be of type Plan, got str$"):
        call()


@pytest.mark.parametrize(
    ("factor", "error", "words"),
    [
        (None, TypeError, "factor must be a tensor, got NoneType"),
        (X[0], ValueError, r"factor must be \[experts, rank, k\], got shape \[4\]"),
    ],
)
def test_a_factor_is_a_stack(factor, error, words):
    with pytest.raises(error, match=words):
        ops.shrink(X, factor, ROUTING, scaling=1.0, source=TOKEN)


@pytest.mark.parametrize("name", ["alpha", "shift", "limit"])
@pytest.mark.parametrize(
    ("value", "error"), [("1", TypeError), (None, TypeError), (float("nan"), ValueError)]
)
def test_an_activation_is_made_of_numbers(name, value, error):
    with pytest.raises(error, match=name):
        sm.Activation(**{name: value})
