"""bfloat16 under Triton's interpreter is what torch computes, and nothing wrong passes silently."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from scattermoe_lora import _interpreter

pytestmark = [
    pytest.mark.correctness,
    pytest.mark.skipif(not _interpreter.INTERPRETED, reason="Triton compiles for a GPU here"),
]

# Below, at and above the tie between two bfloat16 values, and next to each end.
LOW_HALVES = (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)


@triton.jit
def cast_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr, EXPLICIT: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < count, other=0)
    if EXPLICIT:
        x = x.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + index, x, mask=index < count)


@triton.jit
def elementwise_kernel(x_ptr, y_ptr, out_ptr, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index)
    y = tl.load(y_ptr + index)
    if OPERATION == "add":
        out = x + y
    elif OPERATION == "sub":
        out = x - y
    elif OPERATION == "mul":
        out = x * y
    elif OPERATION == "div":
        out = x / y
    elif OPERATION == "maximum":
        out = tl.maximum(x, y)
    elif OPERATION == "neg":
        out = -x
    elif OPERATION == "where":
        out = tl.where(x < y, x, y)
    elif OPERATION == "fma":
        out = tl.fma(x, y, x)
    else:
        out = tl.sum(x, axis=0) + y
    tl.store(out_ptr + index, out)


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, b))


def cast(x: torch.Tensor, dtype: torch.dtype, *, explicit: bool) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    block = 65536
    cast_kernel[(triton.cdiv(x.numel(), block),)](x, y, x.numel(), BLOCK=block, EXPLICIT=explicit)
    return y


def same(actual: torch.Tensor, truth: torch.Tensor) -> bool:
    """Equal bit for bit, but for the payload of a NaN."""
    bits = {2: torch.int16, 4: torch.int32}[truth.element_size()]
    agree = actual.view(bits) == truth.view(bits)
    return bool((agree | (actual.isnan() & truth.isnan())).all())


def every_rounding() -> torch.Tensor:
    """float32 values around every bfloat16 value: each sign, exponent, mantissa and rounding."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    bits = np.concatenate([high | low for low in LOW_HALVES])
    return torch.from_numpy(bits.view(np.float32))


def casts_like_torch(*, explicit: bool) -> bool:
    x = every_rounding()
    return same(cast(x, torch.bfloat16, explicit=explicit), x.bfloat16())


def operands(seed: int, count: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, count, generator=generator).bfloat16()
    return x, y


def computes_like_torch(operation: str) -> bool:
    x, y = operands(seed=3)
    out = torch.empty_like(x)
    elementwise_kernel[(1,)](x, y, out, OPERATION=operation, BLOCK=x.numel())
    truths = {
        "add": x + y,
        "sub": x - y,
        "mul": x * y,
        "div": x / y,
        "maximum": torch.maximum(x, y),
        "neg": -x,
        "where": torch.where(x < y, x, y),
    }
    return same(out, truths[operation])


def dots_within_one_accumulation() -> bool:
    """|error| <= K eps sum |a| |b|: the bound of one sum of K products in float32."""
    m, n, k = 32, 16, 64
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(m, k, generator=generator).bfloat16()
    b = torch.randn(k, n, generator=generator).bfloat16()
    out = torch.empty(m, n)
    dot_kernel[(1,)](a, b, out, M=m, N=n, K=k)
    error = (out.double() - a.double() @ b.double()).abs()
    bound = k * torch.finfo(torch.float32).eps * (a.double().abs() @ b.double().abs())
    return bool((error <= bound).all())


@pytest.mark.parametrize("explicit", [True, False])
def test_float32_to_bfloat16_rounds_as_torch_does(explicit):
    assert casts_like_torch(explicit=explicit)


