"""PEFT's adapters on expert parameters: factored use, merging, nesting, checkpoints."""

import copy
import warnings

import hf_models
import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model
from plain_layer import where_products_run  # noqa: F401

import scattermoe_lora.integrations.transformers as layer
from scattermoe_lora.integrations import peft as adapters

pytestmark = pytest.mark.hf

RANK = 3


def adapted(model, *, rank=RANK, targets=None, seed=3, **settings):
    """A model with adapters on its experts by PEFT, every factor random."""
    targets = adapters.expert_parameters(model) if targets is None else targets
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=targets, **settings
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config)
    randomise(model, seed=seed)
    return model


def randomise(model, *, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values * parameter.shape[-1] ** -0.5)


def ours(model):
    """A copy with attached adapters."""
    copied = copy.deepcopy(model)
    copied.set_experts_implementation(layer.KEY)
    adapters.attach(copied)
    return copied


@pytest.mark.correctness
@pytest.mark.parametrize("family", hf_models.FAMILIES)
def test_factored_adapters_equal_pefts_sum(family, device):
    model = adapted(hf_models.tiny_model(family).to(device))
    ids = hf_models.tokens().to(device)
    truth = hf_models.step(hf_models.eager(model, dtype=torch.float64), ids)
    plain = hf_models.step(hf_models.eager(model), ids)
    hf_models.assert_as_good(hf_models.step(ours(model), ids), plain, truth)


def test_layouts_are_told_apart_on_a_square_projection(where):
    # Read the other way round, olmoe's square gate_up gives no error, only other numbers.
    model = adapted(hf_models.tiny_model("olmoe").to(where))
    ids = hf_models.tokens().to(where)
    right = ours(model)
    wrong = copy.deepcopy(right)
    for wrapper in wrappers(wrong, "gate_up_proj"):
        swapped = getattr(wrapper, "_did_swap_in_out_features", False)
        wrapper._did_swap_in_out_features = not swapped
    truth = hf_models.step(hf_models.eager(model, dtype=torch.float64), ids)["logits"]
    plain = hf_models.step(hf_models.eager(model), ids)["logits"]
    got = hf_models.step(wrong, ids)["logits"]
    with pytest.raises(AssertionError, match="logits"):
        hf_models.assert_as_good({"logits": got}, {"logits": plain}, {"logits": truth})


def wrappers(model, parameter=None):
    """The attached wrappers of a model, of one parameter if it is named."""
    return [
        module
        for module in model.modules()
        if isinstance(module, adapters.ParamWrapper) and parameter in (None, module.parameter_name)
    ]


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_either_projection_alone(parameter, where):
    model = hf_models.tiny_model("qwen3_moe").to(where)
    model = adapted(model, targets=adapters.expert_parameters(model, [parameter]))
    ids = hf_models.tokens().to(where)
    truth = hf_models.step(hf_models.eager(model, dtype=torch.float64), ids)
    plain = hf_models.step(hf_models.eager(model), ids)
    assert any("lora_A" in name for name in truth)
    hf_models.assert_as_good(hf_models.step(ours(model), ids), plain, truth)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"experts.down_proj": 7}},
        {"use_rslora": True},
    ],
    ids=["patterns", "rslora"],
)
def test_ranks_and_scalings_are_pefts(settings, where):
    model = adapted(hf_models.tiny_model("qwen3_moe").to(where), **settings)
    ids = hf_models.tokens().to(where)
    truth = hf_models.step(hf_models.eager(model, dtype=torch.float64), ids)
    plain = hf_models.step(hf_models.eager(model), ids)
    attached = ours(model)
    hf_models.assert_as_good(hf_models.step(attached, ids), plain, truth)
    rows = {row.parameter: row.adapters[0] for row in adapters.coverage(attached).rows}
    for wrapper in wrappers(attached):
        row = rows[wrapper.parameter_name]
        assert (row.rank, row.scaling) == (wrapper.r["default"], wrapper.scaling["default"])
    if "rank_pattern" in settings:
        assert (rows["gate_up_proj"].rank, rows["down_proj"].rank) == (RANK, 2)


def two_adapters(model):
    """A model with a second adapter of another rank and scaling; both active."""
    config = copy.deepcopy(model.peft_config["default"])
    config.r, config.lora_alpha = 2, 5
    try:
        model.add_adapter("second", config)
    except ValueError as refusal:
        pytest.skip(f"this PEFT refuses a second adapter: {refusal}")
    model.base_model.set_adapter(["default", "second"])
    randomise(model, seed=4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def dense_delta(wrapper, name, *, dtype=torch.float64):
    """s B A of one adapter as the parameter stores it, from PEFT's flat factors by its own
    einsum."""
    experts, scaling = wrapper.num_experts, wrapper.scaling[name]
    a = wrapper.lora_A[name].weight.detach().to(dtype)
    b = wrapper.lora_B[name].weight.detach().to(dtype)
    a, b = a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts)
    swapped = getattr(wrapper, "_did_swap_in_out_features", False)
    return scaling * torch.einsum(f"ore,eri->{'eoi' if swapped else 'eio'}", b, a)


