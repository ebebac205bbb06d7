"""The layer as an experts implementation of transformers."""

import copy
import math
from types import SimpleNamespace

import hf_models
import pytest
import torch

pytest.importorskip("transformers")

from plain_layer import where_products_run  # noqa: F401
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

import scattermoe_lora.integrations.transformers as layer
from scattermoe_lora.integrations import _activation, _experts, model_types
from scattermoe_lora.ops import Activation

pytestmark = pytest.mark.hf

FLAGS = {
    "standard": {},
    "transposed": {"is_transposed": True},
    "interleaved": {"is_concatenated": False},
    "biased": {"has_bias": True},
    "ungated": {"has_gate": False},
    "gpt_oss": {"is_transposed": True, "is_concatenated": False, "has_bias": True},
    "ungated_biased_transposed": {"has_gate": False, "has_bias": True, "is_transposed": True},
}


def experts_class(act_fn, **flags):
    """A decorated experts class with those flags; its eager forward is written out per expert."""

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            experts, hidden, width = config.experts, config.hidden, config.width
            up = 2 * width if flags.get("has_gate", True) else width
            first = "gate_up_proj" if flags.get("has_gate", True) else "up_proj"
            self.num_experts, self.act_fn, self.up_name = experts, act_fn, first
            for name, (k, n) in {first: (hidden, up), "down_proj": (width, hidden)}.items():
                shape = (k, n) if flags.get("is_transposed") else (n, k)
                setattr(self, name, nn.Parameter(torch.randn(experts, *shape) * k**-0.5))
                if flags.get("has_bias"):
                    setattr(self, f"{name}_bias", nn.Parameter(torch.randn(experts, n)))

        def linear(self, x, name, expert):
            weight = getattr(self, name)[expert]
            bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
            return nn.functional.linear(x, weight.T if self.is_transposed else weight, bias)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            out = torch.zeros_like(hidden_states)
            for expert in range(self.num_experts):
                token, choice = torch.where(top_k_index == expert)
                h = self.linear(hidden_states[token], self.up_name, expert)
                act = self._apply_gate(h) if self.has_gate else self.act_fn(h)
                y = self.linear(act, "down_proj", expert)
                y = y * top_k_weights[token, choice, None]
                out = out.index_add(0, token, y.to(out.dtype))
            return out

    if flags.get("is_concatenated") is False:

        def interleaved(self, h):
            return self.act_fn(h[..., ::2]) * h[..., 1::2]

        Experts._apply_gate = interleaved
    return use_experts_implementation(**flags)(Experts)


def experts_module(act_fn=nn.functional.silu, *, implementation=layer.KEY, seed=0, **flags):
    torch.manual_seed(seed)
    config = SimpleNamespace(
        experts=5, hidden=24, width=20, _experts_implementation=implementation, model_type="test"
    )
    return experts_class(act_fn, **flags)(config)


def operands(tokens=9, top_k=2, experts=5, hidden=24, seed=1, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator)
    index = (
        torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
        if tokens
        else torch.zeros(0, top_k, dtype=torch.int64)
    )
    weights = torch.rand(tokens, top_k, generator=generator) * 3
    return x.to(device), index.to(device), weights.to(device)


def run(module, x, index, weights, *, implementation, dtype=None):
    """Output and every gradient of one call."""
    module = copy.deepcopy(module)
    module.config._experts_implementation = implementation
    if dtype is not None:
        module, x, weights = module.to(dtype), x.to(dtype), weights.to(dtype)
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    out = module(x, index, weights)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * direction.to(out)).sum().backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad, **grads}


def judge(module, x, index, weights, *, device="cpu"):
    module, x, index, weights = (each.to(device) for each in (module, x, index, weights))
    truth = run(module, x, index, weights, implementation="eager", dtype=torch.float64)
    plain = run(module, x, index, weights, implementation="eager")
    got = run(module, x, index, weights, implementation=layer.KEY)
    hf_models.assert_as_good(got, plain, truth)
    return got


@pytest.mark.correctness
def test_registering_adds_one_name():
    before = dict(ALL_EXPERTS_FUNCTIONS)
    assert before[layer.KEY] is layer.experts_forward
    layer.register()
    assert dict(ALL_EXPERTS_FUNCTIONS) == before
    assert layer.KEY == "scattermoe_lora"


@pytest.mark.correctness
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_every_layout_equals_eager(flags, device):
    judge(experts_module(**flags), *operands(), device=device)


def test_an_activation_that_is_not_fused_runs_as_it_is(where):
    def mish(x):
        return nn.functional.mish(x)

    module = experts_module(mish)
    assert _activation.fused_activation(module) is None
    judge(module, *operands(), device=where)


