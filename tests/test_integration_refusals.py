"""What the integrations refuse: in a sentence, before any work, with nothing half done."""

import json

import hf_models
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from peft import IA3Config, LoraConfig, get_peft_model
from test_adapter_laws import EXPERTS, NAMES, facts, model_of
from test_peft import adapted, randomise
from transformers import BitsAndBytesConfig

import scattermoe_lora.integrations.transformers as layer
from scattermoe_lora.integrations import bitsandbytes as packing
from scattermoe_lora.integrations import loading
from scattermoe_lora.integrations import peft as adapters

pytestmark = [pytest.mark.correctness, pytest.mark.hf]


def config(**settings):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, **settings})


def state(model):
    """What the model is made of, which of it trains, and what it computes."""
    trains = {name: value.requires_grad for name, value in model.named_parameters()}
    return facts(model), trains


def tensors(model):
    """Every parameter and buffer, copied."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one, other):
    """Whether two models hold the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def unlisted(model):
    model.set_experts_implementation("eager")
    return config(target_modules=["q_proj"], target_parameters=[f"{EXPERTS}.{NAMES[0]}"])


def misnamed(model):
    return config(target_modules=[], target_parameters=[f"{EXPERTS}.{NAMES[0]}", "nonsense"])


def averaged(model):
    return config(use_qalora=True)


@pytest.mark.parametrize(
    ("made", "words"),
    [(unlisted, "'eager'"), (misnamed, "'nonsense'"), (averaged, "'default' has use_qalora")],
)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_adapting_that_fails_leaves_the_model_as_it_was(made, words, packed):
    model = model_of(packed=packed)
    asked = made(model)
    before = state(model)
    with pytest.raises(ValueError, match=words):
        adapters.adapt(model, asked)
    assert state(model) == before
    model.set_experts_implementation(layer.KEY)
    assert adapters.coverage(adapters.adapt(model, config())).adapted == 2


@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
def test_loading_that_fails_leaves_the_model_as_it_was(rank, beside, tmp_path):
    """A checkpoint of another rank, or of another number of experts."""
    adapters.adapt(model_of(), config()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": rank}))
    model = model_of() if rank == 8 else model_of(num_experts=2)
    if beside:
        model = adapters.adapt(model, config(r=2))
        randomise(model, seed=3)
    before, values = state(model), tensors(model)
    with pytest.raises(ValueError, match=r"lora_A of .*gate_up_proj has shape .*, the adapter has"):
        adapters.load_adapter(model, tmp_path, adapter_name="second")
    assert state(model) == before
    assert same(tensors(model), values)


@pytest.mark.parametrize("setting", [{"use_qalora": True}, {"layers_to_transform": [1]}])
def test_what_peft_ignored_when_it_wrote_an_adapter_does_not_hinder_loading(setting, tmp_path):
    model = adapters.adapt(model_of(), config())
    randomise(model, seed=3)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **setting}))
    loaded = adapters.load_adapter(model_of(), tmp_path)
    assert same(tensors(loaded), tensors(model))


def test_a_factor_without_the_other_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    adapters.adapt(model_of(), config()).save_pretrained(tmp_path)
    file = str(tmp_path / "adapter_model.safetensors")
    factors = load_file(file)
    left = {name: value for name, value in factors.items() if "base_layer.lora_B" not in name}
    assert len(left) == len(factors) - 1
    save_file(left, file)
    with pytest.raises(ValueError, match=r"lora_A without lora_B for .*experts"):
        adapters.load_adapter(model_of(), tmp_path)


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("", r"no adapter_config\.json"),
        ("adapter_config.json", r"no adapter_config\.json"),
        ("adapter_model.safetensors", r"no adapter_model\.safetensors or adapter_model\.bin"),
    ],
    ids=["directory", "configuration", "weights"],
)
def test_a_directory_without_an_adapter_is_refused(lost, words, tmp_path):
    directory = tmp_path / "adapter"
    if lost:
        adapters.adapt(model_of(), config()).save_pretrained(directory)
        (directory / lost).unlink()
    model = model_of()
    before = state(model)
    with pytest.raises(FileNotFoundError, match=f"^{directory} holds no adapter: {words} in it$"):
        adapters.load_adapter(model, directory)
    assert state(model) == before


