"""Inputs of a case: seeded, balanced, already rounded to their storage types.

balanced   base, LoRA and bias terms of unit variance each, so that no error in one hides behind
another
lora-only  weight and bias are zero: the LoRA part is judged alone
exact      sparse small integers; every partial sum is exact in fp32 and every stored intermediate
exact in
           16 bits, so that a correct kernel equals the reference bit for bit, however it tiles the
           sums
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .captured import Captured, capture
from .cases import Case
from .values import valued

MODES = ("balanced", "lora-only", "exact")
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_BIAS = 0.7
_EXACT_SCALING = -2.0
_EXACT_TERMS = 16  # products per element of X W and X A^T that are not zero
_EXACT_RANKS = 4  # ranks per element of (X A^T) B^T that are not zero


def _lora_dtype(case: Case, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if case.lora_dtype == "float32" else dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The tensors of one case in one dtype.

    Linear problems hold: top_k_index int64 [T, k]; x and dy in the row orders of the case; weight
    [E, K, N];
    bias [E, N] where the case has one; lora_a [E, R, K], lora_b [E, N, R]; gates fp32 [T, k] where
    the case is gated.
    """

    case: Case
    mode: str
    dtype: torch.dtype
    scaling: float
    tensors: Mapping[str, Tensor]
    prepared: Any = None
    """What the spec built from these inputs once for all plans, the package's Routing as a rule."""

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        """The tensor, or None if this problem has none of that name."""
        return self.tensors.get(name)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tensors["top_k_index"].device

    @property
    def lora_dtype(self) -> torch.dtype:
        """Storage type of the adapter."""
        return _lora_dtype(self.case, self.dtype)

    @property
    def narrowed(self) -> bool:
        """Whether kernels round the adapter before they multiply with it."""
        return self.lora_dtype != self.dtype

    def only(self, *names: str) -> "Inputs":
        """With the tensors of these names alone."""
        return replace(self, tensors={name: self.tensors[name] for name in names})

    def having(self, **tensors: Tensor) -> "Inputs":
        """With tensors added or replaced."""
        return replace(self, tensors={**self.tensors, **tensors})


def rows_of(case: Case, order: str) -> int:
    """Rows of an operand laid out in the row order named `order`."""
    return case.tokens if order == "TOKEN" else case.rows


def make_inputs(
    case: Case, dtype: torch.dtype, mode: str, device: torch.device, *, seed: int = 0
) -> Inputs:
    """Draw the inputs of `case`; the same arguments give the same values on the same device."""
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is none of {MODES}")
    seed = case.seed + 7919 * seed
    top_k_index = case.routing.draw(
        tokens=case.tokens, top_k=case.top_k, experts=case.experts, seed=seed
    )
    generator = torch.Generator(device=device).manual_seed(seed + 1)
    source = _Exact(generator, device) if mode == "exact" else _Normal(generator, device)
    scaling = _EXACT_SCALING if mode == "exact" else case.scaling
    tensors = source.linear(case)
    if case.family and mode != "exact":
        real = captured(case, seed)
        top_k_index = real.top_k_index
        tensors["x"] = real.hidden.to(device)
        tensors["weight"] = real.gate_up.mT.to(device).clone()
    if mode != "exact":
        tensors = valued(tensors, case, dtype, top_k_index)
    if mode == "lora-only":
        tensors["weight"].zero_()
        tensors["bias"].zero_()
    if not case.bias:
        del tensors["bias"]
    if not case.gated:
        del tensors["gates"]
    lora_dtype = _lora_dtype(case, dtype)
    for name, value in tensors.items():
        stored = lora_dtype if name.startswith("lora") else dtype
        tensors[name] = value.to(torch.float32 if name == "gates" else stored)
    tensors["weight"] = laid_out(tensors["weight"], case.weight_layout)
    for name in {"x", "dy", "gates"} & tensors.keys():
        tensors[name] = laid_out(tensors[name], case.x_layout)
    tensors["top_k_index"] = top_k_index.to(device)
    return Inputs(case=case, mode=mode, dtype=dtype, scaling=scaling, tensors=tensors)


