"""Ways of fine-tuners through transformers and PEFT: trained, saved, read, put away."""

import copy
import json
from contextlib import contextmanager
from types import SimpleNamespace

import hf_models
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import transformers
from peft import LoraConfig, get_peft_model
from plain_layer import references  # noqa: F401
from safetensors.torch import load_file, save_file
from test_adapter_laws import EXPERTS, NAMES, facts, logits, model_of
from test_bitsandbytes import loaded as loaded_anywhere
from test_bitsandbytes import same_state
from test_peft import adapted, ours, randomise, wrappers
from test_transformers import experts_module, operands
from torch import nn
from transformers.integrations import finegrained_fp8
from transformers.integrations.moe import use_experts_implementation

import scattermoe_lora.integrations.transformers as layer
from scattermoe_lora.integrations import bitsandbytes as packing
from scattermoe_lora.integrations import peft as adapters
from scattermoe_lora.quant import stored_experts

pytestmark = [pytest.mark.correctness, pytest.mark.hf, pytest.mark.usefixtures("references")]

both = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])


def config(**settings):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, **settings})


def adapter(*, packed=False, seed=3, **settings):
    """A model with attached adapters, every factor random."""
    model = adapters.adapt(model_of(packed=packed), config(**settings))
    randomise(model, seed=seed)
    return model


def loaded(path, **settings):
    """A model where the references decode, also beside a GPU."""
    return loaded_anywhere(path, device_map="cpu", **settings)


@contextmanager
def as_far_as_peft_goes():
    """Skips what some versions refuse: a second adapter on parameters, reading an adapter."""
    try:
        yield
    except (TypeError, ValueError) as refusal:
        words = ("only one LoRA adapter per model", "distributed_operation")
        if not any(each in str(refusal) for each in words):
            raise
        pytest.skip(f"this PEFT refuses: {refusal}")


