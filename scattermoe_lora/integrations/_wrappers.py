"""PEFT's wrappers on expert parameters: finding those of a module, and nesting them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import layer as peft_layer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
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


def left_out_by(config: Any, name: str) -> str | None:
    """The setting by which PEFT would leave the module of a parameter out, were it targeted itself.

    PEFT does not ask it for parameters.
    """
    module = name.removeprefix("base_model.model.").rpartition(".")[0]
    for setting in ("exclude_modules", "layers_to_transform"):
        alone = copy.copy(config)
        alone.target_modules, alone.modules_to_save = [module.rpartition(".")[2]], None
        for other in {"exclude_modules", "layers_to_transform"} - {setting}:
            setattr(alone, other, None)
        if not check_target_module_exists(alone, module):
            return setting
    return None


def tuner_layers(model: nn.Module) -> list[Any]:
    """Every wrapper of PEFT in a model."""
    kinds = BaseTunerLayer | AuxiliaryTrainingWrapper
    return [module for module in model.modules() if isinstance(module, kinds)]


def take_off(model: nn.Module, *, keep: Sequence[nn.Module]) -> None:
    """Put what PEFT wrapped in the place of its wrappers, of a model half wrapped too.

    keep: the wrappers that stay.
    """
    found = {id(wrapper) for wrapper in tuner_layers(model)}
    taken = found - {id(wrapper) for wrapper in keep}
    for parent in list(model.modules()):
        if id(parent) in taken:
            continue
        for attribute, child in list(parent.named_children()):
            inner: Any = child
            while id(inner) in taken:
                layered = isinstance(inner, BaseTunerLayer)
                inner = inner.base_layer if layered else inner.original_module
            if inner is not child:
                setattr(parent, attribute, inner)


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
