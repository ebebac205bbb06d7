"""Experts are found where modules keep them, and decoded no further than a call needs."""

import subprocess
import sys

import pytest
import torch
from quant_stacks import Decoding, drawn, parametrised, state_of
from torch import nn
from torch.nn.utils import parametrize

from scattermoe_lora import LoRAWeights, Routing, RowOrder, compat_selective
from scattermoe_lora.ops import scatter2scatter
from scattermoe_lora.quant import (
    ActiveExperts,
    FourBit,
    Int8RowWise,
    active_experts,
    four_bit,
    stored_experts,
)
from verify import references_quant as reference

pytestmark = pytest.mark.correctness

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_a_parametrised_stack_is_found_without_decoding_it(device):
    for outer in (0, 4):
        problem, tensors, _ = drawn(
            device, experts=3, shape=(4, 32), blocksize=32, outer_blocksize=outer
        )
        module = parametrised(tensors["packed"].view(-1, 1), quant_state=state_of(problem, tensors))
        with pytest.raises(AssertionError, match="decodes every expert"):
            _ = module.weight
        stored = stored_experts(module, "weight")
        assert isinstance(stored, FourBit)
        assert stored.dtype == torch.float16
        assert stored.packed.data_ptr() == module.parametrizations.weight.original.data_ptr()
        want = reference.four_bit(tensors, problem, dtype=torch.float32)
        assert torch.equal(stored.dense(dtype=torch.float32), want)


def test_int8_rows_are_found_without_decoding_them(device):
    data = torch.randint(-128, 128, (3, 4, 16), dtype=torch.int8).to(device)
    rows = torch.rand(12).to(device)
    stored = stored_experts(parametrised(data, row_stats=rows), "weight")
    want = reference.int8_row_wise(data, rows, dtype=torch.float16)
    assert torch.equal(stored.dense(dtype=torch.float16), want)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_parameter_with_a_state_is_found_whatever_its_bytes_are_called(device, storage):
    problem, tensors, stored = drawn(device, experts=3, shape=(4, 32))
    module = nn.Module()
    packed = tensors["packed"].view(storage).view(-1, 1)
    module.weight = nn.Parameter(packed, requires_grad=False)
    module.weight.quant_state = state_of(problem, tensors)
    want = stored.dense(dtype=torch.bfloat16)
    assert torch.equal(stored_experts(module, "weight").dense(dtype=torch.bfloat16), want)


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_fp8_parameters_are_found_with_their_scales(device, suffix):
    data = torch.randint(0, 120, (2, 10, 20), dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = torch.rand(2, 2, 3)
    module = nn.Module().to(device)
    module.gate_up_proj = nn.Parameter(data.to(device), requires_grad=False)
    module.register_buffer("gate_up_proj" + suffix, scale.to(device))
    module.block_size = [8, 8]
    stored = stored_experts(module, "gate_up_proj")
    want = reference.float8(data, scale, (8, 8), dtype=torch.float32)
    assert torch.equal(stored.dense(dtype=torch.float32).cpu(), want)


def test_dense_parameters_and_adapted_ones_are_found(device):
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(2, 3, 4, device=device))
    assert stored_experts(module, "weight").data is module.weight
    adapter = type(
        "LoraProxy", (nn.Module,), {"__module__": "peft.tuners", "forward": nn.Identity.forward}
    )
    parametrize.register_parametrization(module, "weight", adapter())
    original = module.parametrizations.weight.original
    assert stored_experts(module, "weight").data is original


def test_recognition_does_not_import_bitsandbytes():
    code = "import sys, scattermoe_lora.quant; sys.exit('bitsandbytes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def unsupported(device):
    module = nn.Module()
    module.plain = nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    module.flat = nn.Parameter(torch.zeros(8, 4))
    module.scaleless = nn.Parameter(
        torch.zeros(2, 4, 4, dtype=torch.float8_e4m3fn), requires_grad=False
    )
    module.waiting = nn.Parameter(torch.zeros(2, 4, 4))
    module.waiting.quant_state = None
    problem, tensors, _ = drawn(device, experts=2, shape=(4, 32))
    module.matrix = nn.Parameter(tensors["packed"], requires_grad=False)
    module.matrix.quant_state = state_of(problem, tensors, shape=(8, 32))
    module.to(device)
    return module


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("absent", AttributeError, "no parameter or buffer named 'absent'"),
        ("plain", TypeError, r"torch.uint8 of shape \[8\] and nothing"),
        ("flat", ValueError, r"got \[8, 4\]"),
        ("scaleless", ValueError, "'scaleless_scale_inv' or 'scaleless_scale'"),
        ("waiting", ValueError, "not quantised yet"),
        ("matrix", ValueError, r"shape \[8, 32\], but a stack of experts has 3"),
    ],
)
def test_what_is_not_known_is_refused(device, name, error, words):
    with pytest.raises(error, match=words):
        stored_experts(unsupported(device), name)


