"""Where `combine` may write its sums."""

import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import scattermoe_lora as sm

pytestmark = pytest.mark.correctness

TOKENS, TOP_K, EXPERTS, HIDDEN = 4, 2, 3, 8
INDEX = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1]])


@given(
    tokens=st.integers(0, 5),
    width=st.integers(1, 5),
    strides=st.tuples(st.integers(0, 8), st.integers(0, 8)),
)
@example(tokens=1, width=1, strides=(0, 0))
def test_a_sum_is_written_where_each_element_has_a_place(tokens, width, strides):
    routing = sm.Routing.from_top_k(INDEX[:1].expand(tokens, TOP_K), EXPERTS)
    y = torch.ones(tokens * TOP_K, width)
    out = torch.zeros(100).as_strided((tokens, width), strides)
    places = {i * strides[0] + j * strides[1] for i in range(tokens) for j in range(width)}
    if len(places) == tokens * width:
        assert sm.ops.combine(y, routing, out=out).eq(TOP_K).all()
    else:
        stated = re.escape(f"{list(strides)} of shape {[tokens, width]}")
        with pytest.raises(ValueError, match=f"place for each element, got strides {stated}"):
            sm.ops.combine(y, routing, out=out)


@pytest.mark.parametrize("apart", [0, 1])
def test_a_sum_is_not_written_where_its_operand_lies(apart):
    """`apart` elements between the two, or one element in common where there are none."""
    routing = sm.Routing.from_top_k(INDEX, EXPERTS)
    rows = TOKENS * TOP_K * HIDDEN
    for first in (0, TOKENS * HIDDEN - 1 + apart):
        memory = torch.ones(rows + first + TOKENS * HIDDEN)
        y = memory[first : first + rows].view(-1, HIDDEN)
        start = first + rows - 1 + apart if first == 0 else 0
        out = memory[start : start + TOKENS * HIDDEN].view(TOKENS, HIDDEN)
        if apart:
            assert sm.ops.combine(y, routing, out=out).eq(TOP_K).all()
            assert y.eq(1).all()
        else:
            with pytest.raises(ValueError, match=r"out must not overlap y: it spans \d+ bytes"):
                sm.ops.combine(y, routing, out=out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_sum_is_not_written_where_its_gates_lie(dtype):
    """Of whatever dtype they are."""
    routing = sm.Routing.from_top_k(INDEX, EXPERTS)
    y = torch.ones(TOKENS * TOP_K, HIDDEN)
    memory = torch.ones(TOKENS * HIDDEN + TOKENS * TOP_K)
    out, rest = memory[: TOKENS * HIDDEN], memory[TOKENS * HIDDEN :]
    apart = rest.view(dtype)[: TOKENS * TOP_K].view(TOKENS, TOP_K)
    assert sm.ops.combine(y, routing, gates=apart, out=out.view(TOKENS, HIDDEN)).shape == (4, 8)
    shared = out.view(dtype)[-TOKENS * TOP_K :].view(TOKENS, TOP_K)
    with pytest.raises(ValueError, match=r"out must not overlap gates: it spans 128 bytes"):
        sm.ops.combine(y, routing, gates=shared, out=out.view(TOKENS, HIDDEN))


def test_a_sum_of_nothing_overlaps_nothing():
    routing = sm.Routing.from_top_k(INDEX[:0], EXPERTS)
    memory = torch.ones(4, HIDDEN)
    assert sm.ops.combine(memory[1:1], routing, out=memory[:0]).shape == (0, HIDDEN)
