"""The mutants: what is changed, who looks for it, and what a worker's answer or silence means."""

import ast
import os
import time

import pytest

from verify import mutants
from verify.broken import BY_HAND
from verify.commands.common import source_directory
from verify.mutation_host import OPERATORS
from verify.mutation_operators import HOST_OPERATORS, KERNEL_OPERATORS, edits
from verify.mutation_reasons import EQUIVALENT
from verify.mutation_trials import SPECS, SPOILED, Task, Verdict, paths_of, trials

pytestmark = pytest.mark.correctness

KERNEL = '''
def kernel(x, w, slots, begin, end, n, N, STEP):
    """Words < that are not code."""
    acc = tl.zeros((STEP,), tl.float32)
    for row in range(begin, end, STEP):
        inside = row < end
        tile = tl.load(x.ptr + row.to(tl.int64) * x.row, mask=inside & (n < N), other=0.0)
        acc = tl.dot(tile, w, acc)
    if begin == end:
        return
    acc *= tl.minimum(slots // 2, 1)
    tl.store(x.ptr, ~acc, mask=inside)
'''
CHANGES = (
    ("comparison", "inside = row <= end"),
    ("comparison", "if begin != end:"),
    ("mask", "tl.load(x.ptr + row.to(tl.int64) * x.row)"),
    ("mask", "tl.store(x.ptr, ~acc)"),
    ("other", "other=float('nan')"),
    ("offset", "tl.store(x.ptr + 1, ~acc, mask=inside)"),
    ("stride", "row.to(tl.int64) * x.col"),
    ("arithmetic", "mask=n < N, other=0.0"),
    ("arithmetic", "tl.minimum(slots % 2, 1)"),
    ("arithmetic", "tl.minimum(slots, 1)"),
    ("augmented", "acc = tl.minimum"),
    ("accumulator", "tl.dot(tile, w, acc).to(tile.dtype).to(tl.float32)"),
    ("accumulator", "acc = tl.dot(tile, w)"),
    ("cast", "x.ptr + row * x.row"),
    ("branch", "if True:"),
    ("branch", "if False:"),
    ("loop", "range(begin, end - STEP, STEP)"),
    ("loop", "range(begin + STEP, end, STEP)"),
    ("neighbour", "range(begin, end + 1, STEP)"),
    ("extremum", "tl.maximum(slots // 2, 1)"),
    ("negation", "tl.store(x.ptr, acc, mask=inside)"),
    ("statement", "    pass"),
    ("constant", "slots // 3"),
)


def made(source, operators=KERNEL_OPERATORS):
    return list(edits("k.py", source, ast.parse(source).body[0], operators))


@pytest.fixture(scope="module")
def generated():
    return list(mutants.generated(source_directory(), list(SPECS.values())))


@pytest.mark.parametrize(("operator", "text"), CHANGES)
def test_an_operator_makes_its_change(operator, text):
    own = [edit for edit in made(KERNEL) if edit.operator == operator]
    assert any(text in edit.apply(KERNEL) for edit in own), [edit.text for edit in own]


LAUNCHER = """
def launch(x, weight, routing, call, gates):
    x = x.contiguous()
    rows = Rows(call.source, RowOrder.TOKEN)
    return product(x, weight, routing, rows, row_scale=gates, width=min(x, weight))
"""
HOST_CHANGES = (
    ("exchanged", "product(weight, x, routing"),
    ("exchanged", "Rows(RowOrder.TOKEN, call.source)"),
    ("conversion", "    x = x\n"),
    ("reassignment", "    pass\n"),
    ("option", "row_scale=None"),
    ("attribute", "Rows(call.target, RowOrder.TOKEN)"),
    ("attribute", "RowOrder.SLOT"),
)


