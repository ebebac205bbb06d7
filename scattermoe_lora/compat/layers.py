"""Whole blocks under their former names: routing, shared experts, adapters of PEFT's wrappers.

A model of transformers keeps its own routing with `integrations.transformers`, which also decodes
packed experts block by block; these blocks know two routers, and read dense parameters.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..integrations._factors import active_factors
from .lora_layout import (
    peft_down_proj_lora_to_scattermoe,
    peft_lora_B_to_scattermoe,
    peft_lora_to_scattermoe,
    validate_scattermoe_lora_shapes,
)
from .parallel_experts import flatten_sort_count, parallel_linear
from .parallel_linear_lora import get_lora_params_from_wrapper, parallel_linear_lora

__all__ = [
    "HFScatterMoEGatedMLP",
    "ScatterMoEGatedMLP",
    "peft_down_proj_lora_to_scattermoe",
    "peft_lora_B_to_scattermoe",
    "peft_lora_to_scattermoe",
    "validate_scattermoe_lora_shapes",
]

Adapter = tuple[Tensor, Tensor, float]
"""lora_A [R E, K], lora_B [N, R E] and their scaling."""

Choice = tuple[Tensor, Tensor, int, int]
"""Weights fp32 [T, k], experts [T, k], k and the number of experts."""

_SHARED = ("shared_expert", "shared_experts", "shared_mlp")


class ScatterMoEGatedMLP(nn.Module):
    """A gated block: `router`, `input_linear` [E, 2 I, H], `output_linear` [E, H, I], `activation`.

    router.layer gives the logits; router.top_k and router.num_experts are numbers.
    """

    def forward(self: Any, layer_input: Tensor) -> Tensor:
        """Output tensor [batch, length, H] of layer_input [batch, length, H].

        The softmax of the top_k chosen experts is normalised to 1.
        """
        router = self.router
        rows = layer_input.reshape(-1, layer_input.shape[-1])
        weights, experts = _softmax_choice(router.layer(rows), router.top_k, normalised=True)
        routing = (weights, experts, router.top_k, router.num_experts)
        out = _gated_mlp(
            rows,
            routing,
            self.input_linear.weight,
            self.output_linear.weight,
            self.activation,
        )
        return out.reshape(layer_input.shape)


class HFScatterMoEGatedMLP(nn.Module):
    """The forward of a block of transformers: `gate`, `experts`, and shared experts if any."""

    @staticmethod
    def forward(self: Any, layer_input: Tensor) -> Tensor:
        """Output tensor [batch, length, H] of the block `self`.

        self.experts holds gate_up_proj [E, 2 I, H], down_proj [E, H, I] and act_fn. It and
        self.gate may be wrapped by PEFT; their adapters are then used in factored form.

        Raises:
            ValueError: the block routes, or its experts compute, in a way that is not known here.
        """
        rows = layer_input.reshape(-1, layer_input.shape[-1])
        gate, weight, delta = _unwrap_gate_lora(self.gate)
        routing = _route(self, gate, rows, weight, delta)
        experts, up, down = _unwrap_experts_lora(self.experts)
        _check_experts(experts)
        out = _gated_mlp(
            rows, routing, experts.gate_up_proj, experts.down_proj, experts.act_fn, up, down
        )
        shared = _compute_shared_expert(self, rows)
        if shared is not None:
            out = out + shared
        return out.reshape(layer_input.shape)


def _gated_mlp(
    rows: Tensor,
    choice: Choice,
    gate_up: Tensor,
    down: Tensor,
    activation: Any,
    gate_up_lora: Adapter | None = None,
    down_lora: Adapter | None = None,
) -> Tensor:
    weights, experts, top_k, count = choice
    triple = flatten_sort_count(experts, count)
    h = _projected(rows, gate_up, top_k, triple, gate_up_lora, grouped_out=True)
    gate, value = h.chunk(2, dim=-1)
    h = activation(gate) * value
    return _projected(h, down, 1, triple, down_lora, grouped_in=True, gates=weights)


def _projected(
    x: Tensor,
    weight: Tensor,
    k: int,
    triple: tuple[Tensor, Tensor, Tensor],
    lora: Adapter | None,
    **told: Any,
) -> Tensor:
    """x through weights [E, out, in]."""
    if lora is None:
        return parallel_linear(x, weight.mT, k, *triple, **told)
    return parallel_linear_lora(x, weight.mT, k, *triple, *lora, **told)


def _route(
    moe_block: Any,
    base_gate: Any,
    hidden_states: Tensor,
    gate_weight: Tensor,
    gate_lora_delta: Tensor | None,
) -> Choice:
    """The sigmoid router where gate or block has a correction bias, else the softmax one."""
    sigmoid = _correction_bias(moe_block, base_gate) is not None
    chosen = _sigmoid_topk_route if sigmoid else _softmax_topk_route
    return chosen(moe_block, base_gate, hidden_states, gate_weight, gate_lora_delta)


def _softmax_topk_route(
    moe_block: Any,
    base_gate: Any,
    hidden_states: Tensor,
    gate_weight: Tensor,
    gate_lora_delta: Tensor | None,
) -> Choice:
    """The top_k largest softmax weights, normalised unless gate.norm_topk_prob is false.

    Raises:
        ValueError: the block asks for groups of experts or for statistics, which softmax routers
            here do not have.
    """
    groups = getattr(moe_block, "n_group", None) or 1
    statistics = any(hasattr(part, "moe_statics") for part in (moe_block, base_gate))
    if groups > 1 or statistics:
        raise ValueError(
            f"{type(moe_block).__name__} routes by softmax with {groups} groups"
            f"{' and moe_statics' if statistics else ''}, and 1 group without is known here; use "
            "integrations.transformers, which leaves routing to the model"
        )
    normalised = getattr(base_gate, "norm_topk_prob", True)
    logits = _logits(hidden_states, gate_weight, gate_lora_delta)
    weights, experts = _softmax_choice(logits, base_gate.top_k, normalised=normalised)
    count = getattr(base_gate, "num_experts", gate_weight.shape[0])
    return weights, experts, base_gate.top_k, count


def _sigmoid_topk_route(
    moe_block: Any,
    base_gate: Any,
    hidden_states: Tensor,
    gate_weight: Tensor,
    gate_lora_delta: Tensor | None,
) -> Choice:
    """Chosen by sigmoid plus correction bias, weighted by the sigmoid alone (DeepSeek-V3).

    Of n_group groups the topk_group with the largest sums of their best two are kept; the others
    take part with 0. Weights are normalised unless norm_topk_prob is false, then multiplied by
    routed_scaling_factor.
    """
    top_k = getattr(moe_block, "top_k", None) or base_gate.top_k
    count = getattr(moe_block, "n_routed_experts", gate_weight.shape[0])
    p = _logits(hidden_states, gate_weight, gate_lora_delta).float().sigmoid()
    bias = _correction_bias(moe_block, base_gate)
    choice = p if bias is None else p + bias
    groups = getattr(moe_block, "n_group", None) or 1
    if groups > 1:
        kept = getattr(moe_block, "topk_group", None) or groups
        by_group = choice.unflatten(1, (groups, -1))
        score = by_group.topk(min(2, by_group.shape[-1]), dim=-1).values.sum(-1)
        rest = torch.ones_like(score, dtype=torch.bool)
        rest.scatter_(1, score.topk(kept, dim=-1).indices, value=False)
        choice = by_group.masked_fill(rest.unsqueeze(-1), 0.0).flatten(1)
    experts = choice.topk(top_k, dim=-1).indices
    weights = p.gather(1, experts)
    if getattr(moe_block, "norm_topk_prob", True):
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * getattr(moe_block, "routed_scaling_factor", 1.0), experts, top_k, count


def _compute_shared_expert(moe_block: Any, hidden_states_flat: Tensor) -> Tensor | None:
    """The output of the experts that every token passes, behind their gate if there is one."""
    shared = next((getattr(moe_block, name) for name in _SHARED if _has(moe_block, name)), None)
    if shared is None:
        return None
    out = shared(hidden_states_flat)
    if _has(moe_block, "shared_expert_gate"):
        out = out * moe_block.shared_expert_gate(hidden_states_flat).sigmoid()
    return out


def _unwrap_gate_lora(gate_module: Any) -> tuple[Any, Tensor, Tensor | None]:
    """(router, its weight, the adapter's scaling B A or None) of a router that PEFT may wrap."""
    if not hasattr(gate_module, "base_layer"):
        return gate_module, gate_module.weight, None
    base = gate_module.base_layer
    a, b, scaling = get_lora_params_from_wrapper(gate_module)
    if a is None or b is None or scaling is None:
        return base, base.weight, None
    return base, base.weight, scaling * (b @ a)


def _convert_smoe_lora(
    lora_A: Tensor, lora_B: Tensor, num_experts: int, rank: int, scaling: float
) -> Adapter:
    """PEFT's factors and their scaling as an adapter of the former kernels."""
    return *peft_lora_to_scattermoe(lora_A, lora_B, num_experts, rank), scaling


def _unwrap_experts_lora(experts_module: Any) -> tuple[Any, Adapter | None, Adapter | None]:
    """(experts, adapter of gate_up_proj, adapter of down_proj) behind PEFT's wrappers."""
    wrappers = {}
    while hasattr(experts_module, "base_layer") and hasattr(experts_module, "lora_A"):
        wrappers[getattr(experts_module, "parameter_name", None)] = experts_module
        experts_module = experts_module.base_layer
    transposed = bool(getattr(experts_module, "is_transposed", False))
    found: list[Adapter | None] = []
    for name in ("gate_up_proj", "down_proj"):
        lora = active_factors(wrappers[name], transposed=transposed) if name in wrappers else None
        if lora is None:
            found.append(None)
        else:
            b = lora.b.permute(1, 0, 2).flatten(1)
            found.append((lora.a.flatten(0, 1), b, lora.scaling))
    return experts_module, found[0], found[1]


def _check_experts(experts: Any) -> None:
    told = {"is_transposed": False, "has_bias": False, "has_gate": True, "is_concatenated": True}
    for flag, known in told.items():
        value = bool(getattr(experts, flag, known))
        if value != known:
            raise ValueError(
                f"{type(experts).__name__} has {flag}={value}, and {known} is known here; use "
                "integrations.transformers"
            )


def _softmax_choice(logits: Tensor, top_k: int, *, normalised: bool) -> tuple[Tensor, Tensor]:
    weights, experts = logits.softmax(-1, dtype=torch.float32).topk(top_k, dim=-1)
    return weights / weights.sum(-1, keepdim=True) if normalised else weights, experts


def _logits(hidden_states: Tensor, gate_weight: Tensor, delta: Tensor | None) -> Tensor:
    logits = linear(hidden_states, gate_weight)
    return logits if delta is None else logits + linear(hidden_states, delta)


def _correction_bias(moe_block: Any, base_gate: Any) -> Tensor | None:
    for part in (base_gate, moe_block):
        if _has(part, "e_score_correction_bias"):
            return part.e_score_correction_bias
    return None


def _has(part: Any, name: str) -> bool:
    return getattr(part, name, None) is not None