def captured(case: Case, seed: int) -> Captured:
    """What the experts of the case's model were called with: gate_up is [E, n_out, k_in]."""
    return capture(
        case.family,
        tokens=case.tokens,
        hidden=case.k_in,
        intermediate=case.n_out // 2,
        experts=case.experts,
        top_k=case.top_k,
        seed=seed,
    )


def laid_out(value: Tensor, layout: str) -> Tensor:
    """The same values with storage laid out as LAYOUTS says; gaps hold NaN."""
    if layout == "transposed":
        return value.mT.contiguous().mT
    if layout == "strided":
        wide = value.new_full((*value.shape[:-1], value.shape[-1] + 3), float("nan"))
        view = wide[..., 1:-2]
        return view.copy_(value)
    if layout == "offset":
        flat = value.new_full((value.numel() + 1,), float("nan"))
        return flat[1:].view(value.shape).copy_(value)
    return value.contiguous()


@dataclass(frozen=True, slots=True)
class _Normal:
    generator: torch.Generator
    device: torch.device

    def _draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        value = torch.randn(shape, generator=self.generator, device=self.device)
        return value.mul_(scale)

    def linear(self, case: Case) -> dict[str, Tensor]:
        experts, k_in, n_out, rank = case.experts, case.k_in, case.n_out, case.rank
        x = self._draw(rows_of(case, case.source), k_in)
        gates = torch.rand(case.tokens, case.top_k, generator=self.generator, device=self.device)
        return {
            "x": x,
            "weight": self._draw(experts, k_in, n_out, scale=k_in**-0.5),
            "bias": self._draw(experts, n_out, scale=_BIAS),
            "lora_a": self._draw(experts, rank, k_in, scale=k_in**-0.5),
            "lora_b": self._draw(experts, n_out, rank, scale=rank**-0.5 / abs(case.scaling)),
            "dy": self._draw(rows_of(case, case.dy_order), n_out),
            "gates": gates.add_(0.25),
        }


@dataclass(frozen=True, slots=True)
class _Exact:
    generator: torch.Generator
    device: torch.device

    def _integers(self, *shape: int, limit: int) -> Tensor:
        """Integers in -limit .. limit without zero."""
        sign = torch.randint(2, shape, generator=self.generator, device=self.device) * 2 - 1
        size = torch.randint(1, limit + 1, shape, generator=self.generator, device=self.device)
        return (sign * size).float()

    def _sparse(self, *shape: int, terms: int, edge: bool) -> Tensor:
        """+-1 at up to `terms` places of the last dimension; the last place among them if
        `edge`.
        """
        keys = torch.rand(shape, generator=self.generator, device=self.device)
        if edge:
            keys[..., -1:] = 2.0
        places = keys.topk(min(terms, shape[-1]), dim=-1).indices
        values = torch.zeros(shape, device=self.device)
        return values.scatter_(-1, places, self._integers(*places.shape, limit=1))

    def linear(self, case: Case) -> dict[str, Tensor]:
        experts, k_in, n_out, rank = case.experts, case.k_in, case.n_out, case.rank
        terms = min(_EXACT_TERMS, k_in)
        ranks = min(_EXACT_RANKS, rank)
        gates = torch.randint(
            0, 2, (case.tokens, case.top_k), generator=self.generator, device=self.device
        )
        return {
            "x": self._sparse(rows_of(case, case.source), k_in, terms=terms, edge=True),
            "weight": self._integers(experts, k_in, n_out, limit=2),
            "bias": self._integers(experts, n_out, limit=3),
            "lora_a": self._sparse(experts, k_in, rank, terms=ranks, edge=False).mT.contiguous(),
            "lora_b": self._sparse(experts, n_out, rank, terms=ranks, edge=False),
            "dy": self._sparse(rows_of(case, case.dy_order), n_out, terms=terms, edge=True),
            "gates": 0.5 + 0.5 * gates.float(),
        }
