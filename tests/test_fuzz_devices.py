"""Campaigns on several GPUs, their launches under compute-sanitizer, and what is planted in the
kernels that they must find.
"""

import argparse
import ast
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import broken_kernels
import pytest
import torch
from rich.console import Console

import scattermoe_lora
from conftest import DEVICE
from verify.cases import SMOKE
from verify.commands import fuzz as command
from verify.coverage import DIMENSIONS
from verify.drawing import memory_needed
from verify.draws import Draw
from verify.fuzz import Campaign, Counts, Settings, has_room
from verify.fuzz_summary import print_summary
from verify.fuzz_worker import Worker
from verify.journal import Journal, read
from verify.parallel import footprint
from verify.run import Outcome, Workbench
from verify.sanitize import EVERY_PLAN, Job
from verify.specs import KERNELS

pytestmark = pytest.mark.correctness
interpreted = pytest.mark.skipif(
    DEVICE != "cpu", reason="asks for the CPU, where Triton may not interpret"
)

POOL = {"combine": [{"dtype": "float32", "path": "default", "label": "default", "unavailable": ""}]}


class Stillness(Campaign):
    """A campaign whose workers are ready at once and do nothing."""

    def __init__(self, *arguments) -> None:
        self.started: list[tuple[str, bool]] = []
        super().__init__(*arguments)

    def _started(self, device, *, pools=False):
        self.started.append((device, pools))
        self.pools = POOL
        process = SimpleNamespace(ready=True, idle=True)
        self._processes.append(process)
        return process


@pytest.mark.parametrize("workers", [1, 3])
def test_every_gpu_has_its_workers(tmp_path, workers):
    devices = ("cuda:0", "cuda:1", "cuda:2")
    settings = Settings(devices=devices, workers=workers, kernels=("combine",))
    campaign = Stillness(tmp_path, settings, {spec.name: spec for spec in KERNELS})
    campaign._start_all()
    names = [device for device, _ in campaign.started]
    assert {device: names.count(device) for device in devices} == dict.fromkeys(devices, workers)
    # The first worker alone says which plans there are.
    assert [pools for _, pools in campaign.started] == [True] + [False] * (len(names) - 1)


def needed_by(draw: Draw) -> float:
    return memory_needed(draw.kernel, draw.case, draw.dtype)


@pytest.mark.parametrize("spec", KERNELS, ids=lambda spec: spec.name)
def test_launches_beside_others_have_room_and_alone_they_always_may(spec):
    draws = [
        Draw(kernel=spec.name, case=replace(case, tokens=tokens), dtype="float32", mode="balanced")
        for case in spec.cases[:4]
        for tokens in (8, 4096)
    ]
    for draw in draws:
        needed = needed_by(draw)
        assert needed >= footprint(spec.name, draw.case)
        assert has_room(draw, [], memory=1)
        assert has_room(draw, draws, memory=0)
        for beside in (draws[:1], draws):
            together = needed + sum(map(needed_by, beside))
            assert has_room(draw, beside, memory=1.5 * together)
            assert not has_room(draw, beside, memory=1.4 * together)


def test_a_draw_without_room_waits_for_it_and_is_not_overtaken(tmp_path):
    """Three workers, the last with a GPU of its own; two draws never fit on one GPU."""
    spec = next(spec for spec in KERNELS if spec.name == "combine")
    told: list[tuple[int, int]] = []

    class Full(Stillness):
        def _next(self):
            self.seed = getattr(self, "seed", 0) + 1
            case = replace(spec.cases[0], tokens=4096, seed=self.seed)
            return Draw(kernel="combine", case=case, dtype="float32", mode="balanced")

    settings = Settings(devices=("cuda:0", "cuda:1"), workers=1, kernels=("combine",))
    campaign = Full(tmp_path, settings, {spec.name: spec})

    def worker(number: int, device: str) -> SimpleNamespace:
        process = SimpleNamespace(draw=None, start=SimpleNamespace(device=device))

        def tell(_: int, draw: Draw, *, patience: float) -> None:
            process.draw = draw
            told.append((number, draw.case.seed))

        process.tell = tell
        return process

    workers = [worker(0, "cuda:0"), worker(1, "cuda:0"), worker(2, "cuda:1")]
    campaign._processes, campaign._memory = workers, 2 * needed_by(campaign._next())
    for number in (0, 1, 1, 2):
        campaign._assign(workers[number], going=True)
    assert told == [(0, 2), (2, 3)]
    campaign._assign(workers[1], going=True)
    workers[0].draw = None
    campaign._assign(workers[1], going=True)
    assert told == [(0, 2), (2, 3), (1, 4)]


@pytest.mark.parametrize("launches", [199, 200])
def test_paths_that_a_short_campaign_missed_are_counted_and_after_a_long_one_named(
    tmp_path, launches
):
    other = {"combine": [POOL["combine"][0], {**POOL["combine"][0], "path": "other"}]}
    campaign = SimpleNamespace(
        coverage=SimpleNamespace(
            by_path=lambda: {"combine [default]": {"launches": 9, **dict.fromkeys(DIMENSIONS, 1)}}
        ),
        pools=other, findings={}, directory=tmp_path,
        counts=Counts(status=Counter(passed=launches)),
    )  # fmt: skip
    console = Console(width=200, record=True, file=io.StringIO())
    print_summary(console, campaign)
    told = console.export_text()
    assert ("never reached: combine [other]" in told) == (launches == 200)
    assert ("1 of 2 paths were not reached in so few cases" in told) == (launches == 199)


def test_a_campaign_takes_every_gpu_unless_one_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert command._devices(torch.device("cuda")) == ("cuda:0", "cuda:1", "cuda:2", "cuda:3")
    assert command._devices(torch.device("cuda:2")) == ("cuda:2",)
    assert command._devices(torch.device("cpu")) == ("cpu",)


