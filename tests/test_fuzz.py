"""Campaigns: what they draw, what they find in broken kernels, how they shrink, stop and go on."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import broken_kernels
import pytest
import torch

import scattermoe_lora
from verify import journal
from verify.cases import EDGES, SMOKE
from verify.coverage import (
    Coverage,
    boundaries,
    enough_to_reach_all,
    features,
    missing_paths,
    tails,
)
from verify.drawing import INTERPRETER, ROOM, Drawing, form_of, limits_of, memory_needed
from verify.draws import Draw, decoded, encoded
from verify.findings import read, signature
from verify.fuzz import Campaign, Settings
from verify.fuzz_worker import is_fixed, plan_pool
from verify.records import plain
from verify.report import never_run
from verify.routings import RoutingKind
from verify.run import Outcome, Problem
from verify.shrink import Shrinking, possible, shrink
from verify.spec import NamedPlan
from verify.specs import KERNELS
from verify.specs.glu import GLU_FORWARD
from verify.specs.linear import LORA_FORWARD, SCATTER2SCATTER

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def verify(*words: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "verify", *words, "--device", "cpu"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def drawing() -> Drawing:
    kernels = {spec.name: spec for spec in (SCATTER2SCATTER, GLU_FORWARD)}
    pools = {name: plan_pool(scattermoe_lora, spec, CPU) for name, spec in kernels.items()}
    return Drawing(
        kernels=kernels,
        pools=pools,
        fixed=frozenset(),
        limits=INTERPRETER,
        random=random.Random(5),
    )


def drawn(**changes) -> Draw:
    draw = Draw(kernel="scatter2scatter", case=SMOKE[0], dtype="float32", mode="balanced")
    return replace(draw, **changes)


# What is drawn


@pytest.mark.correctness
@pytest.mark.parametrize("spec", KERNELS, ids=lambda spec: spec.name)
def test_every_plan_survives_json(spec):
    inputs = spec.inputs(spec.cases[0], torch.float32, "balanced", CPU)
    for named in spec.plans(scattermoe_lora, inputs):
        text = json.dumps(encoded(scattermoe_lora, named.plan))
        assert decoded(scattermoe_lora, json.loads(text)) == named.plan


@pytest.mark.correctness
@pytest.mark.parametrize("case", [*SMOKE, *EDGES], ids=lambda case: case.name)
def test_every_case_survives_json(case):
    draw = drawn(case=case, path="tiles", label="some", seed=7)
    assert Draw.from_json(json.loads(json.dumps(draw.as_json()))) == draw


@pytest.mark.correctness
def test_what_is_no_draw_is_refused():
    with pytest.raises(ValueError, match="not the description of a launch"):
        Draw.from_json({"case": drawn().as_json()["case"], "kernel": "group", "colour": 3})
    values = drawn().as_json()
    values["case"]["routing"] = ["sideways"]
    with pytest.raises(ValueError, match="routing kind"):
        Draw.from_json(values)


@pytest.mark.correctness
@pytest.mark.parametrize("limits", [INTERPRETER, limits_of(6 * 2**30)], ids=["cpu", "small gpu"])
def test_draws_stay_within_the_limits_and_the_choices_of_the_kernel(drawing, limits):
    drawing = replace(drawing, limits=limits, random=random.Random(2))
    kept = [drawing.fresh() for _ in range(50)]
    for draw in [*kept, *(drawing.varied(item) for item in kept * 4)]:
        case = draw.case
        listed = drawing.kernels[draw.kernel].cases
        assert possible(case)
        assert limits.allow(draw.kernel, case)
        assert memory_needed(draw.kernel, case, "float32") <= limits.memory
        assert case.source in {item.source for item in listed}
        assert case.routing.draw(
            tokens=case.tokens, top_k=case.top_k, experts=case.experts, seed=0
        ).shape == (case.tokens, case.top_k)


@pytest.mark.correctness
def test_a_resized_draw_needs_no_new_kernel(drawing):
    kept = [drawing.fresh() for _ in range(40)]
    for draw in kept:
        bounded = replace(draw, case=replace(draw.case, rank=min(draw.case.rank, 16)))
        resized = drawing.resized(bounded)
        assert form_of(resized) == form_of(bounded.of_any_path())
    assert len({item.case.n_out for item in map(drawing.resized, kept[:1] * 20)}) > 1


@pytest.mark.correctness
def test_the_same_seed_draws_the_same(drawing):
    first, second = (replace(drawing, random=random.Random(9)) for _ in range(2))
    assert [first.fresh() for _ in range(20)] == [second.fresh() for _ in range(20)]


@pytest.mark.correctness
def test_on_a_large_gpu_some_draws_pass_32_bit_offsets(drawing):
    memory = 80 * 2**30
    large = replace(drawing, limits=limits_of(memory), random=random.Random(1))
    found = [draw for draw in (large.beyond() for _ in range(60)) if draw is not None]
    assert {draw.stretch for draw in found} == {True}
    for draw in found:
        case = draw.case
        elements = (case.experts * case.k_in * case.n_out, case.rows * case.k_in)
        assert max(elements) > 2**31
        assert memory_needed(draw.kernel, case, draw.dtype) <= ROOM * memory
    assert any(case.case.experts > 100 for case in found)
    assert any(case.case.rows * case.case.k_in > 2**31 for case in found)
    small = replace(large, limits=limits_of(8 * 2**30))
    assert [small.beyond() for _ in range(20)] == [None] * 20


@pytest.mark.correctness
def test_cases_with_inputs_of_their_own_are_recognised():
    fixed = replace(GLU_FORWARD, inputs=lambda case, *rest, **more: {"plain": 1}[case.name])
    assert is_fixed(fixed, CPU)
    assert not is_fixed(GLU_FORWARD, CPU)


# Coverage


@pytest.mark.correctness
def test_boundaries_are_told_by_the_height_of_the_tile():
    tile = plan_pool(scattermoe_lora, SCATTER2SCATTER, CPU)[0]["plan"]["fields"]["tile"]["fields"]
    height = tile["block_m"]
    made = decoded(scattermoe_lora, {"type": "plan.Tile", "fields": tile})
    assert boundaries([height - 1, height, height + 1], made) == ["at", "over", "under"]
    assert boundaries([0, 1, 2 * height + 5], made) == [
        *("empty expert", "one row", "several tiles")
    ]
    assert boundaries([0, 0], made) == ["empty expert", "no rows"]
    case = replace(SMOKE[0], k_in=made.block_k, n_out=made.block_n + 1, rank=3)
    assert tails(case, made) == ["K even", "N tail", "R below"]


@pytest.mark.correctness
def test_coverage_knows_what_is_new():
    draw = drawn(path="tiles", label="a")
    index = torch.tensor([[0, 1]])
    coverage = Coverage()
    assert coverage.add(features(draw, None, index))
    assert not coverage.add(features(draw, None, index))
    for changed in (
        replace(draw, label="b"),
        replace(draw, dtype="float16"),
        replace(draw, case=replace(draw.case, routing=RoutingKind("last"))),
        replace(draw, case=replace(draw.case, x_layout="strided")),
    ):
        assert coverage.add(features(changed, None, index))
    assert coverage.by_path()["scatter2scatter [tiles]"]["launches"] == 6
    assert coverage.paths == {"scatter2scatter [tiles]"}


@pytest.mark.correctness
def test_every_path_that_can_be_run_is_soon_reached():
    kernels = {spec.name: spec for spec in (SCATTER2SCATTER, LORA_FORWARD)}
    pools = {name: plan_pool(scattermoe_lora, spec, CPU) for name, spec in kernels.items()}
    drawing = Drawing(
        kernels=kernels, pools=pools, fixed=frozenset(), limits=INTERPRETER, random=random.Random(5)
    )
    coverage, index, launches = Coverage(), torch.tensor([[0, 1]]), 0
    while unreached := missing_paths(pools, coverage.paths):
        assert not enough_to_reach_all(launches, len(coverage.paths) + len(unreached))
        coverage.add(features(drawing.fresh(unreached), None, index))
        launches += 1
    assert {"lora_forward [fused]", "lora_forward [split]"} < coverage.paths


@pytest.mark.correctness
def test_a_path_that_is_never_run_is_told():
    def outcome(path: str, status: str) -> Outcome:
        plan = NamedPlan(path=path, plan=None)
        problem = Problem(
            lib=scattermoe_lora,
            spec=SCATTER2SCATTER,
            case=SMOKE[0],
            dtype=torch.float32,
            mode="balanced",
            device=CPU,
        )
        return problem.outcome(plan, status=status, reason="no tensor cores")

    outcomes = [
        outcome(path, status)
        for path, status in (
            ("tiles", "unavailable"),
            ("tiles", "passed"),
            ("other", "unavailable"),
            ("other", "unavailable"),
        )
    ]
    assert never_run(outcomes) == {"scatter2scatter [other]": "no tensor cores"}
    assert not never_run(outcomes[:2])


# Shrinking


@pytest.mark.correctness
def test_shrinking_finds_the_smallest_launch_that_fails_alike():
    case = replace(
        SMOKE[0],
        tokens=50, experts=7, top_k=3, k_in=100, n_out=90, rank=33, bias=True, source="SLOT",
        routing=RoutingKind("holes", (50,)), weight_layout="strided", scaling=-1.3,
    )  # fmt: skip

    def fails(draw: Draw) -> bool:
        return draw.case.tokens >= 17 and draw.case.k_in % 16 != 0 and draw.case.bias

    steps = shrink(drawn(case=case, seed=5), attempts=500, seconds=60)
    candidate, best, tried = next(steps), drawn(case=case), 0
    with contextlib.suppress(StopIteration):
        while True:
            tried += 1
            assert possible(candidate.case)
            failed = fails(candidate)
            best = candidate if failed else best
            candidate = steps.send(failed)
    assert (best.case.tokens, best.case.k_in, best.case.experts, best.case.rank) == (17, 1, 1, 1)
    assert best.case.bias
    assert (best.case.weight_layout, best.case.source, best.seed) == ("contiguous", "TOKEN", 0)
    assert tried < 100


@pytest.mark.correctness
def test_shrinking_ends_in_time_and_leaves_listed_cases_alone():
    draw = drawn(case=replace(SMOKE[0], tokens=50))
    now = iter(range(1000))
    steps = shrink(draw, attempts=500, seconds=4, clock=lambda: next(now))
    assert len(list(steps)) < 5
    assert list(shrink(draw, attempts=500, seconds=60, fixed=True)) == []


@pytest.mark.correctness
def test_a_finding_that_does_not_repeat_is_not_shrunk():
    from verify.findings import Finding

    finding = Finding.met("wrong", drawn(path="tiles"), {"status": "failed", "reason": ""})
    job = Shrinking(finding)
    assert job.candidate == finding.first
    job.report("", finding.first, {"status": "passed"})
    assert job.candidate is None
    assert job.finding.reproduced is False
    assert job.finding.draw == finding.first


@pytest.mark.correctness
def test_findings_of_one_cause_share_a_signature():
    one, two = (drawn(path="tiles", seed=seed) for seed in (1, 2))
    reason = "ValueError: rows {} at 0x{}"
    first = signature(one, "error", {"reason": reason.format(3, "ff")})
    assert first == signature(two, "error", {"reason": reason.format(4, "ab")})
    assert first != signature(two, "error", {"reason": "TypeError: rows"})
    assert first != signature(replace(two, path="split"), "error", {"reason": reason})
    assert plain({"got": float("nan"), "all": [1.0, float("inf")]}) == {
        "got": "nan",
        "all": [1.0, "inf"],
    }


# The journal


@pytest.mark.correctness
def test_a_journal_cut_short_loses_its_last_line_only(tmp_path):
    path = tmp_path / "journal.jsonl"
    first = journal.Journal(path)
    first.write(launch=1, draw={"a": 1})
    first.write(done=1)
    first.write(launch=2, draw={"a": 2})
    assert len(list(journal.read(path))) == 3  # before it is closed
    first.close()
    with path.open("a") as file:
        file.write('{"done": 2, "ki')
    second = journal.Journal(path)
    second.write(launch=3, draw={"a": 3})
    second.close()
    lines = list(journal.read(path))
    assert [line.get("launch", line.get("done")) for line in lines] == [1, 1, 2, 3]
    assert journal.unfinished(lines) == [{"a": 2}, {"a": 3}]


# Whole campaigns

FOUND = {
    "stray": ("wrong", "outside"),
    "wild": ("crash", "SIGSEGV"),
    "spin": ("hang", "no answer"),
    "nan": ("wrong", "nan"),
    "compile": ("error", "ssert"),
}


@pytest.mark.parametrize("fault", broken_kernels.FAULTS)
def test_a_broken_kernel_is_found_shrunk_and_replayed(fault, tmp_path):
    tree = broken_kernels.plant("glu_forward", fault, tmp_path / "broken")
    home = tmp_path / "campaign"
    ran = verify(
        *("fuzz", "--kernels", "glu_forward", "--tree", str(tree), "--directory", str(home)),
        *("--seconds", "60", "--enough", "1", "--shrink-seconds", "12", "--patience", "10"),
    )
    assert ran.returncode == 1, ran.stderr
    kind, words = FOUND[fault]
    record = json.loads((home / "fuzz.json").read_text())
    (entry, *_) = [item for item in record["findings"] if item["kind"] == kind]
    finding = read(home / "findings" / entry["file"])
    assert words in finding.outcome["reason"]
    assert finding.reproduced
    first, best = finding.first.case, finding.draw.case
    assert finding.shrunk > 1
    assert best.rows * best.n_out * best.k_in <= first.rows * first.n_out * first.k_in
    assert f"verify replay {home / 'findings' / entry['file']}" in (home / "fuzz.md").read_text()
    file = str(home / "findings" / entry["file"])
    again = verify("replay", file, "--patience", "10")
    assert again.returncode == 1, again.stdout + again.stderr
    assert f"still fails, {kind}" in again.stdout
    if fault != "nan":
        return
    healthy = verify("replay", file, "--tree", str(broken_kernels.PACKAGE), "--patience", "60")
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_campaign_goes_on_where_it_was(tmp_path):
    home = tmp_path / "campaign"
    words = ["--kernels", "glu_forward", "--device", "cpu", "--seed", "3"]
    command = [sys.executable, "-m", "verify", "fuzz", *words, "--directory", str(home)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        launches = sum(
            "done" in line for path in home.glob("journal-*") for line in journal.read(path)
        )
        if launches >= 5:
            break
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert f"go on with --resume {home}" in errors.replace("\n", "")
    before = json.loads((home / "fuzz.json").read_text())
    assert not before["summary"]["complete"]
    assert before["summary"]["cases"] >= 5
    refused = verify("fuzz", "--directory", str(home))
    assert "--resume" in refused.stderr
    ran = verify("fuzz", "--resume", str(home), "--seconds", "20")
    assert ran.returncode == 0, ran.stderr
    after = json.loads((home / "fuzz.json").read_text())
    assert after["summary"]["complete"]
    assert after["seed"] == 3
    assert after["summary"]["cases"] > before["summary"]["cases"]
    assert after["summary"]["features"] >= before["summary"]["features"]
    assert after["seconds"] > before["seconds"]


def test_a_campaign_that_is_told_to_end_leaves_a_record_and_no_worker(tmp_path):
    home = tmp_path / "campaign"
    words = ["--kernels", "combine", "--device", "cpu", "--workers", "2", "--seed", "3"]
    command = [sys.executable, "-m", "verify", "fuzz", *words, "--directory", str(home)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            running = workers_of(home)
            if len(running) == 2 and any("done" in line for line in lines_of(home)):
                break
            time.sleep(0.02)
        assert len(running) == 2
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
        assert not workers_of(home)
    finally:
        for pid in (process.pid, *workers_of(home)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
    done = sum("done" in line for line in lines_of(home))
    assert f"go on with --resume {home}" in said.replace("\n", "")
    record = json.loads((home / "fuzz.json").read_text())
    assert not record["summary"]["complete"]
    assert record["summary"]["cases"] <= done
    values = json.loads((home / "campaign.json").read_text())
    settings = Settings(**values | {"devices": ("cpu",), "kernels": ("combine",)})
    resumed = Campaign(home, settings, {spec.name: spec for spec in KERNELS})
    assert resumed.settings.seed == 3
    assert resumed.counts.launches == done


def test_time_counts_once_however_many_workers_ran(tmp_path):
    """Two workers from 10 to 40, a restarted one to 50, and a second run from 500 to 520."""
    spans = [(10, 40), (12, 38), (41, 50), (500, 520)]
    for number, span in enumerate(spans):
        writer = journal.Journal(tmp_path / f"journal-{number:03}-0001.jsonl")
        for at in span:
            writer.write(done=number, at=float(at), outcome={"reason": "n/a"})
        writer.close()
    assert Campaign(tmp_path, Settings(devices=("cpu",)), {}).counts.seconds == 30 + 9 + 20


def lines_of(home: Path) -> list[dict]:
    """What the journals of a campaign say."""
    return [line for path in sorted(home.glob("journal-*")) for line in journal.read(path)]


def workers_of(home: Path) -> list[int]:
    """Running processes that write a journal of a campaign."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (place / "cmdline").read_bytes().split(b"\0")
            if b"verify.fuzz_worker" in words and any(bytes(home) in word for word in words):
                found.append(int(place.name))
    return found


@pytest.mark.correctness
def test_what_was_running_when_the_machine_died_is_run_first(tmp_path):
    draw = drawn(path="tiles", seed=77)
    with_launch = journal.Journal(tmp_path / "journal-000-0001.jsonl")
    with_launch.write(launch=8, draw=draw.as_json(), at=1.0)
    with_launch.close()
    kernels = {spec.name: spec for spec in KERNELS}
    campaign = Campaign(tmp_path, Settings(devices=("cpu",)), kernels)
    assert campaign.pending == (draw,)


def test_a_package_that_cannot_be_imported_is_said_so(tmp_path):
    tree = tmp_path / "scattermoe_lora"
    tree.mkdir()
    (tree / "__init__.py").write_text("raise ImportError('planted')\n")
    for name in {spec.source for spec in KERNELS}:
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("")
    ran = verify("fuzz", "--tree", str(tree), "--directory", str(tmp_path / "c"), "--seconds", "5")
    assert ran.returncode == 1
    assert "no worker could be started" in ran.stderr
    assert "planted" in ran.stderr


def test_kernels_that_do_not_exist_are_refused():
    ran = verify("fuzz", "--kernels", "scatter")
    assert ran.returncode == 1
    assert "scatter is none of" in ran.stderr
