"""The layer as transformers' experts implementation "scattermoe"; importing registers nothing.

It is `integrations.transformers` under the former name: every layout of experts that layer knows.
Adapters come from `integrations.peft`.
"""

from transformers.integrations.moe import ExpertsInterface

from ..integrations.transformers import experts_forward as scattermoe_experts_forward

__all__ = ["register_scattermoe_experts", "scattermoe_experts_forward"]


def register_scattermoe_experts() -> None:
    """Let `experts_implementation="scattermoe"` choose the layer. Idempotent."""
    ExpertsInterface.register("scattermoe", scattermoe_experts_forward)
