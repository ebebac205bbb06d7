"""Benchmarks: their names, their floors, and that only right results are timed."""

import dataclasses
import itertools
import json

import pytest
import torch

import scattermoe_lora
from conftest import DEVICE
from verify import bench, bench_records, peer_figures, peers
from verify.bench import Bench, Entry, Failure
from verify.bench_arms import Arm, arm_of
from verify.bench_cases import (
    BUILT_IN,
    KINDS,
    PROJECTIONS,
    SHAPES,
    BenchCase,
    Grid,
    Shape,
    choices,
    shape_of,
    targets,
    together,
)
from verify.bench_check import Judge
from verify.bench_inputs import draw
from verify.bench_records import BenchRecord
from verify.cli import main
from verify.floors import Ceilings, floor_ms
from verify.numerics import truncated_to_tf32
from verify.references import Groups
from verify.timing import Effort, HostClock, Timing, clock_of

pytestmark = pytest.mark.correctness

CPU = torch.device("cpu")
TINY = SHAPES["tiny"]
QWEN = SHAPES["qwen3-30b"]


def tiny(kind, what, projection="", **fields):
    fields = {"tokens": 9, "rank": 8, **fields}
    return BenchCase(kind=kind, what=what, shape=TINY, projection=projection, **fields)


def test_names_are_unique_and_say_everything():
    cases = [*targets(), *Grid(dtypes=("bfloat16", "float16")).cases()]
    names = {case: case.name for case in cases}
    assert len(set(names.values())) == len(names)
    assert {case.kind for case in targets()} == set(KINDS)
    assert tiny("layer", "step").name == "layer.step.tiny.t9.r8.balanced"


def test_cases_on_the_same_tensors_are_neighbours():
    keys = [case.inputs_key for case in targets()]
    changes = sum(a != b for a, b in itertools.pairwise(keys))
    assert changes == len(set(keys)) - 1
    assert together([tiny("layer", "step")] * 2) == (tiny("layer", "step"),)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "layer", "what": "sort"}, "no benchmark 'sort' of kind 'layer'"),
        ({"kind": "layer", "what": "step", "projection": "down"}, "of projection 'down'"),
        ({"kind": "projection", "what": "step"}, "of projection ''"),
        ({"kind": "layer", "what": "step", "routing": "uniform"}, "none of balanced"),
        ({"kind": "layer", "what": "step", "tokens": 0}, "0 tokens"),
    ],
)
def test_a_case_that_makes_no_sense_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        BenchCase(shape=TINY, **fields)


def test_half_of_the_rows_go_to_one_expert():
    case = dataclasses.replace(tiny("layer", "step"), shape=QWEN, tokens=512, routing="half")
    share = (choices(case, seed=0) == 0).float().mean()
    assert 0.5 <= share < 0.5 + 1 / QWEN.top_k
    single = dataclasses.replace(case, shape=dataclasses.replace(QWEN, top_k=1), tokens=4096)
    share = (choices(single, seed=0) == 0).float().mean()
    assert abs(share - 0.5) < 1 / 16


