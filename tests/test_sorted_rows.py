"""A routing of rows that are sorted already: what it takes, and what would write elsewhere."""

import numpy as np
import pytest
import torch

import scattermoe_lora as sm

pytestmark = pytest.mark.correctness
EXPERTS = 3
IDS = torch.arange(EXPERTS)


def routed(expert_of_row, slots, *, top_k=1, experts=EXPERTS, **told):
    return sm.Routing.from_sorted(expert_of_row, slots, top_k=top_k, experts=experts, **told)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("beyond", [EXPERTS, 100], ids=["next", "far"])
def test_it_is_the_routing_that_sorting_gives(device, dtype, beyond):
    index = torch.tensor([[2, 0], [1, beyond], [0, 2], [beyond, 1], [0, 0]], device=device)
    made = sm.Routing.from_top_k(index, EXPERTS, sentinels=True)
    ids, slots = index.reshape(-1).sort(stable=True)
    again = routed(ids.to(dtype), slots.to(dtype), top_k=2, validate=True)
    for name in ("slots", "expert_of_row", "offsets", "tiles"):
        assert torch.equal(getattr(again, name), getattr(made, name)), name


def test_no_rows_are_a_routing(device):
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert routed(none, none, top_k=2, validate=True).rows == 0


WRONG = {
    "negative": (IDS - 1, IDS, "expert_of_row begins with -1, but experts are numbered from 0"),
    "unsorted": (IDS.flip(0), IDS, "must be ascending, but is 1 in row 1 after 2"),
    "above": (IDS, IDS + 1, "slots holds 3, but slots are 0 to 2"),
    "below": (IDS, IDS - 1, "slots holds -1, but slots are 0 to 2"),
    "two dimensions of ids": (
        IDS[None],
        IDS,
        r"expert_of_row must be \[rows\], got shape \[1, 3\]",
    ),
    "two dimensions of slots": (IDS, IDS[None], r"slots must be \[rows\], got shape \[1, 3\]"),
    "fewer slots": (IDS, IDS[1:], "expert_of_row has 3 rows but slots has 2"),
    "twice": (IDS, IDS // 2, "slots holds 0 2 times, but each slot is one row"),
}


@pytest.mark.parametrize("name", WRONG)
def test_values_that_would_be_written_elsewhere_are_refused(device, name):
    ids, slots, words = WRONG[name]
    told = {"validate": True} if device.type == "cuda" else {}
    with pytest.raises(ValueError, match=words):
        routed(ids.to(device), slots.to(device), **told)


@pytest.mark.parametrize("name", ["top_k", "experts"])
def test_a_count_is_an_integer(name):
    with pytest.raises(TypeError, match=f"{name} must be an integer, got float"):
        routed(IDS, IDS, **{name: 1.0})


@pytest.mark.parametrize(("dtype", "experts"), [(torch.int8, 128), (torch.uint8, 256)])
def test_a_dtype_may_hold_less_than_the_number_of_experts(dtype, experts):
    ids = torch.tensor([0, 1, 100], dtype=dtype)
    made = routed(ids, IDS, experts=experts)
    assert made.expert_of_row.tolist() == [0, 1, 100]
    assert made.offsets[-1] == 3


def test_an_id_beyond_32_bits_is_dropped():
    ids = torch.tensor([0, 1, 2**32])
    assert routed(ids, IDS).expert_of_row.tolist() == [0, 1, EXPERTS]


def test_a_routing_does_not_change_with_what_it_was_made_of():
    ids, slots = torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1])
    made = routed(ids, slots)
    ids.zero_()
    slots.zero_()
    assert made.expert_of_row.tolist() == [0, 1, 2]
    assert made.slots.tolist() == [2, 0, 1]


def test_rows_and_slots_are_on_one_device():
    with pytest.raises(ValueError, match="expert_of_row is on meta but slots is on cpu"):
        routed(IDS.to("meta"), IDS)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_counts_may_be_of_any_integer_type(kind):
    index = torch.tensor([[0], [2]])
    assert sm.Routing.from_top_k(index, kind(EXPERTS)).experts == EXPERTS
    made = routed(IDS, IDS, top_k=kind(1), experts=kind(EXPERTS))
    assert (made.top_k, made.experts) == (1, EXPERTS)
    assert type(made.experts) is int
    with pytest.raises(TypeError, match="experts must be an integer, got float"):
        sm.Routing.from_top_k(index, float(EXPERTS))
    with pytest.raises(TypeError, match="experts must be an integer, got bool"):
        sm.Routing.from_top_k(index, experts=True)


def sorted_here(ids, **told):
    return sm.Routing.from_top_k(ids[:, None], EXPERTS, **told)


def sorted_before(ids, **told):
    return routed(ids, ids, **told)


@pytest.mark.parametrize("made", [sorted_here, sorted_before])
def test_ids_that_are_not_on_a_cpu_are_read_only_where_that_is_asked(made):
    """Reading them would wait for the device; those on meta have no values."""
    ids = IDS.to("meta")
    for told in ({}, {"validate": False}):
        with pytest.raises(RuntimeError, match="the operands are on meta, where no kernel runs"):
            made(ids, **told)
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        made(ids, validate=True)
