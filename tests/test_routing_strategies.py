"""The routings that verify draws are what their names say, and failures shrink to small ones."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

import scattermoe_lora as lib
from conftest import DEVICE
from scattermoe_lora._row_tiles import ROW_TILES
from verify.captured import FAMILIES
from verify.cases import CASES, Case, tagged
from verify.inputs import DTYPES
from verify.models import Arithmetic
from verify.routings import (
    DROPPING,
    KINDS,
    TILE_HEIGHTS,
    RoutingKind,
    describe_counts,
    expert_counts,
)
from verify.run import Outcome, Problem
from verify.specs.linear import SCATTER2SCATTER
from verify.strategies import captured_cases, cases, routing_kinds

pytestmark = pytest.mark.correctness

CPU = torch.device("cpu")
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


def counts_of(case: Case) -> list[int]:
    sizes = {"tokens": case.tokens, "top_k": case.top_k, "experts": case.experts}
    return expert_counts(case.routing.draw(**sizes, seed=case.seed), case.experts)


def smallest(wanted: Callable[[Case], bool], among=None, **changes) -> Case:
    """The first case that is drawn and wanted, shrunk."""
    options = settings(max_examples=3000, derandomize=True, database=None, **changes)
    return find(cases() if among is None else among, wanted, settings=options)


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        (lambda case: case.tokens == 0, 0),
        (lambda case: case.tokens == 1, 1),
        (lambda case: 0 < case.tokens < case.top_k, 2),
        (lambda case: case.top_k == case.experts > 1 and case.tokens, 2),
        (lambda case: sum(counts_of(case)) < case.rows, 1),
        (lambda case: case.experts > 1 and counts_of(case)[-1] == case.rows > 0, 1),
        (lambda case: counts_of(case)[0] == 0 < sum(counts_of(case)), 1),
        (lambda case: case.routing.name == "alternating" and max(counts_of(case)) >= 20, 20),
    ],
    ids=[
        *("no tokens", "one token", "fewer tokens than choices", "every expert chosen"),
        *("dropped slots", "the last takes all", "the first is empty", "nothing beside many"),
    ],
)
def test_every_corner_of_a_routing_is_drawn_and_shrinks_to_its_smallest(wanted, rows):
    found = smallest(wanted)
    assert found.rows == rows
    assert (found.k_in, found.n_out, found.rank) == (1, 1, 1)


@pytest.mark.parametrize("height", ROW_TILES)
@pytest.mark.parametrize("step", [-1, 0, 1], ids=["under", "at", "over"])
def test_rows_around_the_height_of_every_tile_are_drawn(height, step):
    assert set(ROW_TILES) <= set(TILE_HEIGHTS)
    found = smallest(
        lambda case: height + step in counts_of(case),
        among=cases().filter(lambda case: case.routing.name == "boundary"),
        phases=(Phase.generate,),
    )
    assert height + step in counts_of(found)


def stops_after_16_rows(lib, inputs, plan):
    """Y of a kernel that leaves out all rows of an expert but its first 16."""
    del lib, plan
    y = SCATTER2SCATTER.reference(inputs, Arithmetic())["y"].value.to(inputs.dtype)
    owner = inputs["top_k_index"].reshape(-1)
    for expert in range(inputs.case.experts):
        y[torch.nonzero(owner == expert).flatten()[16:]] = 0
    return {"y": y}


def test_a_failure_shrinks_to_a_small_problem_and_tells_rows_per_expert():
    spec = replace(SCATTER2SCATTER, run=stops_after_16_rows, prepare=None)

    def outcome(case: Case) -> Outcome:
        case = replace(case, source="TOKEN", target="SLOT")
        problem = Problem(
            lib=lib, spec=spec, case=case, dtype=torch.float32, mode="exact", device=CPU
        )
        return next(iter(problem.check(lambda plan: plan.quick)))

    found = smallest(lambda case: case.rows > 16 and outcome(case).status == "failed")
    assert (found.rows, found.experts, found.k_in, found.n_out) == (17, 1, 1, 1)
    assert str(outcome(found)).endswith("; rows per expert [17]")


def test_a_write_outside_tells_rows_per_expert_too():
    def writes_past_the_end(lib, inputs, plan):
        outputs = SCATTER2SCATTER.run(lib, inputs, plan)
        y = outputs["y"]
        y.as_strided((1,), (1,), y.storage_offset() + y.numel()).fill_(3.0)
        return outputs

    spec = replace(SCATTER2SCATTER, run=writes_past_the_end)
    case = replace(tagged("smoke")[0], tokens=3)
    problem = Problem(
        lib=lib,
        spec=spec,
        case=case,
        dtype=torch.float32,
        mode="exact",
        device=torch.device(DEVICE),
    )
    outcome = next(iter(problem.check(lambda plan: plan.quick)))
    counts = describe_counts(problem.draw()["top_k_index"], case.experts)
    assert outcome.measure == "guard"
    assert outcome.reason.startswith("wrote after an output of shape [6, 80]")
    assert outcome.reason.endswith(f"; {counts}")


@given(case=captured_cases(), dtype=st.sampled_from(list(DTYPES.values())))
@settings(max_examples=6)
def test_rows_and_routings_of_real_models_are_drawn(case, dtype):
    device = torch.device(DEVICE)
    problem = Problem(
        lib=lib, spec=SCATTER2SCATTER, case=case, dtype=dtype, mode="balanced", device=device
    )
    first = next(iter(problem.check(lambda plan: plan.quick)))
    assert case.family in FAMILIES
    assert first.ok or "could not see it lost" in first.reason, str(first)