@pytest.mark.parametrize("family", hf_models.FAMILIES)
def test_every_family_equals_eager(family, where):
    model, ids = hf_models.tiny_model(family).to(where), hf_models.tokens().to(where)
    truth = hf_models.eager(model, dtype=torch.float64)(input_ids=ids).logits.detach()
    plain = hf_models.eager(model)(input_ids=ids).logits.detach()
    model.set_experts_implementation(layer.KEY)
    got = model(input_ids=ids).logits.detach()
    hf_models.assert_as_good({"logits": got}, {"logits": plain}, {"logits": truth})


@pytest.mark.parametrize("tokens", [pytest.param(0, marks=pytest.mark.correctness), 1, 2])
def test_decode_sized_inputs(tokens, device):
    judge(experts_module(), *operands(tokens), device=device)


def test_generating_gives_the_tokens_of_eager(where):
    model = hf_models.tiny_model("qwen3_moe").to(where)
    ids = hf_models.tokens(batch=1, length=3).to(where)
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    expected = hf_models.eager(model).generate(ids, **settings)
    model.set_experts_implementation(layer.KEY)
    assert torch.equal(model.generate(ids, **settings), expected)


def test_weights_of_the_router_are_used_as_they_are(where):
    module, (x, index, weights) = experts_module(), operands()
    weights[0] = 0.0
    weights[1, 0] = 0.0
    weights[2] *= 100
    got = judge(module, x, index, weights, device=where)
    assert not got["out"][0].any()
    assert not got["x"][0].any()


def test_weights_of_the_router_are_not_rounded_to_the_dtype_of_the_experts(where):
    module = experts_module().to(where, torch.bfloat16)
    x, index, weights = operands(device=where)
    third = torch.full_like(weights, 1 / 3)
    fine = module(x.bfloat16(), index, third)
    rounded = module(x.bfloat16(), index, third.bfloat16())
    assert fine.dtype == torch.bfloat16
    assert not torch.equal(fine, rounded)


@pytest.mark.correctness
def test_sentinels_are_dropped(device):
    module, (x, index, weights) = experts_module(), operands()
    index[0] = module.num_experts
    index[3, 1] = module.num_experts
    index[5, 0] = -1
    # One of the two choices of token 5 is dropped, so its weight gets no gradient.
    got = judge(module, x, index, weights, device=device)
    assert not got["out"][0].any()
    assert got["weights"][5, 0] == 0


@pytest.mark.parametrize("outside", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inside", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_either_way(outside, inside, where):
    module, (x, index, weights) = experts_module().to(where, inside), operands(device=where)
    x = x.to(outside).requires_grad_()
    with torch.autocast(where.type, dtype=torch.bfloat16):
        out = module(x, index, weights)
    assert out.dtype == outside
    out.sum().backward()
    assert x.grad.dtype == outside
    assert module.gate_up_proj.grad.dtype == inside
    rounded = module.to(torch.bfloat16)
    expected = rounded(x.detach().to(torch.bfloat16), index, weights).to(outside)
    assert torch.equal(out, expected)


def test_hidden_states_of_another_dtype_are_computed_in_that_of_the_experts(where):
    module = experts_module().to(where, torch.bfloat16)
    x, index, weights = operands(device=where)
    out = module(x, index, weights)
    assert out.dtype == torch.float32
    assert torch.equal(out, module(x.bfloat16(), index, weights).float())


@pytest.mark.correctness
def test_a_norm_after_each_expert_is_refused():
    module = experts_module()
    module.has_post_expert_norm = True
    with pytest.raises(
        layer.UnsupportedExpertsError, match="Experts normalises the output of each"
    ):
        module(*operands())


@pytest.mark.correctness
def test_an_undecorated_class_is_refused():
    class Llama4TextExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 8))

    with pytest.raises(layer.UnsupportedExpertsError, match="Llama4TextExperts is not behind"):
        layer.experts_modules(nn.Sequential(Llama4TextExperts()))
    with pytest.raises(ValueError, match="Linear holds no experts module"):
        layer.experts_modules(nn.Linear(2, 2))


def clamped(limit, alpha, shift, order="clamp first"):
    def gate(self, h):
        a, u = h.chunk(2, dim=-1)
        u = u.clamp(-self.limit, self.limit)
        if order == "clamp first":
            a = a.clamp(max=self.limit)
            return (u + shift) * a * torch.sigmoid(self.alpha * a)
        return (u + shift) * (a * torch.sigmoid(self.alpha * a)).clamp(max=self.limit)

    class Module(nn.Module):
        _apply_gate = gate

    module = Module()
    module.limit, module.alpha, module.is_concatenated = limit, alpha, True
    return module