def test_an_unknown_parametrisation_is_refused_and_not_read(device):
    module = parametrised(torch.zeros(2, 3, 4, device=device))
    with pytest.raises(TypeError, match="parametrised by Decoding"):
        stored_experts(module, "weight")


def test_what_is_applied_after_decoding_is_not_lost(device):
    problem, tensors, _ = drawn(device, experts=2, shape=(4, 32))
    module = parametrised(tensors["packed"], quant_state=state_of(problem, tensors))
    module.parametrizations.weight.append(Decoding())
    with pytest.raises(TypeError, match="Decoding, Decoding"):
        stored_experts(module, "weight")


def test_a_routing_of_the_active_experts_routes_every_row_alike(device):
    top_k = torch.tensor([[5, 2], [2, -1], [7, 5], [9, 2]], device=device)
    routing = Routing.from_top_k(top_k, 9, sentinels=True)
    active = ActiveExperts.of(routing)
    assert active.ids.tolist() == active_experts(routing).tolist() == [2, 5, 7]
    kept = routing.expert_of_row < 9
    compact = active.routing
    assert torch.equal(
        active.ids[compact.expert_of_row[kept].long()].int(), routing.expert_of_row[kept]
    )
    assert (compact.expert_of_row[~kept] == 3).all()
    assert torch.equal(compact.slots, routing.slots)
    assert compact.offsets.tolist() == [0, 3, 5, 6]


def test_the_active_experts_give_the_product_of_all(device):
    generator = torch.Generator().manual_seed(3)
    problem, _, stored = drawn(device, experts=6, shape=(16, 32), outer_blocksize=2)
    x = torch.randn(7, 32, generator=generator).to(device)
    top_k = torch.tensor([[1, 4]] * 6 + [[4, 5]], device=device)
    routing = Routing.from_top_k(top_k, problem.experts)
    active = ActiveExperts.of(routing)
    orders = {"source": RowOrder.TOKEN, "target": RowOrder.EXPERT}
    every = stored.dense(dtype=torch.float32).mT
    some = stored.dense(active.ids, dtype=torch.float32).mT
    want = scatter2scatter(x, every, routing, **orders)
    assert torch.equal(scatter2scatter(x, some, active.routing, **orders), want)


def test_gradients_reach_the_active_slices_and_zero_the_others(device):
    lora = LoRAWeights(
        a=torch.randn(4, 2, 3, device=device, requires_grad=True),
        b=torch.randn(4, 5, 2, device=device, requires_grad=True),
        scaling=2.0,
    )
    routing = Routing.from_top_k(torch.tensor([[3], [1]], device=device), 4)
    some = ActiveExperts.of(routing).lora(lora)
    assert torch.equal(some.a, lora.a[[1, 3]])
    assert torch.equal(some.b, lora.b[[1, 3]])
    assert some.scaling == lora.scaling
    (some.a.sum() + some.b.sum()).backward()
    reached = torch.tensor([0.0, 1, 0, 1], device=device).view(4, 1, 1)
    assert torch.equal(lora.a.grad, reached.expand_as(lora.a))
    assert torch.equal(lora.b.grad, reached.expand_as(lora.b))
    table = torch.arange(12.0, device=device).view(4, 3)
    assert torch.equal(ActiveExperts.of(routing).rows(table), table[[1, 3]])


def test_a_call_without_rows_keeps_one_expert(device):
    routing = Routing.from_top_k(torch.empty(0, 2, dtype=torch.int64, device=device), 4)
    assert active_experts(routing).tolist() == []
    active = ActiveExperts.of(routing)
    assert active.ids.tolist() == [0]
    assert active.routing.experts == 1
    with pytest.raises(ValueError, match="1 to 4 experts"):
        ActiveExperts.of(routing, active_experts(routing))


@pytest.mark.parametrize("given", [False, True], ids=["found", "given"])
def test_where_every_expert_has_rows_all_are_kept(device, given):
    routing = Routing.from_top_k(torch.tensor([[2, 0], [1, 2]], device=device), 3)
    ids = torch.arange(3, device=device) if given else None
    active = ActiveExperts.of(routing, ids)
    assert active.ids.tolist() == [0, 1, 2]
    for name in ("slots", "expert_of_row", "offsets"):
        assert torch.equal(getattr(active.routing, name), getattr(routing, name))
    assert active.routing.experts == 3
    more = torch.arange(4, device=device)
    with pytest.raises(ValueError, match=r"1 to 3 experts, got shape \[4\]"):
        ActiveExperts.of(routing, more)


