"""Problems in several processes: all of them, once, no more at a time than there is room for."""

import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import scattermoe_lora as sm
from verify import numerics, parallel
from verify.cases import CASES, MODELS
from verify.models import Arithmetic
from verify.parallel import admitted, checked, footprint, room
from verify.run import Problem, Selection
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
    by_tokens = {case.name: footprint("lora_forward", case) for case in MODELS}
    for case in MODELS:
        held = case.experts * case.k_in * case.n_out * 8
        assert footprint("lora_forward", case) > held + 8 * case.rows * case.n_out
        assert all(footprint("other", case) >= footprint(spec.name, case) for spec in KERNELS)
    for model in ("qwen3-gate-up", "mixtral-down"):
        assert by_tokens[f"{model}-t8192-r16"] >= by_tokens[f"{model}-t2048-r16"]
    assert room(device) > 2 * footprint("other", CASES[0])


class Alive(TorchDispatchMode):
    """Counts the bytes of storages that are alive together."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.add(value.untyped_storage())
        return result

    def add(self, storage):
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())

    def drop(self, key, size):
        self.known.discard(key)
        self.now -= size


WIDE = {"tokens": 192, "experts": 4, "top_k": 2, "k_in": 80, "n_out": 112, "rank": 8}
DEEP = {"tokens": 16, "experts": 16, "top_k": 2, "k_in": 80, "n_out": 112, "rank": 8}


@pytest.mark.parametrize("sizes", [WIDE, DEEP], ids=["rows", "experts"])
@pytest.mark.parametrize(
    "spec",
    [spec for spec in KERNELS if spec.name in parallel._ALIVE],
    ids=lambda spec: spec.name,
)
def test_a_check_takes_no_more_than_was_promised(spec, sizes, monkeypatch):
    monkeypatch.setattr(numerics, "BLOCK", 4096)
    listed = next((case for case in spec.cases if "model" in case.tags), spec.cases[0])
    case = replace(listed, **sizes)
    problem = Problem(
        lib=sm, spec=spec, case=case, dtype=torch.float32, mode=spec.modes[0],
        device=torch.device("cpu"),
    )  # fmt: skip
    expected = spec.reference(problem.draw(), Arithmetic())
    outputs = {name: item.value.to(item.dtype) for name, item in expected.items()}
    del expected

    def run(lib, inputs, plan):
        return {name: value.clone() for name, value in outputs.items()}

    problem = replace(problem, spec=replace(spec, run=run, prepare=None))
    with Alive() as alive:
        found = list(problem.check(lambda plan: plan.quick))
    assert found
    assert footprint(spec.name, case) / 4 <= alive.most <= footprint(spec.name, case)


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
