"""Tiny random models of several families, and how their outputs are judged.

A model under test is judged against the same model in fp64 with transformers' eager experts, by
twice the error that eager experts make in the precision of the test, whole tensors and by norm.
"""

import copy

import torch
import transformers

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, VOCAB = 64, 32, 4, 2, 64
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_SMALL = {"intermediate_size": INTERMEDIATE, "num_experts_per_tok": TOP_K}
_MOE = {**_SMALL, "moe_intermediate_size": INTERMEDIATE, "intermediate_size": 48}
_DEEPSEEK = {
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "qk_nope_head_dim": 16,
}
_GEMMA = {
    "enable_moe_block": True,
    "top_k_experts": TOP_K,
    "head_dim": 32,
    "global_head_dim": 32,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "layer_types": ["full_attention"],
}
FAMILIES = {
    # 2 * INTERMEDIATE == HIDDEN: its gate_up is square.
    "olmoe": ("OlmoeConfig", {**_SMALL, "num_experts": EXPERTS}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_MOE, "num_experts": EXPERTS, "head_dim": 32}),
    "mixtral": ("MixtralConfig", {**_SMALL, "num_local_experts": EXPERTS, "intermediate_size": 64}),
    "deepseek_v3": ("DeepseekV3Config", {**_MOE, **_DEEPSEEK}),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        {
            **_MOE,
            "num_experts": EXPERTS,
            "head_dim": 32,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["full_attention"],
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {**_SMALL, "num_local_experts": EXPERTS, "head_dim": 32, "layer_types": ["full_attention"]},
    ),
    "gemma4": ("Gemma4TextConfig", {**_MOE, **_GEMMA, "num_experts": EXPERTS}),
}


def tiny_model(family, *, dtype=torch.float32, seed=0, **changes):
    """A random one-layer model whose experts matter: weights of unit gain, biases of unit size."""
    name, settings = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**{**_COMMON, **settings, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        for module in experts_of(model):
            for bias in ("gate_up_proj_bias", "down_proj_bias"):
                if hasattr(module, bias):
                    getattr(module, bias).normal_()
    return model.to(dtype).eval()


def experts_of(model):
    """The experts modules of a model."""
    return [module for module in model.modules() if hasattr(module, "is_transposed")]


def tokens(batch=2, length=5, seed=1):
    """Token ids [batch, length]."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def step(model, ids):
    """Logits and the gradients of a fixed random functional of them, by parameter name."""
    model.zero_grad()
    logits = model(input_ids=ids).logits
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * direction.to(logits)).sum().backward()
    grads = {
        name: parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"logits": logits.detach(), **grads}


def eager(model, *, dtype=None):
    """A copy that runs transformers' eager experts, in `dtype` if one is given."""
    copied = copy.deepcopy(model)
    copied.set_experts_implementation("eager")
    return copied if dtype is None else copied.to(dtype)


def assert_as_good(got, plain, truth):
    """Each tensor of `got` is within twice the error of `plain`, and none is missing."""
    assert got.keys() == plain.keys() == truth.keys()
    for name, expected in truth.items():
        scale = expected.double().norm()
        errors = [
            (value[name].double() - expected.double()).norm() / scale for value in (got, plain)
        ]
        # A tensor that plain torch gets exactly right is right to the rounding of its dtype.
        floor = torch.finfo(got[name].dtype).eps
        limit = 2 * errors[1] + floor
        assert scale == 0 or errors[0] <= limit, f"{name}: error {errors[0]:.3g}, limit {limit:.3g}"
        assert scale > 0 or not got[name].any(), f"{name} should be exactly zero"
