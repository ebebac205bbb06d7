"""Adapter checkpoints of any version of PEFT, on dense and on quantised experts.

A checkpoint names a factor by the depth of its wrapper, not by its parameter, and its layout
depends on the version that wrote it. Which parameter a pair belongs to follows from its sizes,
which gate_up and down cannot share; its layout follows from the version alone, since a square
projection has one shape either way.
"""

import json
import re
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn

from ..weights import LoRAWeights
from . import _four_bit
from ._experts import ExpertsLayout, experts_modules, stored_weight
from ._factors import to_peft, version_swaps, wrapper_swaps
from ._wrappers import WrapperChain, left_out_by, wrapper_chains

_FACTOR = re.compile(r"^(?P<path>.+?)(?P<depth>(?:\.base_layer)*)\.lora_(?P<factor>[AB])\.weight$")


def new_wrappers(model: nn.Module, config: PeftConfig, adapter_name: str) -> PeftModel:
    """PEFT's wrappers for a configuration, whose targets on expert parameters are spelled out.

    Settings that PEFT heeds for modules only, exclude_modules and layers_to_transform, hold for
    them too.

    Raises:
        ValueError: the adapter is there already; its initial values need the weight of a linear
            layer; or what PEFT refuses.
    """
    _check_initial_values(config)
    targets = full_names(model, config.target_parameters)
    if targets:
        targets = [name for name in targets if left_out_by(config, name) is None]
    config.target_parameters = targets
    if not isinstance(model, PeftModel):
        return get_peft_model(model, config, adapter_name=adapter_name)
    if adapter_name in model.peft_config:
        raise ValueError(f"the model has an adapter {adapter_name!r} already")
    # PEFT compares the targets of its adapters as they are spelled.
    for other in model.peft_config.values():
        spelled = getattr(other, "target_parameters", None)
        if targets and spelled and set(full_names(model, list(spelled)) or ()) == set(targets):
            config.target_parameters = list(spelled)
    with _dense_stand_ins(model):
        model.add_adapter(adapter_name, config)
    return model


def _check_initial_values(config: PeftConfig) -> None:
    initial = getattr(config, "init_lora_weights", True)
    wanted = isinstance(initial, str) and initial not in ("gaussian", "eva")
    if wanted and getattr(config, "target_parameters", None):
        raise ValueError(
            f"init_lora_weights={initial!r} starts from the weight of a linear layer, which a "
            "stack of experts does not have; use True, 'gaussian' or False"
        )


@contextmanager
def _dense_stand_ins(model: nn.Module) -> Iterator[None]:
    """Parameters of the shape and dtype of packed stacks in their place, without memory.

    PEFT finds no parametrised parameter once it is wrapped, and decodes others to see their sizes.
    """
    taken = []
    for module in experts_modules(model).values():
        packed = [
            name
            for name in ExpertsLayout.of(module).projections
            if _four_bit.parametrised(module, name) is not None
        ]
        if not packed:
            continue
        for name in packed:
            stored = stored_weight(module, name)
            shape = (stored.experts, *stored.shape)
            value = torch.empty((), dtype=stored.dtype, device=stored.device).expand(shape)
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
        taken.append((module, type(module), packed, module._modules.pop("parametrizations")))
        module.__class__ = type(module).__bases__[0]
    try:
        yield
    finally:
        for module, kind, packed, parametrisations in taken:
            module.__class__ = kind
            module._modules["parametrizations"] = parametrisations
            for name in packed:
                del module._parameters[name]


def full_names(model: nn.Module, targets: list[str] | None) -> list[str] | None:
    """Entries of target_parameters with those on expert parameters replaced by full names.

    PEFT finds a quantised parameter by its full name only.
    """
    if not targets:
        return targets
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    known = [
        f"{name}.{parameter}".replace(".base_layer", "")
        for name, module in experts_modules(base).items()
        for parameter in ExpertsLayout.of(module).projections
    ]
    names: list[str] = []
    for target in targets:
        matched = [name for name in known if name == target or name.endswith(f".{target}")]
        names += matched or [target]
    return list(dict.fromkeys(names))


