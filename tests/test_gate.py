"""The gate on a virtual device: what it measures, decides, compares exactly and takes up again."""

import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import on_the_cpu, refused_on_the_cpu
from virtual_device import DEQUANT, Speeds, cases

import scattermoe_lora
from conftest import DEVICE
from verify import peer_figures, revision
from verify.bench_arms import Arm, arm_of
from verify.bench_cases import KINDS, PROJECTIONS, SHAPES, WHATS
from verify.cli import main
from verify.commands.gate import calibrated
from verify.gate import Gate, Result, exit_status, summary_of
from verify.gate_cases import MOST, WITNESSES, suite, tiny_suite
from verify.gate_measure import ARMS, BASE, HEAD, Pairs, Visit, differing, more_rounds
from verify.gate_plant import Plant, busy_wait, slow_tree
from verify.statistics import AMBIGUOUS, IMPROVEMENT, REGRESSION, SAME, UNMEASURED, Rule
from verify.timing import Effort, VirtualClock, clock_of

pytestmark = pytest.mark.correctness

PACKAGE = Path(scattermoe_lora.__path__[0])
SIX = cases(6)
NAME = SIX[2].name


def gate_of(speeds, count=6, **facts):
    gate = Gate(cases=cases(count), visit=speeds.visits, **facts)
    list(gate.run())
    return gate


def outcome(gate):
    """The decisions by name, and the exit status."""
    results = gate.results()
    status = exit_status(summary_of(results, gate.invalid()))
    return {item.name: item.decision for item in results}, status


# The suite


def test_the_suite_is_small_and_covers_every_regime():
    found = suite()
    assert len({case.name for case in found}) == len(found) <= MOST
    assert {case.kind for case in found} == set(KINDS)
    for kind, whats in WHATS.items():
        assert {case.what for case in found if case.kind == kind} == set(whats)
    products = [case for case in found if case.kind == "projection"]
    assert {case.projection for case in products} == set(PROJECTIONS)
    assert {case.tokens for case in products} == {128, 2048, 8192}
    assert {case.rank for case in products} == {16, 32, 64}
    assert {case.routing for case in products} == {"balanced", "zipf", "half"}
    assert {case.dtype for case in products} == {"bfloat16", "float16", "float32"}
    steps = [case for case in found if (case.kind, case.what) == ("layer", "step")]
    assert {case.shape.name for case in steps} == set(SHAPES) - {"tiny"}
    assert {case.tokens for case in steps} == {128, 2048, 8192}


@pytest.mark.parametrize("made", [suite(), tiny_suite()], ids=["gpu", "cpu"])
def test_cases_on_the_same_tensors_are_neighbours(made):
    keys = [case.inputs_key for case in made]
    assert sum(a != b for a, b in itertools.pairwise(keys)) == len(set(keys)) - 1


def test_witnesses_are_in_the_suite_and_have_a_figure():
    assert set(WITNESSES) <= {case.name for case in suite()}
    for figures in peer_figures.FIGURES.values():
        assert set(WITNESSES) <= set(figures)


# Decisions


@pytest.mark.parametrize("seed", range(4))
def test_equal_revisions_are_the_same_after_three_processes(seed):
    gate = gate_of(Speeds(seed=seed, between=0.001), count=60)
    decisions, status = outcome(gate)
    assert set(decisions.values()) == {SAME}
    assert status == 0
    assert {item.processes for item in gate.results()} == {3}


@pytest.mark.parametrize(("factor", "status"), [(1.05, 1), (1.1, 1), (0.9, 0)])
@pytest.mark.parametrize("seed", range(3))
def test_a_change_of_one_benchmark_is_found_and_no_other(seed, factor, status):
    decisions, found = outcome(gate_of(Speeds(seed=seed, slower={NAME: factor}), count=60))
    assert decisions.pop(NAME) == (REGRESSION if factor > 1 else IMPROVEMENT)
    assert set(decisions.values()) == {SAME}
    assert found == status


