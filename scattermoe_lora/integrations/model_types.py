"""Model types and expert sizes: from the live modules first, the configuration second."""

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..quant import stored_experts
from . import _four_bit
from ._experts import ExpertsLayout, experts_modules

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "top_k",
)
# Models that have both keep the dense MLP's size in intermediate_size.
_INTERMEDIATE = (
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "expert_intermediate_size",
    "intermediate_size",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEShape:
    """Sizes of an experts layer: gate_up [hidden, 2 intermediate], down [intermediate, hidden]."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int


def text_config(config: Any) -> Any:
    """The language model's configuration inside a composite one, or `config` itself."""
    thinker = getattr(config, "thinker_config", None)
    inner = config if thinker is None else thinker
    return inner.get_text_config(decoder=True)


def model_types(config: Any) -> tuple[str, ...]:
    """The text type first, then the outer type where it differs."""
    types = (text_config(config).model_type, config.model_type)
    return tuple(dict.fromkeys(types))


def resolve_model_type(config: Any, supported: Container[str]) -> str:
    """The text type of a model, or its outer type where the text type is not supported.

    Raises:
        ValueError: neither is supported.
    """
    candidates = model_types(config)
    found = next((name for name in candidates if name in supported), None)
    if found is None:
        raise ValueError(f"none of the model types {', '.join(candidates)} is supported")
    return found


def moe_shape(model: nn.Module | Any) -> MoEShape:
    """Sizes of the first experts layer of a model, or those that a configuration states.

    Of a live model, the number of experts and the widths come from the shapes of its parameters;
    top_k alone is read from the configuration. Lists (one entry per kind of expert or per layer)
    give their first entry.

    Raises:
        ValueError: the configuration states a size under no name that is known.
        UnsupportedExpertsError: as `experts_modules`.
    """
    if not isinstance(model, nn.Module):
        config = text_config(model)
        return MoEShape(
            experts=_first(config, _EXPERTS, "the number of experts"),
            top_k=_first(config, _TOP_K, "the number of experts per token"),
            hidden=_first(config, ("hidden_size", "d_model"), "the hidden size"),
            intermediate=_first(config, _INTERMEDIATE, "the intermediate size of an expert"),
        )
    module = next(iter(experts_modules(model).values()))
    layout = ExpertsLayout.of(module)
    experts, d1, d2 = _shape(module, layout.down)
    intermediate, hidden = (d1, d2) if layout.transposed else (d2, d1)
    return MoEShape(
        experts=experts,
        top_k=_first(text_config(model.config), _TOP_K, "the number of experts per token"),
        hidden=hidden,
        intermediate=intermediate,
    )


def _shape(module: nn.Module, name: str) -> tuple[int, int, int]:
    _four_bit.follow(module, name)
    stored = stored_experts(module, name)
    return stored.experts, *stored.shape


def _first(config: Any, names: Iterable[str], what: str) -> int:
    names = tuple(names)
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and value:
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    raise ValueError(
        f"the configuration of {config.model_type} states {what} under none of {', '.join(names)}"
    )
