"""4-bit experts: while a model loads, of a model that is loaded, and saved and loaded again.

    import scattermoe_lora.integrations.bitsandbytes as bnb
    model = AutoModelForCausalLM.from_pretrained(
        name,
        quantization_config=bnb.ExpertsQuantizationConfig(),
        experts_implementation="scattermoe_lora",
    )
    model.save_pretrained(path)      # packed bytes and statistics, bit for bit

transformers' own BitsAndBytesConfig leaves stacks of experts in 16 bits. This one packs each stack
as it arrives, so that one stack is dense on the device at a time, and by default packs linear
layers as BitsAndBytesConfig does. Importing this module registers the format with transformers,
which reading a saved model needs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb4bitQuantize
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from . import _four_bit
from ._experts import KEY, ExpertsLayout, experts_modules, is_experts, stored_weight

__all__ = [
    "METHOD",
    "ExpertsQuantizationConfig",
    "ExpertsQuantizer",
    "QuantizationReport",
    "QuantizationRow",
    "placement",
    "quantize_experts",
    "register",
]

METHOD = f"{KEY}_4bit"
"""The name of the format in a saved configuration."""

PARTS = ("data", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state")
"""What a packed stack is saved as, each under `four_bit_<parameter>_<part>`."""


class ExpertsQuantizationConfig(BitsAndBytesConfig):
    """4-bit experts, and 4-bit linear layers unless `linears` is false.

    Args:
        linears: pack linear layers too, as BitsAndBytesConfig(load_in_4bit=True) does.
        experts_blocksize: elements per scale of the experts.
        experts_quant_type, experts_nested: as bnb_4bit_quant_type and bnb_4bit_use_double_quant,
            which they follow by default, for the experts.
        settings: those of BitsAndBytesConfig; bnb_4bit_quant_type is "nf4" here by default.

    Raises:
        ValueError: load_in_8bit, or a type or blocksize that bitsandbytes does not have.
    """

    def __init__(
        self,
        *,
        linears: bool = True,
        experts_blocksize: int = 64,
        experts_quant_type: str | None = None,
        experts_nested: bool | None = None,
        **settings: Any,
    ) -> None:
        settings.pop("quant_method", None)
        if settings.pop("load_in_8bit", False):
            raise ValueError("experts are stored in 4 bits; load_in_8bit is for linear layers only")
        settings["load_in_4bit"] = True
        settings.setdefault("bnb_4bit_quant_type", "nf4")
        settings.setdefault("bnb_4bit_compute_dtype", torch.bfloat16)
        super().__init__(**settings)
        self.quant_method = METHOD
        self.linears = linears
        self.experts_blocksize = experts_blocksize
        self.experts_quant_type = experts_quant_type or self.bnb_4bit_quant_type
        self.experts_nested = (
            self.bnb_4bit_use_double_quant if experts_nested is None else experts_nested
        )
        _four_bit.check_settings(self.experts_quant_type, self.experts_blocksize)

    def to_dict(self) -> dict[str, Any]:
        """As saved, without the load_in_* flags, by which transformers knows its own format."""
        hidden = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")
        return {key: value for key, value in super().to_dict().items() if key not in hidden}

    def to_diff_dict(self) -> dict[str, Any]:
        """Every setting: none is left to the defaults of another version."""
        return self.to_dict()


class PackExperts(ConversionOps):
    """Packs a stack of experts where it is loaded to; other parameters as bitsandbytes does."""

    def __init__(self, quantizer: "ExpertsQuantizer") -> None:
        self.quantizer = quantizer
        self.linear = Bnb4bitQuantize(quantizer)

    def convert(
        self, input_dict: dict[str, Any], *args: Any, model: nn.Module, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Full name -> packed parameter."""
        results: dict[str, Tensor] = {}
        for name, values in input_dict.items():
            value = values[0] if isinstance(values, list) else values
            if self.quantizer.is_stack(model, name):
                results[name] = self.quantizer.pack(name, value)
            else:
                results |= self.linear.convert({name: value}, *args, model=model, **kwargs)
        return results


