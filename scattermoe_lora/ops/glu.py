"""Gated activations of an expert MLP and their gradient, one pass each.

    [gate | up] = h      halves, or interleaved columns
    forward     act = f(gate, up)
    backward    dh  = g f'(h) dact       dact before gating, g one gate per row
                dg  = <act, dact>        act is computed again

    SIGMOID     f = (u + shift) a sigmoid(alpha a)      a = min(gate, limit)
    TANH        f = (u + shift) gelu_tanh(a)            u = clamp(up, -limit, limit)

SiLU is SIGMOID with alpha 1, shift 0 and no limit; gpt-oss has alpha 1.702, shift 1, limit 7 and
interleaved columns. A TANH gate has alpha 1 and shift 0.
"""

import enum
import math
import numbers
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._arguments import check_type
from .._interpreter import require_supported
from .._launch import Launch
from .._sizes import ceil_div, next_power_of_two
from ..routing import Routing, RowOrder
from ._check import check_gates, check_rows, check_same, check_tensor
from ._tile import coefficients, matrix


class Gate(enum.StrEnum):
    """The nonlinearity on the gate half."""

    __hash__ = str.__hash__

    SIGMOID = "sigmoid"
    TANH = "tanh"


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """A gated activation; see the module's formula. limit: infinity for none."""

    gate: Gate = Gate.SIGMOID
    alpha: float = 1.0
    shift: float = 0.0
    limit: float = math.inf
    interleaved: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.gate, Gate):
            raise TypeError(f"gate must be a Gate, got {type(self.gate).__name__}")
        for name in ("alpha", "shift", "limit"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not (math.isfinite(self.alpha) and math.isfinite(self.shift)):
            raise ValueError(f"alpha and shift must be finite, got {self.alpha} and {self.shift}")
        if not self.limit > 0:
            raise ValueError(f"limit must be positive, got {self.limit}")
        if self.gate is Gate.TANH and (self.alpha != 1.0 or self.shift != 0.0):
            raise ValueError(
                f"a tanh gate has alpha 1 and shift 0, got {self.alpha} and {self.shift}"
            )

    @classmethod
    def of(
        cls,
        gate: str,
        alpha: float,
        shift: float,
        limit: float,
        interleaved: bool,  # noqa: FBT001
    ) -> "Activation":
        """The activation that has these `parts`."""
        return cls(gate=Gate(gate), alpha=alpha, shift=shift, limit=limit, interleaved=interleaved)

    @property
    def parts(self) -> tuple[str, float, float, float, bool]:
        """The fields in order, as an operator's plain arguments."""
        return self.gate.value, self.alpha, self.shift, self.limit, self.interleaved


def glu_forward(h: Tensor, activation: Activation) -> Tensor:
    """act [rows, I] from h [rows, 2 I], computed in fp32 and rounded once.

    Raises:
        TypeError, ValueError: h is not 2-D floating point, or has an odd width.
    """
    _check_h(h)
    check_type("activation", activation, Activation)
    act = h.new_empty((h.shape[0], h.shape[1] // 2))
    if act.numel():
        width = act.shape[1]
        _launch(glu_forward_kernel, width, activation, h.dtype, h.stride())(
            (h.shape[0], ceil_div(width, _block(width)), 1),
            h.device,
            (matrix(h), matrix(act), width, activation.alpha, activation.shift, activation.limit),
            h.data_ptr(),
        )
    return act


def glu_backward(
    h: Tensor,
    dact: Tensor,
    routing: Routing,
    activation: Activation,
    *,
    gates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient through the activation and the gates of the routed sum that follows it.

    Args:
        h: [rows, 2 I] in expert order. dact: [rows, I], gradient of act before gating.
        gates: [tokens, top_k] or None for ones.

    Returns:
        dh [rows, 2 I], act [rows, I] (recomputed), and dgates fp32 [tokens, top_k] = <act, dact>.
    """
    check_rows("h", h, routing, RowOrder.EXPERT)
    _check_h(h)
    check_rows("dact", dact, routing, RowOrder.EXPERT)
    check_same("dact", dact, "h", h)
    check_gates(gates, routing)
    check_type("activation", activation, Activation)
    if 2 * dact.shape[1] != h.shape[1]:
        raise ValueError(f"h has width {h.shape[1]} but dact has {dact.shape[1]}")
    dh = h.new_empty(h.shape)
    act = h.new_empty(dact.shape)
    dgates = h.new_empty((routing.tokens, routing.top_k), dtype=torch.float32)
    if routing.rows:
        width = dact.shape[1]
        gates, gates_form, pointers = coefficients(gates)
        pointers |= h.data_ptr() | dact.data_ptr() | routing.slots.data_ptr()
        form = (h.dtype, h.stride(), dact.stride(), gates_form)
        _launch(glu_backward_kernel, width, activation, *form)(
            (routing.rows, 1, 1),
            h.device,
            (
                matrix(h),
                matrix(dact),
                gates,
                matrix(dh),
                matrix(act),
                dgates,
                routing.slots,
                width,
                activation.alpha,
                activation.shift,
                activation.limit,
            ),
            pointers,
        )
    return dh, act, dgates


@lru_cache(maxsize=4096)
def _launch(
    kernel: triton.JITFunction, width: int, activation: Activation, *form: object
) -> Launch:
    del form
    return Launch(
        kernel,
        warps=4,
        TANH=activation.gate is Gate.TANH,
        CLAMPED=math.isfinite(activation.limit),
        INTERLEAVED=activation.interleaved,
        BLOCK=_block(width),
    )


@triton.jit
def gate_and_up(h, row, i, width, CLAMPED: tl.constexpr, INTERLEAVED: tl.constexpr, limit):
    """fp32 (gate, up, gate passes gradient, up passes gradient), and the columns of both in h."""
    if INTERLEAVED:
        gate_col = 2 * i
        up_col = 2 * i + 1
    else:
        gate_col = i
        up_col = width + i
    inside = i < width
    a = tl.load(h.ptr + row * h.row + gate_col * h.col, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(h.ptr + row * h.row + up_col * h.col, mask=inside, other=0.0).to(tl.float32)
    a_passes = inside
    u_passes = inside
    if CLAMPED:
        a_passes = ~(a > limit)
        u_passes = ~((u > limit) | (u < -limit))
        a = tl.where(a_passes, a, limit)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
    return a, u, a_passes, u_passes, gate_col, up_col


@triton.jit
def gate_value(a, alpha, TANH: tl.constexpr):
    """The nonlinearity s(a), with f = (u + shift) s(a), and its derivative."""
    if TANH:
        c: tl.constexpr = 0.7978845608028654
        d: tl.constexpr = 0.044715
        t = 2.0 * tl.sigmoid(2.0 * c * (a + d * a * a * a)) - 1.0
        value = 0.5 * a * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * a * (1.0 - t * t) * c * (1.0 + 3.0 * d * a * a)
    else:
        s = tl.sigmoid(alpha * a)
        value = a * s
        slope = s + alpha * a * s * (1.0 - s)
    return value, slope


@triton.jit(do_not_specialize=["alpha", "shift", "limit"])
def glu_forward_kernel(
    h,
    act,
    width,
    alpha,
    shift,
    limit,
    TANH: tl.constexpr,
    CLAMPED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of one row of act."""
    row = tl.program_id(0).to(tl.int64)
    i = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    a, u, _, _, _, _ = gate_and_up(h, row, i, width, CLAMPED, INTERLEAVED, limit)
    value, _ = gate_value(a, alpha, TANH)
    result = (u + shift) * value
    ptrs = act.ptr + row * act.row + i * act.col
    tl.store(ptrs, result.to(act.ptr.dtype.element_ty), mask=i < width)


@triton.jit(do_not_specialize=["alpha", "shift", "limit"])
def glu_backward_kernel(
    h,
    dact,
    gates,
    dh,
    act,
    dgates,
    slots,
    width,
    alpha,
    shift,
    limit,
    TANH: tl.constexpr,
    CLAMPED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of dh and act, and one gate's gradient."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    g = 1.0
    if gates is not None:
        g = tl.load(gates + slot).to(tl.float32)
    dot = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        i = (start + tl.arange(0, BLOCK)).to(tl.int64)
        inside = i < width
        a, u, a_passes, u_passes, gate_col, up_col = gate_and_up(
            h, row, i, width, CLAMPED, INTERLEAVED, limit
        )
        d = tl.load(dact.ptr + row * dact.row + i * dact.col, mask=inside, other=0.0).to(tl.float32)
        value, slope = gate_value(a, alpha, TANH)
        result = (u + shift) * value
        dot += result * d
        grad_gate = tl.where(a_passes, g * d * (u + shift) * slope, 0.0)
        grad_up = tl.where(u_passes, g * d * value, 0.0)
        dh_row = dh.ptr + row * dh.row
        element = dh.ptr.dtype.element_ty
        tl.store(act.ptr + row * act.row + i * act.col, result.to(element), mask=inside)
        tl.store(dh_row + gate_col * dh.col, grad_gate.to(element), mask=inside)
        tl.store(dh_row + up_col * dh.col, grad_up.to(element), mask=inside)
    tl.store(dgates + slot, tl.sum(dot))


def _check_h(h: Tensor) -> None:
    check_tensor("h", h)
    if not h.dtype.is_floating_point:
        raise TypeError(f"h must be floating point, got {h.dtype}")
    if h.ndim != 2 or h.shape[1] % 2:
        raise ValueError(f"h must be [rows, 2 I], got shape {list(h.shape)}")
    require_supported(h.dtype, h.device)


def _block(width: int) -> int:
    return min(max(next_power_of_two(width), 64), 1024)
