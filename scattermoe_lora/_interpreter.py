"""bfloat16 under Triton's interpreter, and the refusal of what cannot run right.

The interpreter keeps bfloat16 as uint16 bit patterns. Left alone it multiplies and adds those
patterns as integers, and converts float32 to bfloat16 by truncation. When Triton runs interpreted,
importing this module gives its builder a class that decodes bfloat16 operands to float32 and rounds
results to nearest even. Where Triton compiles, nothing is touched.
"""

import functools

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

_DOT_SIZE = 16


def decode(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bit patterns (uint16, any shape)."""
    return np.asarray(bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode(values: np.ndarray) -> np.ndarray:
    """The bfloat16 bit patterns (uint16) nearest to float32 values, ties to even.

    Values beyond the range become infinite, NaN stays NaN (quiet), subnormals are kept.
    """
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    ties_to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    with np.errstate(over="ignore"):
        rounded = (bits + ties_to_even) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x0040)
    return np.asarray(np.where(np.isnan(bits.view(np.float32)), quiet, rounded), dtype=np.uint16)


def _is_bfloat16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _decoded(handle):
    if not _is_bfloat16(handle):
        return handle
    return interpreter.TensorHandle(decode(handle.data), tl.float32)


def _encoded(handle):
    """A float32 result as bfloat16; the outcome of a comparison stays boolean."""
    if handle.data.dtype == np.bool_:
        return interpreter.TensorHandle(handle.data, tl.bfloat16)
    return interpreter.TensorHandle(encode(handle.data), tl.bfloat16)


class RoundingBuilder(interpreter.InterpreterBuilder):
    """The interpreter's builder with bfloat16 computed in float32 and rounded to nearest even."""

    def cast_impl(self, src, dst_type):
        target = dst_type.scalar
        if target == src.dtype.scalar:
            return interpreter.TensorHandle(src.data, target)
        if target == tl.bfloat16:
            return interpreter.TensorHandle(encode(_decoded(src).data.astype(np.float32)), target)
        return super().cast_impl(_decoded(src), dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        target = dst_type.scalar
        eight_bits = 8 in (target.primitive_bitwidth, src.dtype.scalar.primitive_bitwidth)
        truncates = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
        if eight_bits or truncates or not (_is_bfloat16(src) or target == tl.bfloat16):
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        return self.cast_impl(src, dst_type)

    def binary_op(self, lhs, rhs, op):
        if not (_is_bfloat16(lhs) or _is_bfloat16(rhs)):
            return super().binary_op(lhs, rhs, op)
        return _encoded(super().binary_op(_decoded(lhs), _decoded(rhs), op))

    def unary_op(self, arg, op):
        if not _is_bfloat16(arg):
            return super().unary_op(arg, op)
        return _encoded(super().unary_op(_decoded(arg), op))

    def ternary_op(self, lhs, rhs, other, op):
        if op is np.where or not _is_bfloat16(other):
            return super().ternary_op(lhs, rhs, other, op)
        return _encoded(super().ternary_op(_decoded(lhs), _decoded(rhs), _decoded(other), op))

    def create_fma(self, x, y, z):
        if _is_bfloat16(z):
            raise NotImplementedError(
                "a bfloat16 fma rounds once and the interpreter would round twice; "
                "convert its operands to float32"
            )
        return super().create_fma(x, y, z)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        lhs, rhs = _decoded(a), _decoded(b)
        return super().create_dot(lhs, rhs, d, input_precision, max_num_imprecise_acc)

    def get_bf16(self, value):
        return interpreter.TensorHandle(encode(np.array([value], dtype=np.float32)), tl.bfloat16)


def _checked_operands(reduction, operands):
    """Refuses a bfloat16 reduction or scan, which would run over bit patterns."""
    type(reduction).check_operands_of_any_type(reduction, operands)
    for operand in operands:
        if operand.dtype.scalar == tl.bfloat16:
            raise NotImplementedError(
                "the interpreter reduces and scans bfloat16 as bit patterns; "
                "convert the operand to float32"
            )


def install() -> None:
    """Corrects the interpreter of this process. Calling it again changes nothing."""
    interpreter.interpreter_builder.__class__ = RoundingBuilder
    reductions = interpreter.ReduceScanOpInterface
    if not hasattr(reductions, "check_operands_of_any_type"):
        reductions.check_operands_of_any_type = reductions.check_tensor
        reductions.check_tensor = _checked_operands


def _library_is_interpreted() -> bool:
    """Whether Triton was told to interpret when it was first imported."""
    return isinstance(tl.zeros, interpreter.InterpretedFunction)


# Both are settled when Triton, and then this package, are imported.
REQUESTED = bool(triton.knobs.runtime.interpret)
INTERPRETED = REQUESTED and _library_is_interpreted()

if INTERPRETED:
    install()


@triton.jit
def self_test_kernel(a_ptr, b_ptr, exact_ptr, rounded_ptr, count, SIZE: tl.constexpr):
    """exact = sum over count of a[i] b[i] in float32, and the same rounded to bfloat16."""
    row = tl.arange(0, SIZE)
    tile = row[:, None] * SIZE + row[None, :]
    acc = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for step in range(count):
        a = tl.load(a_ptr + step * SIZE * SIZE + tile)
        b = tl.load(b_ptr + step * SIZE * SIZE + tile)
        acc += tl.dot(a, b, input_precision="ieee")
    tl.store(exact_ptr + tile, acc)
    tl.store(rounded_ptr + tile, acc.to(rounded_ptr.dtype.element_ty))


def _self_test(dtype: torch.dtype) -> bool:
    """Whether a small interpreted kernel agrees with torch, bit for bit.

    The operands are integers whose products and sums float32 holds exactly and bfloat16 does not,
    so that no rounding error excuses a difference.
    """
    steps = 2
    ramp = torch.arange(steps * _DOT_SIZE * _DOT_SIZE, dtype=torch.float32)
    a = (ramp % 37 - 18).reshape(steps, _DOT_SIZE, _DOT_SIZE).to(dtype)
    b = (ramp % 29 - 11).reshape(steps, _DOT_SIZE, _DOT_SIZE).to(dtype)
    exact = torch.empty(_DOT_SIZE, _DOT_SIZE, dtype=torch.float32)
    rounded = torch.empty(_DOT_SIZE, _DOT_SIZE, dtype=dtype)
    self_test_kernel[(1,)](a, b, exact, rounded, steps, SIZE=_DOT_SIZE)
    truth = (a.double() @ b.double()).sum(0).float()
    return torch.equal(exact, truth) and torch.equal(rounded, truth.to(dtype))


@functools.cache
def bf16_is_right() -> bool:
    """Whether interpreted bfloat16 agrees with torch: the dot exactly, the cast bit for bit."""
    return _self_test(torch.bfloat16)


@functools.cache
def run_time_loops_work() -> bool:
    """Whether the interpreter runs a loop whose bound is an argument of the kernel.

    That of Triton 3.6 does not with numpy 2.4 or newer (Triton issue 9171).
    """
    try:
        return _self_test(torch.float32)
    except interpreter.InterpreterError:
        return False


def require_supported(dtype: torch.dtype, device: torch.device) -> None:
    """Raises RuntimeError where a kernel on this dtype and device could not run, or not run right.

    Launchers call it with the dtype and device of their operands. On a GPU it looks at two
    attributes; interpreted, it runs a self-test once per process.
    """
    if device.type not in ("cpu", "cuda"):
        raise RuntimeError(f"the operands are on {device}, where no kernel runs: use a CUDA device")
    if not INTERPRETED:
        if device.type != "cpu":
            return
        raise RuntimeError(_why_not_interpreted())
    if not run_time_loops_work():
        raise RuntimeError(
            f"the interpreter of Triton {triton.__version__} cannot run loops with a run-time "
            f"bound beside numpy {np.__version__} (Triton issue 9171): install triton>=3.7 or "
            "numpy<2.4, or use a CUDA device"
        )
    if dtype == torch.bfloat16 and not bf16_is_right():
        raise RuntimeError(
            f"the interpreter of Triton {triton.__version__} computes bfloat16 wrongly and its "
            "correction does not hold there: use float16 or float32, or a CUDA device"
        )


def _why_not_interpreted() -> str:
    if REQUESTED:
        return (
            "TRITON_INTERPRET=1 was set after triton was first imported, which is too late: set "
            "it before triton, transformers or bitsandbytes is imported, or use a CUDA device"
        )
    return (
        "the operands are on the CPU, where Triton kernels run only interpreted: set "
        "TRITON_INTERPRET=1 before triton is first imported (transformers and bitsandbytes "
        "import it), or use a CUDA device"
    )