def test_only_what_is_undecided_is_measured_again():
    gate = gate_of(Speeds(slower={NAME: 1.025}, between=0.0005, within=0.002))
    counts = {item.name: item.processes for item in gate.results()}
    assert counts.pop(NAME) == Rule().stages[-1]
    assert set(counts.values()) == {3}


def test_noise_is_no_success():
    decisions, status = outcome(gate_of(Speeds(between=0.06)))
    assert AMBIGUOUS in decisions.values()
    assert status == 2


def test_noise_known_from_before_counts():
    history = {case.name: [0.02, -0.02, 0.03, -0.03, 0.02, -0.01] * 3 for case in SIX}
    speeds = Speeds(between=0.001, within=0.001)
    assert {item.processes for item in gate_of(speeds).results()} == {3}
    assert {item.processes for item in gate_of(speeds, history=history).results()} != {3}


@pytest.mark.parametrize("arm", ARMS)
def test_what_cannot_be_run_is_unmeasured_and_not_tried_again(arm):
    gate = gate_of(Speeds(raises={NAME: arm}))
    decisions, status = outcome(gate)
    assert decisions[NAME] == UNMEASURED
    assert status == 2
    (visit,) = [visit for visit in gate.found if visit.name == NAME]
    assert visit.reason == f"_ArmError: {arm} raises RuntimeError: no kernel image"


def test_time_that_is_over_leaves_benchmarks_unmeasured():
    gate = gate_of(Speeds(), seconds=0.0)
    decisions, status = outcome(gate)
    assert set(decisions.values()) == {UNMEASURED}
    assert status == 2
    assert gate.results()[0].reason == "no process has measured it"


@pytest.mark.parametrize(
    ("decisions", "status"),
    [
        ((), 2),
        ((SAME, IMPROVEMENT), 0),
        ((SAME, AMBIGUOUS), 2),
        ((SAME, UNMEASURED), 2),
        ((SAME, AMBIGUOUS, REGRESSION), 1),
        ((UNMEASURED, REGRESSION), 1),
    ],
)
def test_only_what_is_known_of_all_is_a_success(decisions, status):
    results = [Result(name=f"b{k}", decision=item, reason="") for k, item in enumerate(decisions)]
    assert exit_status(summary_of(results, [])) == status


def test_a_run_goes_on_where_it_was_interrupted():
    whole = gate_of(Speeds())
    first = Gate(cases=SIX, visit=Speeds().visits)
    kept = list(itertools.islice(first.run(), 8))
    asked = []

    def visit(waiting, process, seconds):
        asked.append((process, len(waiting)))
        return Speeds().visits(waiting, process)

    again = Gate(cases=SIX, visit=visit, found=kept)
    list(again.run())
    assert asked == [(1, 4), (2, 6)]
    assert outcome(again) == outcome(whole)


# What is compared exactly


def visiting(base, head, key):
    """Visits of equal times in which one count differs."""

    def visit(waiting, process, seconds):
        for found in Speeds().visits(waiting, process):
            counts = {"peak_bytes": [100, 100], "launches": [3, 3], key: [base, head]}
            yield replace(found, facts={**found.facts, **(counts if process == 0 else {})})

    return visit


@pytest.mark.parametrize(
    ("key", "words"),
    [("peak_bytes", "bytes at most: 7 before, 8 now"), ("launches", "launches: 7 before, 8 now")],
)
def test_one_byte_or_launch_more_is_a_regression(key, words):
    def run(base, head, **facts):
        gate = Gate(cases=SIX, visit=visiting(base, head, key), **facts)
        list(gate.run())
        return gate

    more = run(7, 8)
    assert outcome(more)[1] == 1
    assert more.results()[0].reason == f"{words}; time: same"
    assert outcome(run(8, 7))[1] == 0
    assert outcome(run(7, 8, accept=(key,)))[1] == 0


