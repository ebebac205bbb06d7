"""What a GPU is given of the 4-bit kernel, compiled for Hopper without one."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.correctness, pytest.mark.compile]

# Triton interprets in this process, so another one compiles: nested statistics, bf16, by ids.
COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from scattermoe_lora.ops.dequantize import dequantize_four_bit_kernel as kernel

constants = {"UNIT": 8, "BLOCKSIZE": 64, "OUTER_BLOCKSIZE": 256, "BLOCK": 512}
types = {
    "out": "*bf16", "packed": "*i32", "expert_ids": "*i64", "absmax": "*u8", "codebook": "*fp32",
    "outer_code": "*fp32", "outer_absmax": "*fp32", "outer_offset": "*fp32",
    "experts": "i32", "first": "i32", "items": "i32",
}
names = kernel.arg_names
signature = {name: types.get(name, "constexpr") for name in names}
aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"}
source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
answer = {"free": [p.name for p in kernel.params if p.do_not_specialize]}
for fusion in (False, True):
    options = {"num_warps": 4, "enable_fp_fusion": fusion}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    answer[str(fusion)] = built.asm["ptx"]
json.dump(answer, sys.stdout)
"""


@pytest.fixture(scope="module")
def compiled():
    built = subprocess.run(
        [sys.executable, "-c", COMPILE],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    return json.loads(built.stdout)


def test_the_nested_scale_is_rounded_twice(compiled):
    assert "fma" not in compiled["False"]
    assert "mul.rn.f32" in compiled["False"]
    assert "add.rn.f32" in compiled["False"]
    assert "fma" in compiled["True"]


def test_memory_is_read_and_written_in_whole_words(compiled):
    ptx = compiled["False"]
    packed, per_thread = 512 // 128, 512 // 128 * 8
    assert ptx.count("st.global.v4.b32") == per_thread // 8
    assert ptx.count("st.global") == ptx.count("st.global.v4.b32")
    assert ptx.count("ld.global.b8") == packed  # one nested scale per word


def test_another_number_of_experts_needs_no_other_kernel(compiled):
    assert {"experts", "first", "items"} <= set(compiled["free"])
