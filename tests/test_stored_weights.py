"""Stored experts as weights: what trains, what changes, what is selected; nothing is lost."""

import pytest
import torch
from torch._dynamo.utils import counters

import scattermoe_lora as sm
from scattermoe_lora.ops.dequantize import NestedScales
from scattermoe_lora.quant import (
    ActiveExperts,
    Dense,
    Float8,
    FourBit,
    Int8RowWise,
    StoredWeight,
    chunks,
)

pytestmark = pytest.mark.correctness
EXPERTS, TOKENS, K, N = 4, 3, 8, 16
BLOCKS = EXPERTS * K * N // 64
INDEX = torch.tensor([[0, 1], [1, 3], [3, 0]])
ROUTING = sm.Routing.from_top_k(INDEX, EXPERTS)
FORMATS = {
    "dense": lambda: Dense(data=torch.ones(EXPERTS, K, N)),
    "float8": lambda: Float8.from_scale(
        torch.ones(EXPERTS, K, N).to(torch.float8_e4m3fn), torch.ones(1)
    ),
    "int8": lambda: Int8RowWise(
        data=torch.ones(EXPERTS, K, N, dtype=torch.int8), row_scale=torch.ones(EXPERTS * K)
    ),
    "four bits": lambda: four_bit(torch.ones(BLOCKS)),
    "nested": lambda: four_bit(
        torch.ones(BLOCKS, dtype=torch.uint8),
        nested=NestedScales(
            code=torch.ones(256),
            absmax=torch.ones(1),
            offset=torch.zeros(1),
            blocksize=256,
        ),
    ),
}


def four_bit(absmax, nested=None):
    packed = torch.full((EXPERTS * K * N // 2,), 17, dtype=torch.uint8)
    return FourBit(
        packed=packed, absmax=absmax, codebook=torch.linspace(-1, 1, 16), blocksize=64,
        experts=EXPERTS, shape=(K, N), nested=nested,
    )  # fmt: skip


def projected(x, weight):
    return sm.expert_linear(x, weight, ROUTING, source=sm.RowOrder.TOKEN, target=sm.RowOrder.SLOT)


def weight_of(data):
    return StoredWeight(stored=Dense(data=data), transposed=False)


def layer(x, weight):
    gates, identity = torch.ones(TOKENS, 2), torch.ones(EXPERTS, N // 2, K)
    return sm.experts_mlp(
        x, gates, ROUTING, gate_up=sm.Projection(weight=weight),
        down=sm.Projection(weight=identity), activation=sm.Activation(),
    )  # fmt: skip


@pytest.mark.parametrize("function", [projected, layer])
@pytest.mark.parametrize(
    ("name", "count"),
    [("dense", 1), ("float8", 2), ("int8", 2), ("four bits", 3), ("nested", 6)],
)
def test_a_storage_that_changed_since_the_forward_gives_no_gradient(name, count, function):
    stored = FORMATS[name]()
    parts = parts_of(stored)
    assert len(parts) == count
    for part in parts:
        x = torch.ones(TOKENS, K, requires_grad=True)
        weight = StoredWeight(stored=stored, transposed=False)
        function(x, weight).sum().backward()
        out = function(x, weight)
        part.copy_(part.clone())
        with pytest.raises(RuntimeError, match="changed in place after the forward"):
            out.sum().backward()


def parts_of(stored):
    values = [getattr(stored, name) for name in stored.__dataclass_fields__]
    nested = [
        part for value in values if isinstance(value, NestedScales) for part in parts_of(value)
    ]
    return [value for value in values if torch.is_tensor(value)] + nested


def test_a_storage_made_under_inference_mode_has_no_versions():
    with torch.inference_mode():
        stored = Dense(data=torch.ones(EXPERTS, K, N))
    assert StoredWeight(stored=stored, transposed=False).versions == ()
    x = torch.ones(TOKENS, K, requires_grad=True)
    projected(x, StoredWeight(stored=stored, transposed=False)).sum().backward()
    assert x.grad.eq(2 * N).all()


@pytest.mark.parametrize("function", [projected, layer])
def test_a_storage_that_trains_is_refused_where_its_gradient_would_be_lost(function):
    data = torch.ones(EXPERTS, K, N, requires_grad=True)
    weight = weight_of(data)
    x = torch.ones(TOKENS, K)
    for call in (function, torch.compile(function, backend="aot_eager")):
        with pytest.raises(ValueError, match="require a gradient, which does not reach a storage"):
            call(x, weight)
    with torch.no_grad():
        assert torch.equal(function(x, weight), function(x, weight_of(data.detach())))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"stored": torch.ones(EXPERTS, K, N)}, "experts in a storage format, got Tensor"),
        ({"ids": [0, 1]}, "ids must be a tensor, got list"),
    ],
)
def test_a_stored_weight_is_of_a_storage(wrong, words):
    with pytest.raises(TypeError, match=words):
        StoredWeight(**{"stored": FORMATS["dense"](), "transposed": False, **wrong})


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([0, 2, 3], "ids lacks expert 1, which has rows"),
        ([1, 0, 3], r"must be ascending experts of 0 to 3, got \[1, 0, 3\]"),
        ([0, 1, 1, 3], "must be ascending experts"),
        ([0, 1, 3, 4], "must be ascending experts"),
        ([-1, 0, 1, 3], "must be ascending experts"),
    ],
)
def test_experts_to_keep_are_checked_on_a_cpu(ids, words):
    with pytest.raises(ValueError, match=words):
        ActiveExperts.of(ROUTING, torch.tensor(ids))