def test_a_peer_that_is_too_slow_is_no_success():
    def visit(waiting, process, seconds):
        for found in Speeds().visits(waiting, process):
            yield replace(found, facts={**found.facts, "invalid": ["a peer took 2 ms"]})

    gate = Gate(cases=SIX, visit=visit)
    list(gate.run())
    assert gate.invalid()
    assert outcome(gate)[1] == 2


def test_bits_are_compared_not_values():
    one = {"y": torch.tensor([0.0, float("nan")]), "z": torch.ones(2)}
    assert differing(one, {key: value.clone() for key, value in one.items()}) == []
    assert differing(one, one | {"y": torch.tensor([-0.0, float("nan")])}) == ["y"]
    assert differing(one, one | {"z": torch.ones(3)}) == ["z"]
    assert differing(one, one | {"z": torch.ones(2, dtype=torch.float16)}) == ["z"]
    assert differing(one, {"y": one["y"]}) == ["z"]


def test_two_copies_that_differ_are_reported():
    gate = gate_of(Speeds(value=lambda arm, name: float(arm == "twin" and name == NAME)))
    (found,) = [item for item in gate.results() if item.bits]
    assert (found.name, found.bits) == (NAME, {"twin": ["y"]})
    assert summary_of(gate.results(), [])["not_reproducible"] == 1


def pairs_of(arms, **facts):
    facts = {"libs": dict.fromkeys(ARMS, scattermoe_lora), **facts}
    effort = Effort(budget_ms=1.0, least=2, most=2)
    device = torch.device(DEVICE)
    facts = {"clock": clock_of(device), "effort": effort, "exact": True, **facts}
    return Pairs(device=device, arms=arms, **facts)


@pytest.mark.parametrize(("error", "measured"), [(0.0, True), (1e-9, True), (1e-3, False)])
def test_results_that_changed_are_judged_before_they_are_timed(error, measured):
    made = iter(ARMS)

    def arms(lib, case, drawn):
        arm = arm_of(lib, case, drawn)
        if next(made) != HEAD:
            return arm
        return Arm(call=lambda: [value * (1 + error) for value in arm.call()], outputs=arm.outputs)

    (visit,) = pairs_of(arms).visits([DEQUANT], 0)
    assert bool(visit.samples) == measured
    if not measured:
        assert visit.reason.startswith("_WrongError: dense errs by")


@pytest.mark.parametrize("counts", [(0, 0), (3, 0)])
def test_launches_that_the_profiler_does_not_see_are_not_equal(counts, monkeypatch):
    found = iter(counts)
    monkeypatch.setattr("verify.gate_measure.launches", lambda call, device: next(found))
    (visit,) = pairs_of(arm_of).visits([DEQUANT], 0)
    assert not visit.samples
    assert visit.reason.startswith("_UncountedError: the profiler saw no kernel")


def test_visits_are_read_as_they_were_written():
    (visit,) = Speeds().visits(SIX[:1], 0)
    again = Visit.from_json(json.loads(json.dumps(visit.as_json())))
    assert again.samples[BASE] == pytest.approx(visit.samples[BASE], abs=1e-9)
    assert replace(again, samples={}) == replace(visit, samples={})


def test_rounds_that_vary_are_taken_more_often_and_slower_ones_are_not():
    dice = random.Random(5)

    def arm(noise, factor=1.0, rounds=20):
        return [factor * (1 + dice.gauss(0, noise)) for _ in range(rounds)]

    assert more_rounds([arm(0.002), arm(0.002, 1.5)], 0.005) == 0
    few, many = (more_rounds([arm(0.001), arm(noise)], 0.005) for noise in (0.02, 0.2))
    assert few % 2 == many % 2 == 0
    assert 0 < few < many == 7 * 20
    assert more_rounds([arm(0.2)], 0.005) == more_rounds([arm(0.2), arm(0.2)], None) == 0


