"""What an experts module of transformers says about itself, and where its weights are.

The decorator `use_experts_implementation` leaves flags on every experts module. They, and the
parameters, are all that is read here: never a class name, a place in the model, or a configuration.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..quant import Dense, StoredExperts, stored_experts
from ..quant.weight import StoredWeight
from . import _four_bit

KEY = __name__.partition(".")[0]
"""The name under which the layer is registered: the name this package was imported by."""

DECODED_BYTES = 256 * 2**20
"""Bound of the experts of a projection that are decoded at a time, where one fits into it."""


class UnsupportedExpertsError(TypeError):
    """An experts module computes something that this layer does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsLayout:
    """Names and layout of the two projections of an experts module.

    Parameters are stored [experts, out, in], or [experts, in, out] where `transposed`. `up` is
    gate_up_proj of gated experts and up_proj of others.
    """

    up: str
    down: str
    gated: bool
    transposed: bool
    interleaved: bool
    biased: bool

    @classmethod
    def of(cls, module: nn.Module) -> "ExpertsLayout":
        """Read the flags of a decorated experts module.

        Raises:
            UnsupportedExpertsError: the module is not decorated, or normalises the output of each
                expert.
        """
        name = type(module).__name__
        if not is_experts(module):
            raise UnsupportedExpertsError(
                f"{name} is not behind transformers' experts interface: it has no is_transposed "
                "and has_gate, so nothing says how its weights are laid out or what it computes "
                "between them"
            )
        if getattr(module, "has_post_expert_norm", False):
            raise UnsupportedExpertsError(
                f"{name} normalises the output of each expert before the routing weight, which "
                "this layer has no step for; use experts_implementation='grouped_mm'"
            )
        gated = bool(module.has_gate)
        return cls(
            up="gate_up_proj" if gated else "up_proj",
            down="down_proj",
            gated=gated,
            transposed=bool(module.is_transposed),
            interleaved=not getattr(module, "is_concatenated", True),
            biased=bool(getattr(module, "has_bias", False)),
        )

    @property
    def projections(self) -> tuple[str, str]:
        """Names of both parameters, in the order of their use."""
        return self.up, self.down


def is_experts(module: nn.Module) -> bool:
    """Whether transformers' experts interface decorated the class of `module`."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Dotted name -> experts module, in the order of the model.

    Raises:
        UnsupportedExpertsError: a module holds stacks of experts but is not decorated, or needs
            more.
        ValueError: there is no experts module at all.
    """
    found = {}
    for name, module in model.named_modules():
        if is_experts(module) or _holds_stacks(module):
            ExpertsLayout.of(module)
            found[name] = module
    if not found:
        raise ValueError(f"{type(model).__name__} holds no experts module with fused 3-D weights")
    return found


def implementation(module: nn.Module) -> str | None:
    """The experts implementation that the configuration of `module` selects."""
    return getattr(getattr(module, "config", None), "_experts_implementation", None)


def stored_weight(module: nn.Module, name: str) -> StoredExperts:
    """The experts under `name` as they are stored; decodes nothing.

    Raises:
        RuntimeError: PEFT has put W + B A in the parameter's place, or a sharded parameter was not
            gathered.
        AttributeError, TypeError, ValueError: as `scattermoe_lora.quant.stored_experts`.
    """
    if _under_peft(module, name):
        raise RuntimeError(
            f"PEFT has replaced {type(module).__name__}.{name} by its sum with the adapter; call "
            f"{KEY}.integrations.peft.attach(model) once, so that the adapter is used in factored "
            "form"
        )
    _four_bit.follow(module, name)
    stored = stored_experts(module, name)
    if isinstance(stored, Dense) and isinstance(stored.data, DTensor):
        raise RuntimeError(
            f"{type(module).__name__}.{name} is a sharded DTensor of shape "
            f"{list(stored.data.shape)}: shard "
            "the decoder layer with fully_shard, so that its experts are gathered before they are "
            "used"
        )
    return stored


def projection_weight(
    module: nn.Module, name: str, layout: ExpertsLayout
) -> tuple[Tensor | StoredWeight, torch.dtype]:
    """The weight [experts, in, out] of a projection and the dtype that it is computed in.

    A dense parameter is a view of it; stored experts are decoded block by block where they are
    used.

    Raises:
        RuntimeError, AttributeError, TypeError, ValueError: as `stored_weight`.
    """
    stored = stored_weight(module, name)
    if isinstance(stored, Dense):
        return stored.data if layout.transposed else stored.data.mT, stored.dtype
    one = math.prod(stored.shape) * stored.dtype.itemsize
    weight = StoredWeight(
        stored=stored, transposed=not layout.transposed, budget_bytes=max(DECODED_BYTES, one)
    )
    return weight, stored.dtype


def bias_of(module: nn.Module, name: str, layout: ExpertsLayout) -> Tensor | None:
    """The bias [experts, out] of a projection, or None."""
    return getattr(module, f"{name}_bias") if layout.biased else None


def _under_peft(module: nn.Module, name: str) -> bool:
    lists = module._modules.get("parametrizations")
    entries = lists._modules.get(name) if lists is not None else None
    if entries is None:
        return False
    return any(type(entry).__module__.partition(".")[0] == "peft" for entry in entries.children())


def _holds_stacks(module: nn.Module) -> bool:
    names = ("gate_up_proj", "down_proj", "up_proj")
    return any(
        parameter is not None and parameter.ndim == 3 and name in names
        for name, parameter in module._parameters.items()
    )
