"""Operands whose elements lie more than 2^31 elements apart, in one dimension at a time."""

import pytest

import scattermoe_lora
from verify.far import FAR_DIMS, FarBench, far_cases
from verify.specs import KERNELS

pytestmark = pytest.mark.correctness
STRETCHED = tuple(spec for spec in KERNELS if far_cases(spec) and spec.name != "routing")


def prepared(lib, spec, inputs):
    return None if spec.prepare is None else spec.prepare(lib, inputs)


@pytest.fixture(scope="module")
def bench():
    return FarBench(prepared)


@pytest.mark.parametrize("spec", STRETCHED, ids=lambda spec: spec.name)
def test_offsets_beyond_32_bits_reach_the_right_elements(spec, bench, device):
    if device.type != "cpu":
        pytest.skip("address space without memory is a matter of the CPU")
    ratios = list(bench.ratios(scattermoe_lora, spec, ()))
    assert len({name for _, name, _ in ratios}) == len(FAR_DIMS) * len(far_cases(spec))
    assert {f"{path} {name}": r for path, name, r in ratios if not r <= 1} == {}
