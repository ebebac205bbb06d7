"""The layer as an experts implementation of transformers; importing this module registers it.

    import scattermoe_lora.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="scattermoe_lora")

Routing, shared experts and their gates stay with the model. Per call of an experts module:

    hidden_states [T, H], top_k_index [T, k], top_k_weights [T, k] -> [T, H]

Registration adds one entry to transformers' table of implementations, and to that of its fp8
experts, and changes nothing else. fp8 experts are computed as what they decode to: activations stay
in 16 bits.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface

from ..autograd import expert_linear
from ..layers import Projection, experts_mlp
from ..routing import Routing, RowOrder
from ..weights import LoRAWeights
from ._activation import fused_activation
from ._experts import (
    KEY,
    ExpertsLayout,
    UnsupportedExpertsError,
    bias_of,
    experts_modules,
    projection_weight,
)
from .model_types import MoEShape, moe_shape, resolve_model_type

__all__ = [
    "KEY",
    "ExpertsLayout",
    "MoEShape",
    "UnsupportedExpertsError",
    "experts_forward",
    "experts_modules",
    "moe_shape",
    "register",
    "resolve_model_type",
]

NO_ADAPTERS: Mapping[str, LoRAWeights] = MappingProxyType({})


def experts_forward(
    self: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    adapters: Mapping[str, LoRAWeights] = NO_ADAPTERS,
) -> Tensor:
    """The forward of an experts module.

    Args:
        hidden_states: [T, H]. Computed in the dtype of the experts, or of autocast where it is on.
        top_k_index: integers [T, k]; slots outside [0, experts) are dropped, as expert parallelism
            marks them.
        top_k_weights: [T, k] in any floating dtype, used in fp32; any values, zero included.
        adapters: parameter name -> factors, from `integrations.peft`.

    Returns:
        [T, H] in the dtype of hidden_states.

    Raises:
        UnsupportedExpertsError: the module needs a step that the layer does not have.
        RuntimeError: PEFT materialised an adapter, or the experts are sharded and were not
            gathered.
    """
    layout = ExpertsLayout.of(self)
    up, dtype = _projection(self, layout.up, layout, adapters)
    down, _ = _projection(self, layout.down, layout, adapters)
    routing = Routing.from_top_k(top_k_index, up.weight.shape[0], sentinels=True)
    hidden = hidden_states
    if not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(dtype)
    activation = fused_activation(self) if layout.gated else None
    if activation is not None:
        out = experts_mlp(
            hidden, top_k_weights, routing, gate_up=up, down=down, activation=activation
        )
    else:
        out = _unfused(self, hidden, top_k_weights, routing, up=up, down=down)
    return out.to(hidden_states.dtype)


def register() -> None:
    """Add the implementation to both tables, under the name of this package. Idempotent."""
    ExpertsInterface.register(KEY, experts_forward)
    FP8ExpertsInterface.register(KEY, experts_forward)


def _projection(
    module: nn.Module, name: str, layout: ExpertsLayout, adapters: Mapping[str, LoRAWeights]
) -> tuple[Projection, torch.dtype]:
    weight, dtype = projection_weight(module, name, layout)
    lora = adapters.get(name)
    if lora is not None and lora.a.dtype not in (torch.float32, dtype):
        lora = LoRAWeights(a=lora.a.float(), b=lora.b.float(), scaling=lora.scaling)
    return Projection(weight=weight, lora=lora, bias=bias_of(module, name, layout)), dtype


def _unfused(
    module: Any,
    hidden: Tensor,
    gates: Tensor,
    routing: Routing,
    *,
    up: Projection,
    down: Projection,
) -> Tensor:
    """Both projections around the module's own activation, which sees rows in expert order."""
    h = expert_linear(
        hidden,
        up.weight,
        routing,
        lora=up.lora,
        bias=up.bias,
        source=RowOrder.TOKEN,
        target=RowOrder.EXPERT,
    )
    act = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    return expert_linear(
        act.to(h.dtype),
        down.weight,
        routing,
        lora=down.lora,
        bias=down.bias,
        gates=gates,
        source=RowOrder.EXPERT,
        target=RowOrder.SLOT,
    )


register()
