"""PEFT's adapters on expert parameters: factored use, merging, nesting, checkpoints."""

import copy
import warnings

import hf_models
import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model

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
def test_factored_adapters_equal_pefts_sum(family):
    model = adapted(hf_models.tiny_model(family))
    ids = hf_models.tokens()
    truth = hf_models.step(hf_models.eager(model, dtype=torch.float64), ids)
    plain = hf_models.step(hf_models.eager(model), ids)
    hf_models.assert_as_good(hf_models.step(ours(model), ids), plain, truth)
