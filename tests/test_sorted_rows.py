"""A routing of rows that are sorted already: what it takes, and what would write elsewhere."""

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
