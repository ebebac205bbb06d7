"""PEFT's wrappers on expert parameters: finding those of a module, and nesting them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import layer as peft_layer
from torch import nn

from ._experts import ExpertsLayout, UnsupportedExpertsError, is_experts

_DEPTH = "_depth_in_peft"


@dataclass(frozen=True, slots=True, kw_only=True)
class WrapperChain:
    """The wrappers around one experts module, innermost first; one wraps one parameter.

    name: dotted name of the experts module, without wrappers. parent, attribute: where the
        outermost hangs.
    """

    name: str
    parent: nn.Module
    attribute: str
    experts: nn.Module
    wrappers: tuple[Any, ...]

    @property
    def adapting(self) -> tuple[Any, ...]:
        """The wrappers whose parameter is a projection; others, on a bias for one, stay PEFT's."""
        projections = ExpertsLayout.of(self.experts).projections
        return tuple(entry for entry in self.wrappers if entry.parameter_name in projections)


def wrapper_chains(model: nn.Module) -> list[WrapperChain]:
    """The wrapped experts modules of a model, in its order.

    Raises:
        UnsupportedExpertsError: a wrapper adapts a stack of matrices whose module this layer does
            not compute.
    """
    chains = []
    for parent_name, parent in model.named_modules():
        if isinstance(parent, peft_layer.ParamWrapper):
            continue
        for attribute, child in parent.named_children():
            if not isinstance(child, peft_layer.ParamWrapper):
                continue
            wrappers = _inner_first(child)
            experts = child.get_base_layer()
            name = without_wrappers(f"{parent_name}.{attribute}" if parent_name else attribute)
            if not is_experts(experts):
                _refuse_stacks(name, experts, wrappers)
                continue
            ExpertsLayout.of(experts)
            chains.append(
                WrapperChain(
                    name=name,
                    parent=parent,
                    attribute=attribute,
                    experts=experts,
                    wrappers=wrappers,
                )
            )
    return chains


def without_wrappers(name: str) -> str:
    """A dotted name as it is without PEFT's wrappers."""
    return name.replace(".base_layer", "")


def nest_by_projection(chain: WrapperChain) -> None:
    """Nest the wrappers in the order of the projections, the first innermost."""
    order = ExpertsLayout.of(chain.experts).projections
    for depth, wrapper in enumerate(chain.wrappers):
        if not hasattr(wrapper, _DEPTH):
            setattr(wrapper, _DEPTH, depth)

    def place(wrapper: Any) -> int:
        return order.index(wrapper.parameter_name) if wrapper.parameter_name in order else -1

    _nest(chain, sorted(chain.wrappers, key=place))


def nest_as_found(chain: WrapperChain) -> None:
    """Undo `nest_by_projection`."""
    if all(hasattr(wrapper, _DEPTH) for wrapper in chain.wrappers):
        _nest(chain, sorted(chain.wrappers, key=lambda wrapper: getattr(wrapper, _DEPTH)))
        for wrapper in chain.wrappers:
            delattr(wrapper, _DEPTH)


def _nest(chain: WrapperChain, wrappers: Sequence[Any]) -> None:
    inner = chain.experts
    for wrapper in wrappers:
        wrapper.base_layer = inner
        inner = wrapper
    setattr(chain.parent, chain.attribute, inner)


def _inner_first(outermost: nn.Module) -> tuple[Any, ...]:
    found = []
    wrapper: Any = outermost
    while isinstance(wrapper, peft_layer.ParamWrapper):
        found.append(wrapper)
        wrapper = wrapper.base_layer
    return tuple(reversed(found))


def _refuse_stacks(name: str, module: nn.Module, wrappers: Sequence[Any]) -> None:
    stacks = [wrapper.parameter_name for wrapper in wrappers if wrapper.num_experts > 1]
    if stacks:
        raise UnsupportedExpertsError(
            f"{name} ({type(module).__name__}) is not behind transformers' experts interface, so "
            f"the adapters on {', '.join(stacks)} cannot be used in factored form"
        )