@pytest.mark.parametrize(("operator", "text"), HOST_CHANGES)
def test_an_operator_on_launchers_makes_its_change(operator, text):
    own = [edit for edit in made(LAUNCHER, OPERATORS) if edit.operator == operator]
    assert any(text in edit.apply(LAUNCHER) for edit in own), [edit.text for edit in own]
    for edit in own:
        assert "min(weight, x)" not in edit.apply(LAUNCHER)
        assert "routing, weight" not in edit.apply(LAUNCHER)


def test_every_mutant_parses_and_differs_from_the_others():
    sources = [edit.apply(KERNEL) for edit in made(KERNEL)]
    for source in sources:
        assert ast.dump(ast.parse(source)) != ast.dump(ast.parse(KERNEL))
    assert len(set(sources)) == len(sources)


def test_ids_stay_when_other_lines_move():
    moved = "# a comment\n\n" + KERNEL
    assert [edit.id for edit in made(moved)] == [edit.id for edit in made(KERNEL)]


def test_docstrings_and_errors_are_left_alone():
    source = "def f(a):\n    'a < b'\n    raise ValueError(a + 1)\n"
    assert made(source, HOST_OPERATORS) == []


def test_ids_are_unique(generated):
    ids = [candidate.id for candidate in generated]
    assert len(set(ids)) == len(ids)


def test_every_device_function_has_mutants(generated):
    package = source_directory()
    missing = {
        function.name
        for path in package.rglob("*.py")
        for function in ast.parse(path.read_text()).body
        if isinstance(function, ast.FunctionDef)
        and any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)
    } - {candidate.kernel for candidate in generated}
    assert missing <= {"self_test_kernel"}


def test_every_mutant_has_checks(generated):
    for checks in {candidate.checks for candidate in generated}:
        assert set(paths_of(checks)) <= set(SPECS)
        assert next(trials(checks), None) is not None, checks


def test_mutants_made_by_hand_fit_the_sources():
    assert mutants.stale(source_directory(), SPECS.values()) == []


@pytest.mark.parametrize("name", sorted(mutants.BY_HAND))
def test_eight_mutants_of_every_operation_are_made_by_hand(name):
    assert name in SPECS
    assert len({mutant.id for mutant in mutants.BY_HAND[name]}) >= 8


def test_reasons_of_equivalent_mutants_are_few_and_of_mutants_that_exist(generated):
    ids = {candidate.id for candidate in generated}
    assert set(EQUIVALENT) <= ids, set(EQUIVALENT) - ids
    every = len(ids) + sum(len(own) for own in mutants.BY_HAND.values())
    assert len(EQUIVALENT) <= every // 20
    assert all(len(reason.split()) >= 5 for reason in EQUIVALENT.values())


def test_the_path_of_a_gpu_and_the_choice_of_a_plan_are_not_mutated():
    source = (
        "def f(path, plan, a):\n"
        "    if plan is None:\n        plan = chosen(a + 1)\n"
        "    if path is Path.GROUPED_MM:\n        return a - 2\n"
        "    match path:\n"
        "        case Path.GROUPED_MM:\n            return a - 3\n"
        "        case _:\n            return a - 4\n"
    )
    seen = mutants._without_unseen(ast.parse(source).body[0])
    changes = {edit.text for edit in edits("k.py", source, seen, HOST_OPERATORS)}
    assert changes == {"a + 4", "a", "5"}


def test_conditions_between_variants_of_equal_results_are_not_mutated():
    source = (
        "def f(a, BLOCK):\n"
        "    EARLY: tl.constexpr = BLOCK <= 32\n"
        "    if EARLY and BLOCK >= HALVED_FROM:\n        a = a + b\n"
        "    else:\n        a = a - b\n"
    )
    seen = mutants._without_variants(ast.parse(source).body[0])
    changes = [edit.text for edit in edits("k.py", source, seen, KERNEL_OPERATORS)]
    assert changes == ["a - b", "a", "a + b", "a"]


