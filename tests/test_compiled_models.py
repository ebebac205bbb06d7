"""Models of transformers under `torch.compile(fullgraph=True)`, with and without adapters."""

import hf_models
import pytest
import torch

pytest.importorskip("peft")

from test_peft import adapted, ours
from torch import nn

import scattermoe_lora.integrations.transformers as layer

pytestmark = [pytest.mark.correctness, pytest.mark.hf]


def compiled(module):
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("family", hf_models.FAMILIES)
def test_a_model_compiles_whole(family, device):
    model = hf_models.tiny_model(family).to(device)
    model.set_experts_implementation(layer.KEY)
    ids = hf_models.tokens().to(device)
    with torch.no_grad():
        got = compiled(model)(input_ids=ids).logits
        expected = model(input_ids=ids).logits
    assert torch.equal(got, expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_model_with_adapters_compiles_whole_and_trains(family, device):
    model = ours(adapted(hf_models.tiny_model(family).to(device)))
    ids = hf_models.tokens().to(device)
    expected = hf_models.step(model, ids)
    whole = compiled(model)
    got = hf_models.step(whole, ids)
    assert sum("lora_" in name for name in got) == 4
    same({name.removeprefix("_orig_mod."): value for name, value in got.items()}, expected)


def test_an_activation_that_is_replaced_is_compiled_anew(device):
    model = hf_models.tiny_model("qwen3_moe").to(device)
    model.set_experts_implementation(layer.KEY)
    (experts,) = hf_models.experts_of(model)
    ids = hf_models.tokens().to(device)
    whole = compiled(model)
    with torch.no_grad():
        before = whole(input_ids=ids).logits
        experts.act_fn = nn.GELU(approximate="tanh")
        after, expected = whole(input_ids=ids).logits, model(input_ids=ids).logits
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)