def test_the_active_adapters_are_summed(where):
    # PEFT's own sum of two adapters differs between versions, so it is written out here.
    model = two_adapters(ours(adapted(hf_models.tiny_model("qwen3_moe").to(where))))
    ids = hf_models.tokens().to(where)
    adapters.attach(model)
    got = model(input_ids=ids).logits.detach()
    by_hand = hf_models.tiny_model("qwen3_moe").to(where)
    with torch.no_grad():
        for wrapper in wrappers(model):
            parameter = getattr(hf_models.experts_of(by_hand)[0], wrapper.parameter_name)
            for name in wrapper.lora_A:
                parameter += dense_delta(wrapper, name).float()
    truth = hf_models.eager(by_hand, dtype=torch.float64)(input_ids=ids).logits.detach()
    plain = hf_models.eager(by_hand)(input_ids=ids).logits.detach()
    hf_models.assert_as_good({"logits": got}, {"logits": plain}, {"logits": truth})
    for wrapper in wrappers(model):
        assert set(wrapper.lora_A) == {"default", "second"}


def test_a_disabled_adapter_is_no_adapter(where):
    base = hf_models.tiny_model("qwen3_moe").to(where)
    model = ours(adapted(copy.deepcopy(base)))
    base.set_experts_implementation(layer.KEY)
    ids = hf_models.tokens().to(where)
    expected = base(input_ids=ids).logits
    assert not torch.equal(model(input_ids=ids).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, expected)
    adapters.merge(model)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.correctness
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_merging_rounds_once_and_unmerging_restores_the_base(family, dtype):
    model = ours(adapted(hf_models.tiny_model(family, dtype=dtype)))
    (experts,) = hf_models.experts_of(model.get_base_model())
    names = ("gate_up_proj", "down_proj")
    base = {name: getattr(experts, name).detach().clone() for name in names}
    model.merge_adapter()
    for wrapper in wrappers(model):
        name = wrapper.parameter_name
        expected = merged_by_hand(base[name], wrapper)
        assert torch.equal(getattr(experts, name), expected)
        assert not torch.equal(getattr(experts, name), base[name])
    model.unmerge_adapter()
    for name in names:
        assert torch.equal(getattr(experts, name), base[name])


@pytest.mark.correctness
@pytest.mark.parametrize("again", [False, True], ids=["unmerged", "merged once more"])
def test_a_model_cast_while_merged_keeps_its_new_dtype(again):
    model = ours(adapted(hf_models.tiny_model("olmoe")))
    cast = copy.deepcopy(model).to(torch.bfloat16)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    if again:
        model.merge_adapter()
        cast.merge_adapter()
    expected = dict(cast.named_parameters())
    for name, value in model.named_parameters():
        assert value.dtype == torch.bfloat16, name
        assert torch.equal(value, expected[name]), name


def merged_by_hand(weight, wrapper):
    """round(W + s B A), one expert after the other in fp32."""
    swapped = getattr(wrapper, "_did_swap_in_out_features", False)
    result = weight.empty() if hasattr(weight, "empty") else torch.empty_like(weight)
    for name in wrapper.lora_A:
        a = wrapper.lora_A[name].weight.detach().float()
        b = wrapper.lora_B[name].weight.detach().float()
        a = a.reshape(wrapper.num_experts, -1, a.shape[1])
        b = b.reshape(b.shape[0], -1, wrapper.num_experts)
        for expert in range(wrapper.num_experts):
            delta = b[:, :, expert] @ a[expert]
            stored = delta if swapped else delta.T
            result[expert] = weight[expert].float() + wrapper.scaling[name] * stored
    return result


@pytest.mark.correctness
def test_a_second_merge_starts_from_the_base():
    model = two_adapters(ours(adapted(hf_models.tiny_model("olmoe", dtype=torch.bfloat16))))
    adapters.attach(model)
    together, apart = copy.deepcopy(model), model
    adapters.merge(together, ["default", "second"])
    adapters.merge(apart, ["default"])
    adapters.merge(apart, ["second"])
    for one, other in zip(wrappers(together), wrappers(apart), strict=True):
        assert one.merged_adapters == other.merged_adapters == ["default", "second"]
        one, other = (getattr(w.get_base_layer(), w.parameter_name) for w in (one, other))
        assert torch.equal(one, other)


