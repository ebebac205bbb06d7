"""Where `combine` may write its sums."""

import pytest
import torch

import scattermoe_lora as sm

pytestmark = pytest.mark.correctness

TOKENS, TOP_K, EXPERTS, HIDDEN = 4, 2, 3, 8
INDEX = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1]])


def test_a_sum_is_written_where_each_element_has_a_place():
    routing = sm.Routing.from_top_k(INDEX, EXPERTS)
    y = torch.ones(TOKENS * TOP_K, HIDDEN)
    out = torch.ones(1, HIDDEN).expand(TOKENS, HIDDEN)
    with pytest.raises(ValueError, match=r"place for each element, got strides \[0, 1\]"):
        sm.ops.combine(y, routing, out=out)
    wide = torch.zeros(TOKENS, 2 * HIDDEN)
    assert sm.ops.combine(y, routing, out=wide[:, ::2]).eq(TOP_K).all()


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


def test_a_sum_of_nothing_overlaps_nothing():
    routing = sm.Routing.from_top_k(INDEX[:0], EXPERTS)
    memory = torch.ones(4, HIDDEN)
    assert sm.ops.combine(memory[1:1], routing, out=memory[:0]).shape == (0, HIDDEN)
