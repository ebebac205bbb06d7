"""What a launcher remembers, with a kernel and a GPU that only take notes."""

import pytest
import torch

from scattermoe_lora import _launch

pytestmark = pytest.mark.correctness

CUDA = torch.device("cuda", 0)


class Kernel:
    """Compiles by counting, and keeps what was launched."""

    arg_names = ["x", "y", "BLOCK", "EVEN"]  # noqa: RUF012

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def first(*args, num_warps, num_stages, **constants):
            self.compiled.append((grid, args, constants, num_warps, num_stages))
            return Variant(self, len(self.compiled))

        return first


class Variant:
    def __init__(self, kernel, number):
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid):
        return lambda *values: self.kernel.launched.append((self.number, grid, values))


@pytest.fixture
def gpu(monkeypatch):
    """Device 0 is the current one; entering another is noted."""
    entered = []

    class Entering:
        def __init__(self, device):
            entered.append(device)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Entering)
    return entered


GIVEN = {"form": ("a",), "pointers": 32, "warps": 4, "stages": 3, "BLOCK": 16, "EVEN": True}


def launch(launcher, device=CUDA, args=(1, 2), grid=(7, 1, 1), **changes):
    launcher(grid, device, args, **{**GIVEN, **changes})


def test_a_form_is_compiled_once_and_launched_with_its_own_arguments(gpu):
    kernel = Kernel()
    launcher = _launch.Launcher(kernel)
    launch(launcher)
    assert kernel.compiled == [((7, 1, 1), (1, 2), {"BLOCK": 16, "EVEN": True}, 4, 3)]
    launch(launcher, args=(3, 4), grid=(9, 1, 1))
    assert len(kernel.compiled) == 1
    assert kernel.launched == [(1, (9, 1, 1), (3, 4, 16, True))]
    assert gpu == []


CHANGES = [
    {"form": ("b",)}, {"warps": 8}, {"stages": 2}, {"BLOCK": 32}, {"EVEN": False},
    {"device": torch.device("cuda", 1)},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_another_form_or_device_is_another_variant(gpu, change):
    kernel = Kernel()
    launcher = _launch.Launcher(kernel)
    for repeat in range(2):
        launch(launcher)
        launch(launcher, **change)
        assert len(kernel.compiled) == 2, repeat
    assert [number for number, *_ in kernel.launched] == [1, 2]
    other = change.get("device")
    assert gpu == ([] if other is None else [other, other])


def test_variants_are_for_aligned_pointers_alone(gpu):
    kernel = Kernel()
    launcher = _launch.Launcher(kernel)
    for pointers, count in ((1, 1), (8, 2), (32, 3), (24, 4), (48, 4)):
        launch(launcher, pointers=pointers)
        assert len(kernel.compiled) == count
    assert len(kernel.launched) == 1


def test_stages_are_three_where_none_are_given(gpu):
    kernel = Kernel()
    _launch.Launcher(kernel)(
        (1, 1, 1), CUDA, (1, 2), form=(), pointers=0, warps=4, BLOCK=16, EVEN=True
    )
    assert kernel.compiled[0][-1] == 3


def test_constants_out_of_order_are_refused(gpu):
    given = {name: GIVEN[name] for name in ("form", "pointers", "warps", "EVEN", "BLOCK")}
    with pytest.raises(AssertionError, match=r"\['EVEN', 'BLOCK'\] do not follow"):
        _launch.Launcher(Kernel())((1, 1, 1), CUDA, (1, 2), **given)


def test_the_interpreter_runs_the_kernel_each_time():
    kernel = Kernel()
    launcher = _launch.Launcher(kernel)
    for count in (1, 2):
        launch(launcher, device=torch.device("cpu"))
        assert len(kernel.compiled) == count
