"""Bad operands are refused before any work, by sentences that name the operand and both facts."""

import re
from dataclasses import replace
from functools import partial

import pytest
import torch

import scattermoe_lora as sm
from scattermoe_lora import ops
from scattermoe_lora._launch import Launch
from scattermoe_lora.plan import PATHS
from scattermoe_lora.quant import Dense, DequantizePlan, Int8RowWise

pytestmark = pytest.mark.correctness

EXPERTS, TOKENS, TOP_K, K, N, RANK = 3, 4, 2, 6, 5, 2
ROWS = TOKENS * TOP_K
TOKEN, SLOT, EXPERT = sm.RowOrder
TILE = sm.Tile(block_m=16, block_n=16, block_k=16)


@pytest.fixture(scope="module")
def good(device) -> dict:
    """Good operands of every function below, by the names of their arguments."""

    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, device=device)

    index = torch.tensor([[0, 1], [1, 0], [1, 1], [0, 1]], device=device)
    return {
        "routing": sm.Routing.from_top_k(index, EXPERTS),
        "x": ones(TOKENS, K),
        "weight": ones(EXPERTS, K, N),
        "lora": sm.LoRAWeights(a=ones(EXPERTS, RANK, K), b=ones(EXPERTS, N, RANK), scaling=1.0),
        "bias": ones(EXPERTS, N),
        "row_scale": ones(TOKENS, TOP_K),
        "dy": ones(ROWS, N),
        "xa": ones(ROWS, RANK),
        "yb": ones(ROWS, RANK),
        "rows": ones(ROWS, N),
        "dout": ones(TOKENS, N),
        "factor": ones(EXPERTS, RANK, K),
        "h": ones(ROWS, 2 * N),
        "dact": ones(ROWS, N),
        "gate_up": sm.Projection(
            weight=ones(EXPERTS, K, 2 * N),
            lora=sm.LoRAWeights(
                a=ones(EXPERTS, RANK, K), b=ones(EXPERTS, 2 * N, RANK), scaling=1.0
            ),
            bias=ones(EXPERTS, 2 * N),
        ),
        "down": sm.Projection(
            weight=ones(EXPERTS, N, K),
            lora=sm.LoRAWeights(a=ones(EXPERTS, RANK, N), b=ones(EXPERTS, K, RANK), scaling=1.0),
            bias=ones(EXPERTS, K),
        ),
        "plan": None,
        "plans": sm.Plans(),
        "activation": sm.Activation(),
        "out": ones(TOKENS, N),
        "source": TOKEN,
        "target": SLOT,
    }


def expert_linear(t):
    return sm.expert_linear(
        t["x"], t["weight"], t["routing"], source=t["source"], target=t["target"],
        lora=t["lora"], bias=t["bias"], gates=t["row_scale"], plans=t["plans"],
    )  # fmt: skip


def scatter2scatter(t):
    return ops.scatter2scatter(
        t["x"], t["weight"], t["routing"], source=t["source"], target=t["target"],
        bias=t["bias"], row_scale=t["row_scale"], plan=t["plan"],
    )  # fmt: skip


def lora_forward(t):
    return ops.lora_forward(
        t["x"], t["weight"], t["lora"], t["routing"], source=t["source"], target=t["target"],
        bias=t["bias"], row_scale=t["row_scale"], plan=t["plan"],
    )  # fmt: skip


def lora_input_grad(t):
    return ops.lora_input_grad(
        t["dy"], t["weight"], t["lora"], t["routing"], source=SLOT, target=t["target"],
        row_scale=t["row_scale"], plan=t["plan"],
    )  # fmt: skip


def shrink(t):
    return ops.shrink(
        t["x"], t["factor"], t["routing"], scaling=1.0, source=TOKEN, row_scale=t["row_scale"]
    )


def lora_weight_grad(t):
    return ops.lora_weight_grad(
        t["x"], t["dy"], t["xa"], t["yb"], t["lora"], t["routing"], x_order=TOKEN, dy_order=SLOT,
        row_scale=t["row_scale"], plan=t["plan"],
    )  # fmt: skip


def expert_weight_grad(t):
    return ops.expert_weight_grad(
        t["x"], t["dy"], t["routing"], x_order=TOKEN, dy_order=SLOT, row_scale=t["row_scale"],
        plan=t["plan"],
    )  # fmt: skip


def expert_bias_grad(t):
    return ops.expert_bias_grad(t["dy"], t["routing"], dy_order=SLOT, row_scale=t["row_scale"])