def trained(model, directory, *, resume=None, **settings):
    """The losses of a `Trainer`, from the checkpoint of a step if one is named."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, hf_models.VOCAB, (6,), generator=generator) for _ in range(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        max_steps=4,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="steps",
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=[{"input_ids": each, "labels": each} for each in ids]
    )
    path = None if resume is None else str(directory / f"checkpoint-{resume}")
    trainer.train(resume_from_checkpoint=path)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_trainer_takes_the_steps_of_eager_experts(tmp_path):
    model = adapted(hf_models.tiny_model("qwen3_moe"))
    expected = trained(hf_models.eager(model), tmp_path / "eager")
    for settings in ({}, {"gradient_checkpointing": True}):
        got = trained(ours(model), tmp_path / f"ours{len(settings)}", **settings)
        assert got == pytest.approx(expected, rel=1e-5)


@both
def test_a_trainer_goes_on_from_its_checkpoint(packed, tmp_path):
    whole = trained(adapter(packed=packed), tmp_path)
    with as_far_as_peft_goes():
        rest = trained(adapter(packed=packed, seed=8), tmp_path, resume=2)
    assert rest[-2:] == whole[-2:]
    read = adapters.load_adapter(model_of(packed=packed), tmp_path / "checkpoint-4")
    again = adapters.load_adapter(model_of(packed=packed), tmp_path / "checkpoint-2")
    assert not torch.equal(logits(read), logits(again))


def test_a_packed_model_that_has_run_is_decoded_and_saved_like_one_that_has_not(tmp_path):
    hf_models.tiny_model("qwen3_moe", dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    packed = packing.ExpertsQuantizationConfig()
    fresh, model = (loaded(tmp_path / "dense", quantization_config=packed) for _ in range(2))
    logits(model)
    same_state(fresh.state_dict(), model.state_dict())
    model.save_pretrained(tmp_path / "packed")
    same_state(fresh.state_dict(), loaded(tmp_path / "packed").state_dict())
    expected = fresh.dequantize().state_dict()
    same_state(expected, model.dequantize().state_dict())
    read = loaded(tmp_path / "packed")
    logits(read)
    same_state(expected, read.dequantize().state_dict())


@pytest.mark.parametrize("how", ["adapt", "load"])
@both
def test_a_second_adapter_joins_on_dense_and_on_packed_experts(packed, how, tmp_path):
    alone = adapter(packed=packed, seed=5, r=2)
    alone.save_pretrained(tmp_path)
    model = adapter(packed=packed)
    before = facts(model), logits(model)
    if how == "adapt":
        with as_far_as_peft_goes():
            adapters.adapt(model, config(r=2), adapter_name="second")
        values = dict(alone.named_parameters())
        with torch.no_grad():
            for name, value in model.named_parameters():
                if ".second." in name:
                    value.copy_(values[name.replace(".second.", ".default.")])
    else:
        with as_far_as_peft_goes():
            adapters.load_adapter(model, tmp_path, adapter_name="second")
    for wrapper in wrappers(model):
        assert set(wrapper.lora_A) == {"default", "second"}
    assert torch.equal(logits(model), before[1])
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(alone))
    model.delete_adapter("second")
    assert (facts(model), [*model.peft_config]) == (before[0], ["default"])


def test_targets_may_be_spelled_shorter_than_those_of_the_adapter_beside(tmp_path):
    adapter().save_pretrained(tmp_path)
    model = adapted(model_of(), targets=[f"mlp.experts.{name}" for name in NAMES])
    adapters.attach(model)
    with as_far_as_peft_goes():
        adapters.load_adapter(model, tmp_path, adapter_name="read")
    assert all("read" in wrapper.lora_A for wrapper in wrappers(model))


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "beside another"])
@both
def test_what_peft_refuses_half_way_leaves_the_model_as_it_was(packed, wrapped):
    """The linear layer is wrapped before the experts refuse dropout."""
    model = adapter(packed=packed) if wrapped else model_of(packed=packed)
    asked = config(
        lora_dropout=0.1,
        target_modules=["q_proj"],
        target_parameters=adapters.expert_parameters(model),
    )
    before, keys = facts(model), list(model.state_dict())
    trains = {name: value.requires_grad for name, value in model.named_parameters()}
    words = "does not work with lora_dropout|only one LoRA adapter per model"
    with pytest.raises(ValueError, match=words):
        adapters.adapt(model, asked, adapter_name="new")
    assert {name: value.requires_grad for name, value in model.named_parameters()} == trains
    assert (facts(model), list(model.state_dict())) == (before, keys)
    if wrapped:
        assert [*model.peft_config] == ["default"]


def test_an_adapter_that_is_there_is_not_loaded_over(tmp_path):
    model = adapter()
    model.save_pretrained(tmp_path)
    randomise(model, seed=9)
    expected = logits(model)
    for call in (
        lambda: adapters.load_adapter(model, tmp_path),
        lambda: adapters.adapt(model, config()),
    ):
        with pytest.raises(ValueError, match="has an adapter 'default' already"):
            call()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("initial", ["pissa", "olora", "orthogonal"])
def test_initial_values_from_the_weight_of_a_linear_layer_are_refused(initial):
    with pytest.raises(ValueError, match=f"init_lora_weights='{initial}' starts from the weight"):
        adapters.adapt(model_of(), config(init_lora_weights=initial))


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"exclude_modules": ["layers.0.mlp.experts"]},
        {"exclude_modules": r"model\.layers\.0\..*"},
    ],
    ids=str,
)
def test_layers_that_are_left_out_stay_without_adapters(settings, tmp_path):
    short = [f"mlp.experts.{name}" for name in NAMES]
    for targets in (None, short):
        model = model_of(num_hidden_layers=2)
        model = adapters.adapt(model, config(**settings, target_parameters=targets))
        rows = adapters.coverage(model).rows
        assert [bool(row.adapters) for row in rows] == [False, False, True, True]
    model.save_pretrained(tmp_path)
    read = adapters.load_adapter(model_of(num_hidden_layers=2), tmp_path)
    assert adapters.coverage(read).adapted == 2
    (setting, *_) = settings
    asked = config(**settings, target_modules=[], target_parameters=short)
    every = get_peft_model(model_of(num_hidden_layers=2), asked)
    with pytest.raises(ValueError, match=f"{setting} of adapter 'default' leaves .* out, but PEFT"):
        adapters.attach(every)
    every.save_pretrained(tmp_path / "every")
    read = adapters.load_adapter(model_of(num_hidden_layers=2), tmp_path / "every")
    assert adapters.coverage(read).adapted == 4


def test_a_checkpoint_of_more_layers_is_refused(tmp_path):
    adapters.adapt(model_of(num_hidden_layers=2), config()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    short = [f"mlp.experts.{name}" for name in NAMES]
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, "target_parameters": short}))
    model = model_of()
    before = facts(model)
    with pytest.raises(ValueError, match=r"holds .*layers\.1.* and 3 more, which the model has no"):
        adapters.load_adapter(model, tmp_path)
    assert facts(model) == before


def test_a_checkpoint_without_some_layers_is_refused(tmp_path):
    model = adapter(target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    save_file({name: value for name, value in state.items() if "q_proj" not in name}, file)
    with pytest.raises(ValueError, match=r"holds no values for .*q_proj\.lora_A.* and 1 more"):
        adapters.load_adapter(model_of(), tmp_path)


@pytest.fixture
def quantized(tmp_path):
    """A packed model from disk; linear layers as bitsandbytes cannot spoil them on a CPU."""

    def load(**settings):
        path = tmp_path / "dense"
        if not path.exists():
            hf_models.tiny_model("qwen3_moe", dtype=torch.bfloat16).save_pretrained(path)
        settings = {"linears": False, **settings}
        return loaded(path, quantization_config=packing.ExpertsQuantizationConfig(**settings))

    return load


def merged(model):
    """The model with an adapter merged for good, its experts dense."""
    model = adapters.adapt(model, config())
    randomise(model, seed=3)
    return model.merge_and_unload()


@pytest.mark.parametrize("now", [False, True], ids=["plain now", "nested now"])
@pytest.mark.parametrize("first", [False, True], ids=["plain first", "nested first"])
def test_what_is_merged_is_packed_anew_saved_and_read(first, now, quantized, tmp_path):
    model = merged(quantized(experts_nested=first))
    packing.quantize_experts(model, nested=now, blocksize=128)
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded(tmp_path / "saved")), expected)


def test_two_ways_of_packing_are_not_saved_as_one(quantized, tmp_path):
    model = quantized(experts_nested=True)
    only = config(target_modules=[], target_parameters=["experts.down_proj"])
    model = adapters.adapt(model, only).merge_and_unload()
    packing.quantize_experts(model)
    with pytest.raises(ValueError, match="some experts have nested scales and others plain ones"):
        model.save_pretrained(tmp_path / "saved")


def test_merged_experts_are_saved_in_16_bits_once_the_model_is_decoded(quantized, tmp_path):
    model = merged(quantized())
    with pytest.raises(ValueError, match=r"is dense although .* or call dequantize\(\)"):
        model.save_pretrained(tmp_path / "saved")
    expected = logits(model)
    model.dequantize().save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded(tmp_path / "saved")), expected)


def test_decoding_a_model_gives_the_experts_that_were_packed(quantized, tmp_path):
    model = quantized(experts_nested=True)
    expected = logits(model)
    dense = model.dequantize()
    assert torch.equal(logits(dense), expected)
    assert not hasattr(hf_models.experts_of(dense)[0], "parametrizations")
    dense.save_pretrained(tmp_path / "saved")
    read = loaded(tmp_path / "saved")
    assert read.state_dict().keys() == hf_models.tiny_model("qwen3_moe").state_dict().keys()
    assert torch.equal(logits(read), expected)


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["as packed", "fp32"])
def test_decoding_a_model_decodes_its_linear_layers_too(dtype, quantized):
    model = quantized(linears=True)
    (experts,) = hf_models.experts_of(model)
    wanted = dtype or torch.bfloat16
    stacks = {name: stored_experts(experts, name).dense(dtype=wanted) for name in NAMES}
    assert type(model.model.layers[0].self_attn.o_proj) is not nn.Linear
    dense = model.dequantize(dtype)
    for name, expected in stacks.items():
        assert torch.equal(getattr(experts, name), expected)
    projection = dense.model.layers[0].self_attn.o_proj
    assert type(projection) is nn.Linear
    assert projection.weight.dtype == wanted


def test_a_base_under_adapters_is_not_saved_under_names_that_nothing_reads(quantized, tmp_path):
    model = adapters.adapt(quantized(), config())
    with pytest.raises(ValueError, match="is wrapped by PEFT, under whose names no base model is"):
        model.get_base_model().save_pretrained(tmp_path / "saved")
    base = model.unload()
    base.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(loaded(tmp_path / "saved")), logits(base))


def test_experts_beside_linear_layers_in_8_bits_are_used_and_not_saved(quantized, tmp_path):
    quantized()
    eight = transformers.BitsAndBytesConfig(load_in_8bit=True)
    model = loaded(tmp_path / "dense", quantization_config=eight)
    packing.quantize_experts(model)
    assert logits(copy.deepcopy(model)).isfinite().all()
    with pytest.raises(ValueError, match="beside experts in 4 bits can be used, but no format"):
        model.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("attached", [False, True], ids=["base", "adapters"])
def test_a_state_dict_of_packed_experts_is_read(attached, nested, tmp_path):
    def made(*, nested, seed):
        model = hf_models.tiny_model("qwen3_moe", seed=seed)
        packing.quantize_experts(model, nested=nested)
        model.set_experts_implementation(layer.KEY)
        return adapters.adapt(model, config()) if attached else model

    model = made(nested=nested, seed=0)
    randomise(model, seed=3)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    for other in (made(nested=nested, seed=1), made(nested=not nested, seed=2)):
        for each in (other, copy.deepcopy(other)):
            assert not torch.equal(logits(each), logits(model))
            each.load_state_dict(state)
            assert torch.equal(logits(each), logits(model))
    few = hf_models.tiny_model("qwen3_moe", num_experts=2)
    packing.quantize_experts(few)
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) .*gate_up_proj\.original"):
        few.load_state_dict(hf_models.eager(model).state_dict())


def test_experts_without_values_are_not_merged_into():
    model = adapter().to("meta")
    with pytest.raises(ValueError, match=r"Qwen3MoeExperts\.gate_up_proj is on the meta device"):
        adapters.merge(model)


def test_experts_in_fp8_are_computed_as_what_they_decode_to(device):
    kind = use_experts_implementation(
        experts_class=finegrained_fp8.FP8Experts,
        experts_interface=finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS,
        has_bias=False,
        has_gate=True,
    )
    dense = experts_module().to(torch.bfloat16).requires_grad_(requires_grad=False)
    sizes = SimpleNamespace(
        hidden_size=dense.config.hidden,
        num_experts=dense.config.experts,
        moe_intermediate_size=dense.config.width,
        hidden_act="silu",
        _experts_implementation=layer.KEY,
        model_type="test",
    )
    module = kind(config=sizes, block_size=(8, 4))
    dense, module = dense.to(device), module.to(device)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, value in module.named_parameters():
            drawn = torch.rand(value.shape, generator=generator) + 0.1
            value.data = (drawn if "scale" in name else 3 * drawn - 1.5).to(device, value.dtype)
            value.requires_grad_(requires_grad=False)
        for name in NAMES:
            stored = stored_experts(module, name)
            getattr(dense, name).copy_(stored.dense(dtype=torch.bfloat16))
    x, index, weights = operands(device=device)
    got, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, truth = module(got, index, weights), dense(expected, index, weights)
    assert torch.equal(out, truth)
    out.sum().backward()
    truth.sum().backward()
    assert torch.equal(got.grad, expected.grad)
    assert got.grad.any()


def test_an_expert_parameter_has_one_name_with_and_without_adapters():
    names = [f"{EXPERTS}.{name}" for name in NAMES]
    for model in (model_of(), adapter(), adapter(packed=True)):
        assert adapters.expert_parameters(model) == names
