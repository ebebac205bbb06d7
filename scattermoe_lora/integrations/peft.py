"""PEFT's adapters on expert parameters, used in factored form.

    model = adapt(model, LoraConfig(r=16, lora_alpha=32))      # get_peft_model and attach in one
    print(coverage(model))

PEFT replaces W by W + s B A before the experts run, twice per forward, and then computes a dense
gradient of W. An attached wrapper passes (A, B, s) to the experts instead. Everything else stays
PEFT's: parameters, their names, `disable_adapter`, `set_adapter`, `save_pretrained`. `detach`
undoes it.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import layer as peft_layer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from . import _merge
from ._checkpoints import expect_adapter, load_factors, new_wrappers, written_version
from ._coverage import AdapterRow, Coverage, ParameterRow, check_targets, coverage_of
from ._experts import KEY, ExpertsLayout, experts_modules, implementation
from ._factors import active_factors
from ._four_bit import parametrised
from ._merge import MergeReport, MergeRow
from ._wrappers import (
    WrapperChain,
    nest_as_found,
    nest_by_projection,
    take_off,
    tuner_layers,
    without_wrappers,
    wrapper_chains,
)

__all__ = [
    "AdapterRow",
    "Coverage",
    "MergeReport",
    "MergeRow",
    "ParamWrapper",
    "ParameterRow",
    "adapt",
    "attach",
    "coverage",
    "detach",
    "expert_parameters",
    "load_adapter",
    "merge",
    "unmerge",
]


# PEFT knows its wrapper by the name of the class when it adds a second adapter.
class ParamWrapper(peft_layer.ParamWrapper):
    """PEFT's wrapper of one expert parameter, passing its adapter on as factors.

    `attach` changes the class of PEFT's wrappers to this one and `detach` changes it back:
    parameters, buffers and hooks stay the same objects.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The wrapped experts on x, given the active adapters.

        Raises:
            ValueError: what PEFT refuses, a batch of mixed adapters for one.
            RuntimeError: another implementation runs on quantised experts, where PEFT's sum goes
                wrong.
        """
        experts = self.get_base_layer()
        if implementation(experts) != KEY:
            _check_peft_is_right(experts, self.parameter_name)
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        layout = ExpertsLayout.of(experts)
        adapters = dict(kwargs.pop("adapters", {}))
        lora = active_factors(self, transposed=layout.transposed)
        if lora is not None:
            adapters[self.parameter_name] = lora
        return self.base_layer(x, *args, adapters=adapters, **kwargs)

    def merge(
        self,
        safe_merge: bool = False,  # noqa: FBT001, FBT002 - PEFT's signature
        adapter_names: list[str] | None = None,
    ) -> None:
        """Put round(W + sum of s B A), summed in fp32, in the place of W, and keep W.

        Quantised experts become dense; `integrations.peft.merge` can quantise them again.

        Raises:
            ValueError: safe_merge, and the sum is not finite.
        """
        names = check_adapters_to_merge(self, adapter_names)
        _merge.merge_wrapper(self, names, check=safe_merge)

    def unmerge(self) -> None:
        """Put the kept W back, bit for bit."""
        _merge.unmerge_wrapper(self)

    def unload_and_optionally_merge_module(
        self,
        merge: bool,  # noqa: FBT001 - PEFT's signature
        safe_merge: bool,  # noqa: FBT001
        adapter_names: list[str] | None,
    ) -> nn.Module:
        """The experts without wrappers, merged for good where asked; no base is kept then."""
        wrapper: Any = self
        while isinstance(wrapper, peft_layer.ParamWrapper):
            if merge and isinstance(wrapper, ParamWrapper):
                names = check_adapters_to_merge(wrapper, adapter_names)
                _merge.merge_wrapper(wrapper, names, check=safe_merge, keep=False)
            elif merge:
                wrapper.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            wrapper = wrapper.base_layer
        return self.get_base_layer()


def expert_parameters(
    model: nn.Module, projections: Sequence[str] = ("gate_up_proj", "up_proj", "down_proj")
) -> list[str]:
    """Full names of the experts' parameters, for `LoraConfig(target_parameters=...)`.

    Full names are what PEFT needs to find quantised parameters; they serve dense ones as well. They
    are those of the model without adapters.

    Raises:
        ValueError: no experts module has such a parameter.
        UnsupportedExpertsError: as `experts_modules`.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    names = [
        f"{without_wrappers(name)}.{parameter}"
        for name, module in experts_modules(base).items()
        for parameter in ExpertsLayout.of(module).projections
        if parameter in projections
    ]
    if not names:
        raise ValueError(f"no experts module has a parameter named {' or '.join(projections)}")
    return names