def test_selective_functions_agree_with_selecting_afterwards(device):
    problem, tensors, stored = drawn(device, experts=5, shape=(6, 16), blocksize=32)
    ids = torch.tensor([0, 0, 2, 2, 4], device=device)
    offsets = torch.tensor([2, 2, 4, 4, 5], device=device)
    active = compat_selective.get_active_experts(ids, 5)
    assert active.tolist() == [0, 2, 4]
    compact, counts = compat_selective.remap_expert_indices(ids, offsets, active, 5)
    assert compact.tolist() == [0, 0, 1, 1, 2]
    assert counts.tolist() == [2, 4, 5]
    module = parametrised(tensors["packed"], quant_state=state_of(problem, tensors))
    got = compat_selective.selective_expert_weights(module, "weight", active)
    assert torch.equal(got, stored.dense(dtype=torch.float16)[active])
    plain = compat_selective.selective_dequant_nf4_triton(
        tensors["packed"], tensors["absmax"], active, (6, 16), 32, torch.float32
    )
    assert torch.equal(plain, stored.dense(dtype=torch.float32)[active])
    rounded = compat_selective.selective_dequant_nf4_triton(
        tensors["packed"], tensors["absmax"], active, (6, 16), 32
    )
    assert torch.equal(rounded, stored.dense(dtype=torch.bfloat16)[active])
    assert rounded.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="480 elements, not a multiple of 84"):
        compat_selective.selective_dequant_nf4_triton(
            tensors["packed"], tensors["absmax"], active, (6, 14), 32
        )


def test_selective_lora_weights_are_expert_major(device):
    lora_a = torch.arange(4 * 2 * 3.0, device=device).view(8, 3).requires_grad_()
    lora_b = torch.arange(5 * 8.0, device=device).view(5, 8)
    active = torch.tensor([1, 3], device=device)
    a, b = compat_selective.selective_lora_weights(lora_a, lora_b, active, 4)
    assert torch.equal(a, lora_a[[2, 3, 6, 7]])
    assert torch.equal(b, lora_b[:, [2, 3, 6, 7]])
    a.sum().backward()
    assert lora_a.grad.sum(1).tolist() == [0, 0, 3, 3, 0, 0, 3, 3]
    with pytest.raises(ValueError, match=r"8 rank rows and lora_B 8 .* multiple of 3"):
        compat_selective.selective_lora_weights(lora_a, lora_b, active, 3)


def test_codebooks_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    for name, codebook in reference.CODEBOOKS.items():
        assert torch.equal(codebook(), functional.get_4bit_type(name, "cpu"))
    assert torch.equal(reference.dynamic_codebook(), functional.create_dynamic_map())
    nf4 = torch.tensor(compat_selective.NF4_CODEBOOK)
    assert torch.equal(nf4, reference.nf4_codebook())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_decodes_its_parameters_alike(device, quant_type, nested):
    """On a CPU it is right where rows are whole blocks."""
    quantised = pytest.importorskip("bitsandbytes.nn.parametrize")
    for dtype, blocksize in zip(DTYPES, (64, 128, 32), strict=True):
        module = nn.Module()
        generator = torch.Generator().manual_seed(blocksize)
        weight = torch.randn(5, 6, 128, generator=generator).to(dtype).to(device)
        module.weight = nn.Parameter(weight, requires_grad=False)
        quantised.replace_parameter_4bit(module, "weight", nested, quant_type, blocksize)
        stored = stored_experts(module, "weight")
        assert stored.dtype == dtype
        assert (stored.nested is not None) == nested
        assert torch.equal(stored.dense(dtype=dtype), module.weight)


def test_bitsandbytes_decodes_int8_rows_alike(device):
    functional = pytest.importorskip("bitsandbytes").functional
    data = torch.randint(-128, 128, (3, 4, 16), dtype=torch.int8).to(device)
    rows = torch.rand(12).to(device)
    want = functional.int8_vectorwise_dequant(data.view(12, 16), rows).view(3, 4, 16)
    assert torch.equal(Int8RowWise(data=data, row_scale=rows).dense(dtype=torch.float32), want)


def test_params4bit_with_a_stack_is_found(device):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    module = nn.Module()
    module.weight = bitsandbytes.nn.Params4bit(packed, requires_grad=False, quant_state=state)
    want = bitsandbytes.functional.dequantize_4bit(packed, state)
    assert torch.equal(stored_experts(module, "weight").dense(dtype=torch.float32), want)
    assert torch.equal(four_bit(packed, state).dense(dtype=torch.float32), want)
