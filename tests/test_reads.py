"""Accesses outside of tensors, seen in the interpreter even if nothing comes of them."""

import pytest
import torch
import triton
import triton.language as tl

from verify.guards import Guards
from verify.reads import Reads

pytestmark = pytest.mark.correctness


@triton.jit
def reading_kernel(source, target, first, count, SIZE: tl.constexpr):
    """target[i] = source[i + first] for i < count; the sum of what is read is not used."""
    i = tl.arange(0, SIZE)
    value = tl.load(source + i + first, mask=i < count, other=0.0)
    tl.store(target + i, tl.where(i + first < 8, value, 0.0), mask=i < 8)


@pytest.mark.parametrize(
    ("first", "count", "outside"), [(0, 8, 0), (0, 9, 1), (-2, 8, 2), (0, 16, 8), (3, 5, 0)]
)
def test_reads_past_either_end_are_counted(device, first, count, outside):
    if device.type != "cpu":
        pytest.skip("the interpreter alone shows its addresses")
    with Guards() as guards:
        source, target = torch.zeros(8), torch.empty(8)
        with Reads((guards,), ()) as reads:
            reading_kernel[(1,)](source, target, first, count, SIZE=16)
    assert guards.problems() == ()
    assert len(reads.problems()) == (1 if outside else 0)
    assert all(f"({outside} elements)" in text for text in reads.problems())


def test_nothing_is_watched_afterwards(device):
    if device.type != "cpu":
        pytest.skip("the interpreter alone shows its addresses")
    with Guards() as guards, Reads((guards,), ()) as reads:
        source, target = torch.zeros(8), torch.empty(8)
    reading_kernel[(1,)](source, target, 0, 16, SIZE=16)
    assert reads.problems() == ()