def test_unloading_leaves_merged_experts_without_wrappers(where):
    model = ours(adapted(hf_models.tiny_model("qwen3_moe").to(where)))
    ids = hf_models.tokens().to(where)
    expected = copy.deepcopy(model)
    expected.merge_adapter()
    plain = model.merge_and_unload()
    assert torch.equal(plain(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert not any("lora" in name for name, _ in plain.named_parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant, where):
    model = ours(adapted(hf_models.tiny_model("qwen3_moe").to(where))).train()
    ids = hf_models.tokens().to(where)
    expected = hf_models.step(model, ids)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = hf_models.step(model, ids)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.correctness
def test_coverage_counts_what_is_trained():
    model = hf_models.tiny_model("qwen3_moe")
    model = adapted(model, targets=["mlp.experts.down_proj"])
    model.set_experts_implementation(layer.KEY)
    report = adapters.attach(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (report.adapted, len(report.rows), report.trainable) == (1, 2, trained)
    assert f"1 of 2 expert parameters adapted, {trained:,} trainable elements" in str(report)
    assert adapters.attach(model) == report


@pytest.mark.correctness
def test_what_is_not_right_is_refused():
    model = hf_models.tiny_model("qwen3_moe")
    ids = hf_models.tokens()
    with pytest.raises(ValueError, match="has no adapter on an expert parameter"):
        adapters.attach(model)
    model = adapted(model)
    with pytest.raises(ValueError, match=r"implementation of .* is .*; call"):
        adapters.attach(hf_models.eager(model))
    model.set_experts_implementation(layer.KEY)
    with pytest.raises(RuntimeError, match=r"peft\.attach"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="is attached; call"):
        adapters.merge(model)
    missing = copy.deepcopy(model)
    missing.peft_config["default"].target_parameters = ["mlp.experts.gate_proj"]
    with pytest.raises(ValueError, match=r"'mlp\.experts\.gate_proj', which matched no parameter"):
        adapters.attach(missing)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="PEFT has merged default"):
        adapters.attach(merged)
    adapters.attach(model)
    with pytest.raises(ValueError, match="adapter"):
        model(input_ids=ids, adapter_names=["default", "__base__"])
    adapters.merge(model)
    with pytest.raises(ValueError, match="unmerge before detaching"):
        adapters.detach(model)


@pytest.mark.correctness
def test_detaching_gives_everything_back():
    model = adapted(hf_models.tiny_model("qwen3_moe"))
    before = list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    attached = ours(model)
    assert [type(module) for module in attached.modules()] != classes
    adapters.detach(attached)
    assert [type(module) for module in attached.modules()] == classes
    assert list(attached.state_dict()) == before


def test_checkpoints_are_pefts(tmp_path, where):
    from peft import PeftModel

    model = ours(adapted(hf_models.tiny_model("gpt_oss").to(where)))
    ids = hf_models.tokens().to(where)
    model.save_pretrained(tmp_path)
    read = PeftModel.from_pretrained(hf_models.tiny_model("gpt_oss").to(where), tmp_path)
    assert torch.equal(ours(read)(input_ids=ids).logits, model(input_ids=ids).logits)
    base = hf_models.tiny_model("gpt_oss").to(where)
    base.set_experts_implementation(layer.KEY)
    loaded = adapters.load_adapter(base, tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_checkpoint_in_the_layout_of_another_version_loads(family, tmp_path, where):
    from safetensors.torch import load_file, save_file

    model = ours(adapted(hf_models.tiny_model(family).to(where)))
    ids = hf_models.tokens().to(where)
    model.save_pretrained(tmp_path)
    # Versions before and after 0.19.1 exchange the factors of both layouts.
    swapped = getattr(wrappers(model)[0], "_did_swap_in_out_features", False)
    transposed = hf_models.experts_of(model)[0].is_transposed
    other = {True: "0.21.0", False: "0.18.1"}[swapped == transposed]
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    written = {}
    for name in [name for name in state if name.endswith("lora_A.weight")]:
        partner = name.replace("lora_A", "lora_B")
        a, b = state[name], state[partner]
        experts = hf_models.EXPERTS
        a3, b3 = a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts)
        written[name] = b3.permute(2, 1, 0).reshape(-1, b.shape[0]).contiguous()
        written[partner] = a3.permute(2, 1, 0).reshape(a.shape[1], -1).contiguous()
    save_file(written if not transposed else state, file)
    base = hf_models.tiny_model(family).to(where)
    base.set_experts_implementation(layer.KEY)
    here = adapters.load_adapter(base, tmp_path, written_by=other)
    assert torch.equal(here(input_ids=ids).logits, model(input_ids=ids).logits)