def test_a_process_takes_the_rounds_that_it_lacks():
    clock, dice = VirtualClock(), random.Random(6)

    def arms(lib, case, drawn):
        spend = lambda: clock.spend(1 + 0.1 * dice.random())  # noqa: E731
        return Arm(call=lambda: spend() or (torch.zeros(1),), outputs=("y",))

    effort = Effort(budget_ms=1.0, least=20, most=20)
    counts = {
        precision: {
            len(samples)
            for visit in pairs_of(
                arms, clock=clock, effort=effort, exact=False, precision=precision
            ).visits([DEQUANT], 0)
            for samples in visit.samples.values()
        }
        for precision in (None, 0.005)
    }
    assert counts[None] == {20}
    (taken,) = counts[0.005]
    assert 20 < taken <= 160


# Planted slowdowns


@pytest.mark.parametrize("percent", [3.0, 5.0, 10.0])
def test_a_plant_takes_its_share_of_the_device(percent):
    clock = VirtualClock()
    plant = Plant(percent=percent, wait=lambda ms: lambda: clock.spend(ms))
    slower = plant.slowed(clock, lambda: clock.spend(2.0), {HEAD: lambda: clock.spend(2.0)})
    assert clock.once(slower[HEAD]) == pytest.approx(2.0 * (1 + percent / 100))


def test_a_plant_slows_the_second_revision_and_its_copy():
    clock = VirtualClock()

    def arms(lib, case, drawn):
        return Arm(call=lambda: clock.spend(1.0) or (torch.zeros(1),), outputs=("y",))

    plant = Plant(percent=10.0, wait=lambda ms: lambda: clock.spend(ms))
    pairs = pairs_of(arms, clock=clock, plant=plant, exact=False)
    for process in (1, 2):
        (visit,) = pairs.visits([DEQUANT], process)
        found = {arm: samples[0] for arm, samples in visit.samples.items()}
        assert found == pytest.approx({BASE: 1.0, HEAD: 1.1, "twin": 1.1})


def test_a_wait_is_as_long_as_it_should_be():
    clock = VirtualClock()
    launch, per_ms = 0.002, 1_700_000
    wait = busy_wait(clock, lambda cycles: clock.spend(launch + cycles / per_ms))
    assert clock.once(wait(0.05)) == pytest.approx(0.05, rel=1e-3)
    assert clock.once(wait(0.0)) == pytest.approx(launch, rel=1e-2)


class EventsTakeTime(VirtualClock):
    """A sample is longer than its call, as between the events of a GPU."""

    def samples(self, calls, rounds, host_ms):
        found = super().samples(calls, rounds, host_ms)
        return [[value + 0.004 for value in values] for values in found]


def test_a_wait_after_other_work_does_not_count_what_events_take():
    clock, per_ms = EventsTakeTime(), 1_700_000
    wait = busy_wait(clock, lambda cycles: clock.spend(0.001 + cycles / per_ms))
    assert clock.once(wait(0.05)) == pytest.approx(0.05, rel=1e-3)


def test_a_wait_is_measured_at_the_clock_of_a_gpu_at_work():
    clock = VirtualClock()

    def spin(cycles):
        clock.spend(cycles / (345_000 if clock.seconds < 0.1 else 1_980_000))

    wait = busy_wait(clock, spin)(0.05)
    clock.spend(1000.0)
    assert clock.once(wait) == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize(("percent", "status"), [(5.0, 1), (10.0, 1)])
def test_a_planted_slowdown_fails_the_gate(percent, status):
    decisions, found = outcome(gate_of(Speeds(every=1 + percent / 100), count=60))
    assert set(decisions.values()) == {REGRESSION}
    assert found == status


def test_a_plant_of_nothing_is_refused():
    with pytest.raises(ValueError, match="0% is not between"):
        Plant(percent=0, wait=lambda ms: lambda: None)