def group(t):
    return ops.group(t["rows"], t["routing"], source=t["target"], row_scale=t["row_scale"])


def combine(t):
    return ops.combine(t["rows"], t["routing"], gates=t["row_scale"], out=t["out"])


def combine_grad(t):
    return ops.combine_grad(t["rows"], t["dout"], t["routing"])


def glu_forward(t):
    return ops.glu_forward(t["h"], t["activation"])


def glu_backward(t):
    return ops.glu_backward(t["h"], t["dact"], t["routing"], t["activation"], gates=t["row_scale"])


def experts_mlp(t):
    return sm.experts_mlp(
        t["x"], t["row_scale"], t["routing"], gate_up=t["gate_up"], down=t["down"],
        activation=t["activation"],
    )  # fmt: skip


def listed(value):
    """The argument, of no type that anything takes."""
    return [value]


def away(value):
    if isinstance(value, sm.LoRAWeights):
        return sm.LoRAWeights(a=value.a.to("meta"), b=value.b.to("meta"), scaling=1.0)
    return value.to("meta")


def narrow(value):
    return value[..., :-1]


def fewer(value):
    return value[:-1]


def factors(change):
    return lambda lora: sm.LoRAWeights(a=change(lora.a), b=change(lora.b), scaling=1.0)


def having(field, change):
    """Factors or a projection with one field changed."""
    return lambda value: replace(value, **{field: change(getattr(value, field))})


def on_path(path):
    return lambda plan: sm.Plan(path=sm.Path(path), tile=TILE, shrink=TILE)


SLOTS = f"must have shape {[ROWS]} or {[TOKENS, TOP_K]}, got {[TOKENS - 1, TOP_K]}"
WIDE, TALL = having("a", narrow), having("b", lambda b: b[:, :-1])


def scaled(called):
    facts = (
        (fewer, ValueError, SLOTS),
        (away, ValueError, "is on meta but"),
        (listed, TypeError, "must be a tensor, got list"),
        (torch.Tensor.int, TypeError, "must be floating point of 16 bits or more"),
    )
    return tuple(("row_scale", change, error, f"{called} {said}") for change, error, said in facts)


SCALED = scaled("row_scale")
GATED = scaled("gates")[1:] + tuple(
    ("row_scale", change, ValueError, f"gates must have shape {[TOKENS, TOP_K]}, got")
    for change in (fewer, narrow, torch.Tensor.flatten, torch.Tensor.t)
)
ROUTING = ("routing", listed, TypeError, "routing must be of type Routing, got list")
TARGET = ("target", listed, TypeError, "target must be of type RowOrder, got list")
ADAPTER = ("lora", listed, TypeError, "lora must be of type LoRAWeights, got list")
STACK = ("weight", listed, TypeError, "weight must be a tensor or come in blocks, got list")
EXPERTS_LOST = f"has {EXPERTS - 1} experts but the routing has {EXPERTS}"
WEIGHT = (
    STACK,
    ("weight", away, ValueError, "weight is on meta but"),
    ("weight", fewer, ValueError, "weight " + EXPERTS_LOST),
    ("weight", lambda w: w[:, :-1], ValueError, f"width {K - 1} but x has {K}"),
    ("weight", lambda w: w[0], ValueError, f"[experts, k, n], got shape {[K, N]}"),
    ("weight", torch.Tensor.half, TypeError, "weight is torch.float16 but x is torch.float32"),
    ("weight", lambda w: w[:, :, :0], ValueError, f"not be empty, got shape {[EXPERTS, K, 0]}"),
)
BIAS = (
    ("bias", listed, TypeError, "bias must be a tensor, got list"),
    ("bias", away, ValueError, "bias is on meta but"),
    ("bias", narrow, ValueError, f"shape {[EXPERTS, N]}, got {[EXPERTS, N - 1]}"),
    ("bias", fewer, ValueError, f"shape {[EXPERTS, N]}, got {[EXPERTS - 1, N]}"),
    ("bias", torch.Tensor.int, TypeError, "bias must be floating point of 16 bits or more"),
)
LORA = (
    ADAPTER,
    ("lora", away, ValueError, "lora is on meta but x"),
    ("lora", factors(fewer), ValueError, "lora " + EXPERTS_LOST),
    ("lora", WIDE, ValueError, f"takes inputs of width {K - 1} but x has width {K}"),
    ("lora", factors(torch.Tensor.half), TypeError, "lora is torch.float16; with x in torch.float"),
    ("lora", TALL, ValueError, f"lora.b has output width {N - 1} but the weight has {N}"),
)


