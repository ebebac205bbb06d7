"""Types, sizes, loading, projections, activations and recordings: tables and refusals."""

import json
from types import SimpleNamespace

import hf_models
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from plain_layer import references  # noqa: F401
from test_storage_laws import stack
from test_transformers import clamped, experts_module
from torch import nn

import scattermoe_lora.integrations.transformers as layer
from scattermoe_lora.integrations import _activation, _experts, loading, model_types, peft
from scattermoe_lora.integrations import bitsandbytes as packing
from scattermoe_lora.integrations.profiler import ProfilerCallback
from scattermoe_lora.ops import Activation
from scattermoe_lora.ops.glu import Gate
from scattermoe_lora.weights import LoRAWeights

pytestmark = [pytest.mark.correctness, pytest.mark.hf, pytest.mark.usefixtures("references")]


def text(**sizes):
    config = SimpleNamespace(model_type="listed", **sizes)
    config.get_text_config = lambda decoder: config if decoder else None
    return config


RIGHT = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
}
FIELDS = {
    "experts": ("num_experts num_local_experts n_routed_experts moe_num_experts", "number of exp"),
    "top_k": (
        "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts top_k",
        "the number of experts per token",
    ),
    "hidden": ("hidden_size d_model", "the hidden size"),
    "intermediate": (
        "moe_intermediate_size expert_ffn_hidden_size expert_intermediate_size intermediate_size",
        "the intermediate size of an expert",
    ),
}


@pytest.mark.parametrize(("field", "known"), FIELDS.items(), ids=FIELDS)
def test_a_size_is_read_under_every_name_and_the_first_counts(field, known):
    names, words = known[0].split(), known[1]
    others = {name: value for name, value in RIGHT.items() if name != names[0]}
    assert len(others) == len(RIGHT) - 1
    for place, name in enumerate(names):
        rest = dict.fromkeys(names[place + 1 :], 7)
        for value in (3, [3, 5], (3,)):
            shape = model_types.moe_shape(text(**others, **rest, **{name: value}))
            assert getattr(shape, field) == 3
    for wrong in (None, True, "3", [], [True], 3.0):
        with pytest.raises(ValueError, match=f"listed states .*{words}.* under none of {names[0]}"):
            model_types.moe_shape(text(**others, **{names[0]: wrong}))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_sizes_of_a_live_model_are_those_of_its_parameters(family, packed):
    model = hf_models.tiny_model(family)
    if packed:
        packing.quantize_experts(model)
    model.config.hidden_size = model.config.num_local_experts = model.config.num_experts = 999
    expected = model_types.MoEShape(
        experts=hf_models.EXPERTS,
        top_k=hf_models.TOP_K,
        hidden=hf_models.HIDDEN,
        intermediate=hf_models.INTERMEDIATE,
    )
    assert model_types.moe_shape(model) == expected
    assert model_types.moe_shape(model.to("meta")) == expected


def test_text_types_come_from_inside():
    inner, outer = text(), text()
    inner.model_type, outer.get_text_config = "inner", lambda decoder: inner if decoder else None
    assert model_types.text_config(outer) is inner
    assert model_types.model_types(outer) == ("inner", "listed")
    assert model_types.model_types(inner) == ("inner",)
    omni = text(thinker_config=outer)
    assert model_types.text_config(omni) is inner
    assert model_types.text_config(text(thinker_config=None)).model_type == "listed"


def test_one_call_passes_on_what_it_is_given():
    calls = []

    class Source:
        @classmethod
        def from_pretrained(cls, name, **settings):
            calls.append((name, settings))
            return hf_models.tiny_model("qwen3_moe") if name == "experts" else nn.Linear(2, 2)

    packed = {"load_in_4bit": True}
    model = loading.load_model("experts", model_class=Source, quantization=packed, revision="x")
    settings = {"revision": "x", "experts_implementation": layer.KEY}
    assert calls == [("experts", {**settings, "quantization_config": packed})]
    assert isinstance(model, nn.Module)
    loading.load_model("experts", model_class=Source, revision="x")
    assert calls[1:] == [("experts", settings)]
    with pytest.raises(ValueError, match="Linear holds no experts"):
        loading.load_model("none", model_class=Source)


def test_factors_of_a_third_dtype_are_taken_in_fp32(monkeypatch):
    (experts,) = hf_models.experts_of(hf_models.tiny_model("qwen3_moe"))
    layout = _experts.ExpertsLayout.of(experts)
    for base, given, taken in (
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
    ):
        experts.to(base)
        lora = LoRAWeights(a=stack(4, 2, 64).to(given), b=stack(4, 64, 2).to(given), scaling=3.0)
        found, dtype = layer._projection(experts, "gate_up_proj", layout, {"gate_up_proj": lora})
        assert dtype == found.weight.dtype == base
        assert found.lora.a.dtype == found.lora.b.dtype == taken
        assert torch.equal(found.lora.a.float(), lora.a.float())
        assert torch.equal(found.lora.b.float(), lora.b.float())
        assert found.lora.scaling == 3.0
        assert (
            layer._projection(experts, "down_proj", layout, {"gate_up_proj": lora})[0].lora is None
        )


