"""A model with this layer in one call: loaded, packed, adapted and attached.

lora = LoraConfig(r=16, lora_alpha=32)
model = load_model(name, quantization=ExpertsQuantizationConfig(), lora=lora)
"""

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import QuantizationConfigMixin

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
        ValueError: the model has no experts; a setting that the other arguments decide is given; or
            as `integrations.peft.attach`.
        TypeError: quantization or lora is no configuration.
    """
    _check(quantization, lora, settings)
    from . import bitsandbytes as _  # noqa: F401 - a saved packed model is read by its registration

    if quantization is not None:
        settings["quantization_config"] = quantization
    model = model_class.from_pretrained(name, experts_implementation=KEY, **settings)
    experts_modules(model)
    if lora is None:
        return model
    from .peft import adapt

    return adapt(model, lora)


def _check(quantization: Any, lora: Any, settings: dict[str, Any]) -> None:
    """Refuse, before anything is loaded, what would fail after it or be ignored."""
    if quantization is not None and not isinstance(quantization, QuantizationConfigMixin | dict):
        raise TypeError(
            "quantization must be an ExpertsQuantizationConfig or another quantisation "
            f"configuration of transformers, got {type(quantization).__name__}"
        )
    if quantization is not None and "quantization_config" in settings:
        raise ValueError("quantization and quantization_config are both given: pass one of them")
    if settings.get("experts_implementation", KEY) != KEY:
        raise ValueError(
            f"experts_implementation must be {KEY!r} here, got "
            f"{settings['experts_implementation']!r}"
        )
    settings.pop("experts_implementation", None)
    if lora is not None:
        from peft import LoraConfig

        if not isinstance(lora, LoraConfig):
            raise TypeError(f"lora must be a peft.LoraConfig, got {type(lora).__name__}")
