"""Clocks, samples and how much is measured, on a virtual clock."""

import gc
import math
from itertools import pairwise

import pytest
import torch

from verify.timing import (
    Effort,
    HostClock,
    Timing,
    VirtualClock,
    is_kernel,
    launches,
    measure,
    peak_bytes,
    turn_order,
)

pytestmark = pytest.mark.correctness


def spending(clock, *milliseconds):
    """A call that takes these times in turn, the last one for ever."""
    left = list(milliseconds)
    return lambda: clock.spend(left.pop(0) if len(left) > 1 else left[0])


def test_a_call_takes_the_time_that_it_spends():
    clock = VirtualClock()
    assert clock.once(spending(clock, 3.0)) == pytest.approx(3.0)
    assert clock.back_to_back(spending(clock, 1.0, 3.0), 2) == pytest.approx(2.0)
    assert clock.enqueue(spending(clock, 0.5), 4) == pytest.approx(0.5)


def test_arms_take_turns_and_each_is_as_often_first_as_last():
    clock, order = VirtualClock(), []
    calls = [lambda name=name: order.append(name) or clock.spend(1.0) for name in "abc"]
    clock.samples(calls, 4, [0.0] * 3)
    assert "".join(order) == "abccbaabccba"
    for turn, following in pairwise(range(6)):
        assert turn_order(2, turn) == turn_order(2, following)[::-1]


def test_interleaving_cancels_a_drift_of_the_clock():
    clock, drift = VirtualClock(), [1.0]

    def call():
        drift[0] *= 1.01
        clock.spend(drift[0])

    rounds = 200
    base, head = clock.samples([call, call], rounds, [0.0, 0.0])
    ratio = sum(math.log(b / a) for a, b in zip(base, head, strict=True)) / rounds
    always_the_same_order = math.log(1.01)
    assert abs(ratio) < always_the_same_order / rounds


def test_measure_gives_medians_of_the_calls_and_their_host_time():
    clock = VirtualClock()
    calls = {"fast": spending(clock, 1.0), "slow": spending(clock, 9.0, 2.0)}
    found = measure(clock, calls, Effort(budget_ms=50.0, least=5, most=9))
    assert [found[name].median for name in calls] == pytest.approx([1.0, 2.0])
    assert found["slow"].wall_ms == pytest.approx(2.0)
    assert len(found["fast"].samples) == len(found["slow"].samples) == 9


@pytest.mark.parametrize("disturbed", range(3, 12))
def test_a_call_that_the_host_delays_once_does_not_move_the_wall_time(disturbed):
    """The first call says how long one takes, two warm up; then come the rows of three."""
    clock = VirtualClock()
    times = [2.0] * disturbed + [500.0, 2.0]
    effort = Effort(budget_ms=50.0, least=5, most=5)
    assert effort.calls(2.0) == 3
    found = measure(clock, {"ours": spending(clock, *times)}, effort)
    assert found["ours"].wall_ms == pytest.approx(2.0)


@pytest.mark.parametrize(("each", "rounds"), [(0.001, 100), (10.0, 25), (1000.0, 21)])
def test_samples_fill_the_budget_within_bounds(each, rounds):
    assert Effort().rounds([each, each / 2]) == rounds


def test_quartiles_enclose_the_median():
    timing = Timing(samples=(5.0, 1.0, 3.0, 2.0, 100.0), wall_ms=1.0, host_ms=1.0)
    low, high = timing.quartiles
    assert (low, timing.median, high) == (2.0, 3.0, 5.0)
    assert Timing(samples=(4.0,), wall_ms=1.0, host_ms=1.0).quartiles == (4.0, 4.0)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_off_while_time_is_taken_and_as_it_was_afterwards(enabled):
    seen = []
    before = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        HostClock().once(lambda: seen.append(gc.isenabled()))
        assert seen == [False]
        assert gc.isenabled() == enabled
    finally:
        gc.enable() if before else gc.disable()


def test_nothing_is_invented_where_nothing_counts():
    cpu = torch.device("cpu")
    assert peak_bytes(lambda: None, cpu) is None
    assert launches(lambda: None, cpu) is None


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("_scatter2scatter_kernel", True),
        ("void at::native::vectorized_elementwise_kernel<4, ...>(int)", True),
        ("Memset (Device)", False),
        ("Memcpy DtoD (Device -> Device)", False),
        ("Activity Buffer Request", False),
        ("at::cuda::(anonymous namespace)::spin_kernel(long)", False),
    ],
)
def test_copies_fills_and_busy_waits_are_no_kernels(name, counts):
    assert is_kernel(name) == counts
