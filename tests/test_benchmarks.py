"""Every benchmark of a suite under pytest-benchmark: times of device events, one per sample."""

import pytest

from verify.benchmark_plugin import cases_of

pytestmark = [pytest.mark.bench, pytest.mark.gpu]


def pytest_generate_tests(metafunc):
    cases = cases_of(metafunc.config.getoption("bench_suite"))
    metafunc.parametrize("case", cases, ids=[case.name for case in cases])


def test_benchmark(case, timed):
    timed(case)
