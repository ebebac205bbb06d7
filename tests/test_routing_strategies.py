"""The routings that verify draws are what their names say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verify.cases import CASES, tagged
from verify.routings import (
    DROPPING,
    KINDS,
    TILE_HEIGHTS,
    RoutingKind,
    describe_counts,
    expert_counts,
)
from verify.strategies import cases, routing_kinds

pytestmark = pytest.mark.correctness

SIZES = {"tokens": 40, "top_k": 2, "experts": 6, "seed": 3}


def counts(name: str, *parameters: int, **sizes: int) -> list[int]:
    sizes = {**SIZES, **sizes}
    return expert_counts(RoutingKind(name, parameters).draw(**sizes), sizes["experts"])


@given(kind=routing_kinds(), tokens=st.integers(0, 40), experts=st.integers(1, 9), data=st.data())
def test_every_kind_gives_ids_in_range(kind, tokens, experts, data):
    top_k = data.draw(st.integers(1, experts))
    index = kind.draw(tokens=tokens, top_k=top_k, experts=experts, seed=1)
    assert index.dtype == torch.int64
    assert index.shape == (tokens, top_k)
    if kind.name not in DROPPING:
        assert sum(expert_counts(index, experts)) == tokens * top_k


@pytest.mark.parametrize("name", KINDS)
def test_draws_depend_on_the_seed_alone(name):
    kind = RoutingKind(name)
    assert kind.draw(**SIZES).equal(kind.draw(**SIZES))


def test_kinds_do_what_they_say():
    assert counts("one", 2) == [0, 0, 80, 0, 0, 0]
    assert counts("last") == [0, 0, 0, 0, 0, 80]
    assert counts("only", 3) == [0, 0, 0, 80, 0, 0]
    assert counts("first-empty")[0] == 0
    assert counts("last-empty")[-1] == 0
    assert counts("holes", 50).count(0) >= 3
    assert counts("alternating")[0::2] == [0, 0, 0]
    assert min(counts("alternating")[1::2]) > 20
    assert counts("all", top_k=6) == [40] * 6
    assert sum(counts("all-sentinels")) == 0
    assert 0 < sum(counts("sentinels", 30)) < 80
    assert max(counts("power", 3)) > 2 * min(counts("power", 3))


@pytest.mark.parametrize("height", TILE_HEIGHTS)
def test_boundary_puts_experts_on_both_sides_of_a_tile(height):
    found = counts("boundary", height, experts=4, tokens=2 * height, top_k=2)
    assert {height - 1, height, height + 1} <= set(found)


def test_distinct_choices_where_a_router_makes_them():
    for name in ("uniform", "zipf", "power", "all"):
        index = RoutingKind(name).draw(**{**SIZES, "top_k": 4})
        assert all(len(set(row)) == 4 for row in index.tolist())
    repeated = RoutingKind("repeated").draw(**SIZES)
    assert all(len(set(row)) == 1 for row in repeated.tolist())


def test_counts_are_told_in_words():
    assert (
        describe_counts(torch.tensor([[0, 2], [-1, 2]]), 3) == "rows per expert [1 0 2], 1 dropped"
    )


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="nonsense"):
        RoutingKind("nonsense")


def test_every_kind_is_met_by_a_case():
    assert {case.routing.name for case in CASES} == set(KINDS)


def test_case_names_are_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


@given(case=cases())
def test_drawn_cases_are_no_larger_than_the_written_ones(case):
    assert case.rows <= max(written.rows for written in tagged("smoke", "edge"))
