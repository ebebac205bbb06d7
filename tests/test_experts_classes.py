"""Every experts class of the installed transformers that its interface decorates, against eager."""

import copy
import importlib
import re
from pathlib import Path

import hf_models
import pytest
import torch

pytest.importorskip("transformers")

import transformers

import scattermoe_lora.integrations.transformers as layer

pytestmark = pytest.mark.hf

EXPERTS, HIDDEN, WIDTH = 5, 24, 20
SIZES = {
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS
    ),
    **dict.fromkeys(("moe_intermediate_size", "intermediate_size"), WIDTH),
    "hidden_size": HIDDEN,
    "moe_latent_size": None,
    # Configurations whose layers may differ are read as if they did not.
    "allow_global_per_layer_attribute_access": True,
}
REFUSED = {"MuseSparkExperts": "normalises the output of each expert"}
MODELS = Path(transformers.__file__).parent / "models"
DECORATED = re.compile(r"^@use_experts_implementation.*\n(?:@.*\n)*class (\w+)", re.MULTILINE)


def decorated():
    """(family, module, class) as they stand in the sources, which nothing has imported yet."""
    return [
        (file.parent.name, file.stem, name)
        for file in sorted(MODELS.glob("*/modeling_*.py"))
        for name in DECORATED.findall(file.read_text())
    ]


def configurations(family):
    """Configurations of a family with small experts, with lists where some take lists."""
    for file in sorted((MODELS / family).glob("configuration_*.py")):
        module = importlib.import_module(f"transformers.models.{family}.{file.stem}")
        for name, kind in vars(module).items():
            if not (isinstance(kind, type) and name.endswith("Config")):
                continue
            if kind.__module__ != module.__name__:
                continue
            for sizes in (SIZES, {**SIZES, "moe_intermediate_size": [WIDTH, WIDTH]}):
                config = kind()
                config.__dict__.update(
                    {
                        getattr(kind, "attribute_map", {}).get(key, key): value
                        for key, value in sizes.items()
                    }
                )
                config._experts_implementation = "eager"
                yield config


def small(family, module, name):
    """A random module of the class, from the first configuration that it takes."""
    kind = getattr(importlib.import_module(f"transformers.models.{family}.{module}"), name)
    refusals = []
    for config in configurations(family):
        try:
            experts = kind(config)
        except (AttributeError, TypeError, KeyError, IndexError) as refusal:
            refusals.append(f"{type(config).__name__}: {refusal}")
            continue
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in experts.parameters():
                # Wide enough to reach the clamps of those that clamp.
                parameter.normal_(std=4 * parameter.shape[-1] ** -0.5)
        return experts
    raise AssertionError(f"no configuration of {family} makes a {name}: {refusals}")


CLASSES = decorated()


def test_there_are_many_classes():
    assert len(CLASSES) >= 50


@pytest.mark.parametrize(("family", "module", "name"), CLASSES, ids=[name for *_, name in CLASSES])
def test_every_decorated_class_equals_eager_or_is_refused(family, module, name, device):
    experts = small(family, module, name).to(device)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, HIDDEN, generator=generator)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(6)])
    weights = torch.rand(6, 2, generator=generator)
    x, index, weights = x.to(device), index.to(device), weights.to(device)
    with torch.no_grad():
        if name in REFUSED:
            experts.config._experts_implementation = layer.KEY
            with pytest.raises(layer.UnsupportedExpertsError, match=f"{name} {REFUSED[name]}"):
                experts(x, index, weights)
            return
        truth = copy.deepcopy(experts).double()(x.double(), index, weights.double())
        plain = experts(x, index, weights)
        experts.config._experts_implementation = layer.KEY
        got = experts(x, index, weights)
    assert truth.any()
    hf_models.assert_as_good({"out": got}, {"out": plain}, {"out": truth})