def test_a_slow_tree_is_the_package_with_another_launcher(tmp_path):
    tree = slow_tree(PACKAGE, tmp_path, 10.0)
    changed = [
        path.name
        for path in PACKAGE.rglob("*.py")
        if (tree / path.relative_to(PACKAGE)).read_text() != path.read_text()
    ]
    assert changed == ["_launch.py"]
    try:
        slow = revision.load(tree, "planted_slow")
        pairs = pairs_of(arm_of, libs={BASE: scattermoe_lora, HEAD: slow, "twin": slow})
        (visit,) = pairs.visits([DEQUANT], 0)
        assert visit.facts["bits"] == {BASE: [], "twin": []}
    finally:
        revision.unload("planted_slow")
    with pytest.raises(ValueError, match="exists already"):
        slow_tree(PACKAGE, tmp_path, 10.0)


# The command


@pytest.mark.skipif(DEVICE != "cpu", reason="measures on the CPU, where Triton may not interpret")
def test_the_command_compares_writes_a_record_and_goes_on_with_it(tmp_path):
    path = tmp_path / "gate.json"
    words = ["gate", "--device", "cpu", "--against", str(PACKAGE), "--names", DEQUANT.name]
    words += ["--processes", "1", "--json", str(path)]
    # One process of a shared CPU decides nothing, or by chance something.
    assert on_the_cpu(words) in (0, 1, 2)
    record = json.loads(path.read_text())
    assert record.keys() >= {"environment", "fingerprint", "summary", "benchmarks", "visits"}
    (entry,) = record["benchmarks"]
    assert (entry["name"], entry["processes"], entry["bits"]) == (DEQUANT.name, 1, {})
    (visit,) = record["visits"]
    assert set(visit["samples"]) == set(ARMS)
    assert record["summary"]["complete"]
    assert record["base"] == record["head"]
    assert (record["command"], record["against"]) == ("gate", PACKAGE.name)
    on_the_cpu([*words, "--resume", str(path)])
    assert json.loads(path.read_text())["visits"] == record["visits"]
    path.write_text(json.dumps(record | {"base": "other", "visits": "not read"}))
    assert on_the_cpu([*words, "--resume", str(path), "--minutes", "0"]) == 2
    assert json.loads(path.read_text())["visits"] == []
    path.write_text(json.dumps(record))
    for option, value in (("--seed", "7"), ("--plant", "9")):
        refused = refused_on_the_cpu([*words, "--resume", str(path), option, value])
        assert re.match(f"--resume: .* made with {option[2:]} 0.*is {value}", refused)
    assert json.loads(path.read_text()) == record


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "needs --against"),
        (("--against", "x", "--calibrate", "--plant", "5"), "needs --against"),
        (("--calibrate", "--plant", "5"), "nothing can be planted"),
        (("--against", "x", "--names", "nothing.*"), "nothing of"),
        (("--against", "no-such-revision"), "git has no scattermoe_lora"),
        (("--against", "x", "--accept", "time"), "time is none of peak_bytes, launches"),
        (("--rates", "absent.json"), "is no record of the gate"),
        (("--write-slow-tree", "x"), "0.0% is not between"),
    ],
)
def test_options_that_make_no_sense_are_refused(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused_on_the_cpu(["gate", "--device", "cpu", *words])


@pytest.mark.parametrize(
    ("rates", "status"),
    [
        ({}, 0),
        ({"benchmarks": 59}, 2),
        ({"power": 0.98}, 1),
        ({"false_alarm_rate_at_most": 0.011}, 1),
        (None, 2),
    ],
)
def test_a_calibration_succeeds_where_all_is_in_the_rates_and_they_are_kept(rates, status):
    good = {"benchmarks": 60, "power": 0.995, "false_alarm_rate_at_most": 0.0015}
    record = {"rates": None if rates is None else good | rates, "summary": {"benchmarks": 60}}
    assert calibrated(record) == status


def test_the_list_is_the_suite(capsys):
    assert main(["gate", "--list"]) == 0
    assert capsys.readouterr().out.split() == [case.name for case in suite()]