def adapt(model: nn.Module, config: LoraConfig, *, adapter_name: str = "default") -> PeftModel:
    """`get_peft_model` and `attach` in one, on dense or packed experts.

    Args:
        config: its target_parameters may be short names, as on dense models; without any, and
            without target_modules, every expert parameter is adapted. It is not changed.

    Raises:
        TypeError: config is no LoraConfig.
        ValueError, UnsupportedExpertsError: as `attach`, and what PEFT refuses; the model is as it
            was then.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config must be a peft.LoraConfig, got {type(config).__name__}")
    config = copy.deepcopy(config)
    if not config.target_parameters and not config.target_modules:
        config.target_modules = []
        config.target_parameters = expert_parameters(model)
    with _new_adapter(model, config, adapter_name) as adapted:
        attach(adapted)
    return adapted


def attach(model: nn.Module) -> Coverage:
    """Use every adapter on an expert parameter of `model` in factored form from now on. Idempotent.

    Wrappers of one experts module are nested in the order of the projections, innermost first, as
    PEFT nests them on dense models: on quantised ones PEFT nests them the other way round, and a
    checkpoint tells wrappers apart by their depth alone. Adapters on other parameters, a router for
    one, stay PEFT's.

    Returns:
        Which parameters are adapted, with which ranks; print it.

    Raises:
        ValueError: no adapter is on an expert parameter; an entry of target_parameters matched
            nothing, or a setting is one that PEFT ignores there; the experts implementation is
            another; or PEFT has merged an adapter, so that W is not known.
        UnsupportedExpertsError: an adapter is on experts that this layer does not compute.
    """
    chains = wrapper_chains(model)
    check_targets(model)
    if not any(chain.adapting for chain in chains):
        raise ValueError(
            f"{type(model).__name__} has no adapter on an expert parameter; name them in "
            f"LoraConfig(target_parameters=...), see {KEY}.integrations.peft.expert_parameters"
        )
    for chain in chains:
        _check(chain)
    for chain in chains:
        nest_by_projection(chain)
        for wrapper in chain.adapting:
            wrapper.__class__ = ParamWrapper
    return coverage(model)


def detach(model: nn.Module) -> None:
    """Give every wrapper back to PEFT, nested as PEFT had nested them.

    Raises:
        ValueError: an adapter is merged; unmerge first, since PEFT would subtract what was rounded.
    """
    chains = wrapper_chains(model)
    for chain in chains:
        for wrapper in chain.adapting:
            if isinstance(wrapper, ParamWrapper) and wrapper.merged:
                raise ValueError(
                    f"{', '.join(wrapper.merged_adapters)} is merged into {chain.name}."
                    f"{wrapper.parameter_name}; unmerge before detaching"
                )
    for chain in chains:
        nest_as_found(chain)
        for wrapper in chain.adapting:
            wrapper.__class__ = peft_layer.ParamWrapper


def coverage(model: nn.Module) -> Coverage:
    """Which expert parameters of `model` are adapted, and how.

    Raises:
        ValueError, UnsupportedExpertsError: as `experts_modules`.
    """
    return coverage_of(model, wrapper_chains(model))


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    adapter_name: str = "default",
    trainable: bool = False,
    written_by: str | None = None,
) -> PeftModel:
    """Load an adapter that any version of PEFT wrote, on dense or packed experts, and attach it.

    PEFT itself reads only the layout of its own version, and pairs factors with parameters by the
    nesting of its wrappers. `save_pretrained` of an attached model writes what PEFT expects on a
    dense model.

    Args:
        model: with or without adapters. trainable: train the adapter on.
        written_by: the version of PEFT that wrote the checkpoint, where it does not say.

    Raises:
        FileNotFoundError: the directory holds no adapter.
        ValueError: the adapter is not LoRA; the version is not known; factors and parameters do not
            fit; or as `attach`. The model is as it was then.
    """
    directory = Path(directory)
    expect_adapter(directory)
    version = written_version(directory, written_by)
    config = PeftConfig.from_pretrained(str(directory))
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"the adapter in {directory} has a {type(config).__name__}, and only LoRA is on experts"
        )
    config.inference_mode = not trainable
    if not config.target_modules:
        # They had no effect on what PEFT wrote.
        config.layers_to_transform = config.exclude_modules = None
        config.use_qalora = False
    with _new_adapter(model, config, adapter_name) as adapted:
        attach(adapted)
        load_factors(adapted, directory, adapter_name, version)
    return adapted


def merge(
    model: nn.Module, adapters: Sequence[str] | None = None, *, requantize: bool = False
) -> MergeReport:
    """Merge adapters into every attached expert parameter: round(W + sum of s B A), summed in fp32.

    Args:
        adapters: names; the active ones by default. Adapters that are merged already stay merged.
        requantize: quantise merged experts again, in their own format; the report states the error
            that this adds. Otherwise quantised experts become dense, and stay so until unmerged, or
            until a merge, of nothing further too, quantises them again.

    Raises:
        ValueError: nothing is attached, or a name is that of no adapter on an expert parameter.
    """
    rows, attached = [], list(_attached(model))
    chosen = [adapters] if isinstance(adapters, str) else adapters
    known = sorted({name for _, wrapper in attached for name in wrapper.lora_A})
    if unknown := [name for name in chosen or () if name not in known]:
        raise ValueError(
            f"adapters to merge: {', '.join(map(repr, unknown))} is none of {', '.join(known)}"
        )
    for name, wrapper in attached:
        names = check_adapters_to_merge(wrapper, None if chosen is None else list(chosen))
        error = _merge.merge_wrapper(wrapper, names, requantize=requantize)
        rows.append(
            MergeRow(
                module=name,
                parameter=wrapper.parameter_name,
                adapters=tuple(wrapper.merged_adapters),
                requantization_error=error,
            )
        )
    return MergeReport(rows=tuple(rows))


def unmerge(model: nn.Module) -> None:
    """Put the base of every merged expert parameter back, bit for bit.

    Raises:
        ValueError: nothing is attached.
    """
    for _, wrapper in _attached(model):
        if wrapper.merged:
            wrapper.unmerge()


@contextmanager
def _new_adapter(model: nn.Module, config: PeftConfig, adapter_name: str) -> Iterator[PeftModel]:
    """PEFT's wrappers for a configuration, taken off again where the body fails."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    before = tuner_layers(model)
    present = set(model.peft_config) if isinstance(model, PeftModel) else None
    try:
        yield new_wrappers(model, config, adapter_name)
    except BaseException:
        if present is None:
            # PEFT marks the model that it wraps.
            vars(model).pop("peft_config", None)
        elif adapter_name not in present:
            _forget(model, adapter_name)
        take_off(model, keep=before)
        for parameter, trains in trained:
            parameter.requires_grad_(trains)
        raise


