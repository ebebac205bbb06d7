"""What a launch remembers, with a kernel and a GPU that only take notes."""

from types import SimpleNamespace

import pytest
import torch
from triton import knobs

from scattermoe_lora import _launch

pytestmark = pytest.mark.correctness

CUDA = torch.device("cuda", 0)
OTHER = torch.device("cuda", 1)


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
    """Compiled code with Triton's two ways to launch it: the one of users, and its own."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel, number):
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid):
        return lambda *values: self.kernel.launched.append((self.number, grid, values, "listened"))

    def run(self, x, y, z, stream, function, metadata, *hooks_and_values):
        hooks, values = hooks_and_values[:3], hooks_and_values[3:]
        assert (function, metadata, hooks) == ("function", "metadata", (None, None, None))
        self.kernel.launched.append((self.number, (x, y, z), values, stream))


class Driver:
    """A stream for each device, named by it."""

    def get_current_stream(self, index):
        return f"stream {index}"


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
    monkeypatch.setattr(_launch, "driver", SimpleNamespace(active=Driver()))
    return entered


def made(kernel) -> _launch.Launch:
    return _launch.Launch(kernel, warps=4, stages=2, BLOCK=16, EVEN=True)


def test_a_form_is_compiled_once_and_launched_with_its_own_arguments(gpu):
    kernel = Kernel()
    launch = made(kernel)
    launch((7, 1, 1), CUDA, (1, 2), 32)
    assert kernel.compiled == [((7, 1, 1), (1, 2), {"BLOCK": 16, "EVEN": True}, 4, 2)]
    launch((9, 2, 3), CUDA, (3, 4), 32)
    assert len(kernel.compiled) == 1
    assert kernel.launched == [(1, (9, 2, 3), (3, 4, 16, True), "stream 0")]


def test_each_device_has_its_own_variant_and_is_entered_where_it_is_not_current(gpu):
    kernel = Kernel()
    launch = made(kernel)
    for device in (CUDA, OTHER, CUDA, OTHER):
        launch((7, 1, 1), device, (1, 2), 32)
    assert gpu == [OTHER, OTHER]
    assert len(kernel.compiled) == 2
    assert [(number, how) for number, *_, how in kernel.launched] == [
        (1, "stream 0"),
        (2, "stream 1"),
    ]


def test_variants_are_for_aligned_pointers_alone(gpu):
    kernel = Kernel()
    launch = made(kernel)
    for pointers, count in ((1, 1), (8, 2), (32, 3), (24, 4), (48, 4)):
        launch((7, 1, 1), CUDA, (1, 2), pointers)
        assert len(kernel.compiled) == count
    assert len(kernel.launched) == 1


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_profilers_hear_of_each_launch(gpu, hook):
    kernel = Kernel()
    launch = made(kernel)
    listener, chain = lambda *facts: None, getattr(knobs.runtime, hook)
    launch((7, 1, 1), CUDA, (1, 2), 32)
    chain.add(listener)
    try:
        launch((7, 1, 1), CUDA, (1, 2), 32)
    finally:
        chain.remove(listener)
    launch((7, 1, 1), CUDA, (1, 2), 32)
    assert [how for *_, how in kernel.launched] == ["listened", "stream 0"]


def test_stages_are_three_where_none_are_given(gpu):
    kernel = Kernel()
    _launch.Launch(kernel, warps=4, BLOCK=16, EVEN=True)((1, 1, 1), CUDA, (1, 2), 0)
    assert kernel.compiled[0][-1] == 3


def test_constants_out_of_order_are_refused(gpu):
    launch = _launch.Launch(Kernel(), warps=4, EVEN=True, BLOCK=16)
    with pytest.raises(AssertionError, match=r"\['EVEN', 'BLOCK'\] do not follow"):
        launch((1, 1, 1), CUDA, (1, 2), 0)


def test_the_interpreter_runs_the_kernel_each_time(monkeypatch):
    monkeypatch.setattr(_launch, "INTERPRETED", True)
    kernel = Kernel()
    launch = made(kernel)
    for count in (1, 2):
        launch((7, 1, 1), torch.device("cpu"), (1, 2), 32)
        assert len(kernel.compiled) == count
