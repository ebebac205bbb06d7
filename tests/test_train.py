"""Training parity: its criteria on curves that are known, its reference, planted faults."""

import json
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from verify import train_criteria as criteria
from verify import train_models
from verify.cli import main
from verify.train import Training, on_and_off, steps
from verify.train_models import Run, Settings, batches, standard_library, trainee

pytestmark = pytest.mark.hf

CPU = torch.device("cpu")
SMALL = replace(Settings.of(CPU, 3), distinct=2, layers=1)


def draws(count, seed, *, size=1.0):
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return [size * value for value in values.tolist()]


def curves(seed, *, ours=1.0, shift=0.0, count=300):
    """Three curves around one, whose errors grow with the steps; ours times and plus something."""
    middle = [2 + 4 * math.exp(-step / 50) for step in range(count)]
    found = []
    for offset, factor in ((0, ours), (1, 1.0), (2, 1.0)):
        errors = draws(count, 3 * seed + offset, size=1e-3 * factor)
        found.append(
            [
                m + error * (1 + step / 50)
                for step, (m, error) in enumerate(zip(middle, errors, strict=True))
            ]
        )
    found[0] = [value + shift for value in found[0]]
    return found


@pytest.mark.parametrize("count", [30, 300])
def test_curves_that_differ_by_noise_alone_pass(count):
    found = [
        finding
        for seed in range(200)
        for finding in criteria.within_noise("x", *curves(seed, count=count))
    ]
    assert len(found) == 200 * criteria.PHASES
    assert all(finding.passed for finding in found)


@pytest.mark.parametrize("fault", [{"ours": 30.0}, {"shift": 0.1}, {"shift": math.nan}], ids=str)
def test_a_curve_outside_of_the_noise_fails(fault):
    found = criteria.within_noise("x", *curves(0, **fault))
    assert not any(finding.passed for finding in found)
    assert f"{found[0].value:.2e}" in found[0].text
    assert f"{found[0].limit:.2e}" in found[0].text


def test_curves_that_are_equal_are_judged_by_the_rounding_of_a_loss():
    line = [5.0, 4.0, 3.0]
    assert all(finding.passed for finding in criteria.within_noise("x", line, line, line))
    off = [value + 1e-3 for value in line]
    assert not any(finding.passed for finding in criteria.within_noise("x", off, line, line))


def test_correlated_steps_count_less():
    white = draws(1000, 0)
    runs = [value for value in white for _ in range(10)]
    assert 700 < criteria.independent(white) <= 1000
    assert 700 < criteria.independent(runs) < 1500
    assert criteria.independent([1.0] * 50) < 2
    assert criteria.independent([0.0] * 5) == 1


@pytest.mark.parametrize(
    ("curve", "passed"),
    [
        ([6.0, 5.0, 4.1], True),
        ([6.0, 5.0, 4.3], False),
        ([6.0, 6.5], False),
        ([math.nan] * 3, False),
    ],
    ids=str,
)
def test_the_loss_must_fall(curve, passed):
    finding = criteria.fall("x", curve)
    assert finding.passed == passed
    assert finding.criterion == "x: fall"


@pytest.mark.parametrize(
    ("on", "passed"), [(4.0, True), (4.3, False), (6.0, False), (math.nan, False)]
)
def test_switching_the_adapter_off_must_cost(on, passed):
    finding = criteria.switched_off("x", on=on, off=6.0)
    assert finding.passed == passed
    assert "6.0000 without" in finding.text