class ExpertsQuantizer(Bnb4BitHfQuantizer):
    """transformers' quantiser of `ExpertsQuantizationConfig`."""

    def __init__(self, quantization_config: ExpertsQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.device: torch.device | None = None
        self.states: dict[str, Any] = {}

    def update_device_map(self, device_map: Any) -> Any:
        """One device, where one process loads the whole model; see `placement`."""
        sharded = is_fsdp_enabled() or is_deepspeed_zero3_enabled()
        placed = placement(device_map, device=local_device(), sharded=sharded)
        devices = set(placed.values()) if isinstance(placed, dict) else set()
        self.device = torch.device(devices.pop()) if len(devices) == 1 else None
        return placed

    def is_stack(self, model: nn.Module, name: str) -> bool:
        """Whether a dotted name is that of an expert parameter."""
        path, _, parameter = name.rpartition(".")
        module = model.get_submodule(path)
        return is_experts(module) and parameter in ExpertsLayout.of(module).projections

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Stacks of experts and the parts of packed ones, and linear layers where asked."""
        path, _, parameter = param_name.rpartition(".")
        if is_experts(model.get_submodule(path)):
            return self.is_stack(model, param_name) or parameter.startswith("four_bit_")
        return self.quantization_config.linears and super().param_needs_quantization(
            model, param_name, **kwargs
        )

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """As transformers', with stacks put together in host memory: the device sees each once."""
        conversions = super().update_weight_conversions(weight_conversions, *args)
        if not self.pre_quantized and self.device is not None and self.device.type != "cpu":
            for conversion in conversions:
                targets = getattr(conversion, "target_patterns", [])
                if hasattr(conversion, "force_cpu") and any("experts" in name for name in targets):
                    conversion.force_cpu = True
        return conversions

    def get_quantize_ops(self) -> ConversionOps:
        """The operation that packs a parameter as it arrives."""
        return PackExperts(self)

    def pack(self, name: str, value: Tensor) -> nn.Parameter:
        """Pack one stack, and keep its state until the model is complete."""
        settings = self.quantization_config
        packed, self.states[name] = _four_bit.quantized(
            value,
            quant_type=settings.experts_quant_type,
            blocksize=settings.experts_blocksize,
            nested=settings.experts_nested,
            device=self.device,
        )
        return nn.Parameter(packed, requires_grad=False)

    def _process_model_before_weight_loading(
        self, model: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        stacks = list(_stacks(model))
        if self.quantization_config.linears:
            super()._process_model_before_weight_loading(model, *args, **kwargs)
        if self.pre_quantized:
            for _, module, parameter in stacks:
                _expect_parts(module, parameter, nested=self.quantization_config.experts_nested)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module, parameter in _stacks(model, parts=self.pre_quantized):
            if self.pre_quantized:
                _four_bit.install_parts(module, parameter, _take_parts(module, parameter))
            else:
                packed = module._parameters[parameter]
                assert packed is not None
                _four_bit.install(module, parameter, packed.data, self.states.pop(name))
        # Reading packed linear layers has no inverse, and saving them as they are needs none.
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", [])
            if not any(
                isinstance(operation, Bnb4bitDeserialize)
                for operation in getattr(conversion, "operations", ())
            )
        ]
        if not self.quantization_config.linears:
            return model
        # bitsandbytes 0.50 repacks a layer that runs in eval mode on a CPU with AVX-512 BF16, and
        # from then on saves and decodes it wrongly.
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = False
        return super()._process_model_after_weight_loading(model, **kwargs)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Every stack dense, decoded on its device, and linear layers as transformers does it.

        dtype: a model that was saved has the name of its dtype in its configuration.
        """
        exact = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for _, module, parameter in list(_stacks(model)):
            packed = _four_bit.parametrised(module, parameter)
            if packed is not None:
                weight = _four_bit.dense(packed, exact)
                _four_bit.remove(module, parameter)
                module.register_parameter(parameter, nn.Parameter(weight, requires_grad=False))
        if self.quantization_config.linears:
            return super()._dequantize(model, dtype=exact)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict]:
        """The state to save, packed stacks under names that no conversion of transformers matches.

        Raises:
            ValueError: a stack is dense, because an adapter was merged into it; some are nested and
                some are not; or PEFT has wrapped them.
        """
        state = model.state_dict()
        if getattr(model, "_hf_peft_config_loaded", False):
            # transformers saves the adapters alone.
            return state, {}
        for name, module, parameter in list(_stacks(model)):
            packed = _four_bit.parametrised(module, parameter)
            if packed is None:
                raise ValueError(
                    f"{name} is dense although the model's format is {METHOD}: unmerge and merge "
                    "anew with requantize=True, or pack what is merged by quantize_experts, or "
                    "call dequantize() to save a model in 16 bits"
                )
            if ".base_layer." in f".{name}":
                raise ValueError(
                    f"{name} is wrapped by PEFT, under whose names no base model is read: save "
                    "adapters by the PeftModel, and the base before they are added or after "
                    "unload()"
                )
            if packed.state.nested != self.quantization_config.experts_nested:
                raise ValueError(
                    f"some experts have nested scales and others plain ones, {name} "
                    f"{'nested' if packed.state.nested else 'plain'}: a saved model has one kind"
                )
            prefix = name.removesuffix(parameter)
            for key in [key for key in state if key == name or key.startswith(f"{name}.")]:
                del state[key]
            parts = _four_bit.parts(packed)
            state |= {f"{prefix}{_part(parameter, part)}": parts[part] for part in parts}
        return state, {}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationRow:
    """One packed parameter and ||decoded - dense|| / ||dense||."""

    name: str
    relative_error: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationReport:
    """What `quantize_experts` did, one row per parameter."""

    rows: tuple[QuantizationRow, ...]

    def __str__(self) -> str:
        before = sum(row.bytes_before for row in self.rows)
        after = sum(row.bytes_after for row in self.rows)
        worst = max((row.relative_error for row in self.rows), default=0.0)
        return (
            f"{len(self.rows)} expert parameters: {before:,} -> {after:,} bytes, "
            f"worst relative error {worst:.3g}"
        )


def placement(device_map: Any, *, device: torch.device, sharded: bool) -> Any:
    """Where to load a model whose experts are packed on the way in.

    The planner behind "auto" counts 16 bits per element in places and sends what seems not to fit
    to the CPU or a disk, where nothing can be packed. So None and "auto" mean `device`, whole.
    Under FSDP or ZeRO-3 (`sharded`) the framework places parameters itself, and the map is left
    alone: every process packs stacks where they arrive, and FSDP shards the packed bytes like any
    frozen parameter. A stack that ZeRO-3 keeps partitioned does not have its size, which the first
    forward refuses. Any other map is what the caller wants.
    """
    if sharded:
        return device_map
    return {"": device} if device_map in (None, "auto") else device_map


def local_device() -> torch.device:
    """The accelerator of this process, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = torch.cuda.current_device()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        index = torch.distributed.get_node_local_rank(fallback_rank=index)
    return torch.device("cuda", index)


def quantize_experts(
    model: nn.Module,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    nested: bool = False,
    device: torch.device | str | None = None,
) -> QuantizationReport:
    """Pack every dense stack of experts of a loaded model, one at a time; packed ones stay.

    A model of transformers can then be saved and loaded like one that was packed while loading.

    Args:
        quant_type: "nf4" or "fp4".
        blocksize: elements per scale.
        nested: pack the scales as well.
        device: where to pack, and to leave the packed bytes; by default where each stack is.

    Raises:
        ValueError: quant_type or blocksize is none that bitsandbytes has, or there is no such
            CUDA device.
        ValueError, UnsupportedExpertsError: as `experts_modules`.
        TypeError: a stack is stored in another packed format.
    """
    _four_bit.check_settings(quant_type, blocksize)
    _expect_device(device)
    rows = []
    for name, module, parameter in list(_stacks(model)):
        if _four_bit.parametrised(module, parameter) is not None:
            continue
        stored = stored_weight(module, parameter)
        dense = module._parameters.get(parameter)
        if dense is None or not dense.dtype.is_floating_point or dense.ndim != 3:
            raise TypeError(
                f"{name} is stored as {type(stored).__name__} and cannot be packed again"
            )
        packed, state = _four_bit.quantized(
            dense.data, quant_type=quant_type, blocksize=blocksize, nested=nested, device=device
        )
        after = _four_bit.four_bit(packed, state)
        rows.append(
            QuantizationRow(
                name=name,
                relative_error=_four_bit.relative_error(after, dense.data),
                bytes_before=dense.nbytes,
                bytes_after=after.nbytes,
            )
        )
        _four_bit.install(module, parameter, packed, state)
    if rows and isinstance(model, PreTrainedModel):
        _mark(model, quant_type=quant_type, blocksize=blocksize, nested=nested)
    return QuantizationReport(rows=tuple(rows))


def _expect_device(device: torch.device | str | None) -> None:
    """Refuse a CUDA device that is not there.

    Raises:
        ValueError: torch sees fewer.
    """
    chosen = None if device is None else torch.device(device)
    if chosen is None or chosen.type != "cuda":
        return
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (chosen.index or 0) >= seen:
        raise ValueError(f"experts cannot be packed on {chosen}: torch sees {seen} CUDA devices")


def register() -> None:
    """Tell transformers of the format. Idempotent."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(ExpertsQuantizationConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(ExpertsQuantizer)


def _mark(model: PreTrainedModel, *, quant_type: str, blocksize: int, nested: bool) -> None:
    """Let transformers save the model in this format, with the linear layers as they are."""
    present: Any = getattr(model, "hf_quantizer", None)
    if isinstance(present, ExpertsQuantizer):
        # What stays packed differently is found where the model is saved.
        settings = present.quantization_config
        settings.experts_quant_type, settings.experts_blocksize = quant_type, blocksize
        settings.experts_nested = nested
        model.config.quantization_config = settings
        return
    if present is not None and type(present) is not Bnb4BitHfQuantizer:
        present.is_serializable = _Unsaved(present)
        return
    settings = {} if present is None else present.quantization_config.to_dict()
    config = ExpertsQuantizationConfig(
        **settings,
        linears=present is not None,
        experts_blocksize=blocksize,
        experts_quant_type=quant_type,
        experts_nested=nested,
    )
    model.hf_quantizer = ExpertsQuantizer(config, pre_quantized=False)
    model.config.quantization_config = config
    model.quantization_method = config.quant_method
    model.is_quantized = True


@dataclass(frozen=True, slots=True)
class _Unsaved:
    """In the place of `is_serializable` of a quantiser that knows nothing of packed experts."""

    quantizer: Any

    def __call__(self) -> bool:
        method = self.quantizer.quantization_config.quant_method
        raise ValueError(
            f"linear layers in {getattr(method, 'value', method)} beside experts in 4 bits can be "
            "used, but no format holds both: save the adapters, and pack the experts anew"
        )


def _stacks(model: nn.Module, *, parts: bool = False) -> Iterator[tuple[str, nn.Module, str]]:
    """(dotted name, experts module, parameter) of every stack; `parts`: of those in parts too."""
    modules = (
        {name: module for name, module in model.named_modules() if is_experts(module)}
        if parts
        else experts_modules(model)
    )
    for name, module in modules.items():
        for parameter in ExpertsLayout.of(module).projections:
            yield f"{name}.{parameter}" if name else parameter, module, parameter


def _part(parameter: str, part: str) -> str:
    return f"four_bit_{parameter}_{part}"


def _expect_parts(module: Any, parameter: str, *, nested: bool) -> None:
    """Buffers in the place of a stack for the loader to fill, of the dtypes that were saved."""
    del module._parameters[parameter]
    # transformers would draw random values for the parameter that is not there.
    module._is_hf_initialized = True
    for part in PARTS:
        if part.startswith("nested") and not nested:
            continue
        packed = part in ("data", "quant_state") or (part == "absmax" and nested)
        dtype = torch.uint8 if packed else torch.float32
        module.register_buffer(_part(parameter, part), torch.empty(0, dtype=dtype, device="meta"))


def _take_parts(module: nn.Module, parameter: str) -> dict[str, Tensor]:
    found = {part: module._buffers.pop(_part(parameter, part), None) for part in PARTS}
    return {part: value for part, value in found.items() if value is not None}


register()
