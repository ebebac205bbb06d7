"""pytest-benchmark that fails a run which got slower: `pytest --benchmark-compare`.

pytest-benchmark measures, stores and shows. Whether a benchmark got slower is decided by the gate,
which measures pairs of today's sources and those of the baseline's revision, and becomes the exit
status. What cannot be compared (no baseline, no GPU, another GPU, a benchmark that is missing,
renamed, disabled or skipped) is no success.

`BenchmarkGate` is the plugin; the device that it measures on is given to it.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest

from .bench_cases import BenchCase
from .environment import gpu_directory_name
from .gate import Result, exit_status, summary_of
from .gate_process import digest
from .statistics import IMPROVEMENT, SAME
from .timing import VirtualClock

_STORAGE = "file://./.benchmarks"
"""pytest-benchmark's own default."""
_STORING = ("benchmark_compare", "benchmark_save", "benchmark_autosave", "benchmark_json")
_UNKNOWN = ("unversioned", "unknown", "")
_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One benchmark, measured. samples: milliseconds. info: what is stored with them. problem: why
    there is nothing to store.
    """

    samples: tuple[float, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


class Device(Protocol):
    """What benchmarks are measured on. gpu: its name, empty where there is none."""

    gpu: str

    def facts(self) -> Mapping[str, Any]:
        """Versions that are stored with the name of the GPU."""

    def sources(self) -> Path:
        """The directory of today's package."""

    def tree(self, against: str, destination: Path) -> Path:
        """The package as of a revision, below a directory.

        Raises:
            ValueError: there is no such revision.
        """

    def measure(self, case: BenchCase) -> Measured:
        """Measure today's sources."""

    def compare(
        self,
        base: Path,
        cases: Sequence[BenchCase],
        *,
        seconds: float,
        say: Callable[[str], None],
    ) -> tuple[Sequence[Result], Sequence[str]]:
        """Decide every case against the package in `base`; also what makes that invalid."""


def add_options(parser: pytest.Parser) -> None:
    """The options beside those of pytest-benchmark."""
    group = parser.getgroup("benchmark")
    group.addoption(
        "--bench-suite",
        choices=("gate", "targets", "full"),
        default="gate",
        help="benchmarks: those of the gate (default), of `verify bench`, or the whole grid",
    )
    group.addoption(
        "--bench-against",
        metavar="REV|DIR",
        help="where the sources of the baseline are, if not at the revision that it states; write "
        "--bench-against=DIR, or pytest takes the directory for one of tests",
    )
    group.addoption(
        "--bench-minutes", type=float, default=8.0, help="time of the gate in minutes (8)"
    )


def cases_of(suite: str) -> tuple[BenchCase, ...]:
    """The benchmarks of a suite of `--bench-suite`."""
    from .bench_cases import Grid, targets
    from .gate_cases import suite as of_the_gate

    return {"gate": of_the_gate, "targets": targets, "full": Grid().cases}[suite]()