def _forget(model: Any, adapter_name: str) -> None:
    """Take an adapter off, also one that PEFT has not added everywhere."""
    if adapter_name in model.peft_config:
        model.delete_adapter(adapter_name)
        return
    for module in tuner_layers(model):
        module.delete_adapter(adapter_name)


def _attached(model: nn.Module) -> Iterator[tuple[str, ParamWrapper]]:
    found = [
        (chain.name, wrapper)
        for chain in wrapper_chains(model)
        for wrapper in chain.wrappers
        if isinstance(wrapper, ParamWrapper)
    ]
    if not found:
        raise ValueError(
            f"no adapter of {type(model).__name__} is attached; call "
            f"{KEY}.integrations.peft.attach(model)"
        )
    return iter(found)


def _check(chain: WrapperChain) -> None:
    if implementation(chain.experts) != KEY:
        raise ValueError(
            f"the experts implementation of {chain.name} is {implementation(chain.experts)!r}; "
            f"call model.set_experts_implementation({KEY!r}) before attaching"
        )
    for wrapper in chain.adapting:
        if not isinstance(wrapper, ParamWrapper) and wrapper.merged:
            raise ValueError(
                f"PEFT has merged {', '.join(wrapper.merged_adapters)} into {chain.name}."
                f"{wrapper.parameter_name} and kept no copy of the base; unmerge before attaching"
            )


def _check_peft_is_right(experts: nn.Module, name: str) -> None:
    if parametrised(experts, name) is not None:
        raise RuntimeError(
            f"{type(experts).__name__}.{name} is quantised and the experts implementation is "
            f"{implementation(experts)!r}: PEFT drops or accumulates adapters there. Use "
            f"model.set_experts_implementation({KEY!r})"
        )