def test_float32_to_bfloat16_rounds_random_values_as_torch_does():
    generator = torch.Generator().manual_seed(7)
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), generator=generator, dtype=torch.int64)
    x = bits.to(torch.int32).view(torch.float32)
    assert same(cast(x, torch.bfloat16, explicit=True), x.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_bfloat16_converts_as_torch_does(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    if dtype == torch.int32:
        x = x[x.abs() < 2.0**30].contiguous()
    with np.errstate(over="ignore"):
        converted = cast(x, dtype, explicit=True)
    assert torch.equal(converted.nan_to_num(), x.to(dtype).nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_other_types_convert_to_bfloat16_as_torch_does(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    x = x.to(torch.int16).view(torch.float16) if dtype == torch.float16 else x * 257
    assert same(cast(x, torch.bfloat16, explicit=True), x.bfloat16())


@pytest.mark.parametrize("operation", ["add", "sub", "mul", "div", "maximum", "neg", "where"])
def test_bfloat16_arithmetic_is_torchs(operation):
    assert computes_like_torch(operation)


def test_bfloat16_dot_errs_by_one_accumulation_at_most():
    assert dots_within_one_accumulation()


@pytest.mark.parametrize(
    ("method", "law"),
    [
        ("cast_impl", lambda: casts_like_torch(explicit=True)),
        ("cast_impl", lambda: casts_like_torch(explicit=False)),
        ("cast_impl", _interpreter.bf16_is_right.__wrapped__),
        ("create_dot", dots_within_one_accumulation),
        ("create_dot", _interpreter.bf16_is_right.__wrapped__),
        ("binary_op", lambda: computes_like_torch("add")),
        ("binary_op", lambda: computes_like_torch("mul")),
        ("binary_op", lambda: computes_like_torch("where")),
    ],
)
def test_without_its_correction_the_law_fails(monkeypatch, method, law):
    _interpreter.install()  # revisions that other tests load install their own
    assert law()
    monkeypatch.delattr(_interpreter.RoundingBuilder, method)
    # A wrong exponent may overflow on the way; the verdict is what counts.
    with np.errstate(all="ignore"):
        assert not law()


@pytest.mark.parametrize("operation", ["fma", "sum"])
def test_what_stays_wrong_is_refused(operation):
    x, y = operands(seed=11)
    with pytest.raises(interpreter.InterpreterError, match=r"convert .* to float32"):
        elementwise_kernel[(1,)](x, y, torch.empty_like(x), OPERATION=operation, BLOCK=x.numel())


def test_installing_again_changes_nothing():
    _interpreter.install()
    _interpreter.install()
    assert casts_like_torch(explicit=True)
    assert dots_within_one_accumulation()
    assert computes_like_torch("mul")


def test_wrong_bfloat16_is_refused_and_other_types_are_not(monkeypatch):
    monkeypatch.setattr(_interpreter, "bf16_is_right", lambda: False)
    cpu = torch.device("cpu")
    _interpreter.require_supported(torch.float32, cpu)
    with pytest.raises(RuntimeError, match="computes bfloat16 wrongly"):
        _interpreter.require_supported(torch.bfloat16, cpu)


def test_broken_loop_bounds_are_refused(monkeypatch):
    monkeypatch.setattr(_interpreter, "run_time_loops_work", lambda: False)
    with pytest.raises(RuntimeError, match=r"numpy .* issue 9171"):
        _interpreter.require_supported(torch.float32, torch.device("cpu"))


def test_compiling_triton_is_untouched_and_refuses_the_cpu():
    script = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
if sys.argv[1] == "late":
    import triton
    os.environ["TRITON_INTERPRET"] = "1"
import torch
from scattermoe_lora import _interpreter
assert not _interpreter.INTERPRETED
assert type(_interpreter.interpreter.interpreter_builder).__module__ == "triton.runtime.interpreter"
_interpreter.require_supported(torch.bfloat16, torch.device("cuda"))
try:
    _interpreter.require_supported(torch.float32, torch.device("cpu"))
except RuntimeError as error:
    print(error)
"""
    for order, sentence in (("never", "set TRITON_INTERPRET=1 before"), ("late", "too late")):
        ran = subprocess.run(
            [sys.executable, "-c", script, order], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
        assert sentence in ran.stdout