GATES = {
    "silu": (nn.functional.silu, Activation()),
    "tanh": (lambda x: nn.functional.gelu(x, approximate="tanh"), Activation(gate=Gate.TANH)),
    "quick": (lambda x: x * torch.sigmoid(1.702 * x), Activation(alpha=1.702)),
    "relu": (nn.functional.relu, None),
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("act_fn", "wanted"), GATES.values(), ids=GATES)
def test_an_activation_is_known_by_its_values(act_fn, wanted, interleaved):
    module = experts_module(act_fn, **({"is_concatenated": False} if interleaved else {}))
    module.a_number, module.a_flag, module.another = 1.702, True, 3
    module.nothing, module.negative = 0.0, -0.5
    found = _activation.fused_activation(module)
    if wanted is None:
        assert found is None
        return
    assert found.interleaved is interleaved
    assert (found.gate, found.alpha) == (wanted.gate, wanted.alpha)
    assert (found.shift, found.limit) == (0.0, float("inf"))
    gate, up = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).double()
    error = (_activation.formula(gate, up, found) - act_fn(gate) * up).abs().max()
    assert error <= 64 * torch.finfo(torch.float64).eps * (gate * up).abs().max()


@pytest.mark.parametrize("limit", [0.5, 3.0, 20.0])
@pytest.mark.parametrize("tanh", [False, True])
def test_a_formula_is_clamped_from_above_and_on_both_sides(limit, tanh):
    points = torch.tensor([-40.0, -limit, -0.1, 0.0, 0.3, limit, 40.0], dtype=torch.float64)
    gate, up = points[:, None], points[None, :]
    gate, up = gate.expand(7, 7), up.expand(7, 7)
    activation = Activation(
        gate=Gate.TANH if tanh else Gate.SIGMOID, limit=limit, shift=0.0 if tanh else 1.0
    )
    low, both = gate.clamp(max=limit), up.clamp(-limit, limit)
    act = nn.functional.gelu if tanh else nn.functional.silu
    more = {"approximate": "tanh"} if tanh else {}
    expected = act(low, **more) * (both + (0.0 if tanh else 1.0))
    error = (_activation.formula(gate, up, activation) - expected).abs().max()
    assert error <= 64 * torch.finfo(torch.float64).eps * 41**2


def test_a_gate_that_reads_more_than_numbers_runs_as_it_is():
    class Reads(nn.Module):
        is_concatenated = True

        def __init__(self, error):
            super().__init__()
            self.error = error

        def _apply_gate(self, h):
            return self.scale * h

    assert _activation.fused_activation(Reads("scale is no number")) is None

    class Wide(Reads):
        def _apply_gate(self, h):
            return nn.functional.silu(h)

    assert _activation.fused_activation(Wide("another shape")) is None
    unsaid = clamped(7.0, 1.702, 1.0)
    del unsaid.is_concatenated
    assert not _activation.fused_activation(unsaid).interleaved
    negative = clamped(7.0, 1.702, 1.0)
    negative.limit = -7.0
    assert _activation.fused_activation(negative) is None


def steps(callback, count):
    given = SimpleNamespace(world_size=1, process_index=0)
    for step in range(count):
        callback.on_step_begin(given, SimpleNamespace(global_step=step), None)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(2).sum()
        callback.on_step_end(given, SimpleNamespace(global_step=step + 1), None)


def traced(file):
    events = json.loads(file.read_text())["traceEvents"]
    return {event["name"] for event in events if event.get("name", "").startswith("step ")}


def test_by_default_the_first_step_is_traced_without_a_suffix(tmp_path):
    callback = ProfilerCallback(tmp_path / "made" / "here")
    callback.on_train_begin(SimpleNamespace(world_size=1, process_index=0), None, None)
    steps(callback, 3)
    assert callback.recording.memory == torch.cuda.is_available()
    written = ["snapshot.pickle"] * callback.recording.memory + ["trace.json"]
    assert sorted(file.name for file in (tmp_path / "made" / "here").iterdir()) == written
    assert traced(tmp_path / "made" / "here" / "trace.json") == {"step 0"}


def test_a_recording_tells_shapes_memory_and_stacks(tmp_path):
    with ProfilerCallback(tmp_path, steps=1) as callback:
        steps(callback, 1)
    found = json.loads((tmp_path / "trace.json").read_text())
    (total,) = [e for e in found["traceEvents"] if e.get("name") == "aten::sum"][:1]
    assert total["args"]["Input Dims"][0] == [2]
    assert any(event.get("name") == "[memory]" for event in found["traceEvents"])
    assert any(event.get("cat") == "python_function" for event in found["traceEvents"])


def test_nothing_is_written_that_is_not_asked_for(tmp_path):
    callback = ProfilerCallback(tmp_path / "p", trace=False, memory=False)
    steps(callback, 2)
    callback.on_train_end(None, None, None)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("gated", [True, False])
def test_parameters_are_named_of_experts_with_a_gate_and_without(gated):
    model = nn.ModuleDict({"experts": experts_module(has_gate=gated)})
    up = "experts.gate_up_proj" if gated else "experts.up_proj"
    assert peft.expert_parameters(model) == [up, "experts.down_proj"]