class BenchmarkGate:
    """The plugin of one run of pytest."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._clock = VirtualClock()
        self._baselines: list[Mapping[str, Any]] = []
        self._base: Path | None = None
        self._measured: dict[str, BenchCase] = {}
        self._skipped: dict[str, str] = {}
        self._scratch: Path | None = None
        self._lines: list[str] = []
        self._status = 0

    # Before anything is collected

    def pytest_configure(self, config: pytest.Config) -> None:
        """Refuse what could only pass without a comparison; give each GPU its own storage."""
        if not any(config.getoption(name) for name in _STORING):
            return
        if self._device.gpu and config.getoption("benchmark_storage") == _STORAGE:
            config.option.benchmark_storage = f"{_STORAGE}/{gpu_directory_name(self._device.gpu)}"
        if not _comparing(config):
            return
        why = ""
        if not self._device.gpu:
            why = "there is no GPU in use"
        elif config.getoption("benchmark_skip") and not config.getoption("benchmark_only"):
            why = "--benchmark-skip leaves out every benchmark"
        elif config.getoption("benchmark_disable") and not config.getoption("benchmark_enable"):
            why = "--benchmark-disable measures nothing"
        elif config.getoption("dist", "no") != "no" or hasattr(config, "workerinput"):
            why = "pytest-xdist disables benchmarks (run with -n 0)"
        if why:
            raise pytest.UsageError(f"--benchmark-compare cannot compare: {why}")

    def pytest_benchmark_update_machine_info(
        self, config: pytest.Config, machine_info: dict[str, Any]
    ) -> None:
        """Store the GPU."""
        del config
        machine_info["gpu"] = {"name": self._device.gpu, **self._device.facts()}

    def pytest_benchmark_update_commit_info(
        self, config: pytest.Config, commit_info: dict[str, Any]
    ) -> None:
        """Store what the package was, which the commit does not say of a changed tree."""
        del config
        commit_info["sources"] = digest(self._device.sources())

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_compare_machine_info(
        self, machine_info: Mapping[str, Any], compared_benchmark: Mapping[str, Any]
    ) -> None:
        """Take a baseline that was loaded, unless it is of another GPU."""
        theirs = compared_benchmark["machine_info"].get("gpu", {}).get("name", "no GPU")
        ours = machine_info["gpu"]["name"]
        if theirs != ours:
            raise pytest.UsageError(
                f"--benchmark-compare cannot compare: the baseline was measured on {theirs}, "
                f"this is {ours}"
            )
        self._baselines.append(compared_benchmark)

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Find the baseline's sources."""
        config = session.config
        if not _comparing(config):
            return
        if len(self._baselines) != 1:
            storage = config.getoption("benchmark_storage")
            found = "no baseline" if not self._baselines else f"{len(self._baselines)} baselines"
            raise pytest.UsageError(
                f"--benchmark-compare cannot compare: {found} in {storage} for "
                f"{config.getoption('benchmark_compare')!r}; --benchmark-save NAME makes one"
            )
        self._base = self._base_tree(config.getoption("bench_against"))

    def _base_tree(self, against: str | None) -> Path:
        commit = self._baselines[0].get("commit_info", {})
        revision = against or str(commit.get("id", ""))
        try:
            if revision in _UNKNOWN:
                raise ValueError("the baseline states no revision; --bench-against gives its place")
            self._scratch = Path(tempfile.mkdtemp(prefix="benchmark-gate-"))
            tree = self._device.tree(revision, self._scratch / "base")
            if digest(tree) != commit.get("sources"):
                raise ValueError(
                    f"the baseline was measured with sources {commit.get('sources')}, "
                    f"{revision} has {digest(tree)}"
                )
        except ValueError as error:
            raise pytest.UsageError(f"--benchmark-compare cannot compare: {error}") from error
        return tree

    # Benchmarks

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Benchmarks read a clock that their samples move."""
        for item in items:
            if item.get_closest_marker("bench"):
                item.add_marker(pytest.mark.benchmark(timer=self._clock.now))

    @pytest.fixture
    def timed(self, benchmark: Any, request: pytest.FixtureRequest) -> Callable[[BenchCase], None]:
        """Measures a case and hands its samples to pytest-benchmark."""

        def run(case: BenchCase) -> None:
            if not benchmark.enabled:
                benchmark.pedantic(lambda: self._device.measure(case))
                return
            measured = self._device.measure(case)
            if measured.problem:
                benchmark.has_error = True
                pytest.fail(f"{case.name}: {measured.problem}", pytrace=False)
            left = iter(measured.samples)
            benchmark.extra_info.update(measured.info)
            benchmark.pedantic(lambda: self._clock.spend(next(left)), rounds=len(measured.samples))
            self._measured[request.node.nodeid] = case

        return run

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember benchmarks that were skipped."""
        if report.skipped and "bench" in report.keywords:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "skipped"
            self._skipped[report.nodeid] = str(reason)

    # The decision

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Set the exit status by the gate."""
        if self._base is None or exitstatus not in (
            pytest.ExitCode.OK,
            pytest.ExitCode.TESTS_FAILED,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        ):
            return
        self._lines = self._absent()
        status = int(bool(self._lines))
        if self._measured:
            results, invalid = self._device.compare(
                self._base,
                list(self._measured.values()),
                seconds=60 * session.config.getoption("bench_minutes"),
                say=self._sayer(session.config),
            )
            summary = summary_of(results, invalid)
            self._lines += [
                f"{item.decision}: {item.name}: {_change(item)}{item.reason}"
                for item in results
                if item.decision not in (SAME, IMPROVEMENT)
            ]
            self._lines += [f"invalid: {text}" for text in invalid]
            self._lines.append(
                ", ".join(f"{summary[key]} {key}" for key in summary if key in _COUNTED)
            )
            decided = exit_status(summary)
            status = 1 if 1 in (status, decided) else decided
        else:
            self._lines.append("no benchmark was measured")
            status = 1
        session.exitstatus = self._status = status or int(exitstatus)

    def _absent(self) -> list[str]:
        """Benchmarks of the baseline that this run did not measure, in words."""
        names = [item["fullname"] for item in self._baselines[0]["benchmarks"]]
        found = [f"skipped: {name}: {why}" for name, why in self._skipped.items()]
        missing = [
            name for name in names if name not in self._measured and name not in self._skipped
        ]
        if missing:
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            found.append(
                f"{len(missing)} of {len(names)} benchmarks of the baseline were not measured "
                f"(failed, removed, renamed or deselected): {', '.join(missing[:_SHOWN])}{more}"
            )
        return found

    def _sayer(self, config: pytest.Config) -> Callable[[str], None]:
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        return (lambda text: None) if reporter is None else reporter.write_line

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        """Say what was decided."""
        if not _comparing(config) or not self._lines:
            return
        terminalreporter.section("gate: pairs with the baseline's revision")
        for line in self._lines:
            terminalreporter.write_line(line)
        terminalreporter.write_line(f"exit status {self._status}")

    def pytest_unconfigure(self) -> None:
        """Remove the sources of the baseline."""
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


_COUNTED = ("same", "improvement", "regression", "ambiguous", "unmeasured")


def _comparing(config: pytest.Config) -> bool:
    # An empty list where the option is absent, True where it has no value.
    return config.getoption("benchmark_compare", default=None) not in (None, [])


def _change(item: Result) -> str:
    return "" if item.ratio is None else f"{item.ratio - 1:+.1%}, "