def test_adapters_that_are_not_lora_are_refused(tmp_path):
    other = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    model = model_of()
    before = state(model)
    with pytest.raises(TypeError, match=r"config must be a peft\.LoraConfig, got IA3Config"):
        adapters.adapt(model, other)
    get_peft_model(model_of(), other).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a IA3Config, and only LoRA is on experts"):
        adapters.load_adapter(model, tmp_path)
    assert state(model) == before


@pytest.mark.parametrize("names", ["nonsense", ["default", "nonsense"]], ids=str)
def test_merging_an_adapter_that_is_not_there_is_refused(names):
    model = adapters.adapt(model_of(), config())
    with pytest.raises(ValueError, match="'nonsense' is none of default"):
        adapters.merge(model, names)
    assert all(not row.adapters for row in adapters.merge(model, []).rows)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"quantization": "nf4"}, TypeError, "quantization must be .*, got str"),
        ({"lora": {"r": 4}}, TypeError, "lora must be a peft.LoraConfig, got dict"),
        ({"experts_implementation": "eager"}, ValueError, "got 'eager'"),
        (
            {
                "quantization": packing.ExpertsQuantizationConfig(),
                "quantization_config": BitsAndBytesConfig(load_in_4bit=True),
            },
            ValueError,
            "quantization and quantization_config are both given",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_loading_refuses_settings_before_it_loads(settings, error, words):
    class Model:
        @staticmethod
        def from_pretrained(*names, **settings):
            raise AssertionError("nothing was to be loaded")

    with pytest.raises(error, match=words):
        loading.load_model("name", model_class=Model, **settings)


@pytest.mark.parametrize("given", ["quantization", "quantization_config", None])
def test_a_quantisation_may_be_given_under_either_name_or_none(given):
    config, seen = BitsAndBytesConfig(load_in_4bit=True), {}

    class Model:
        @staticmethod
        def from_pretrained(name, **settings):
            seen.update(settings)
            return hf_models.tiny_model("qwen3_moe")

    loading.load_model("name", model_class=Model, **({given: config} if given else {}))
    assert seen.get("quantization_config") is (config if given else None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_type": "int4"}, "quant_type of experts must be 'nf4' or 'fp4', got 'int4'"),
        ({"blocksize": 0}, "blocksize of experts must be one of 32, .*, got 0"),
        ({"blocksize": 48}, "blocksize of experts must be one of 32, .*, got 48"),
    ],
)
def test_formats_that_are_not_there_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        packing.quantize_experts(hf_models.tiny_model("qwen3_moe"), **settings)
    with pytest.raises(ValueError, match=words):
        packing.ExpertsQuantizationConfig(
            **{f"experts_{name}": value for name, value in settings.items()}
        )


@pytest.mark.parametrize("seen", [0, 2])
def test_devices_that_are_not_there_are_refused(monkeypatch, seen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    model = hf_models.tiny_model("qwen3_moe")
    values = tensors(model)
    for device in ("cuda", torch.device("cuda", 0), "cuda:2")[0 if seen == 0 else 2 :]:
        words = f"cannot be packed on {device}: torch sees {seen} CUDA devices"
        with pytest.raises(ValueError, match=words):
            packing.quantize_experts(model, device=device)
    assert same(tensors(model), values)


def test_adapters_on_experts_with_a_norm_are_refused_and_stay_as_they_are():
    model = adapted(model_of())
    for module in hf_models.experts_of(model):
        module.has_post_expert_norm = True
    before = state(model)
    with pytest.raises(layer.UnsupportedExpertsError, match="normalises the output of each expert"):
        adapters.attach(model)
    assert state(model) == before
