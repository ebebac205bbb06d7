"""The decision rule: what moves it, what does not, and how often it errs."""

import itertools
import math
import random
from statistics import fmean, stdev

import pytest

from verify.gate_measure import ARMS, Visit
from verify.gate_proof import LEAST, Proof, kept, prove
from verify.statistics import (
    AMBIGUOUS,
    IMPROVEMENT,
    REGRESSION,
    SAME,
    Rule,
    decide,
    log_ratio,
    log_ratio_error,
    mean_spread,
    pooled,
    scales,
    spread,
)

pytestmark = pytest.mark.correctness

RULE = Rule()
SCALE = 0.002
"""Of the ratio of one process; an H100 with a flushed L2 has 0.0015 to 0.004."""


def decision(*percents, scale=SCALE, rule=RULE):
    values = [math.log1p(percent / 100) for percent in percents]
    return decide(values, scale, rule, benchmarks=60)


# The ratio of one process


def interleaved(ratio, rounds=20, drift=0.0, second=0.0):
    """Samples of two arms that take turns. drift: of the clock per call. second: what a call takes
    longer for being the second of its round.
    """
    found, time = ([], []), 1.0
    for turn in range(rounds):
        for place, arm in enumerate((0, 1) if turn % 2 == 0 else (1, 0)):
            found[arm].append((time + place * second) * (ratio if arm else 1.0))
            time *= 1 + drift
    return found


@pytest.mark.parametrize("ratio", [1.0, 1.05, 0.7])
@pytest.mark.parametrize("facts", [{}, {"drift": 0.01}, {"drift": -0.005}, {"second": 0.1}])
def test_a_ratio_is_seen_through_drift_and_place(ratio, facts):
    # What a drift of 1% a call leaves of a block: the product of two drifts.
    assert log_ratio(*interleaved(ratio, **facts)) == pytest.approx(math.log(ratio), abs=2e-4)


def test_neither_cancels_without_turns():
    time = [1.01**k for k in range(40)]
    assert log_ratio(time[:20], time[20:]) == pytest.approx(20 * math.log(1.01))
    base, head = interleaved(1.0, second=0.1)
    assert log_ratio(sorted(base), [value + 0.1 for value in sorted(base)]) > 0.05
    assert log_ratio(base, head) == pytest.approx(0.0, abs=1e-12)


def test_disturbed_rounds_do_not_count():
    base, head = interleaved(1.03)
    head[4] *= 10
    base[9] *= 3
    assert log_ratio(base, head) == pytest.approx(math.log(1.03))


def test_a_disturbed_round_does_not_choose_one_place():
    base, head = interleaved(1.0, second=0.1)
    head[5] *= 10
    assert log_ratio(base, head) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("base", "head", "words"),
    [
        ([1.0], [1.0, 1.0], "1 samples of one revision and 2"),
        ([], [], "0 samples"),
        ([1.0, 0.0], [1.0, 1.0], "a sample took 0.0 ms"),
    ],
)
def test_samples_that_make_no_ratio_are_refused(base, head, words):
    with pytest.raises(ValueError, match=words):
        log_ratio(base, head)


def test_the_error_of_a_ratio_is_what_ratios_vary_by():
    dice = random.Random(4)

    def arm():
        return [1 + dice.gauss(0, 0.02) for _ in range(40)]

    drawn = [(arm(), arm()) for _ in range(1000)]
    actual = stdev([log_ratio(*pair) for pair in drawn])
    # The standard error of a standard deviation of 1000 values is 2%; the rest is that the median
    # of 20 blocks is not yet normal.
    assert fmean(log_ratio_error(*pair) for pair in drawn) == pytest.approx(actual, rel=0.1)
    slower = [1.3 * value for value in drawn[0][1]]
    same = log_ratio_error(drawn[0][0], slower)
    assert same == pytest.approx(log_ratio_error(*drawn[0]))


# The decision