def rows_of(name, rows, called=None):
    called = called or name
    return (
        (name, away, ValueError, f"{called} is on meta but the routing is on"),
        (name, fewer, ValueError, f"{called} has {rows - 1} rows, but"),
        (name, lambda v: v[0], ValueError, f"{called} must be [rows, width], got shape"),
        (name, torch.Tensor.double, TypeError, f"{called} must be float32, float16 or bfloat16"),
        (name, torch.Tensor.tolist, TypeError, f"{called} must be a tensor, got list"),
    )


def paths(operation):
    return tuple(
        ("plan", on_path(path), ValueError, f"no path '{path.value}'")
        for path in sm.Path
        if path not in PATHS[operation]
    )


NO_BLOCKS = ("plan", on_path("grouped_mm"), ValueError, "needs bfloat16 on CUDA, got torch.float32")
X, DY = rows_of("x", TOKENS), rows_of("dy", ROWS)
HALF_DY = ("dy", torch.Tensor.half, TypeError, "dy is torch.float16 but x is torch.float32")
MAPPED = sm.Tile(block_m=16, block_n=16, block_k=16, descriptor=True)
UNMAPPED = "the plan loads W through a tensor map, but W has shape"
PLAIN = sm.Plan(path=sm.Path.SPLIT, tile=TILE)

