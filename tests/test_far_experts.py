"""Experts more than 2^31 elements apart: their gradients, and packed ones that are decoded."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

import scattermoe_lora
from scattermoe_lora.ops.dequantize import dequantize_four_bit_kernel
from scattermoe_lora.ops.dequantize_scaled import dequantize_scaled_kernel
from verify.far import far_cases, space
from verify.specs.gradients import EXPERT_WEIGHT_GRAD, LORA_WEIGHT_GRAD

pytestmark = pytest.mark.correctness


@pytest.fixture(autouse=True)
def on_a_cpu(device):
    if device.type != "cpu":
        pytest.skip("address space without memory is a matter of the CPU")


def address_space(count, dtype):
    """Zeros of which only the touched pages exist, after 2^31 others: where an offset that is cut
    to 32 bits leads.
    """
    return space(2**31 + count, dtype)[2**31 :]


class FarStacks(TorchDispatchMode):
    """Context in which the last matrix of an empty stack is 2^31 elements from the first."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        empty = (torch.ops.aten.new_empty.default, torch.ops.aten.empty.memory_format)
        if func not in empty or result.ndim != 3 or not result.is_floating_point():
            return result
        experts, _, columns = result.shape
        step = 2**31 // (experts - 1) + 16
        flat = address_space(experts * step, result.dtype)
        self.found.append(flat.as_strided(result.shape, (step, columns, 1), flat.storage_offset()))
        return self.found[-1]


@pytest.mark.parametrize("spec", [LORA_WEIGHT_GRAD, EXPERT_WEIGHT_GRAD], ids=lambda s: s.name)
def test_gradients_of_experts_far_apart_are_those_of_neighbours(spec, device):
    inputs = spec.inputs(far_cases(spec)[0], torch.float16, "exact", device)
    inputs = replace(inputs, prepared=spec.prepare(scattermoe_lora, inputs))
    offered = [plan for plan in spec.plans(scattermoe_lora, inputs) if not plan.unavailable]
    for plan in {(plan.path, bool(plan.plan.part_rows)): plan for plan in offered}.values():
        wanted = spec.run(scattermoe_lora, inputs, plan.plan)
        with FarStacks() as far:
            found = spec.run(scattermoe_lora, inputs, plan.plan)
        assert len(far.found) == len(wanted), plan.label
        for name, value in wanted.items():
            assert torch.equal(found[name], value), (plan.label, name)


@pytest.fixture
def last_program(monkeypatch):
    """Makes the interpreter run one program of a grid as if it were the one of these numbers."""

    def run(*numbers):
        def number(axis):
            return interpreter.TensorHandle(np.array([numbers[axis]], dtype=np.int32), tl.int32)

        monkeypatch.setattr(interpreter.interpreter_builder, "create_get_program_id", number)

    return run


PACKED_EXPERTS, SIDE = 40, 2**13
ELEMENTS = SIDE * SIDE
"""Of one expert; those of all are more than 2^31."""


@pytest.mark.parametrize("nested", [False, True])
def test_4_bit_experts_beyond_32_bits_are_decoded_to_their_place(last_program, nested):
    tail, total = 64, PACKED_EXPERTS * ELEMENTS
    generator = torch.Generator().manual_seed(1)
    out = address_space(total, torch.float16)
    packed = address_space(total // 2, torch.uint8)
    packed[-tail // 2 :] = torch.randint(0, 256, (tail // 2,), generator=generator)
    codebook = torch.randn(16, generator=generator)
    absmax = address_space(total // tail, torch.uint8 if nested else torch.float32)
    absmax[-1] = 7 if nested else 3.5
    outer = address_space(total // tail // 2, torch.float32)
    outer[-1] = 0.25
    statistics = (torch.arange(256.0), outer, torch.ones(1)) if nested else (None,) * 3
    items = ELEMENTS // 8
    last_program(items // (tail // 8) - 1, PACKED_EXPERTS - 1)
    dequantize_four_bit_kernel[(1, 1)](
        out, packed.view(torch.int32), None, absmax, codebook, *statistics, PACKED_EXPERTS, 0,
        items, UNIT=8, BLOCKSIZE=tail, OUTER_BLOCKSIZE=2 if nested else 0, BLOCK=tail // 8,
    )  # fmt: skip
    nibbles = torch.stack([packed[-tail // 2 :] >> 4, packed[-tail // 2 :] & 15], 1).flatten()
    scale = 7 * 0.25 + 1 if nested else 3.5
    assert torch.equal(out[-tail:], (codebook[nibbles.long()] * scale).half())


def test_8_bit_experts_beyond_32_bits_are_decoded_to_their_place(last_program):
    rows, columns, total = 4, 64, PACKED_EXPERTS * ELEMENTS
    shape, tile = (PACKED_EXPERTS, SIDE, SIDE), (-1, slice(-rows, None), slice(-columns, None))
    generator = torch.Generator().manual_seed(1)
    out = address_space(total, torch.float16).view(shape)
    data = address_space(total, torch.uint8).view(shape)
    data[tile] = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.zeros(PACKED_EXPERTS, SIDE // rows, 1)
    scale[-1, -1] = 0.375
    last_program(ELEMENTS // (rows * columns) - 1, PACKED_EXPERTS - 1)
    dequantize_scaled_kernel[(1, 1)](
        out, data, None, scale, PACKED_EXPERTS, 0, SIDE, SIDE, rows, SIDE, SIDE // rows, 1,
        1.0, ENCODING="int8", BLOCK_R=rows, BLOCK_C=columns,
    )  # fmt: skip
    assert torch.equal(out[tile], (data[tile].view(torch.int8) * 0.375).half())