def expect_adapter(directory: Path) -> None:
    """Refuse a directory that is no checkpoint of an adapter.

    Raises:
        FileNotFoundError: its configuration or its weights are not there.
    """
    for names in ((CONFIG_NAME,), (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        if not any((directory / name).is_file() for name in names):
            raise FileNotFoundError(f"{directory} holds no adapter: no {' or '.join(names)} in it")


def written_version(directory: Path, written_by: str | None) -> str:
    """The version of PEFT that wrote a checkpoint.

    Raises:
        ValueError: the checkpoint does not say, and `written_by` is not given.
    """
    config = json.loads((directory / CONFIG_NAME).read_text())
    version = written_by or config.get("peft_version")
    if not version:
        raise ValueError(
            f"{directory} does not say which version of PEFT wrote it, and the layout depends on "
            "it: pass written_by"
        )
    return str(version).partition("@")[0]


def load_factors(model: PeftModel, directory: Path, adapter_name: str, version: str) -> None:
    """Fill the adapter's parameters from a checkpoint.

    Raises:
        ValueError: a factor fits no parameter, or a parameter gets none.
    """
    state = load_peft_weights(str(directory), device="cpu")
    pairs: dict[str, dict[str, dict[str, Tensor]]] = {}
    chains = {chain.name: chain for chain in wrapper_chains(model)}
    rest = {}
    for key, value in state.items():
        match = _FACTOR.match(key)
        if match is None or match["path"] not in chains:
            rest[key] = value
            continue
        found = pairs.setdefault(match["path"], {}).setdefault(match["depth"], {})
        found[match["factor"]] = value
    for name, chain in chains.items():
        _fill(chain, pairs.get(name, {}), adapter_name, version)
    filled = {id(value) for chain in chains.values() for value in _factors_of(chain)}
    _fill_others(model, rest, adapter_name, filled)


def _fill_others(
    model: PeftModel, state: dict[str, Tensor], adapter_name: str, filled: Container[int]
) -> None:
    """Let PEFT fill what is on no expert parameter, from everything that is left.

    Raises:
        ValueError: something is left over, or a factor gets nothing.
    """
    modules = {name for name, _ in model.named_modules()}
    factors = [match for match in map(_FACTOR.match, state) if match is not None]
    unknown = [each.string for each in factors if each["path"] + each["depth"] not in modules]
    missing = [name for name, _ in model.named_parameters()]
    if state and not unknown:
        result = set_peft_model_state_dict(model, state, adapter_name=adapter_name)
        unknown, missing = list(result.unexpected_keys), list(result.missing_keys)
    if unknown:
        raise ValueError(f"the checkpoint holds {_some(unknown)}, which the model has no place for")
    own = {
        name: id(value)
        for name, value in model.named_parameters()
        if f".{adapter_name}." in name and "lora_" in name
    }
    missing = [name for name in missing if name in own and own[name] not in filled]
    if missing:
        raise ValueError(f"the checkpoint holds no values for {_some(missing)}")


def _factors_of(chain: WrapperChain) -> Iterator[Tensor]:
    for wrapper in chain.adapting:
        yield from wrapper.lora_A.parameters()
        yield from wrapper.lora_B.parameters()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{min(names)}{more}"


@torch.no_grad()
def _fill(
    chain: WrapperChain,
    pairs: Mapping[str, Mapping[str, Tensor]],
    adapter: str,
    version: str,
) -> None:
    transposed = ExpertsLayout.of(chain.experts).transposed
    swapped = version_swaps(version, transposed=transposed)
    waiting = [wrapper for wrapper in chain.adapting if adapter in wrapper.lora_A]
    for pair in pairs.values():
        if len(pair) < 2:
            there, absent = ("A", "B") if "A" in pair else ("B", "A")
            raise ValueError(
                f"the checkpoint holds lora_{there} without lora_{absent} for {chain.name}"
            )
        fitting = [entry for entry in waiting if _fits(entry, chain.experts, pair, swapped=swapped)]
        if len(fitting) != 1:
            sizes = {name: list(value.shape) for name, value in pair.items()}
            raise ValueError(
                f"the checkpoint holds factors of shapes {sizes} for {chain.name}, which fit "
                f"{len(fitting)} of its parameters as PEFT {version} lays them out"
            )
        wrapper = fitting[0]
        waiting.remove(wrapper)
        lora = LoRAWeights.from_peft(
            pair["A"],
            pair["B"],
            experts=wrapper.num_experts,
            scaling=1.0,
            swapped=swapped,
            transposed=transposed,
        )
        a, b = to_peft(lora, swapped=wrapper_swaps(wrapper), transposed=transposed)
        for factor, value in (("lora_A", a), ("lora_B", b)):
            parameter = getattr(wrapper, factor)[adapter].weight
            if parameter.shape != value.shape:
                raise ValueError(
                    f"the checkpoint's {factor} of {chain.name}.{wrapper.parameter_name} has shape "
                    f"{list(value.shape)}, the adapter has {list(parameter.shape)}: the rank or "
                    "the number of experts is another"
                )
            parameter.copy_(value)
    if waiting:
        names = ", ".join(wrapper.parameter_name for wrapper in waiting)
        raise ValueError(f"the checkpoint holds no factors for {names} of {chain.name}")


def _fits(wrapper: Any, experts: nn.Module, pair: Mapping[str, Tensor], *, swapped: bool) -> bool:
    first, second = stored_weight(experts, wrapper.parameter_name).shape
    a, b = (second, first) if swapped else (first, second)
    return pair["A"].shape[1] == a and pair["B"].shape[0] == b
