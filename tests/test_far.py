"""Operands whose elements lie more than 2^31 elements apart, in one dimension at a time."""

import fcntl
import time
from contextlib import ExitStack

import pytest
import torch

import scattermoe_lora
from verify.far import FAR_DIMS, FarBench, far_cases, stretched
from verify.specs import KERNELS
from verify.specs.gradients import LORA_WEIGHT_GRAD

pytestmark = pytest.mark.correctness
_BYTES = 20 * 2**30
"""What a process takes: 2^31 elements of the operands' type, of the gates' and of each output."""
STRETCHED = tuple(spec for spec in KERNELS if far_cases(spec) and spec.name != "routing")


def prepared(lib, spec, inputs):
    return None if spec.prepare is None else spec.prepare(lib, inputs)


@pytest.fixture(scope="module")
def room(device, tmp_path_factory):
    """One of the few places that a GPU has memory for, among all processes of the run."""
    if device.type == "cpu":
        yield
        return
    places = int(torch.cuda.get_device_properties(device).total_memory // _BYTES)
    with ExitStack() as files:
        root = tmp_path_factory.getbasetemp().parent
        locks = [files.enter_context((root / f"far-{n}").open("w")) for n in range(max(1, places))]
        while not any(_taken(lock) for lock in locks):
            time.sleep(0.1)
        yield
        torch.cuda.empty_cache()


def _taken(lock) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@pytest.fixture(scope="module")
def bench(room, device):
    return FarBench(prepared, device)


@pytest.mark.parametrize("spec", STRETCHED, ids=lambda spec: spec.name)
def test_offsets_beyond_32_bits_reach_the_right_elements(spec, bench):
    ratios = list(bench.ratios(scattermoe_lora, spec, ()))
    assert len({name for _, name, _ in ratios}) == len(FAR_DIMS) * len(far_cases(spec))
    assert {f"{path} {name}": r for path, name, r in ratios if not r <= 1} == {}


def test_operands_that_share_their_storage_keep_their_values():
    inputs = LORA_WEIGHT_GRAD.inputs(
        far_cases(LORA_WEIGHT_GRAD)[0], torch.float16, "exact", torch.device("cpu")
    )
    for dim in FAR_DIMS:
        apart = stretched(inputs, dim)
        for name, value in inputs.tensors.items():
            assert torch.equal(apart[name], value), (dim, name)
        halves = [value for value in apart.tensors.values() if value.dtype == torch.float16]
        assert len({value.untyped_storage().data_ptr() for value in halves}) < len(halves)
