"""`pytest --benchmark-compare` on a virtual device: what fails it, and that nothing else does."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from virtual_device import H100, Speeds, VirtualDevice

from verify.benchmark_plugin import BenchmarkGate, add_options, cases_of

pytest.importorskip("pytest_benchmark")
pytest_plugins = ["pytester"]
pytestmark = pytest.mark.correctness

SUITE = Path(__file__).parent / "test_benchmarks.py"
COPY = "test_copy_of_benchmarks.py"
FIRST = cases_of("gate")[0].name
COMMIT = {"id": "5" * 40, "dirty": False}


class Inner:
    """What the conftest of this project does, and facts that pytest-benchmark looks up slowly."""

    def pytest_addoption(self, parser):
        add_options(parser)

    def pytest_configure(self, config):
        for marker in ("bench", "gpu"):
            config.addinivalue_line("markers", marker)

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_generate_machine_info(self):
        return {"node": "virtual"}

    @pytest.hookimpl(tryfirst=True)
    def pytest_benchmark_generate_commit_info(self, config):
        return dict(COMMIT)


@dataclass
class Runs:
    """Runs of pytest in one directory."""

    pytester: pytest.Pytester
    package: Path
    devices: list[VirtualDevice] = field(default_factory=list)

    def __call__(self, *words, **facts):
        facts = {"revisions": {COMMIT["id"]: self.package}, **facts}
        device = VirtualDevice(package=self.package, **facts)
        self.devices.append(device)
        plugins = [Inner(), BenchmarkGate(device)]
        words = ("-p", "no:cacheprovider", "-q", "--benchmark-columns=median", *words)
        return self.pytester.runpytest_inprocess(*words, plugins=plugins)

    def save(self, *words, **facts):
        assert self(*words, "--benchmark-save=base", **facts).ret == 0

    def compare(self, *words, **facts):
        return self(*words, "--benchmark-compare", **facts)


@pytest.fixture
def runs(pytester, tmp_path, monkeypatch):
    # What runs inside is no worker of pytest-xdist, whatever runs this test.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    package = tmp_path / "scattermoe_lora"
    package.mkdir()
    (package / "__init__.py").write_text("")
    shutil.copy(SUITE, pytester.path / COPY)
    return Runs(pytester, package)


def said(result, *words):
    """Whether some line of all that was printed has these words."""
    lines = [*result.outlines, *result.errlines]
    return any(all(word in line for word in words) for line in lines)


FEW = ("-k", "kernel")


@pytest.mark.parametrize("seed", range(3))
def test_unchanged_sources_pass(runs, seed):
    runs.save()
    result = runs.compare(speeds=Speeds(seed=seed))
    assert result.ret == 0
    assert said(result, "0 regression, 0 improvement, 60 same, 0 ambiguous, 0 unmeasured")
    assert said(result, "exit status 0")
    assert runs.devices[-1].asked == [case.name for case in cases_of("gate")]


@pytest.mark.parametrize("name", [case.name for case in cases_of("gate")[::13]])
def test_a_slowdown_of_one_benchmark_fails_the_run(runs, name):
    runs.save()
    result = runs.compare(speeds=Speeds(slower={name: 1.1}))
    assert result.ret == 1
    assert said(result, f"regression: {name}: +")
    assert said(result, "1 regression, 0 improvement, 59 same")
    assert said(result, "exit status 1")


def test_a_kernel_three_times_slower_fails_the_run(runs):
    runs.save(*FEW)
    result = runs.compare(*FEW, speeds=Speeds(slower={FIRST: 3.0}))
    assert result.ret == 1
    assert said(result, f"regression: {FIRST}: +20")


def test_a_faster_run_passes(runs):
    runs.save(*FEW)
    assert runs.compare(*FEW, speeds=Speeds(every=0.8)).ret == 0


def test_what_is_saved_are_device_times_and_what_explains_them(runs):
    runs.save(*FEW, speeds=Speeds(ms=0.25, within=0.0, between=0.0))
    (path,) = runs.pytester.path.glob(".benchmarks/nvidia-h100-80gb-hbm3/*/0001_base.json")
    saved = json.loads(path.read_text())
    assert saved["machine_info"]["gpu"]["name"] == H100
    assert saved["commit_info"]["sources"]
    (entry,) = [item for item in saved["benchmarks"] if FIRST in item["name"]]
    assert entry["stats"]["median"] == pytest.approx(0.25e-3)
    assert entry["stats"]["rounds"] == 20
    assert entry["extra_info"] == {"name": FIRST, "launches": 3}


def test_noise_that_hides_a_slowdown_is_no_success(runs):
    runs.save(*FEW)
    result = runs.compare(*FEW, speeds=Speeds(between=0.08))
    assert result.ret == 2
    assert said(result, "ambiguous: ", "5% must be")


def test_a_benchmark_that_the_baseline_cannot_run_is_no_success(runs):
    runs.save(*FEW)
    result = runs.compare(*FEW, speeds=Speeds(raises={FIRST: "base"}))
    assert result.ret == 2
    assert said(result, f"unmeasured: {FIRST}: ", "base raises RuntimeError: no kernel image")


def test_no_baseline(runs):
    result = runs.compare(*FEW)
    assert result.ret == 4
    assert said(result, "cannot compare: no baseline in", "--benchmark-save NAME makes one")


def test_no_gpu(runs):
    runs.save(*FEW)
    result = runs.compare(*FEW, gpu="")
    assert result.ret == 4
    assert said(result, "cannot compare: there is no GPU in use")


def test_another_gpu(runs):
    runs.save(*FEW)
    (path,) = runs.pytester.path.glob(".benchmarks/*/*/0001_base.json")
    result = runs(*FEW, f"--benchmark-compare={path}", gpu="NVIDIA A100-SXM4-80GB")
    assert result.ret == 4
    assert said(result, f"baseline was measured on {H100}, this is NVIDIA A100-SXM4-80GB")


def test_another_gpu_does_not_see_the_baselines_of_this_one(runs):
    runs.save(*FEW)
    result = runs.compare(*FEW, gpu="NVIDIA A100-SXM4-80GB")
    assert result.ret == 4
    assert said(result, "no baseline in", "nvidia-a100-sxm4-80gb")


def test_two_baselines(runs):
    runs.save(*FEW)
    runs.save(*FEW)
    result = runs(*FEW, "--benchmark-compare=000")
    assert result.ret == 4
    assert said(result, "cannot compare: 2 baselines in")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--benchmark-disable",), "--benchmark-disable measures nothing"),
        (("--benchmark-skip",), "--benchmark-skip leaves out every benchmark"),
        (("-n", "2"), "pytest-xdist disables benchmarks"),
    ],
)
def test_disabled_benchmarks(runs, words, why):
    runs.save(*FEW)
    result = runs.compare(*FEW, *words)
    assert result.ret == 4
    assert said(result, f"cannot compare: {why}")


def test_a_deselected_benchmark(runs):
    runs.save(*FEW)
    result = runs.compare("-k", f"kernel and not {FIRST}")
    assert result.ret == 1
    assert said(result, "1 of 11 benchmarks of the baseline were not measured", FIRST)


def test_no_benchmark_at_all(runs):
    runs.save(*FEW)
    result = runs.compare("-k", "nothing_is_called_so")
    assert result.ret == 1
    assert said(result, "no benchmark was measured")


def test_benchmarks_that_are_only_collected(runs):
    runs.save(*FEW)
    result = runs.compare(*FEW, "--collect-only")
    assert result.ret == 1
    assert runs.devices[-1].asked == []


def test_a_file_that_is_skipped_as_a_whole(runs):
    runs.save(*FEW)
    file = runs.pytester.path / COPY
    skip = 'pytest.skip("not today", allow_module_level=True)\n'
    file.write_text(file.read_text().replace("pytestmark", skip + "pytestmark"))
    result = runs.compare(*FEW)
    assert result.ret == 1
    assert said(result, "11 of 11 benchmarks of the baseline were not measured")


def test_a_file_that_is_gone(runs):
    runs.save(*FEW)
    (runs.pytester.path / COPY).unlink()
    result = runs.compare(*FEW)
    assert result.ret == 1
    assert said(result, "no benchmark was measured")


def test_another_test_that_fails_beside_unchanged_benchmarks(runs):
    runs.pytester.makepyfile(test_other="def test_of_a_kernel(): assert False")
    words = (*FEW, "--benchmark-save=base")
    assert runs(*words).ret == 1
    result = runs.compare(*FEW)
    assert said(result, "0 regression, 0 improvement, 11 same")
    assert result.ret == 1


def test_a_run_that_stops_at_its_first_failure(runs):
    runs.save(*FEW)
    result = runs.compare(*FEW, "-x", problems={FIRST: "failed: y errs by 0.3"})
    assert result.ret == 1
    assert said(result, "11 of 11 benchmarks of the baseline were not measured")


def test_a_renamed_benchmark(runs):
    runs.save(*FEW)
    file = runs.pytester.path / COPY
    file.write_text(file.read_text().replace("case.name for", "case.name.upper() for"))
    result = runs.compare("-k", "KERNEL")
    assert result.ret == 1
    assert said(result, "11 of 11 benchmarks of the baseline were not measured")


def test_a_skipped_benchmark(runs):
    runs.save(*FEW)
    file = runs.pytester.path / COPY
    skip = f'    if "{FIRST}" == case.name:\n        pytest.skip("not today")\n    timed(case)\n'
    file.write_text(file.read_text().replace("    timed(case)\n", skip))
    result = runs.compare(*FEW)
    assert result.ret == 1
    assert said(result, "skipped: ", FIRST, "not today")


def test_a_benchmark_with_wrong_results(runs):
    runs.save(*FEW)
    result = runs.compare(*FEW, problems={FIRST: "failed: y errs by 0.3"})
    assert result.ret == 1
    assert said(result, "y errs by 0.3")
    assert said(result, "1 of 11 benchmarks of the baseline were not measured")


def test_a_baseline_whose_revision_is_gone(runs):
    runs.save(*FEW)
    result = runs.compare(*FEW, revisions={})
    assert result.ret == 4
    assert said(result, f"git has no revision '{COMMIT['id']}'")


def test_a_baseline_of_uncommitted_sources(runs, tmp_path):
    committed = tmp_path / "committed"
    shutil.copytree(runs.package, committed)
    (runs.package / "__init__.py").write_text("CHANGED = True\n")
    runs.save(*FEW)
    result = runs.compare(*FEW, revisions={COMMIT["id"]: committed})
    assert result.ret == 4
    assert said(result, "the baseline was measured with sources", COMMIT["id"])
    stated = {"elsewhere": runs.package}
    assert runs.compare(*FEW, "--bench-against=elsewhere", revisions=stated).ret == 0


def test_without_comparing_nothing_is_decided(runs):
    result = runs(*FEW, speeds=Speeds(every=2.0))
    assert result.ret == 0
    assert runs.devices[-1].asked == []


@pytest.mark.parametrize("suite", ["gate", "targets"])
def test_every_benchmark_of_a_suite_is_timed(runs, suite):
    result = runs(f"--bench-suite={suite}", "--benchmark-only")
    result.assert_outcomes(passed=len(cases_of(suite)))


def test_a_comparison_that_is_refused_leaves_no_directory(runs, tmp_path, monkeypatch):
    """A plugin that a conftest registers and that refuses is not asked to clean up."""

    class Conftest(Inner):
        def pytest_configure(self, config):
            super().pytest_configure(config)
            device = VirtualDevice(package=runs.package, gpu="")
            config.pluginmanager.register(BenchmarkGate(device))

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    words = ("-p", "no:cacheprovider", "--benchmark-compare")
    result = runs.pytester.runpytest_inprocess(*words, plugins=[Conftest()])
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert not list((tmp_path / "scratch").iterdir())
