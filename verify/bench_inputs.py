"""The tensors of a benchmark, drawn on its device: terms of like size, weights stored as models
store them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bench_cases import PROJECTIONS, BenchCase, choices
from .entries import BY_ENTRY, inputs_of
from .inputs import Inputs
from .references_quant import FourBitProblem, draw_four_bit, four_bit

SCALING = 1.7
BLOCK = 64
OUTER_BLOCK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Tensors by name.

    Projection: top_k_index int64 [T, k], x and dy in the row orders of the case, weight [E, K, N]
    stored as [E, N, K], lora_a [E, R, K], lora_b [E, N, R]. Layer: x, dout [T, H], gates [T, k],
    and the weights and factors of each projection with its name behind theirs. stored: packed
    tensors of 4-bit projections. inputs: of a kernel that is timed by its entry.
    """

    case: BenchCase
    tensors: Mapping[str, Tensor]
    stored: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    inputs: Inputs | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def of(self, projection: str) -> dict[str, Tensor]:
        """weight, lora_a and lora_b of one projection of a layer."""
        end = f"_{projection}"
        return {k.removesuffix(end): v for k, v in self.tensors.items() if k.endswith(end)}


@dataclass(frozen=True, slots=True)
class _Source:
    generator: torch.Generator
    device: torch.device
    dtype: torch.dtype

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        value = torch.empty(shape, dtype=self.dtype, device=self.device)
        return value.normal_(generator=self.generator).mul_(scale)

    def projection(self, experts: int, k: int, n: int, rank: int) -> dict[str, Tensor]:
        """A frozen stack and, with a rank, an adapter whose term is as large as the stack's."""
        drawn = {"weight": self(experts, n, k, scale=k**-0.5).mT}
        if rank:
            drawn["lora_a"] = self(experts, rank, k, scale=k**-0.5)
            drawn["lora_b"] = self(experts, n, rank, scale=rank**-0.5 / SCALING)
        return drawn


def draw(case: BenchCase, device: torch.device, *, seed: int = 0) -> Drawn:
    """The tensors that all cases with the same `inputs_key` share."""
    case = case.inputs_key
    generator = torch.Generator(device=device).manual_seed(seed + 1)
    source = _Source(generator, device, case.torch_dtype)
    shape = case.shape
    if case.kind == "dequant":
        return Drawn(case=case, tensors={}, stored={case.projection: stored(case, device, seed)})
    tensors = {"top_k_index": choices(case, seed).to(device)}
    if case.by_entry:
        inputs = inputs_of(BY_ENTRY[case.what], case.case, case.torch_dtype, device, seed=seed)
        return Drawn(case=case, tensors=tensors, inputs=inputs.having(**tensors))
    if case.projection:
        k, n = shape.widths(case.projection)
        tensors |= source.projection(shape.experts, k, n, case.rank)
        tensors["x"] = source(case.tokens if case.projection == "gate_up" else case.rows, k)
        tensors["dy"] = source(case.rows, n)
        return Drawn(case=case, tensors=tensors)
    tensors["x"] = source(case.tokens, shape.hidden)
    tensors["dout"] = source(case.tokens, shape.hidden)
    gates = torch.rand(case.tokens, shape.top_k, generator=generator, device=device)
    tensors["gates"] = (gates + 0.25).to(case.torch_dtype)
    if case.kind == "kernel":
        tensors["h"] = source(case.rows, 2 * shape.intermediate)
        tensors["dact"] = source(case.rows, shape.intermediate)
        tensors["y"] = source(case.rows, shape.hidden)
        return Drawn(case=case, tensors=tensors)
    packed: dict[str, dict[str, Tensor]] = {}
    for name in PROJECTIONS:
        k, n = shape.widths(name)
        drawn = source.projection(shape.experts, k, n, case.rank)
        if case.kind == "qlora-layer":
            packed[name] = stored(case, device, seed, projection=name)
            drawn["weight"] = decoded(case, packed[name], name).mT
        tensors |= {f"{key}_{name}": value for key, value in drawn.items()}
    return Drawn(case=case, tensors=tensors, stored=packed)


def problem_of(case: BenchCase, projection: str) -> FourBitProblem:
    """What a 4-bit stack of a projection is."""
    k, n = case.shape.widths(projection)
    outer = OUTER_BLOCK if case.what == "nf4-nested" else 0
    return FourBitProblem(
        experts=case.shape.experts, shape=(n, k), blocksize=BLOCK, outer_blocksize=outer
    )


def stored(
    case: BenchCase, device: torch.device, seed: int, *, projection: str = ""
) -> dict[str, Tensor]:
    """A 4-bit stack whose dense form has a standard deviation of about K^-1/2."""
    projection = projection or case.projection
    problem = problem_of(case, projection)
    tensors = draw_four_bit(problem, seed=seed, device=device)
    if not problem.outer_blocksize:
        generator = torch.Generator(device=device).manual_seed(seed + 2)
        scale = torch.rand(problem.blocks, generator=generator, device=device) + 0.5
        tensors["absmax"] = scale.mul_(1.6 * problem.shape[1] ** -0.5)
    return tensors


def decoded(case: BenchCase, tensors: Mapping[str, Tensor], projection: str) -> Tensor:
    """What a 4-bit stack stands for, [E, N, K]."""
    return four_bit(tensors, problem_of(case, projection), dtype=case.torch_dtype)
