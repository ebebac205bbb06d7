"""Chooses GPU or interpreter before Triton is imported; profiles and markers of the test suite."""

import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from verify import benchmark_device, benchmark_plugin
from verify.environment import prepare_interpreter

DEVICE = prepare_interpreter()
# Tensors on the CPU are small: more threads only wait for each other, and for those of other test
# processes. The variable is for the processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
_PROCESSES, _DEVICE_BYTES = 16, 2**31
"""At most so many, each with so much of a GPU's memory: contexts alone take half a gigabyte."""
_EXCLUDED = pytest.StashKey[list[str]]()
_ELSEWHERE = pytest.StashKey[list[str]]()

hypothesis.settings.register_profile(
    "gate", derandomize=True, deadline=None, max_examples=25, database=None
)
# Where CI is set, hypothesis would make this one derandomised and without a database, too.
hypothesis.settings.register_profile(
    "fuzz",
    parent=hypothesis.settings.get_profile("default"),
    deadline=None,
    max_examples=500,
    print_blob=True,
)


def pytest_addoption(parser) -> None:
    parser.addoption(
        "--profile",
        choices=("gate", "fuzz"),
        default="gate",
        help="hypothesis: `gate` draws the same bounded examples each time, `fuzz` new ones",
    )
    benchmark_plugin.add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config) -> None:
    """The whole suite takes several processes, unless told how many (`-n`); benchmarks take one."""
    options = config.option
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    alone = hasattr(config, "workerinput") or options.usepdb or options.collectonly
    alone = alone or options.capture == "no"
    if (
        whole
        and not alone
        and config.pluginmanager.hasplugin("xdist")
        and options.numprocesses is None
        and not _benchmarks(config)
    ):
        options.numprocesses = _processes()


def _processes() -> int:
    most = min(os.cpu_count() or 1, _PROCESSES)
    if DEVICE == "cpu":
        return most
    memory = torch.cuda.get_device_properties(0).total_memory
    return max(1, min(most, memory // _DEVICE_BYTES))


def _benchmarks(config) -> bool:
    """Whether benchmarks were asked for."""
    return "bench" in config.option.markexpr or any(
        str(argument).startswith("--benchmark") for argument in config.invocation_params.args
    )


def pytest_configure(config) -> None:
    hypothesis.settings.load_profile(config.getoption("--profile"))
    if config.pluginmanager.hasplugin("benchmark"):
        machine = benchmark_device.ThisMachine(torch.device(DEVICE))
        config.pluginmanager.register(benchmark_plugin.BenchmarkGate(machine), "benchmark-gate")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels of this run are launched."""
    return torch.device(DEVICE)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell ignores interrupts for what it runs in the background, and its processes inherit
    that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_collection_modifyitems(config, items) -> None:
    """Deselects what this machine cannot run, and benchmarks that nobody asked for."""
    devices = torch.cuda.device_count() if DEVICE == "cuda" else 0
    reasons = {}
    if devices < 1:
        reasons["gpu"] = "no CUDA device is in use"
    if devices < 2:
        reasons["multi_gpu"] = f"it takes 2 CUDA devices and {devices} is in use"
    if not _benchmarks(config):
        reasons["bench"] = "no --benchmark option or -m bench was given"
    kept, excluded = [], {marker: [] for marker in reasons}
    for item in items:
        marker = next((marker for marker in reasons if item.get_closest_marker(marker)), None)
        (kept if marker is None else excluded[marker]).append(item)
    config.stash[_EXCLUDED] = [
        f"{len(found)} {marker} tests deselected: {reasons[marker]}"
        for marker, found in excluded.items()
        if found
    ]
    config.hook.pytest_deselected(items=[item for found in excluded.values() for item in found])
    items[:] = kept


def pytest_report_collectionfinish(config) -> list[str]:
    return config.stash.get(_EXCLUDED, [])


def pytest_sessionfinish(session) -> None:
    """What a process of pytest-xdist leaves out is told by the one that started it."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["excluded"] = session.config.stash.get(_EXCLUDED, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    del error
    node.config.stash[_ELSEWHERE] = getattr(node, "workeroutput", {}).get("excluded", [])


def pytest_terminal_summary(terminalreporter, config) -> None:
    for text in config.stash.get(_ELSEWHERE, []):
        terminalreporter.write_line(text)
