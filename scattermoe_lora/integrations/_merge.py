"""Merging adapters into expert weights, and back.

    merged = round(W + sum of s_i B_i A_i)        summed in fp32, expert by expert, rounded once

The base is kept, in host memory where the model is on another device, and put back as it was:
nothing is ever subtracted. Every merge starts from the kept base, so that merging a second adapter
rounds once as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..quant import Dense, StoredExperts
from ..weights import LoRAWeights
from . import _four_bit
from ._experts import ExpertsLayout, stored_weight
from ._factors import adapter_factors

_KEPT = "_kept_base"


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRow:
    """A merged parameter; requantization_error: ||quantised - merged|| / ||merged||, or None."""

    module: str
    parameter: str
    adapters: tuple[str, ...]
    requantization_error: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What a merge did, one row per parameter."""

    rows: tuple[MergeRow, ...]

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            error = row.requantization_error
            note = "" if error is None else f", quantised again with relative error {error:.2e}"
            names = ", ".join(row.adapters) or "nothing"
            lines.append(f"{row.module}.{row.parameter}: merged {names}{note}")
        return "\n".join(lines)


def merge_wrapper(
    wrapper: Any,
    names: Sequence[str],
    *,
    check: bool = False,
    keep: bool = True,
    requantize: bool = False,
) -> float | None:
    """Merge adapters `names`, beside those merged already, into the parameter of one wrapper.

    requantize: quantise the result in the format of its base, also where it has been dense since an
    earlier merge and there is no further name.

    Returns:
        The error of quantising again, or None where the merged parameter is dense.

    Raises:
        ValueError: check, and the merged weights are not finite.
    """
    names = [name for name in names if name in wrapper.lora_A]
    experts, parameter = wrapper.get_base_layer(), wrapper.parameter_name
    kept = wrapper.__dict__.get(_KEPT)
    decoded = kept is not None and kept.four_bit is not None
    dense = decoded and _four_bit.parametrised(experts, parameter) is None
    if not names and not (requantize and dense):
        return None
    transposed = ExpertsLayout.of(experts).transposed
    if kept is None:
        kept = Kept.of(experts, parameter)
    loras = [
        adapter_factors(wrapper, name, transposed=transposed)
        for name in (*wrapper.merged_adapters, *names)
    ]
    merged = merged_weight(kept.stored(experts, parameter), loras, transposed=transposed)
    if check and not bool(torch.isfinite(merged).all()):
        raise ValueError(
            f"adapters {', '.join(names)} make {type(experts).__name__}.{parameter} infinite or NaN"
        )
    if keep:
        wrapper.__dict__[_KEPT] = kept.on_host()
    error = None
    if requantize and kept.four_bit is not None:
        error = _four_bit.replace(experts, parameter, merged, like=kept.four_bit)
    else:
        _put_dense(experts, parameter, merged)
    wrapper.merged_adapters.extend(names)
    return error


def unmerge_wrapper(wrapper: Any) -> None:
    """Put the kept base back."""
    kept = wrapper.__dict__.pop(_KEPT, None)
    if kept is not None:
        kept.put_back(wrapper.get_base_layer(), wrapper.parameter_name)
    wrapper.merged_adapters.clear()


@torch.no_grad()
def merged_weight(
    stored: StoredExperts, loras: Sequence[LoRAWeights], *, transposed: bool
) -> Tensor:
    """round(W + sum of s B A) as stored, [experts, d1, d2]; one expert at a time in fp32."""
    out = torch.empty((stored.experts, *stored.shape), dtype=stored.dtype, device=stored.device)
    with torch.autocast(stored.device.type, enabled=False):
        for expert in range(stored.experts):
            total = stored.dense(range(expert, expert + 1), dtype=torch.float32)[0]
            for lora in loras:
                delta = lora.scaling * (lora.b[expert].float() @ lora.a[expert].float())
                total = total + (delta.mT if transposed else delta)
            out[expert] = total
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A base as it was before a merge: dense, or packed bytes with what decodes them."""

    data: Tensor
    device: torch.device
    four_bit: _four_bit.Parametrised | None = None

    @classmethod
    def of(cls, experts: nn.Module, parameter: str) -> "Kept":
        """The base that an experts module holds now."""
        four_bit = _four_bit.parametrised(experts, parameter)
        if four_bit is not None:
            return cls(data=four_bit.packed, device=four_bit.packed.device, four_bit=four_bit)
        stored = stored_weight(experts, parameter)
        if not isinstance(stored, Dense):
            raise TypeError(
                f"{type(experts).__name__}.{parameter} is stored as {type(stored).__name__}, into "
                "which adapters cannot be merged"
            )
        if stored.device.type == "meta":
            raise ValueError(
                f"{type(experts).__name__}.{parameter} is on the meta device, where it has no "
                "values: load the model without offloading to merge into it"
            )
        return cls(data=stored.data.detach(), device=stored.device)

    def on_host(self) -> "Kept":
        """The same in host memory; packed bytes stay where they are."""
        if self.four_bit is not None:
            return self
        return Kept(data=self.data.to("cpu"), device=self.device)

    def stored(self, experts: nn.Module, parameter: str) -> StoredExperts:
        """The base, where the module is."""
        if self.four_bit is not None:
            return self.four_bit.on(_device(experts, parameter)).stored()
        now = stored_weight(experts, parameter)
        return Dense(data=self.data.to(now.device, now.dtype))

    def put_back(self, experts: nn.Module, parameter: str) -> None:
        """Make the module hold this base again."""
        if self.four_bit is not None:
            here = self.four_bit.on(_device(experts, parameter))
            _four_bit.restore(experts, parameter, here)
        else:
            parameter_now = experts._parameters[parameter]
            assert parameter_now is not None
            parameter_now.data = self.data.to(parameter_now.device, parameter_now.dtype)


def _device(experts: nn.Module, parameter: str) -> torch.device:
    """Where the experts are now, dense or packed."""
    packed = _four_bit.parametrised(experts, parameter)
    return packed.packed.device if packed is not None else stored_weight(experts, parameter).device


def _put_dense(experts: nn.Module, parameter: str, merged: Tensor) -> None:
    if _four_bit.parametrised(experts, parameter) is not None:
        _four_bit.remove(experts, parameter)
        setattr(experts, parameter, nn.Parameter(merged, requires_grad=False))
        return
    present = experts._parameters[parameter]
    assert present is not None
    present.data = merged