def test_shapes_come_from_transformers_configurations(tmp_path):
    config = {
        "model_type": "qwen3_moe",
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "hidden_size": 48,
        "moe_intermediate_size": 20,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = shape_of(str(tmp_path))
    assert (shape.experts, shape.top_k, shape.hidden, shape.intermediate) == (6, 3, 48, 20)
    with pytest.raises(ValueError, match="none of qwen3-30b"):
        shape_of(str(tmp_path / "missing"))


# performance.md 3d, 3e: 800 TFLOP/s, 3.0 TB/s.
FLOORS = {
    ("projection", "forward", "qwen3-30b", "gate_up", 2048): 0.293,
    ("projection", "input-grad", "qwen3-30b", "gate_up", 2048): 0.312,
    ("projection", "weight-grad", "qwen3-30b", "gate_up", 2048): 0.025,
    ("projection", "step", "qwen3.5-35b", "down", 2048): 0.463,
    ("layer", "forward", "mixtral", "", 2048): 1.812,
    ("layer", "step", "olmoe", "", 8192): 2.342,
}


@pytest.mark.parametrize(("key", "milliseconds"), FLOORS.items())
def test_floors_count_every_operand_once(key, milliseconds):
    kind, what, model, projection, tokens = key
    case = BenchCase(
        kind=kind, what=what, shape=SHAPES[model], projection=projection, tokens=tokens
    )
    peak = Ceilings(flops=800e12, bandwidth=3.0e12)
    assert round(floor_ms(case, peak), 3) == milliseconds


@pytest.mark.parametrize("case", targets(("tiny",)), ids=lambda case: case.name)
def test_every_benchmark_has_a_floor(case):
    assert floor_ms(case, Ceilings(flops=1e12, bandwidth=1e12)) > 0


PEERED = [
    *(tiny("projection", what, p) for what in ("forward", "step") for p in PROJECTIONS),
    *(tiny("projection", what, "down") for what in ("input-grad", "weight-grad")),
    tiny("layer", "step", routing="half"),
]


@pytest.mark.parametrize("case", PEERED, ids=lambda case: case.name)
def test_the_composition_is_right_and_its_errors_are_seen(case):
    drawn = draw(case, CPU)
    judge = Judge.of(case, drawn)
    arm = peers.composition(case, drawn)
    results = arm.results()
    assert judge.problem_of(results) == ""
    for name, value in results.items():
        wrong = {**results, name: value * 1.05}
        assert judge.problem_of(wrong, slack=1.0).startswith(name)
        missing = {**results, name: value[:-1]}
        assert "errs by inf" in judge.problem_of(missing)


def test_fp32_may_be_summed_in_any_order_but_not_in_tf32():
    shape = Shape(name="deep", experts=2, hidden=4096, intermediate=8, top_k=1)
    case = BenchCase(
        kind="kernel", what="base", shape=shape, projection="gate_up", tokens=16, rank=0,
        dtype="float32",
    )  # fmt: skip
    drawn = draw(case, CPU)
    judge = Judge.of(case, drawn)
    groups = Groups.of(drawn["top_k_index"], shape.experts)
    x = drawn["x"][groups.places("TOKEN")]
    weight = drawn["weight"][groups.labels("EXPERT")]
    one_by_one = torch.zeros(x.shape[0], weight.shape[2])
    for k in range(shape.hidden):
        one_by_one += x[:, k, None] * weight[:, k]
    assert judge.problem_of({"base": one_by_one}) == ""
    cut = [truncated_to_tf32(value.double()) for value in (x, weight)]
    in_tf32 = torch.einsum("rk,rkn->rn", *cut).float()
    assert judge.problem_of({"base": in_tf32}).startswith("base errs")
    of_tf32 = Judge.of(dataclasses.replace(case, dtype="tf32"), drawn)
    assert of_tf32.problem_of({"base": in_tf32}) == ""
    assert of_tf32.problem_of({"base": in_tf32 * 1.005}).startswith("base errs")
    in_bf16 = torch.einsum("rk,rkn->rn", *(value.bfloat16().double() for value in (x, weight)))
    assert of_tf32.problem_of({"base": in_bf16.float()}).startswith("base errs")


@pytest.mark.hf
def test_peers_are_right_before_they_are_timed(monkeypatch, device):
    case = tiny("layer", "step")
    drawn = draw(case, device)
    judge = Judge.of(case, drawn)
    monkeypatch.setattr(peers, "_unadapted_problem", lambda *arguments: "not judged here")
    arms, left_out = peers.arms_beside(case, drawn, judge)
    assert set(arms) == {peers.COMPOSITION, peers.HF_PEFT, peers.INTEGRATED}
    assert left_out == {peers.HF: "not judged here"}


def test_a_peer_that_is_missing_wrong_or_broken_is_left_out_aloud(monkeypatch):
    def missing(case, drawn):
        raise ModuleNotFoundError("No module named 'gone'", name="gone")

    def broken(case, drawn):
        raise RuntimeError("no such kernel")

    def wrong(case, drawn):
        arm = peers.composition(case, drawn)
        return Arm(call=lambda: [2 * value for value in arm.call()], outputs=arm.outputs)

    monkeypatch.setattr(peers, "PEERS", {"a": missing, "b": broken, "c": wrong})
    case = tiny("projection", "forward", "gate_up")
    drawn = draw(case, CPU)
    arms, left_out = peers.arms_beside(case, drawn, Judge.of(case, drawn), ("a", "b", "c"))
    assert arms == {}
    assert left_out["a"] == "not installed: gone"
    assert left_out["b"] == "RuntimeError: no such kernel"
    assert "y errs by" in left_out["c"]


def test_a_peer_slower_than_its_figure_makes_a_comparison_invalid():
    gpu, name = "NVIDIA H100 80GB HBM3", "layer.step.qwen3-30b.t2048.r16.balanced"
    figure = peer_figures.FIGURES[gpu][name][peers.COMPOSITION]
    assert peer_figures.too_slow(gpu, name, {peers.COMPOSITION: figure * 1.05}) == []
    (text,) = peer_figures.too_slow(gpu, name, {peers.COMPOSITION: figure * 1.15})
    assert "its figure on this GPU is 3.360 ms" in text
    assert peer_figures.too_slow("another", name, {peers.COMPOSITION: figure * 2}) == []


def test_figures_are_of_benchmarks_that_exist():
    known = {case.name for case in targets()}
    for figures in peer_figures.FIGURES.values():
        assert set(figures) <= known


FAST = Effort(budget_ms=1.0, least=2, most=3)
DEQUANT = BenchCase(
    kind="dequant", what="nf4", shape=TINY, projection="down", tokens=1, rank=0, dtype="float32"
)
KEYS = {
    "name", "kind", "model", "T", "R", "routing", "path", "ms", "floor_ms", "wall_ms",
    "first_call_s", "peak_bytes", "launches", "peers", "copy_share", "detail",
}  # fmt: skip


@pytest.fixture
def bench_of_dequant(device):
    clock = clock_of(device)
    made = Bench(lib=scattermoe_lora, device=device, clock=clock, effort=FAST, peers=())
    return made.ready(["float32"])


def test_an_entry_holds_what_records_promise(bench_of_dequant):
    (entry,) = bench_of_dequant.run([DEQUANT])
    assert isinstance(entry, Entry)
    assert entry.as_json().keys() == KEYS
    assert entry.as_json()["copy_share"] == pytest.approx(entry.floor_ms / entry.ms, abs=1e-4)
    assert json.loads(json.dumps(entry.as_json())) == entry.as_json()
    assert entry.ms > 0


@pytest.mark.parametrize(("dtype", "setting"), [("tf32", "high"), ("float32", "highest")])
def test_fp32_is_multiplied_as_the_case_says_and_as_before_afterwards(dtype, setting, device):
    """An arm asks torch for its setting at every call, so that is what must hold then."""
    settings = []

    class Watching(HostClock):
        def once(self, call):
            settings.append(torch.get_float32_matmul_precision())
            return super().once(call)

    before = torch.get_float32_matmul_precision()
    made = Bench(lib=scattermoe_lora, device=device, clock=Watching(), effort=FAST, peers=())
    case = dataclasses.replace(DEQUANT, dtype=dtype)
    (entry,) = made.ready([dtype]).run([case])
    assert isinstance(entry, Entry), entry
    assert set(settings) == {setting}
    assert torch.get_float32_matmul_precision() == before
    assert case.torch_dtype is torch.float32


def test_what_decoding_takes_stands_beside_what_it_may(bench_of_dequant, device, monkeypatch):
    timing = Timing(samples=(1.0,), wall_ms=1.0, host_ms=1.0)
    monkeypatch.setattr(bench, "measure", lambda clock, calls, effort: dict.fromkeys(calls, timing))
    case = tiny("qlora-layer", "chunked", dtype="float32", tokens=1, rank=1)
    (entry,) = bench_of_dequant.run([case])
    assert isinstance(entry, Entry), entry
    budgets, taken = (entry.detail[f"{name}_bytes"] for name in ("budget", "transient"))
    assert set(budgets) == set(taken) == set(PROJECTIONS)
    for name in PROJECTIONS:
        assert budgets[name] > 0
        if device.type == "cpu":
            assert taken[name] is None
        else:
            assert 0 < taken[name] <= budgets[name]


def test_wrong_results_have_no_times(bench_of_dequant, monkeypatch):
    def wrong(lib, case, drawn):
        arm = arm_of(lib, case, drawn)
        return Arm(call=lambda: [value + 1e-3 for value in arm.call()], outputs=arm.outputs)

    monkeypatch.setattr(bench, "arm_of", wrong)
    (failure,) = bench_of_dequant.run([DEQUANT])
    assert isinstance(failure, Failure)
    assert (failure.status, "dense errs by" in failure.reason) == ("failed", True)


def test_a_benchmark_that_raises_does_not_end_the_others(bench_of_dequant, monkeypatch):
    def broken(lib, case, drawn):
        if case == DEQUANT:
            raise RuntimeError("no kernel image")
        return arm_of(lib, case, drawn)

    monkeypatch.setattr(bench, "arm_of", broken)
    other = dataclasses.replace(DEQUANT, projection="gate_up")
    failure, entry = bench_of_dequant.run([DEQUANT, other])
    assert (failure.status, failure.reason) == ("error", "RuntimeError: no kernel image")
    assert isinstance(entry, Entry)


def test_the_command_writes_a_record_and_goes_on_with_it(tmp_path, capsys):
    path = tmp_path / "bench.json"
    command = ["bench", "--models", "tiny", "--names", "dequant.nf4.*", "--dtypes", "float32"]
    command += ["--no-peers", "--quick", "--json", str(path), "--device", DEVICE]
    assert main([*command, "--minutes", "0"]) == 2
    summary = json.loads(path.read_text())["summary"]
    assert (summary["measured"], summary["wanted"], summary["failed"]) == (0, 2, 0)
    assert main([*command, "--resume"]) == 0
    record = json.loads(path.read_text())
    assert [entry["name"] for entry in record["benchmarks"]] == [
        "dequant.nf4.tiny.gate_up.float32",
        "dequant.nf4.tiny.down.float32",
    ]
    assert record["summary"]["complete"]
    assert record.keys() >= {"schema", "command", "environment", "fingerprint", "ceilings"}
    times = [entry["ms"] for entry in record["benchmarks"]]
    assert main([*command, "--resume"]) == 0
    assert [entry["ms"] for entry in json.loads(path.read_text())["benchmarks"]] == times


@pytest.mark.parametrize("key", ["environment", "fingerprint"])
def test_numbers_of_other_code_or_machines_are_not_taken_up(tmp_path, key, monkeypatch):
    monkeypatch.setattr(bench_records, "environment", lambda device: {"device": "this"})
    monkeypatch.setattr(bench_records, "fingerprints", lambda package, kernels: {"a": "1"})
    path = tmp_path / "bench.json"

    def fresh():
        return BenchRecord.start(path, [DEQUANT], package=tmp_path, device=CPU, seed=0)

    first = fresh()
    entry = {"name": DEQUANT.name, "kind": "dequant", "T": 1, "routing": "balanced", "ms": 1.0}
    entry |= {"floor_ms": 1.0, "peers": {}, "detail": {"what": "nf4", "dtype": "", "invalid": []}}
    first.entries.append(entry)
    first.write()
    again = fresh()
    assert "1 of 1 are taken" in again.take_up()
    changed = json.loads(path.read_text()) | {key: "another"}
    path.write_text(json.dumps(changed))
    again = fresh()
    assert f"has another {key}" in again.take_up()
    assert again.names == set()


def test_numbers_of_another_seed_are_neither_taken_up_nor_lost(tmp_path):
    path = tmp_path / "bench.json"
    command = ["bench", "--models", "tiny", "--names", "dequant.nf4.*", "--json", str(path)]
    command += ["--device", DEVICE, "--minutes", "0", "--seed"]
    assert main([*command, "5"]) == 2
    before = path.read_text()
    with pytest.raises(SystemExit, match=r"^--resume: .*bench.json has seed 5, and --seed is 6$"):
        main([*command, "6", "--resume"])
    assert path.read_text() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU compiles")
def test_cold_compilations_without_a_gpu_are_refused():
    with pytest.raises(SystemExit, match=r"^--cold times .* for a GPU, and the device is cpu$"):
        main(["bench", "--models", "tiny", "--cold", "--device", "cpu"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("words", [["bench"], ["gate", "--against", "."]], ids=["bench", "gate"])
def test_times_of_the_interpreter_have_to_be_asked_for(words):
    with pytest.raises(SystemExit, match=r"times kernels on a GPU, .*; --device cpu tries"):
        main(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kinds", "layers"), "layers is none of"),
        (("--models", "./no-such-model"), "no transformers configuration"),
        (("--names", "nothing.*"), "nothing was selected"),
    ],
)
def test_options_that_select_nothing_are_refused(words, message):
    with pytest.raises(SystemExit, match=message):
        main(["bench", "--list", *words])


def test_the_product_of_all_is_narrowed_by_what_is_stated(capsys):
    words = ["bench", "--list", "--models", "tiny", "--kinds", "layer", "--full"]

    def listed(*more: str) -> set[str]:
        assert main([*words, *more]) == 0
        return set(capsys.readouterr().out.split())

    whole = Grid(models=("tiny",), kinds=("layer",))
    assert listed() == {case.name for case in whole.cases()}
    narrow = dataclasses.replace(whole, tokens=(64,), ranks=(4, 8), dtypes=("float32",))
    assert listed("--T", "64", "--rank", "4,8", "--dtypes", "float32") == {
        case.name for case in narrow.cases()
    }
    zipf = {case.name for case in whole.cases() if case.routing == "zipf"}
    assert listed("--routing", "zipf") == zipf


def test_the_list_is_what_the_issue_asks_for():
    names = [case.name for case in targets()]
    for model in BUILT_IN:
        for tokens in (2048, 8192):
            assert f"layer.step.{model}.t{tokens}.r16.balanced" in names
            assert f"projection.input-grad.{model}.down.t{tokens}.r16.balanced" in names
    assert "qlora-layer.chunked.qwen3-30b.t8192.r16.balanced" in names
    assert "layer.step.mixtral.t8192.r16.half" in names