def test_experts_to_keep_are_int64_and_may_be_more_than_have_rows():
    with pytest.raises(TypeError, match=r"ids must be int64, got torch\.int32"):
        ActiveExperts.of(ROUTING, torch.tensor([0, 1, 3], dtype=torch.int32))
    with pytest.raises(TypeError, match="ids must be a tensor, got list"):
        ActiveExperts.of(ROUTING, [0, 1, 3])
    kept = ActiveExperts.of(ROUTING, torch.arange(EXPERTS)).routing
    assert torch.equal(kept.expert_of_row, ROUTING.expert_of_row)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: FourBit(packed=None, absmax=None, codebook=None, blocksize=64, experts=1,
                         shape=(8, 8)), TypeError, "packed must be a tensor, got NoneType"),
        (lambda: Int8RowWise(data=None, row_scale=None), TypeError, "data must be a tensor"),
        (lambda: Float8.from_scale(torch.ones(1, 2, 2).to(torch.float8_e5m2), None), TypeError,
         "scale must be a tensor, got NoneType"),
        (lambda: Float8(data=torch.ones(1, 2, 2).to(torch.float8_e5m2), scale=None, block=(1, 1)),
         TypeError, "scale must be a tensor, got NoneType"),
        (lambda: Float8.from_scale(torch.ones(1, 2, 2).to(torch.float8_e5m2), torch.ones(1, 1, 1),
                                   block=(0, 1)), ValueError, r"at least 1 x 1 elements, got \[0"),
        (lambda: chunks(FORMATS["dense"](), 10**6, dtype=torch.float32, experts=0), ValueError,
         "experts must be at least 1, got 0"),
    ],
    ids=["four bits", "int8", "no scale", "no scale, stated", "block", "chunks"],
)  # fmt: skip
def test_parts_that_are_missing_or_empty_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("function", [projected, layer])
def test_stored_experts_break_a_graph_where_it_is_meant_alone(function):
    """And where the interpreter's self-test looks at memory, which a GPU does not."""
    torch.compiler.reset()
    counters.clear()
    x = torch.ones(TOKENS, K, requires_grad=True)
    torch.compile(function, backend="eager")(x, weight_of(torch.ones(EXPERTS, K, N)))
    (reason,) = (reason for reason in counters["graph_break"] if "UntypedStorage" not in reason)
    assert "torch.compile traces dense weights without stated plans" in reason


def test_one_expert_is_one_chunk():
    assert chunks(FORMATS["dense"](), 10**6, dtype=torch.float32, experts=1) == [range(1)]