REFUSED = {
    expert_linear: (
        *X[1:], *WEIGHT, *BIAS, *LORA, *GATED, ROUTING, TARGET,
        ("source", listed, TypeError, "the row order of x must be of type RowOrder, got list"),
        ("plans", listed, TypeError, "plans must be of type Plans, got list"),
        ("target", lambda order: EXPERT, ValueError, "target must be SLOT, got EXPERT"),
    ),
    scatter2scatter: (
        *X, *WEIGHT, *BIAS, *SCALED, *paths(sm.Operation.SCATTER2SCATTER), NO_BLOCKS,
        ROUTING, TARGET,
        ("target", lambda order: TOKEN, ValueError, "RowOrder.EXPERT, got RowOrder.TOKEN"),
        ("plan", lambda plan: sm.Plan(path=sm.Path.TILES, tile=MAPPED), ValueError, UNMAPPED),
    ),
    lora_forward: (
        *X, *WEIGHT, *BIAS, *LORA, *SCALED, *paths(sm.Operation.LORA_FORWARD), NO_BLOCKS,
        ROUTING, TARGET,
        ("target", lambda order: TOKEN, ValueError, "RowOrder.EXPERT, got RowOrder.TOKEN"),
        ("plan", lambda p: PLAIN, ValueError, "on the split path needs a shrink tile"),
        ("plan", lambda p: replace(PLAIN, path=sm.Path.FUSED, tile=MAPPED), ValueError,
         "the fused path loads W through pointers, but the plan asks for a tensor map"),
    ),
    lora_input_grad: (
        *rows_of("dy", ROWS, "dy"), *SCALED, *paths(sm.Operation.LORA_INPUT_GRAD),
        ROUTING, TARGET, ADAPTER, STACK,
        ("weight", fewer, ValueError, "weight " + EXPERTS_LOST),
        ("weight", torch.Tensor.half, TypeError, "weight is torch.float16 but dy is torch.float32"),
        ("lora", away, ValueError, "lora is on meta but dy is on"),
        ("weight", narrow, ValueError, f"output width {N - 1} but dy has width {N}"),
        ("lora", WIDE, ValueError, f"a takes inputs of width {K - 1} but the weight has width {K}"),
        ("lora", TALL, ValueError, f"b has output width {N - 1} but dy has {N}"),
    ),
    shrink: (
        *X, *SCALED, ROUTING,
        ("factor", narrow, ValueError, f"factor takes inputs of width {K - 1} but x has {K}"),
        ("factor", fewer, ValueError, f"factor has {EXPERTS - 1} experts"),
        ("factor", away, ValueError, "factor is on meta but"),
        ("factor", torch.Tensor.half, TypeError, "factor is torch.float16 but"),
    ),
    lora_weight_grad: (
        *X, *DY, HALF_DY, *LORA[:-1], *SCALED, *paths(sm.Operation.LORA_WEIGHT_GRAD), ROUTING,
        ("lora", TALL, ValueError, f"lora.b has output width {N - 1} but dy has {N}"),
        *rows_of("xa", ROWS), *rows_of("yb", ROWS),
        ("xa", narrow, ValueError, f"xa has width {RANK - 1} but the rank is {RANK}"),
        ("yb", narrow, ValueError, f"yb has width {RANK - 1} but the rank is {RANK}"),
        ("xa", torch.Tensor.half, TypeError, "xa is torch.float16 but x is torch.float32"),
        ("yb", torch.Tensor.half, TypeError, "yb is torch.float16 but x is torch.float32"),
        *((low, lambda v: None, ValueError, f"{low} is needed on the") for low in ("xa", "yb")),
    ),
    expert_weight_grad: (
        *X, *DY, HALF_DY, ROUTING, *SCALED, *paths(sm.Operation.EXPERT_WEIGHT_GRAD), NO_BLOCKS,
    ),
    expert_bias_grad: (*DY, *SCALED, ROUTING),
    group: (
        *rows_of("rows", ROWS, "x"), *SCALED, ROUTING,
        ("target", listed, TypeError, "the row order of x must be of type RowOrder, got list"),
        ("target", lambda order: EXPERT, ValueError, "RowOrder.SLOT, got RowOrder.EXPERT"),
    ),
    combine: (
        *rows_of("rows", ROWS, "y"), *GATED, ROUTING,
        ("out", listed, TypeError, "out must be a tensor, got list"),
        ("out", narrow, ValueError, f"out must have shape {[TOKENS, N]}, got {[TOKENS, N - 1]}"),
        ("out", torch.Tensor.half, TypeError, "out is torch.float16 but y is torch.float32"),
        ("out", away, ValueError, "out is on meta but y is on"),
    ),
    combine_grad: (
        *rows_of("rows", ROWS, "y"), *rows_of("dout", TOKENS), ROUTING,
        ("dout", narrow, ValueError, f"y has width {N} but dout has {N - 1}"),
        ("dout", torch.Tensor.half, TypeError, "dout is torch.float16 but y is torch.float32"),
    ),
    glu_forward: (
        ("h", narrow, ValueError, f"h must be [rows, 2 I], got shape {[ROWS, 2 * N - 1]}"),
        ("h", lambda v: v[0], ValueError, f"h must be [rows, 2 I], got shape {[2 * N]}"),
        ("h", torch.Tensor.int, TypeError, "h must be floating point, got torch.int32"),
        ("h", listed, TypeError, "h must be a tensor, got list"),
        ("h", away, RuntimeError, "the operands are on meta, where no kernel runs"),
        ("activation", listed, TypeError, "activation must be of type Activation, got list"),
    ),
    glu_backward: (
        *rows_of("h", ROWS)[:2], *rows_of("dact", ROWS), *GATED, ROUTING,
        ("activation", listed, TypeError, "activation must be of type Activation, got list"),
        ("h", narrow, ValueError, f"h must be [rows, 2 I], got shape {[ROWS, 2 * N - 1]}"),
        ("dact", narrow, ValueError, f"h has width {2 * N} but dact has {N - 1}"),
        ("dact", torch.Tensor.half, TypeError, "dact is torch.float16 but h is torch.float32"),
    ),
    experts_mlp: (
        *rows_of("x", TOKENS, "hidden")[1:2], *rows_of("x", TOKENS, "hidden")[3:],
        ("x", lambda v: v[0], ValueError, f"hidden must be [tokens, H], got shape {[K]}"),
        *GATED, ROUTING,
        ("activation", listed, TypeError, "activation must be of type Activation, got list"),
        *(
            (name, change, TypeError, f"{called} must {words}, got list")
            for name in ("gate_up", "down")
            for change, called, words in (
                (listed, name, "be of type Projection"),
                (having("weight", listed), f"{name}.weight", "be a tensor or come in blocks"),
                (having("plans", listed), f"{name}.plans", "be of type Plans"),
                (having("lora", listed), f"{name}.lora", "be of type LoRAWeights"),
                (having("bias", listed), f"{name}.bias", "be a tensor"),
            )
        ),
        *(
            (name, having("weight", lambda w: w[0]), ValueError, f"{name}.weight must be [experts")
            for name in ("gate_up", "down")
        ),
        ("gate_up", having("weight", narrow), ValueError, f"width {2 * N - 1}, which must be"),
        ("down", having("weight", lambda w: w[:, :-1]), ValueError, f"input width {N - 1} of down"),
        *(
            (name, having(*change), error, words)
            for name, n in (("gate_up", 2 * N), ("down", K))
            for change, error, words in (
                (("weight", away), ValueError, f"{name}.weight is on meta but hidden is on"),
                (("weight", fewer), ValueError, f"{name}.weight {EXPERTS_LOST}"),
                (("weight", torch.Tensor.half), TypeError, f"{name}.weight is torch.float16 but"),
                (("bias", torch.Tensor.int), TypeError, f"{name}.bias must be floating point"),
                (("bias", away), ValueError, f"{name}.bias is on meta but hidden is on"),
                (("bias", narrow), ValueError, f"{name}.bias must have shape {[EXPERTS, n]}, got"),
                (("lora", away), ValueError, f"{name}.lora is on meta but hidden is on"),
                (("lora", WIDE), ValueError, f"{name}.lora.a takes inputs of width"),
                (("lora", TALL), ValueError, f"output width {n - 1} but the weight has {n}"),
                (("lora", factors(fewer)), ValueError, f"{name}.lora {EXPERTS_LOST}"),
            )
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("function", REFUSED, ids=lambda function: function.__name__)
def test_each_operand_is_refused_by_name_and_with_both_facts(good, function, monkeypatch):
    """Before anything is launched."""
    launched = []
    monkeypatch.setattr(Launch, "__call__", lambda self, *facts: launched.append(self))
    for name, change, error, words in REFUSED[function]:
        with pytest.raises(error) as raised:
            function({**good, name: change(good[name])})
        assert says(raised.value, words), name
        assert not launched, name


def says(error, words):
    """Whether these words, the first of them whole, are in an error's sentence."""
    return re.search(rf"(?<!\w){re.escape(words)}", str(error))


def tile(**wrong):
    return lambda: sm.Tile(**{"block_m": 16, "block_n": 16, "block_k": 16, **wrong})


def from_top_k(index, experts=EXPERTS):
    return lambda: sm.Routing.from_top_k(index, experts)


def from_sorted(experts_of_rows, slots, top_k=1, experts=EXPERTS):
    return lambda: sm.Routing.from_sorted(experts_of_rows, slots, top_k=top_k, experts=experts)


IDS, ROW = torch.arange(3), torch.ones(1, 1, 1)
STORED = Dense(data=torch.ones(EXPERTS, 4, 8))
PACKED = Int8RowWise(
    data=torch.ones(EXPERTS, 4, 8, dtype=torch.int8), row_scale=torch.ones(EXPERTS * 4)
)


def dense(stored, ids=None, dtype=torch.float32, **out):
    return lambda: stored.dense(ids, dtype=dtype, **out)


def both(ids=None, **more):
    return [dense(stored, ids, **more) for stored in (STORED, PACKED)]


SHAPE = [EXPERTS, 4, 8]
VALUES = (
    *((tile(**{f"block_{axis}": 24}), ValueError, f"block_{axis} must be a power of two, got 24")
      for axis in "mnk"),
    *((tile(**{f"block_{axis}": 8}), ValueError, "must be at least 16") for axis in "mnk"),
    *((tile(warps=count), ValueError, f"warps must be a power of two, got {count}")
      for count in (0, 3, -4)),
    (tile(stages=0), ValueError, "stages must be at least 1, got 0"),
    (partial(sm.Activation, limit=0.0), ValueError, "limit must be positive, got 0.0"),
    (partial(sm.Activation, limit=float("nan")), ValueError, "limit must be positive, got nan"),
    *((partial(sm.Activation, gate=ops.Gate.TANH, **wrong), ValueError, "tanh gate has alpha 1 and")
      for wrong in ({"alpha": 1.5}, {"shift": 1.0})),
    *((from_top_k(torch.ones(2, 2, dtype=dtype)), TypeError, f"must hold integers, got {dtype}")
      for dtype in (torch.float32, torch.bool, torch.complex64, torch.complex128, torch.uint16)),
    *((from_top_k(IDS[None], count), TypeError, f"experts must be an integer, got {name}")
      for count, name in ((4.0, "float"), (torch.tensor(4), "Tensor"))),
    *((partial(sm.LoRAWeights, a=ROW, b=ROW, scaling=wrong), TypeError, f"be a number, got {name}")
      for wrong, name in ((torch.tensor(2.0, requires_grad=True), "Tensor"), ("2", "str"),
                          (None, "NoneType"))),
    *((partial(sm.Plans, **{name: "gram"}), TypeError, f"the plan of {name} must be of type Plan")
      for name in ("forward", "input_grad", "weight_grad")),
    (lambda: sm.candidates(None, "cpu"), TypeError, "that Device.of tells of a device, got str"),
    (from_top_k([[0, 1]]), TypeError, "top_k_index must be a tensor, got list"),
    (from_sorted([0], IDS), TypeError, "expert_of_row must be a tensor, got list"),
    (from_sorted(IDS, [0]), TypeError, "slots must be a tensor, got list"),
    *((partial(sm.LoRAWeights, scaling=1.0, **{"a": ROW, "b": ROW, name: [0]}), TypeError,
       f"lora.{name} must be a tensor, got list") for name in "ab"),
    (partial(sm.Activation, gate="sigmoid"), TypeError, "gate must be a Gate, got str"),
    (from_top_k(IDS), ValueError, "must be [tokens, top_k], got shape [3]"),
    (from_top_k(IDS[None], 2), ValueError, "chooses 3 experts per token, but there are 2"),
    (from_top_k(IDS[None], 0), ValueError, "experts must be at least 1, got 0"),
    (from_top_k(IDS[None, :0]), ValueError, "top_k must be at least 1, got top_k_index of shape"),
    (from_top_k(torch.empty(2**30, 2, dtype=torch.int64, device="meta")), ValueError,
     f"{2**30} tokens x 2 choices exceed"),
    (from_top_k(IDS[:, None] + 1), ValueError, "holds expert 3, but experts are 0 to 2"),
    (from_top_k(IDS[:, None] - 1), ValueError, "holds expert -1, but experts are 0 to 2"),
    *((from_sorted(*pair), TypeError, f"{name} must hold integers, got {dtype}")
      for dtype in (torch.float32, torch.bool)
      for name, pair in (("expert_of_row", (IDS.to(dtype), IDS)), ("slots", (IDS, IDS.to(dtype))))),
    (from_sorted(IDS, IDS, top_k=0), ValueError, "must be at least 1, got 0 and 3"),
    (from_sorted(IDS, IDS, experts=0), ValueError, "must be at least 1, got 1 and 0"),
    (from_sorted(IDS, IDS, top_k=2), ValueError, "3 rows are not a multiple of top_k = 2"),
    *((partial(DequantizePlan, **{"block": 64, "warps": 4, name: value}), ValueError,
       f"{name} must be a power of two, got {value}")
      for name, value in (("block", 96), ("block", 0), ("warps", 3), ("warps", 0))),
    (partial(DequantizePlan, block=32, warps=4), ValueError, "at least 64 elements, got 32"),
    *((call, error, words)
      for calls, error, words in (
          (both([0]), TypeError, "must be a tensor, a range or None, got list"),
          (both(IDS.to(torch.int16)), TypeError, "must be int64 or int32, got torch.int16"),
          (both(IDS[None]), ValueError, "must be [selected], got shape [1, 3]"),
          (both(IDS.to("meta")), ValueError, "expert_ids is on meta but the experts are on cpu"),
          (both(range(0, 3, 2)), ValueError, "must have step 1, got 2"),
          (both(range(1, 4)), ValueError, "holds 3, but experts are 0 to 2"),
          (both(range(4)), ValueError, "holds 3, but experts are 0 to 2"),
          (both(range(-1, 2)), ValueError, "holds -1, but experts are 0 to 2"),
          (both(IDS + 1), ValueError, "holds 3, but experts are 0 to 2"),
          (both(IDS - 1), ValueError, "holds -1, but experts are 0 to 2"),
          (both(torch.zeros(65536, dtype=torch.int64)), ValueError, "65536 experts were selected"),
          (both(dtype=torch.float64), TypeError, "float16 or bfloat16, got torch.float64"),
          (both(out=torch.ones(SHAPE).half()), TypeError, "out is torch.float16 but torch.float32"),
          (both(range(2), out=torch.ones(SHAPE)), ValueError, f"has shape {SHAPE} but the experts"),
          (both(out=torch.ones(SHAPE, device="meta")), ValueError, "out is on meta but the"),
          (both(out=torch.ones(3, 8, 4).mT), ValueError, "must be contiguous, got strides"),
          (both(out=torch.ones(SHAPE, requires_grad=True)), ValueError, "requires a gradient"),
      )
      for call in calls),
)  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), VALUES, ids=range(len(VALUES)))
def test_values_that_describe_nothing_are_refused(call, error, words):
    with pytest.raises(error) as raised:
        call()
    assert says(raised.value, words)