@pytest.mark.parametrize(
    ("percents", "verdict"),
    [
        ((0.1, -0.2, 0.3), SAME),
        ((1.2, 1.4, 1.1), SAME),
        ((5.0, 4.8, 5.3), REGRESSION),
        ((3.4, 3.5, 3.6), REGRESSION),
        ((40.0, 41.0, 39.0), REGRESSION),
        ((-4.8, -5.0, -5.1), IMPROVEMENT),
    ],
)
def test_what_is_clear_is_decided_at_once(percents, verdict):
    found = decision(*percents)
    assert (found.verdict, found.wants) == (verdict, 0)
    assert found.ratio == pytest.approx(1 + sorted(percents)[1] / 100)


@pytest.mark.parametrize(
    ("percents", "words"),
    [
        ((2.4, 2.5, 2.6), "of the limit of 2.5%"),
        ((2.8, 2.7, 2.8), "of the limit of 2.5%"),
        ((0.0, 0.1, 2.0), "processes differ by 2.0%"),
        ((0.0,), "1 of 3 processes"),
    ],
)
def test_what_is_not_clear_asks_for_more_processes(percents, words):
    found = decision(*percents)
    assert found.verdict == AMBIGUOUS
    assert found.wants > len(percents)
    assert words in found.reason


def test_stages_are_asked_for_in_order_and_then_no_more():
    near = (2.5,) * 9
    wants = [decision(*near[:count]).wants for count in (1, 3, 5)]
    assert wants == [3, 5, 9]
    last = decision(*near)
    assert (last.verdict, last.wants) == (SAME, 0)
    assert decision(*(2.6,) * 9).verdict == REGRESSION


def test_noise_raises_the_limit_and_ends_in_doubt_not_in_a_verdict():
    quiet, loud = decision(3.0, 3.1, 3.2), decision(3.0, 3.1, 3.2, scale=0.012)
    assert quiet.verdict == REGRESSION
    assert loud.limit > quiet.limit
    assert (loud.verdict, loud.wants) == (AMBIGUOUS, 5)
    hopeless = decision(*(3.0,) * 9, scale=0.03)
    assert (hopeless.verdict, hopeless.wants) == (AMBIGUOUS, 0)
    assert "5% must be" in hopeless.reason


def test_processes_that_disagree_to_the_end_count_as_noise():
    values = (0.0, 9.0, -8.0, 6.0, -7.0, 0.0, 8.0, -6.0, 3.0)
    found = decision(*values)
    assert (found.verdict, found.wants) == (AMBIGUOUS, 0)
    assert found.sees > 1.05


def test_one_disturbed_process_of_nine_changes_nothing():
    assert decision(*(0.1,) * 8, 30.0).verdict == SAME
    assert decision(*(5.0,) * 8, -30.0).verdict == REGRESSION


def test_a_change_that_every_process_shows_needs_no_quiet():
    assert decision(40.0, 60.0, 90.0, scale=0.02).verdict == REGRESSION
    assert decision(-40.0, -30.0, -45.0, scale=0.02).verdict == IMPROVEMENT


def test_more_benchmarks_are_judged_more_strictly():
    values = [math.log(1.03)] * 3
    one, many = (decide(values, 0.02, RULE, benchmarks=count) for count in (1, 1000))
    assert one.limit < many.limit


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"limit": 0.06}, r"a limit of 0\.06 cannot find a slowdown of 0\.05"),
        ({"limit": 0.0}, "a limit of"),
        ({"stages": ()}, "are not counts"),
        ({"stages": (5, 3)}, "are not counts"),
    ],
)
def test_rules_that_make_no_sense_are_refused(facts, words):
    with pytest.raises(ValueError, match=words):
        Rule(**facts)
    with pytest.raises(ValueError, match="without a process"):
        decide([], 0.1, RULE, benchmarks=1)


# Noise


def test_the_scale_of_noise_is_found():
    dice = random.Random(1)
    nulls = {f"b{k}": [dice.gauss(0, 0.004 if k else 0.02) for _ in range(200)] for k in range(20)}
    found = scales(nulls)
    # The standard error of a standard deviation of 200 values is 5%; three of them.
    assert found["b3"] == pytest.approx(0.004, rel=0.15)
    assert found["b0"] == pytest.approx(0.02, rel=0.15)