def test_what_only_the_interpreter_sees_is_tried_there_and_counts_nowhere_on_a_gpu():
    made = {
        device: {c.id for c in mutants.by_hand(source_directory(), SPECS.values(), device)
                 if not c.equivalent}
        for device in ("cpu", "cuda")
    }  # fmt: skip
    unseen = {m.id for found in BY_HAND.values() for m in found if m.unseen_on_gpu}
    assert made["cpu"] - made["cuda"] == unseen == {"expert_weight_grad-p-tail"}
    assert made["cuda"] < made["cpu"]


def test_a_sample_is_seeded_and_keeps_what_was_made_by_hand(generated):
    by_hand = list(mutants.by_hand(source_directory(), SPECS.values(), "cpu"))
    every = [*by_hand, *generated]
    first, again = (mutants.sample(every, per_kernel=2, seed=3) for _ in range(2))
    assert [c.id for c in first] == [c.id for c in again]
    assert [c.id for c in first] != [c.id for c in mutants.sample(every, per_kernel=2, seed=4)]
    assert {c.id for c in by_hand} <= {c.id for c in first}


def answering(connection, device):
    """Hangs or dies where a task's id says so; answers others."""
    while True:
        task = connection.recv()
        if task.id.startswith("hang"):
            time.sleep(60)
        if task.id.startswith("die"):
            os.abort()
        if task.id.startswith("stop"):
            raise SystemExit(3)
        connection.send("alive")
        status = SPOILED if task.id.startswith("spoil") else device
        connection.send(Verdict(id=task.id, status=status, checks=1))


def test_silence_death_and_damage_kill_a_mutant_that_does_it_twice():
    names = ("a", "hang", "die", "spoil", "b")
    tasks = [Task(id=name, file="", source="", checks=()) for name in names]
    found = {}
    mutants.try_all(
        tasks,
        jobs=2,
        device="survived",
        seconds=0.5,
        found=lambda verdict: found.update({verdict.id: verdict}),
        body=answering,
    )
    assert {name: verdict.status for name, verdict in found.items()} == {
        "a": "survived",
        "hang": "killed",
        "die": "killed",
        "spoil": "killed",
        "b": "survived",
    }
    assert found["hang"].killed_by == {"measure": "timeout"}
    assert found["die"].killed_by == {"measure": "crash"}
    assert found["spoil"].killed_by == {"measure": "damage"}


def test_a_worker_that_is_ended_otherwise_kills_nobody():
    task = Task(id="stop", file="", source="", checks=())
    with pytest.raises(RuntimeError, match="exit code 3 while it tried stop"):
        mutants.try_all(
            [task], jobs=1, device="cpu", seconds=5.0, found=lambda verdict: None, body=answering
        )


def test_what_a_record_found_is_kept_while_the_change_is_the_same(generated):
    one, other = generated[:2]
    entry = mutants.as_json(one, Verdict(id=one.id, status="killed", killed_by={}, checks=1))
    changed = {**mutants.as_json(other, Verdict(id=other.id, status="killed")), "diff": "old"}
    known = mutants.known_verdicts([entry, changed], generated)
    assert list(known) == [one.id]
    assert known[one.id].status == "killed"


@pytest.mark.parametrize(("reason", "kept"), [(mutants.SAME_CODE, True), ("written once", False)])
def test_of_equivalent_mutants_a_record_keeps_those_of_the_same_code(generated, reason, kept):
    one = generated[0]
    verdict = Verdict(id=one.id, status="equivalent", reason=reason)
    known = mutants.known_verdicts([mutants.as_json(one, verdict)], generated)
    assert (one.id in known) == kept


def test_scores_leave_out_what_counts_nowhere():
    statuses = ("killed", "killed", "survived", "equivalent", "invalid")
    entries = [{"kernel": "k", "status": status} for status in statuses]
    assert mutants.scores(entries) == {
        "k": {"killed": 2, "total": 3, "equivalent": 1, "invalid": 1}
    }
