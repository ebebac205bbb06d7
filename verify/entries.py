"""Kernels that are compiled ahead and timed by their entry in `verify.specs` alone, at whatever
sizes are asked for.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from .cases import Case
from .inputs import Inputs
from .spec import KernelSpec
from .specs import KERNELS

_NAMED_OTHERWISE = frozenset(
    {
        *("routing", "scatter2scatter", "shrink", "lora_forward", "lora_input_grad"),
        *("lora_weight_grad", "group", "combine", "glu_forward", "glu_backward"),
        "dequantize_four_bit",
    }
)
"""Kernels whose benchmarks have names of their own, in `bench_cases`."""
_UNSIZED = frozenset({"dequantize_scaled"})
"""Kernels whose cases say by name how their operands are stored: other sizes have no inputs."""

BY_ENTRY: Mapping[str, KernelSpec] = {
    spec.name: spec
    for spec in KERNELS
    if spec.source.startswith("ops/") and spec.name not in _NAMED_OTHERWISE | _UNSIZED
}
"""By name, the kernels of which nothing but their entry says how they are timed."""


def sized(
    spec: KernelSpec,
    *,
    tokens: int,
    experts: int,
    top_k: int,
    k_in: int,
    n_out: int,
    rank: int,
) -> Case:
    """The first case of a kernel at other sizes; one that has no rank is given some."""
    return replace(
        spec.cases[0],
        name="sized",
        tokens=tokens,
        experts=experts,
        top_k=top_k,
        k_in=k_in,
        n_out=n_out,
        rank=max(rank, 1),
    )


def dtype_of(spec: KernelSpec) -> torch.dtype:
    """What a kernel is timed and compiled in: bf16 where it takes that."""
    return torch.bfloat16 if torch.bfloat16 in spec.dtypes else spec.dtypes[0]


def inputs_of(
    spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device, *, seed: int = 0
) -> Inputs:
    """Inputs of a kernel in the first of its modes."""
    return spec.inputs(case, dtype, spec.modes[0], device, seed=seed)


def prepared(spec: KernelSpec, lib: ModuleType, inputs: Inputs) -> Inputs:
    """The inputs with what the kernel is given besides."""
    return inputs if spec.prepare is None else replace(inputs, prepared=spec.prepare(lib, inputs))


def plan_of(spec: KernelSpec, lib: ModuleType, inputs: Inputs) -> Any:
    """The plan that a kernel is timed and compiled with: the first that it offers."""
    return spec.plans(lib, inputs)[0].plan