def settings_of(place: Path, device: str, *words: str) -> Settings:
    """Those of a new campaign there, of a command line."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = parser.parse_args(["--directory", str(place / "new"), *words])
    return command._settings(arguments, torch.device(device))[1]


def test_the_processors_are_shared_by_the_gpus(monkeypatch, tmp_path):
    def workers(gpus: int, processors: int, gigabytes: int = 80, *words: str) -> int:
        facts = SimpleNamespace(total_memory=gigabytes * 10**9)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
        monkeypatch.setattr(command, "cores", lambda: processors)
        return settings_of(tmp_path, "cuda", *words).workers

    assert [workers(1, 16), workers(1, 64), workers(8, 16), workers(8, 4)] == [12, 12, 1, 1]
    assert [workers(1, 16, 40), workers(1, 16, 24), workers(1, 16, 5)] == [6, 3, 1]
    assert [workers(1, 16, 80, "--memory", "24"), workers(1, 16, 24, "--workers", "5")] == [4, 5]


def test_memory_is_stated_for_a_gpu_only(tmp_path):
    with pytest.raises(SystemExit, match="--memory is that of a GPU, and the device is cpu"):
        settings_of(tmp_path, "cpu", "--memory", "4")


@pytest.mark.parametrize(("stated", "memory"), [(0, 70), (24, 24)])
def test_launches_share_the_memory_that_is_free_at_first_unless_it_is_stated(
    tmp_path, stated, memory
):
    settings = Settings(devices=("cuda:0",), workers=2, kernels=("combine",), memory=stated)
    campaign = Campaign(tmp_path, settings, {spec.name: spec for spec in KERNELS})
    campaign._learn({"environment": {}, "memory": 70, "pools": POOL, "fixed": []})
    campaign._learn({"environment": {}, "memory": 60})
    assert campaign._memory == memory


class Sanitizer:
    """Finds an error in every launch in fp16."""

    def __init__(self) -> None:
        self.asked: list[Job] = []

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        self.asked += jobs
        wrong = [job.draw.dtype == "float16" for job in jobs]
        return [
            job.outcome("failed" if bad else "passed", "an invalid read" if bad else "")
            for job, bad in zip(jobs, wrong, strict=True)
        ]


@interpreted
@pytest.mark.parametrize(("dtype", "status"), [("float16", 1), ("float32", 0)])
def test_kept_launches_run_under_the_sanitizer_and_its_errors_count(
    dtype, status, monkeypatch, tmp_path
):
    sanitizer, home = Sanitizer(), tmp_path / "campaign"
    draws = [
        Draw(kernel="combine", case=SMOKE[0], dtype=dtype, mode="balanced", path="default", seed=k)
        for k in range(5)
    ]

    class Short(Campaign):
        def run(self, seconds, *, enough=0):
            for draw in draws:
                self.counts.add(draw, "passed")
            self._kept = list(draws)
            self.pools = POOL
            self.coverage.paths.add("combine [default]")
            yield

    monkeypatch.setattr("verify.fuzz.Campaign", Short)
    monkeypatch.setattr(command, "_sanitizer", lambda settings, device: sanitizer)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = ["--device", "cpu", "--kernels", "combine", "--seconds", "1", "--sanitize", "3"]
    arguments = parser.parse_args([*words, "--directory", str(home)])
    assert command.main(arguments) == status
    assert len({job.draw for job in sanitizer.asked}) == 3
    assert {job.tool for job in sanitizer.asked} == {EVERY_PLAN}
    sanitized = json.loads((home / "fuzz.json").read_text())["sanitized"]
    assert [item["status"] for item in sanitized] == ["failed" if status else "passed"] * 3


@interpreted
def test_without_the_sanitizer_nothing_is_started(tmp_path):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    home = tmp_path / "campaign"
    words = ["--device", "cpu", "--seconds", "1", "--sanitize", "3", "--directory", str(home)]
    with pytest.raises(SystemExit, match="--sanitize: "):
        command.main(parser.parse_args(words))
    assert not home.exists()


@pytest.mark.parametrize("fault", broken_kernels.FAULTS)
@pytest.mark.parametrize("kernel", ["scatter2scatter", "glu_forward"])
def test_every_fault_can_be_planted_in_the_sources_of_today(kernel, fault, tmp_path):
    tree = broken_kernels.plant(kernel, fault, tmp_path)
    changed = [
        path
        for path in broken_kernels.PACKAGE.rglob("*.py")
        if (tree / path.relative_to(broken_kernels.PACKAGE)).read_text() != path.read_text()
    ]
    (path,) = changed
    ast.parse((tree / path.relative_to(broken_kernels.PACKAGE)).read_text())


class Gone(io.StringIO):
    """A pipe that nobody reads any more."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


@interpreted
def test_a_launch_whose_campaign_is_killed_has_no_end_and_is_made_again(tmp_path):
    path = tmp_path / "journal-000-0001.jsonl"
    worker = Worker(
        lib=scattermoe_lora,
        kernels={spec.name: spec for spec in KERNELS},
        device=torch.device("cpu"),
        journal=Journal(path),
        answers=Gone(),
        bench=Workbench(),
    )
    draw = Draw(kernel="group", case=SMOKE[0], dtype="float32", mode="balanced")
    with pytest.raises(SystemExit, match="the campaign is gone"):
        worker.run(1, draw)
    assert [line.get("launch") for line in read(path)] == [1]
    (again,) = Campaign(tmp_path, Settings(devices=("cpu",)), {}).pending
    assert (again.kernel, again.case) == (draw.kernel, draw.case)
