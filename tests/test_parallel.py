"""Problems in several processes: all of them, once, no more at a time than there is room for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import scattermoe_lora as sm
from verify.cases import CASES, MODELS
from verify.parallel import admitted, checked, footprint, room
from verify.run import Selection
from verify.specs import KERNELS

sizes = st.integers(1, 50)


@pytest.mark.correctness
@given(st.lists(sizes, max_size=12), st.lists(sizes, max_size=4), st.integers(0, 4), sizes)
def test_what_is_under_way_has_room_unless_it_is_alone(waiting, running, free, space):
    batches = [[index] for index in range(len(waiting))]
    chosen = admitted(batches, sum(running), free, space, lambda batch: waiting[batch[0]])
    taken = sum(running) + sum(waiting[batch[0]] for batch in chosen)
    assert len(chosen) <= free
    assert chosen == [batch for batch in batches if batch in chosen]
    assert not chosen or taken <= space or len(chosen) + len(running) == 1
    if batches and free and not running:
        assert chosen
    if len(chosen) < free:
        left = [waiting[batch[0]] for batch in batches if batch not in chosen]
        assert all(taken + size > space for size in left)


@pytest.mark.correctness
def test_larger_problems_take_more(device):
    by_tokens = {case.name: footprint(case) for case in MODELS}
    for case in MODELS:
        held = case.experts * case.k_in * case.n_out * 8
        assert footprint(case) > held + 8 * case.rows * case.n_out
    for model in ("qwen3-gate-up", "mixtral-down"):
        assert by_tokens[f"{model}-t8192-r16"] >= by_tokens[f"{model}-t2048-r16"]
    assert room(device) > 2 * footprint(CASES[0])


def test_every_problem_comes_back_once_with_its_own_outcomes(device):
    selection = Selection(kernels=("group",), cases=("edge",))
    problems = selection.problems(sm, KERNELS, torch.device(device))
    assert len(problems) > 24
    found = list(checked(problems, selection, workers=2))
    assert sorted(map(id, problems)) == sorted(id(problem) for problem, _ in found)
    for problem, outcomes in found:
        assert outcomes
        assert {(o.kernel, o.case) for o in outcomes} == {(problem.spec.name, problem.case.name)}
        assert all(outcome.ok for outcome in outcomes)
