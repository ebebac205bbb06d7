"""Which fused activation, if any, computes what an experts module's own gate function computes.

Nothing is known by name. The module's gate function is evaluated on a grid of (gate, up) pairs that
reaches past every clamp, and a fused activation is used only where it gives the same numbers to
fp32 accuracy there. Any other gate function runs as it is. The outcome depends on the function, its
activation, the module's numbers and what it has as None, and is remembered by them.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import Activation
from ..ops.glu import Gate

# Magnitudes in steps of sqrt(2) from 2^-10 to 2^15, past every clamp in use and inside fp16's
# range.
_MAGNITUDES = [2.0 ** (step / 2) for step in range(-20, 31)]
_GRID = sorted({0.0, *_MAGNITUDES, *(-value for value in _MAGNITUDES)})
# Roundings between two ways of writing the same formula in fp32.
_ROUNDINGS = 16


def fused_activation(module: Any) -> Activation | None:
    """The fused activation that equals `module._apply_gate`, or None where none does."""
    numbers = {
        name: float(value)
        for name, value in vars(module).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    absent = tuple(sorted(name for name, value in vars(module).items() if value is None))
    parts = _parts(
        type(module)._apply_gate,
        getattr(module, "act_fn", None),
        tuple(sorted(numbers.items())),
        absent,
        not getattr(module, "is_concatenated", True),
    )
    return None if parts is None else Activation.of(*parts)


@torch.compiler.assume_constant_result
def _parts(*key: Any) -> tuple[str, float, float, float, bool] | None:
    """The parts of the activation that matches: what torch.compile takes as a constant, guarding on
    what the key is made of.
    """
    found = _matching(*key)
    return None if found is None else found.parts


@functools.lru_cache(maxsize=1024)
def _matching(
    gate_function: Callable[[Any, Tensor], Tensor],
    act_fn: Callable[..., Any] | None,
    numbers: tuple[tuple[str, float], ...],
    absent: tuple[str, ...],
    interleaved: bool,  # noqa: FBT001 - a memo's key is positional
) -> Activation | None:
    size = len(_GRID)
    points = torch.tensor(_GRID, dtype=torch.float32)
    gate, up = points[:, None].expand(size, size), points[None, :].expand(size, size)
    h = torch.stack([gate, up], dim=2).flatten(1) if interleaved else torch.cat([gate, up], dim=1)
    stand_in = SimpleNamespace(**{**dict.fromkeys(absent), **dict(numbers), "act_fn": act_fn})
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            truth = gate_function(stand_in, h)
    except (AttributeError, TypeError, RuntimeError):
        # It reads more than its numbers, so no grid of values shows what it does.
        return None
    values = {value for _, value in numbers}
    return next(
        (
            candidate
            for candidate in _candidates(values, interleaved=interleaved)
            if _equal(truth, formula(gate.double(), up.double(), candidate))
        ),
        None,
    )


def formula(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """What a fused activation computes, in plain torch and the precision of its operands."""
    if math.isfinite(activation.limit):
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(-activation.limit, activation.limit)
    if activation.gate is Gate.TANH:
        return up * nn.functional.gelu(gate, approximate="tanh")
    return (up + activation.shift) * gate * torch.sigmoid(activation.alpha * gate)


def _candidates(values: Iterable[float], *, interleaved: bool) -> Iterator[Activation]:
    values = sorted(values)
    limits = [math.inf, *(value for value in values if value > 0)]
    for limit in limits:
        yield Activation(gate=Gate.TANH, limit=limit, interleaved=interleaved)
    for limit, alpha, shift in itertools.product(limits, [1.0, *values], (0.0, 1.0)):
        yield Activation(alpha=alpha, shift=shift, limit=limit, interleaved=interleaved)


def _equal(truth: Tensor, value: Tensor) -> bool:
    if truth.shape != value.shape:
        return False
    # Where a nonlinearity cancels, 1 + tanh near -1, the error is relative to the operands.
    points = 1.0 + torch.tensor(_GRID, dtype=torch.float64).abs()
    scale = points[:, None] * points[None, :]
    error = (truth.double() - value).abs()
    return bool((error <= _ROUNDINGS * torch.finfo(torch.float32).eps * scale).all())
