"""The products one by one, without autograd."""

from . import lora_ops, ops, single

__all__ = ["lora_ops", "ops", "single"]