def test_few_processes_are_drawn_towards_the_others():
    nulls = {f"b{k}": [0.004, -0.004, 0.004] for k in range(9)} | {"lucky": [0.0, 0.0, 0.0]}
    found = scales(nulls)
    assert 0.002 < found["lucky"] < found["b0"]


def test_one_disturbed_process_is_not_squared():
    calm = {f"b{k}": [0.002, -0.002, 0.002] for k in range(9)}
    found = scales(calm | {"hit": [0.002, -0.002, 0.2]})
    assert found["b0"] < found["hit"] < 3 * found["b0"]


def test_history_is_pooled_by_name_and_a_benchmark_without_any_is_refused():
    assert pooled({"a": [1.0]}, {"a": [2.0], "b": [3.0]}, names=["a"]) == {"a": [1.0, 2.0]}
    with pytest.raises(ValueError, match="b has no ratio"):
        scales({"a": [0.1], "b": []})


def test_spread_leaves_out_the_outer_quarters():
    assert spread([5.0, 1.0, 2.0]) == 4.0
    assert spread([9.0, 1.0, 2.0, 3.0, -9.0]) == 2.0
    dice = random.Random(2)
    for count in (3, 5, 9, 10):
        drawn = [spread([dice.gauss(0, 1) for _ in range(count)]) for _ in range(4000)]
        assert sum(drawn) / len(drawn) == pytest.approx(mean_spread(count), rel=0.05)


# How often it errs


def samples(*, processes=LEAST, benchmarks=12, between=0.002, within=0.01, rounds=20):
    dice = random.Random(3)
    found = []
    for process, k in itertools.product(range(processes), range(benchmarks)):
        made = {}
        for arm in ARMS:
            middle = 1 + dice.gauss(0, between / math.sqrt(2))
            made[arm] = tuple(middle * (1 + dice.gauss(0, within)) for _ in range(rounds))
        found.append(Visit(name=f"b{k}", process=process, samples=made))
    return found


def test_rates_of_quiet_samples_are_those_that_the_rule_promises():
    found = prove(samples(), draws=400)
    assert (found.processes, found.benchmarks, found.false_alarms) == (10, 12, 0)
    assert found.at_most == 3 / 400
    assert found.power >= 0.99
    assert kept(found, RULE)
    assert found.as_json()["false_alarm_rate"] == 0.0


def test_rates_see_a_rule_that_is_too_eager():
    eager = Rule(limit=0.002, false_alarms=0.9, stages=(1,))
    found = prove(samples(), eager, draws=100)
    assert found.rate > 10 * RULE.false_alarms
    assert not kept(found, RULE)


def test_rates_see_a_slowdown_that_is_too_small_to_be_found():
    assert prove(samples(), slowdown=0.02, draws=100).power < 0.5
    assert prove(samples(), slowdown=0.0, draws=100).mean_power == 0.0


def test_noisy_samples_end_in_doubt_not_in_alarms():
    found = prove(samples(between=0.03), draws=60)
    assert found.undecided > 30
    assert found.false_alarms <= 2


def test_too_few_processes_publish_nothing():
    with pytest.raises(ValueError, match="9 processes were measured, 10 are needed"):
        prove(samples(processes=9))
    ragged = [visit for visit in samples(benchmarks=2) if visit.process != int(visit.name[1:])]
    with pytest.raises(ValueError, match="no benchmark was measured by all of 10"):
        prove(ragged)


def test_the_bound_of_a_rate_is_above_it():
    facts = {"processes": 10, "benchmarks": 5, "undecided": 0, "extended": 0.0, "slowdown": 0.05}
    facts |= {"power": 1.0, "weakest": "b0", "mean_power": 1.0, "draws": 1000}
    for alarms in (1, 10, 500):
        found = Proof(false_alarms=alarms, **facts)
        assert found.rate < found.at_most < 2 * found.rate + 0.01
