"""Adapters of PEFT under the layer: what is passed on, merged, given back, loaded, refused."""

import copy
import inspect
import json

import hf_models
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as peft_layer
from plain_layer import references  # noqa: F401
from safetensors.torch import load_file, save_file
from test_peft import RANK, adapted, merged_by_hand, ours, randomise, two_adapters, wrappers
from torch import nn

import scattermoe_lora.integrations.transformers as layer
from scattermoe_lora.integrations import _checkpoints, _four_bit, _merge, _wrappers
from scattermoe_lora.integrations import bitsandbytes as packing
from scattermoe_lora.integrations import peft as adapters

pytestmark = [pytest.mark.correctness, pytest.mark.hf, pytest.mark.usefixtures("references")]

NAMES = ("gate_up_proj", "down_proj")
EXPERTS = "model.layers.0.mlp.experts"


def model_of(family="qwen3_moe", *, packed=False, **changes):
    model = hf_models.tiny_model(family, **changes)
    if packed:
        packing.quantize_experts(model)
    model.set_experts_implementation(layer.KEY)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=hf_models.tokens()).logits


def facts(model):
    """Everything that a module keeps beside tensors and other modules, by name."""
    kept = ("_parameters", "_buffers", "_modules")
    return {
        name: (type(module), sorted(key for key in vars(module) if key not in kept))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_attaching_nests_by_projection_and_detaching_undoes_it(packed):
    model = adapted(model_of(packed=packed))
    before, order = facts(model), [chain.wrappers for chain in _wrappers.wrapper_chains(model)]
    for _ in range(2):
        adapters.attach(model)
        adapters.attach(model)
        (chain,) = _wrappers.wrapper_chains(model)
        assert (chain.name, chain.attribute) == (f"base_model.model.{EXPERTS}", "experts")
        assert tuple(wrapper.parameter_name for wrapper in chain.wrappers) == NAMES
        assert getattr(chain.parent, chain.attribute) is chain.wrappers[-1]
        adapters.detach(model)
        assert facts(model) == before
        assert [chain.wrappers for chain in _wrappers.wrapper_chains(model)] == order


@pytest.mark.parametrize("method", ["merge", "unmerge", "unload_and_optionally_merge_module"])
def test_methods_of_pefts_wrapper_keep_its_arguments_and_defaults(method):
    ours_now, pefts = (
        inspect.signature(getattr(kind, method)).parameters.values()
        for kind in (adapters.ParamWrapper, peft_layer.ParamWrapper)
    )
    assert [(p.name, p.default) for p in ours_now] == [(p.name, p.default) for p in pefts]


def test_an_adapter_alone_at_the_top_has_the_name_of_its_attribute():
    class Top(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = hf_models.experts_of(model_of())[0]

    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    top = get_peft_model(Top(), config).base_model.model
    (chain,) = _wrappers.wrapper_chains(top)
    assert (chain.name, chain.parent) == ("experts", top)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_adapters_on_other_parameters_stay_pefts(family):
    router = "mlp.gate.weight" if family == "qwen3_moe" else "mlp.router.weight"
    others = [router] if family == "qwen3_moe" else [router, "experts.down_proj_bias"]
    model = model_of(family)
    model = adapted(model, targets=[*adapters.expert_parameters(model), *others])
    plain = {
        id(module) for module in model.modules() if isinstance(module, peft_layer.ParamWrapper)
    }
    report = adapters.attach(model)
    assert (report.adapted, len(report.rows), len(plain)) == (2, 2, 2 + len(others))
    assert {wrapper.parameter_name for wrapper in wrappers(model)} == set(NAMES)
    rest = [
        module.parameter_name
        for module in model.modules()
        if type(module) is peft_layer.ParamWrapper
    ]
    assert sorted(rest) == sorted(name.rpartition(".")[2] for name in others)
    assert [row.parameter for row in adapters.merge(model).rows] == list(NAMES)


def test_stacks_outside_of_the_interface_are_refused():
    class Stack(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.weight_of_all = nn.Parameter(torch.ones(shape))

    class Model(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.inner = Stack(*shape)

    config = LoraConfig(r=2, target_modules=[], target_parameters=["inner.weight_of_all"])
    with pytest.raises(
        layer.UnsupportedExpertsError, match=r"inner \(Stack\) .* on weight_of_all cannot"
    ):
        adapters.attach(get_peft_model(Model(2, 4, 4), config))
    with pytest.raises(ValueError, match="has no adapter on an expert parameter"):
        adapters.attach(get_peft_model(Model(4, 4), copy.deepcopy(config)))


def test_another_implementation_gets_pefts_sum():
    model = adapted(hf_models.tiny_model("qwen3_moe"))
    expected = logits(hf_models.eager(model))
    attached = ours(model)
    attached.set_experts_implementation("eager")
    assert torch.equal(logits(attached), expected)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_adapters_that_are_off_while_merged_come_back(packed):
    base = model_of(packed=packed)
    expected = logits(base)
    model = ours(adapted(base))
    on = logits(model)
    adapters.merge(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert not any(wrapper.merged for wrapper in wrappers(model))
    assert torch.equal(logits(model), on)


def in_order(model):
    """The attached wrappers in the order of the projections."""
    return [wrapper for name in NAMES for wrapper in wrappers(model, name)]


def weights(model):
    return [getattr(w.get_base_layer(), w.parameter_name).detach() for w in in_order(model)]


def by_hand(base, wrapper, names):
    """What merging those adapters of a wrapper makes of its base."""
    only = copy.deepcopy(wrapper)
    for name in set(only.lora_A) - set(names):
        del only.lora_A[name]
    return merged_by_hand(base, only)


@pytest.mark.parametrize("names", [None, ["second"], ["second", "default"]], ids=str)
def test_merging_takes_the_adapters_that_are_named(names):
    model = two_adapters(ours(adapted(hf_models.tiny_model("qwen3_moe"))))
    adapters.attach(model)
    model.base_model.set_adapter("default")
    base = [weight.clone() for weight in weights(model)]
    taken = names or ["default"]
    by_peft = copy.deepcopy(model)
    by_peft.merge_adapter(names)
    gone = copy.deepcopy(model).merge_and_unload(adapter_names=names)
    report = adapters.merge(model, names)
    for wrapper, row, before in zip(in_order(model), report.rows, base, strict=True):
        assert wrapper.merged_adapters == taken
        assert (row.parameter, row.adapters) == (wrapper.parameter_name, tuple(taken))
        assert row.module == f"base_model.model.{EXPERTS}"
        assert row.requantization_error is None
        want = by_hand(before, wrapper, taken)
        if len(taken) == 1:
            assert torch.equal(getattr(wrapper.get_base_layer(), wrapper.parameter_name), want)
        unloaded = getattr(hf_models.experts_of(gone)[0], wrapper.parameter_name)
        assert torch.equal(unloaded, getattr(wrapper.get_base_layer(), wrapper.parameter_name))
    assert all(torch.equal(a, b) for a, b in zip(weights(by_peft), weights(model), strict=True))
    lines = [f"{row.module}.{row.parameter}: merged {', '.join(taken)}" for row in report.rows]
    assert str(report).splitlines() == lines
    adapters.unmerge(model)
    adapters.unmerge(model)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), base, strict=True))
    assert str(adapters.MergeReport(rows=(adapters.MergeRow(
        module="m", parameter="p", adapters=(), requantization_error=0.125
    ),))) == "m.p: merged nothing, quantised again with relative error 1.25e-01"  # fmt: skip


@pytest.mark.parametrize("how", ["merge", "unload"])
def test_a_safe_merge_refuses_what_is_not_finite_and_changes_nothing(how):
    model = ours(adapted(hf_models.tiny_model("qwen3_moe")))
    base = [weight.clone() for weight in weights(model)]
    with torch.no_grad():
        wrappers(model, "down_proj")[0].lora_B["default"].weight[0, 0] = float("inf")
    call = model.merge_adapter if how == "merge" else model.merge_and_unload
    first = copy.deepcopy(model)
    words = r"adapters default make Qwen3MoeExperts\.down_proj infinite or NaN"
    with pytest.raises(ValueError, match=words):
        call(safe_merge=True)
    adapters.merge(first)
    broken = {
        name: torch.isfinite(getattr(hf_models.experts_of(first)[0], name)).all() for name in NAMES
    }
    assert broken == {"gate_up_proj": True, "down_proj": False}
    down = wrappers(model, "down_proj")
    assert all(not wrapper.merged for wrapper in down)
    for wrapper, before in zip(in_order(model), base, strict=True):
        if wrapper in down:
            assert torch.equal(wrapper.get_base_layer().down_proj, before)


def test_unloading_without_merging_gives_the_base():
    base = model_of()
    expected = logits(base)
    model = ours(adapted(base))
    assert not torch.equal(logits(model), expected)
    plain = model.unload()
    assert torch.equal(logits(plain), expected)
    assert not any(isinstance(m, peft_layer.ParamWrapper) for m in plain.modules())


def test_unloading_merges_pefts_own_wrappers_too():
    model = model_of("gpt_oss")
    model = adapted(model, targets=[*adapters.expert_parameters(model), "experts.down_proj_bias"])
    before = hf_models.experts_of(model)[0].down_proj_bias.detach().clone()
    adapters.attach(model)
    kept = copy.deepcopy(model).unload()
    plain = model.merge_and_unload()
    assert torch.equal(hf_models.experts_of(kept)[0].down_proj_bias, before)
    merged = hf_models.experts_of(plain)[0].down_proj_bias
    assert torch.isfinite(merged).all()
    assert not torch.equal(merged, before)


def test_only_dense_and_packed_experts_are_merged_into(monkeypatch):
    model = ours(adapted(hf_models.tiny_model("qwen3_moe")))
    monkeypatch.setattr(_merge, "stored_weight", lambda experts, name: "something else")
    with pytest.raises(TypeError, match=r"Qwen3MoeExperts\.gate_up_proj is stored as str"):
        adapters.merge(model)


def test_a_kept_base_lies_in_host_memory_and_goes_after_unmerging():
    model = ours(adapted(hf_models.tiny_model("qwen3_moe")))
    adapters.merge(model)
    for wrapper in wrappers(model):
        assert vars(wrapper)[_merge._KEPT].data.device.type == "cpu"
    adapters.unmerge(model)
    assert not any(_merge._KEPT in vars(wrapper) for wrapper in wrappers(model))
    gone = copy.deepcopy(model)
    inner = wrappers(gone)
    gone.merge_and_unload()
    assert not any(_merge._KEPT in vars(wrapper) for wrapper in inner)


def test_expert_parameters_are_those_that_are_asked_for():
    model = model_of()
    assert adapters.expert_parameters(model) == [f"{EXPERTS}.{name}" for name in NAMES]
    assert adapters.expert_parameters(model, ["down_proj"]) == [f"{EXPERTS}.down_proj"]
    with pytest.raises(ValueError, match="a parameter named up_proj or w1"):
        adapters.expert_parameters(model, ["up_proj", "w1"])


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_adapting_is_wrapping_and_attaching(packed):
    config = LoraConfig(r=RANK, lora_alpha=5)
    before = config.to_dict()
    model = adapters.adapt(model_of(packed=packed), config, adapter_name="mine")
    assert isinstance(model, PeftModel)
    assert config.to_dict() == before
    rows = adapters.coverage(model).rows
    assert [(row.module, row.parameter) for row in rows] == [
        (f"base_model.model.{EXPERTS}", name) for name in NAMES
    ]
    for row in rows:
        (adapter,) = row.adapters
        assert (adapter.adapter, adapter.rank, adapter.active) == ("mine", RANK, True)
        assert adapter.scaling == 5 / RANK
        size = RANK * hf_models.EXPERTS * sum(row.shape)
        assert adapter.trainable == size
    short = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    model = adapters.adapt(model_of(packed=packed), short)
    assert [bool(row.adapters) for row in adapters.coverage(model).rows] == [False, True]
    assert any("q_proj.lora_A" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="has no adapter on an expert parameter"):
        adapters.adapt(model_of(packed=packed), LoraConfig(r=2, target_modules=["q_proj"]))


def test_targets_are_spelled_out():
    model, full = model_of(), [f"{EXPERTS}.{name}" for name in NAMES]
    names = _checkpoints.full_names
    assert names(model, None) is None
    assert names(model, []) == []
    assert names(model, ["down_proj", "mlp.experts.down_proj", full[1]]) == [full[1]]
    assert names(model, ["mlp.gate.weight", *full]) == ["mlp.gate.weight", *full]
    assert names(model, ["wn_proj"]) == ["wn_proj"]
    wrapped = adapted(model)
    assert names(wrapped, ["gate_up_proj"]) == full[:1]


def test_coverage_is_a_table():
    model = two_adapters(ours(adapted(hf_models.tiny_model("qwen3_moe"))))
    adapters.attach(model)
    model.base_model.set_adapter("second")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("second" in name and "lora_A" in name)
    report = adapters.coverage(model)
    first = next(iter(report.rows))
    assert (first.experts, first.shape, first.storage) == (4, (64, 64), "Dense float32")
    name = f"base_model.model.{EXPERTS}"
    head = "parameter experts shape storage adapter rank scaling trainable"
    lines = str(report).splitlines()
    assert lines[0].split() == head.split()
    assert [line.split()[5:] for line in lines[1:3]] == [
        ["(default)", "3", "2", "0"],
        ["second", "2", "2.5", "512"],
    ]
    assert lines[1].startswith(f"{name}.gate_up_proj        4  64x64  Dense float32  (default)")
    assert lines[2].endswith("     2      2.5        512")
    assert report.trainable == 512 + 2 * 4 * first_width(report)
    assert lines[-1] == f"2 of 2 expert parameters adapted, {report.trainable} trainable elements"
    for wrapper in wrappers(model):
        wrapper.enable_adapters(enabled=False)
    assert not any(a.active for row in adapters.coverage(model).rows for a in row.adapters)
    none = str(adapters.coverage(model_of())).splitlines()
    assert none[1].split()[-4:] == ["-", "-", "-", "0"]
    assert none[-1] == "0 of 2 expert parameters adapted, 0 trainable elements"


def first_width(report):
    """Columns of lora_A of the down projection."""
    swapped = report.rows[1].adapters[1].trainable // 8
    assert swapped in report.rows[1].shape
    return swapped


def saved_adapter(tmp_path, family="olmoe", **settings):
    model = ours(adapted(hf_models.tiny_model(family), **settings))
    model.save_pretrained(tmp_path)
    return model


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
def test_loading_gives_every_factor_back(trainable, beside, tmp_path):
    model = saved_adapter(tmp_path)
    target = model_of("olmoe")
    if beside:
        target = get_peft_model(target, LoraConfig(r=2, target_modules=["q_proj"]))
    read = adapters.load_adapter(target, tmp_path, adapter_name="read", trainable=trainable)
    assert (read is target) == beside
    for wrapper, other in zip(wrappers(read), wrappers(model), strict=True):
        assert wrapper.parameter_name == other.parameter_name
        for factors, want in ((wrapper.lora_A, other.lora_A), (wrapper.lora_B, other.lora_B)):
            assert torch.equal(factors["read"].weight, want["default"].weight)
            assert factors["read"].weight.requires_grad == (trainable and not beside)
        assert set(wrapper.lora_A) == {"read"}
    assert any("q_proj.lora_A.default" in name for name, _ in read.named_parameters()) == beside


def test_loading_fills_the_adapters_of_other_layers_too(tmp_path):
    model = hf_models.tiny_model("olmoe")
    config = LoraConfig(
        r=RANK, target_modules=["q_proj"], target_parameters=adapters.expert_parameters(model)
    )
    model = get_peft_model(model, config)
    randomise(model, seed=5)
    model = ours(model)
    model.save_pretrained(tmp_path)
    read = adapters.load_adapter(model_of("olmoe"), str(tmp_path))
    assert adapters.coverage(read).trainable == 0
    other = dict(read.named_parameters())
    found = [name for name, _ in model.named_parameters() if "q_proj.lora_" in name]
    assert len(found) == 2
    for name in found:
        assert torch.equal(other[name], dict(model.named_parameters())[name])
    assert torch.equal(logits(read), logits(model))


def test_a_checkpoint_without_a_version_takes_one_by_hand(tmp_path):
    model = saved_adapter(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    version = config.pop("peft_version")
    assert _checkpoints.written_version(tmp_path, None) == version.partition("@")[0]
    file.write_text(json.dumps({**config, "peft_version": "0.20.1@abc"}))
    assert _checkpoints.written_version(tmp_path, None) == "0.20.1"
    assert _checkpoints.written_version(tmp_path, "0.18.0") == "0.18.0"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not say which version of PEFT wrote it"):
        adapters.load_adapter(model_of("olmoe"), tmp_path)
    read = adapters.load_adapter(model_of("olmoe"), tmp_path, written_by=version)
    assert torch.equal(logits(read), logits(model))


def test_factors_that_fit_no_parameter_are_refused(tmp_path):
    saved_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    one = [name for name in state if ".base_layer.lora_" in name]
    assert len(one) == 2
    save_file({name: value for name, value in state.items() if name not in one}, file)
    with pytest.raises(ValueError, match=r"holds no factors for (gate_up|down)_proj of"):
        adapters.load_adapter(model_of("olmoe"), tmp_path)
    for factor in ("A", "B"):
        wide = {
            name: torch.ones(97, 97) if name in one and f"lora_{factor}" in name else value
            for name, value in state.items()
        }
        save_file(wide, file)
        with pytest.raises(ValueError, match=r"\[97, 97\].* fit 0 of its parameters"):
            adapters.load_adapter(model_of("olmoe"), tmp_path)


def test_merging_nothing_more_changes_nothing():
    model = ours(adapted(model_of(packed=True)))
    (experts,) = hf_models.experts_of(model.get_base_model())
    assert [row.adapters for row in adapters.merge(model, []).rows] == [(), ()]
    assert hasattr(experts, "parametrizations")
    adapters.merge(model)
    before = [weight.data_ptr() for weight in experts.parameters()]
    report = adapters.merge(model)
    assert [row.requantization_error for row in report.rows] == [None, None]
    assert [weight.data_ptr() for weight in experts.parameters()] == before
    adapters.merge(model, requantize=True)
    before = [weight.data_ptr() for weight in experts.parameters()]
    for requantize in (False, True):
        report = adapters.merge(model, requantize=requantize)
        assert [row.requantization_error for row in report.rows] == [None, None]
        assert [weight.data_ptr() for weight in experts.parameters()] == before


@pytest.mark.parametrize("names", [None, []], ids=["active", "none"])
def test_what_was_merged_is_quantised_later_as_at_once(names):
    def packed():
        (experts,) = hf_models.experts_of(model.get_base_model())
        assert hasattr(experts, "parametrizations")
        return [_four_bit.parametrised(experts, name) for name in NAMES]

    model = ours(adapted(model_of(packed=True)))
    base = [item.packed.clone() for item in packed()]
    at_once = adapters.merge(model, requantize=True)
    wanted = packed()
    adapters.unmerge(model)
    adapters.merge(model)
    later = adapters.merge(model, names, requantize=True)
    assert later == at_once
    assert all(row.requantization_error > 0 for row in later.rows)
    for one, other, before in zip(packed(), wanted, base, strict=True):
        assert torch.equal(one.packed, other.packed)
        assert torch.equal(one.state.absmax, other.state.absmax)
        assert not torch.equal(one.packed, before)
    adapters.unmerge(model)
    assert all(torch.equal(one.packed, before) for one, before in zip(packed(), base, strict=True))


def test_a_dense_base_is_not_quantised_later():
    model = ours(adapted(model_of()))
    adapters.merge(model)
    before = [weight.data_ptr() for weight in model.parameters()]
    report = adapters.merge(model, requantize=True)
    assert [row.requantization_error for row in report.rows] == [None, None]
    assert [weight.data_ptr() for weight in model.parameters()] == before


def test_no_names_for_a_mixed_batch_are_the_active_adapters():
    outermost = wrappers(ours(adapted(hf_models.tiny_model("qwen3_moe"))))[0]
    x, index = torch.ones(3, hf_models.HIDDEN), torch.tensor([[0, 1], [2, 3], [1, 0]])
    gates = torch.ones(3, 2)
    got = outermost(x, index, gates, adapter_names=None)
    assert torch.equal(got, outermost(x, index, gates))


def test_an_adapter_of_modules_alone_covers_no_experts():
    model = get_peft_model(model_of(), LoraConfig(r=2, target_modules=["q_proj"]))
    rows = adapters.coverage(model).rows
    assert rows
    assert not any(row.adapters for row in rows)
    both = get_peft_model(model_of(), LoraConfig(r=2, target_modules=["q_proj"]))
    targets = adapters.expert_parameters(both)
    both.add_adapter("mine", LoraConfig(r=2, target_modules=[], target_parameters=targets))
    assert all(row.adapters for row in adapters.attach(both).rows)
