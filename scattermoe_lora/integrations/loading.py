"""A model with this layer in one call: loaded, packed, adapted and attached.

lora = LoraConfig(r=16, lora_alpha=32)
model = load_model(name, quantization=ExpertsQuantizationConfig(), lora=lora)
"""

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AutoModelForCausalLM

from .transformers import KEY, experts_modules

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["load_model"]


def load_model(
    name: str,
    *,
    quantization: Any = None,
    lora: "LoraConfig | None" = None,
    model_class: Any = AutoModelForCausalLM,
    **settings: Any,
) -> nn.Module:
    """`model_class.from_pretrained(name, **settings)` with this layer, and with attached adapters.

    Args:
        quantization: an `integrations.bitsandbytes.ExpertsQuantizationConfig`, or any other that
            transformers knows. A model that was saved packed needs none.
        lora: adapters to add, see `integrations.peft.adapt`.

    Raises:
        UnsupportedExpertsError: the model has experts that this layer does not compute.
        ValueError: the model has no experts; or as `integrations.peft.attach`.
    """
    from . import bitsandbytes as _  # noqa: F401 - a saved packed model is read by its registration

    if quantization is not None:
        settings["quantization_config"] = quantization
    model = model_class.from_pretrained(name, experts_implementation=KEY, **settings)
    experts_modules(model)
    if lora is None:
        return model
    from .peft import adapt

    return adapt(model, lora)