@pytest.mark.correctness
@pytest.mark.parametrize(("limit", "alpha", "shift"), [(7.0, 1.702, 1.0), (10, 1.0, 0.0)])
def test_a_clamped_gate_is_recognised_by_what_it_computes(limit, alpha, shift):
    found = _activation.fused_activation(clamped(limit, alpha, shift))
    assert found == Activation(alpha=alpha, shift=shift, limit=limit)


@pytest.mark.correctness
@pytest.mark.parametrize(
    "module",
    [
        clamped(7.0, 1.702, 0.5),
        clamped(7.0, 1.0, 0.0, order="clamp last"),
        experts_module(nn.functional.gelu),
        experts_module(lambda x: nn.functional.silu(x) + 1e-3 * x),
    ],
    ids=["shift", "clamped after", "gelu of erf", "nearly silu"],
)
def test_a_gate_that_differs_is_not_recognised(module):
    assert _activation.fused_activation(module) is None


@pytest.mark.correctness
def test_common_gates_are_fused():
    assert _activation.fused_activation(experts_module()) == Activation()
    families = {family: hf_models.tiny_model(family) for family in ("gpt_oss", "gemma4")}
    found = {
        family: _activation.fused_activation(hf_models.experts_of(model)[0])
        for family, model in families.items()
    }
    assert found["gpt_oss"] == Activation(alpha=1.702, shift=1.0, limit=7.0, interleaved=True)
    assert found["gemma4"].gate.value == "tanh"
    assert math.isinf(found["gemma4"].limit)


@pytest.mark.correctness
@pytest.mark.parametrize("family", hf_models.FAMILIES)
def test_sizes_come_from_the_live_model_and_from_its_configuration_alike(family):
    model = hf_models.tiny_model(family)
    shape = model_types.moe_shape(model)
    module = hf_models.experts_of(model)[0]
    weight = _experts.stored_weight(module, "down_proj")
    assert {shape.hidden, shape.intermediate} == set(weight.shape)
    assert (shape.experts, shape.top_k, shape.hidden) == (
        hf_models.EXPERTS,
        hf_models.TOP_K,
        hf_models.HIDDEN,
    )
    assert model_types.moe_shape(model.config) == shape


@pytest.mark.correctness
def test_every_family_of_transformers_states_its_sizes():
    import transformers

    stated = {
        "AriaTextConfig": {"moe_num_experts": 8, "moe_topk": 2, "intermediate_size": 32},
        "Ernie4_5_MoeConfig": {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32},
        "DeepseekV3Config": {"n_routed_experts": 8, "num_experts_per_tok": 2},
        "NemotronHConfig": {"n_routed_experts": 8, "num_experts_per_tok": 2},
        "GptOssConfig": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32},
        "HunYuanMoEV1Config": {"num_experts": 8, "moe_topk": 2, "intermediate_size": 32},
    }
    for name, settings in stated.items():
        config = getattr(transformers, name)(hidden_size=64, **settings)
        shape = model_types.moe_shape(config)
        assert (shape.experts, shape.top_k, shape.hidden) == (8, 2, 64), name
    config = SimpleNamespace(
        model_type="listed", num_experts=[8, 4], moe_k=2, hidden_size=64, moe_intermediate_size=[32]
    )
    config.get_text_config = lambda decoder: config
    assert model_types.moe_shape(config).intermediate == 32
    config.moe_k = None
    with pytest.raises(
        ValueError, match="listed states the number of experts per token under none"
    ):
        model_types.moe_shape(config)


@pytest.mark.correctness
def test_the_text_type_comes_before_the_outer_type():
    import transformers

    config = transformers.Qwen3_5MoeConfig()
    assert model_types.model_types(config) == ("qwen3_5_moe_text", "qwen3_5_moe")
    resolve = model_types.resolve_model_type
    assert resolve(config, {"qwen3_5_moe_text", "qwen3_5_moe"}) == "qwen3_5_moe_text"
    assert resolve(config, {"qwen3_5_moe"}) == "qwen3_5_moe"
    with pytest.raises(ValueError, match="none of the model types qwen3_5_moe_text, qwen3_5_moe"):
        resolve(config, {"mixtral"})
    assert resolve(transformers.MixtralConfig(), {"mixtral"}) == "mixtral"
    omni = transformers.Qwen3OmniMoeConfig()
    assert model_types.model_types(omni)[0] == "qwen3_omni_moe_text"