@pytest.mark.parametrize("run", [Run.EAGER, Run.OTHER_ORDER])
@pytest.mark.parametrize("arm", train_models.ARMS)
def test_the_reference_is_transformers_eager_with_the_sum(arm, run):
    """Against plain eager experts holding W + s B A; bitsandbytes packs nothing wider than fp32."""
    settings = replace(SMALL, dtype={"lora": "float64", "nf4": "float32"}[arm])
    who = trainee(settings, arm, run, device=CPU, seed=0)
    ids = batches(standard_library(), settings, 0)[0]
    plain = train_models.base_model(settings, 0)
    assert len(who.parameters) == 4 * settings.layers
    generator = torch.Generator().manual_seed(5)
    stacks = [module for module in who.model.modules() if hasattr(module, "product")]
    modules = [module for module in plain.modules() if hasattr(module, "is_transposed")]
    with torch.no_grad():
        for place, stack in enumerate(stacks):
            stack.to(stack.weight.dtype)
            stack.b.normal_(generator=generator)
            weight = getattr(modules[place // 2], train_models.NAMES[place % 2])
            weight.copy_(stack.weight + settings.scaling * stack.b @ stack.a)
    got = who.model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(got, plain(input_ids=ids, labels=ids).loss)
    with who.disabled():
        assert who.model(input_ids=ids, labels=ids).loss != got


def test_packed_values_are_near_what_was_packed():
    weight = torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(0))
    values = train_models.nf4_values(weight)
    # The widest gap between neighbouring codes of NF4 is under 0.31 of a block's largest value.
    largest = weight.view(2, 64, 2, 64).abs().amax(-1, keepdim=True)
    assert (((values - weight).view(2, 64, 2, 64).abs()) <= 0.31 / 2 * largest).all()
    assert not torch.equal(values, weight)


def test_text_is_read_and_cut_the_same_way_each_time():
    text = standard_library()
    assert 0 <= text.min() < text.max() < train_models.VOCABULARY
    one, two = batches(text, SMALL, 3), batches(text, SMALL, 3)
    assert one.shape == (SMALL.distinct, SMALL.batch, SMALL.length)
    assert torch.equal(one, two)
    assert not torch.equal(one, batches(text, SMALL, 4))


def test_the_reference_learns_and_its_orders_part_by_rounding_only():
    settings = replace(SMALL, steps=30, distinct=3)
    drawn = batches(standard_library(), settings, 2)
    runs = (Run.EAGER, Run.OTHER_ORDER)
    who = [trainee(settings, "lora", run, device=CPU, seed=0) for run in runs]
    one, other = (list(steps(each, drawn, settings)) for each in who)
    assert criteria.fall("lora", one).passed
    assert criteria.switched_off(
        "lora", **dict(zip(("on", "off"), on_and_off(who[0], drawn[2]), strict=True))
    ).passed
    assert one != other
    assert criteria.size([a - b for a, b in zip(one, other, strict=True)]) < 1e-3 * one[-1]


@pytest.fixture
def scaled(monkeypatch):
    """Plants a factor on the scaling that our experts see."""
    from scattermoe_lora.integrations import peft as adapters
    from scattermoe_lora.weights import LoRAWeights

    true = adapters.active_factors

    def plant(factor):
        def wrong(wrapper, *, transposed):
            lora = true(wrapper, transposed=transposed)
            return lora and LoRAWeights(a=lora.a, b=lora.b, scaling=factor * lora.scaling)

        monkeypatch.setattr(adapters, "active_factors", wrong)

    return plant


def trained(device, arm="lora", settings=SMALL):
    training = Training(settings=settings, arms=(arm,), device=device, seed=0)
    assert [progress.step for progress in training.run()] == [1, 2, 3] * 3
    assert training.complete
    return {
        kind: [finding.passed for finding in training.findings() if kind in finding.criterion]
        for kind in ("off", "noise")
    }


def test_our_curve_is_within_the_noise(device):
    # With a second layer gradients pass through experts.
    assert trained(device, "nf4", replace(SMALL, layers=2))["noise"] == [True] * 3


def test_an_adapter_that_is_ignored_is_seen(scaled, device):
    scaled(0.0)
    found = trained(device)
    assert found["off"] == [False]
    assert found["noise"][-1] is False


def test_a_wrong_scale_is_seen(scaled, device):
    scaled(1.05)
    assert trained(device)["noise"][-1] is False


def test_the_command_writes_its_record_and_the_picture(tmp_path, monkeypatch, device):
    monkeypatch.setattr(Settings, "of", lambda device, count: replace(SMALL, steps=count))
    record, picture = tmp_path / "train.json", tmp_path / "train.png"
    words = ["train", "--device", str(device), "--steps", "2", "--arms", "lora"]
    # Two steps are too few to learn much.
    assert main([*words, "--json", str(record), "--plot", str(picture)]) == 1
    values = json.loads(record.read_text())
    assert {"schema", "command", "environment", "seed", "started", "seconds"} <= values.keys()
    assert values["summary"]["complete"] is True
    passed = {item["criterion"]: item["passed"] for item in values["findings"]}
    assert passed["lora: fall"] is False
    assert all(value for name, value in passed.items() if "noise" in name)
    assert values["summary"]["failed"] == sum(not value for value in passed.values())
    curves = values["curves"]["lora"]
    assert {run.value: len(curves[run.value]) for run in Run} == dict.fromkeys(
        [run.value for run in Run], 2
    )
    assert values["fingerprint"].keys() == {"experts_mlp", "dequantize_four_bit"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_leaves_a_record(tmp_path, monkeypatch, device):
    def interrupted(training):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Training, "run", interrupted)
    record = tmp_path / "train.json"
    assert main(["train", "--device", str(device), "--json", str(record)]) == 130
    assert json.loads(record.read_text())["summary"] == {
        "passed": 0,
        "failed": 0,
        "complete": False,
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 1}, "at least 2 steps, got 1"),
        ({"hidden": 96}, "hidden 96 and intermediate 64 must be multiples of 64"),
        ({"top_k": 5}, "5 experts per token of 4"),
        ({"distinct": 0}, "at least 1 batch, got 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **settings)


def test_a_missing_package_is_named(monkeypatch, capsys, device):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["train", "--device", str(device), "--arms", "lora"]) == 2
    assert "peft is not installed" in capsys.readouterr().err
