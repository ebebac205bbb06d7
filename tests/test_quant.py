"""Stored experts decode to what their format defines, bit for bit, whole, selected or in chunks."""

import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from quant_stacks import drawn, stored_four_bit

from scattermoe_lora.ops import dequantize, dequantize_scaled
from scattermoe_lora.ops._selection import Selection
from scattermoe_lora.quant import (
    Dense,
    DequantizePlan,
    Float8,
    FourBit,
    Int8RowWise,
    StoredExperts,
    StoredWeight,
    chunks,
)
from verify import references_quant as reference
from verify.references_quant import FourBitProblem

pytestmark = pytest.mark.correctness

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@pytest.mark.parametrize("outer", [0, 256, 3])
@pytest.mark.parametrize("blocksize", BLOCK_SIZES)
def test_decoding_is_the_codebook_times_the_scale_rounded_once(device, blocksize, outer):
    index = BLOCK_SIZES.index(blocksize)
    problem, tensors, stored = drawn(
        device,
        seed=index,
        experts=3,
        shape=((9, 64), (16, 96), (7, 18))[index % 3],
        blocksize=blocksize,
        codebook=("nf4", "fp4")[index % 2],
        outer_blocksize=outer,
    )
    for dtype in DTYPES:
        want = reference.four_bit(tensors, problem, dtype=dtype)
        assert torch.equal(stored.dense(dtype=dtype), want)


@given(data=st.data())
def test_any_stack_and_any_selection_decode_exactly(device, data):
    d1, d2 = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 48))
    problem, tensors, stored = drawn(
        device,
        seed=data.draw(st.integers(0, 2**16)),
        experts=data.draw(st.integers(1, 6)),
        shape=(2 * d1, d2),
        blocksize=data.draw(st.sampled_from((2, 6, 8, 24, *BLOCK_SIZES))),
        codebook=data.draw(st.sampled_from(("nf4", "fp4"))),
        outer_blocksize=data.draw(st.sampled_from((0, 1, 2, 7, 256))),
    )
    ids = data.draw(st.lists(st.integers(0, problem.experts - 1), max_size=8))
    ids = torch.tensor(ids, dtype=data.draw(st.sampled_from((torch.int64, torch.int32))))
    ids = ids.to(device)
    dtype = data.draw(st.sampled_from(DTYPES))
    want = reference.four_bit(tensors, problem, dtype=dtype, expert_ids=ids)
    assert torch.equal(stored.dense(ids, dtype=dtype), want)


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_quantised_weights_decode_to_the_nearest_code(device, codebook):
    problem = FourBitProblem(experts=2, shape=(8, 64), codebook=codebook)
    weight = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0)).to(device)
    tensors = reference.quantise_four_bit(weight, problem)
    decoded = stored_four_bit(problem, tensors).dense(dtype=torch.float32)
    absmax = tensors["absmax"].repeat_interleave(problem.blocksize).view_as(weight)
    every = tensors["codebook"] * absmax[..., None]
    assert torch.equal((weight - decoded).abs(), (weight[..., None] - every).abs().amin(-1))


@pytest.mark.parametrize("blocksize", [2, 6, 12, 24])
def test_blocks_that_end_inside_a_word_decode_exactly(device, blocksize):
    problem, tensors, stored = drawn(device, experts=3, shape=(5, 8), blocksize=blocksize)
    want = reference.four_bit(tensors, problem, dtype=torch.float16)
    assert torch.equal(stored.dense(dtype=torch.float16), want)


def test_bytes_that_start_off_a_word_decode_alike(device):
    problem, tensors, stored = drawn(device, experts=3, shape=(4, 32))
    shifted = torch.empty(tensors["packed"].numel() + 1, dtype=torch.uint8, device=device)
    shifted[1:] = tensors["packed"]
    moved = stored_four_bit(problem, tensors, packed=shifted[1:])
    want = stored.dense(dtype=torch.float16)
    assert torch.equal(moved.dense(dtype=torch.float16), want)


@pytest.mark.parametrize("block", [64, 128, 4096])
def test_the_plan_does_not_change_the_result(device, block):
    _, _, stored = drawn(device, experts=3, shape=(6, 40), blocksize=32, outer_blocksize=2)
    plan = DequantizePlan(block=block, warps=1)
    want = stored.dense(dtype=torch.float32)
    assert torch.equal(stored.dense(dtype=torch.float32, plan=plan), want)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_fp8_value_decodes_as_torch_converts_it(device, kind):
    every = torch.arange(256, dtype=torch.uint8, device=device).view(kind).view(2, 8, 16)
    one = torch.ones((), device=device)
    for dtype in DTYPES:
        got = Float8.from_scale(every, one).dense(dtype=dtype)
        assert torch.equal(got.isnan(), every.float().isnan())
        assert torch.equal(got.nan_to_num(nan=0.0), every.to(dtype).nan_to_num(nan=0.0))


@pytest.mark.parametrize(
    ("scale_shape", "given_block", "block"),
    [
        ((), None, (9, 20)),
        ((1,), None, (9, 20)),
        ((3,), None, (9, 20)),
        ((3, 1, 1), None, (9, 20)),
        ((3, 9), None, (1, 20)),
        ((3, 9, 1), None, (1, 20)),
        ((3, 1, 20), None, (9, 1)),
        ((3, 3, 5), None, (3, 4)),
        ((3, 2, 3), (8, 8), (8, 8)),
        ((3, 1, 2), (16, 16), (16, 16)),
        ((3, 3, 1), (16, 32), (3, 20)),
    ],
)
def test_scales_of_every_granularity_meet_their_elements(device, scale_shape, given_block, block):
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(0, 120, (3, 9, 20), generator=generator, dtype=torch.uint8)
    data = data.view(torch.float8_e4m3fn).to(device)
    scale = torch.rand(scale_shape, generator=generator).to(device) + 0.5
    stored = Float8.from_scale(data, scale, block=given_block)
    assert stored.block == block
    for dtype in (torch.float32, torch.bfloat16):
        want = reference.float8(data, stored.scale, block, dtype=dtype)
        assert torch.equal(stored.dense(dtype=dtype), want)


def test_int8_rows_decode_in_units_of_their_largest_magnitude(device):
    generator = torch.Generator().manual_seed(2)
    data = torch.randint(-128, 128, (3, 7, 20), generator=generator, dtype=torch.int8).to(device)
    scale = torch.rand(21, generator=generator).to(device)
    for dtype in DTYPES:
        want = reference.int8_row_wise(data, scale, dtype=dtype)
        assert torch.equal(Int8RowWise(data=data, row_scale=scale).dense(dtype=dtype), want)


def every_format(device):
    data = torch.randint(0, 120, (5, 6, 16), dtype=torch.uint8).to(device)
    rows = torch.rand(30).to(device)
    return {
        "nf4": drawn(device, experts=5, shape=(6, 16), blocksize=32)[2],
        "nested": drawn(device, experts=5, shape=(6, 18), blocksize=64, outer_blocksize=2)[2],
        "fp8": Float8.from_scale(data.view(torch.float8_e5m2), rows[:5]),
        "int8": Int8RowWise(data=data.view(torch.int8), row_scale=rows),
        "dense": Dense(data=torch.randn(5, 16, 6).to(device).mT),
    }


FORMATS = ("nf4", "nested", "fp8", "int8", "dense")


@pytest.mark.parametrize("name", FORMATS)
def test_selected_experts_are_slices_of_the_whole(device, name):
    stored = every_format(device)[name]
    whole = stored.dense(dtype=torch.float32)
    assert isinstance(stored, StoredExperts)
    assert whole.shape == (stored.experts, *stored.shape)
    for ids in ([4, 0, 2], [1, 1, 1], [3], [], [0, 1, 2, 3, 4]):
        ids = torch.tensor(ids, dtype=torch.int64, device=device)
        assert torch.equal(stored.dense(ids, dtype=torch.float32), whole[ids])
    for span in (range(5), range(1, 3), range(4, 5), range(2, 2)):
        got = stored.dense(span, dtype=torch.float32)
        assert torch.equal(got, whole[span.start : span.stop])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("fitting", [1, 2, 3, 7])
def test_chunks_in_a_reused_buffer_are_the_whole(device, name, fitting):
    stored = every_format(device)[name]
    budget = fitting * math.prod(stored.shape) * 2 + 1
    spans = chunks(stored, budget, dtype=torch.float16)
    assert [expert for span in spans for expert in span] == list(range(stored.experts))
    assert len(spans) == -(-stored.experts // fitting)
    largest = max(len(span) for span in spans)
    assert largest * math.prod(stored.shape) * 2 <= budget
    assert largest - min(len(span) for span in spans) <= 1
    buffer = torch.full((largest, *stored.shape), float("nan"), device=device, dtype=torch.float16)
    whole = stored.dense(dtype=torch.float16)
    for span in spans:
        out = buffer[: len(span)]
        got = stored.dense(span, dtype=torch.float16, out=out)
        assert got.data_ptr() == buffer.data_ptr()
        assert torch.equal(got, whole[span.start : span.stop])


def test_a_budget_below_one_expert_is_refused_with_both_numbers(device):
    stored = every_format(device)["nf4"]
    with pytest.raises(ValueError, match=r"takes 192 bytes .* budget is 191 bytes"):
        chunks(stored, 191, dtype=torch.float16)


@pytest.mark.parametrize("name", FORMATS[:-1])
def test_an_unknown_id_that_could_not_be_checked_gives_nan_and_reads_nothing(device, name):
    stored = every_format(device)[name]
    ids = torch.tensor([-1, 2, 5, 2**40], device=device)
    out = torch.empty(4, *stored.shape, device=device)
    chosen = Selection(ids=ids, first=0, count=4)
    if isinstance(stored, FourBit):
        dequantize.dequantize_four_bit(
            stored.packed,
            stored.absmax,
            stored.codebook,
            chosen,
            blocksize=stored.blocksize,
            nested=stored.nested,
            experts=stored.experts,
            out=out,
        )
    else:
        scale = stored.scale if name == "fp8" else stored.row_scale.view(5, 6, 1)
        block = stored.block if name == "fp8" else (1, 16)
        dequantize_scaled.dequantize_scaled(
            stored.data,
            scale,
            chosen,
            rows=block[0],
            columns=block[1],
            step=1.0 if name == "fp8" else 1 / 127,
            out=out,
        )
    assert out[[0, 2, 3]].isnan().all()
    assert torch.equal(out[1:2], stored.dense(range(2, 3), dtype=torch.float32))


def test_dense_experts_keep_their_gradient_unless_a_buffer_is_given(device):
    weight = torch.randn(4, 3, 2, device=device, requires_grad=True)
    stored = Dense(data=weight)
    stored.dense(torch.tensor([2, 2], device=device), dtype=torch.float32).sum().backward()
    assert torch.equal(weight.grad.sum((1, 2)) / 6, torch.tensor([0.0, 0, 2, 0], device=device))
    out = torch.empty(4, 3, 2, device=device)
    assert not stored.dense(dtype=torch.float32, out=out).requires_grad


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"shape": (3, 5)}, ValueError, "15 elements, but bytes of 4-bit storage hold 2"),
        ({"blocksize": 7}, ValueError, "must be even and at least 2, got 7"),
        ({"experts": 0}, ValueError, "at least one expert"),
        ({"experts": 4}, ValueError, "packed must have 256 elements, got 192"),
        ({"blocksize": 32}, ValueError, "absmax must have 12 elements, got 6"),
        ({"absmax": torch.zeros(6, dtype=torch.uint8)}, TypeError, "absmax must be torch.float32"),
        ({"packed": torch.zeros(192)}, TypeError, "packed must be torch.uint8"),
        ({"codebook": torch.zeros(8)}, ValueError, "codebook must have 16 elements, got 8"),
        ({"absmax": torch.zeros(6, device="meta")}, ValueError, "absmax is on meta"),
        ({"packed": torch.zeros(384, dtype=torch.uint8)[::2]}, ValueError, r"strides \[2\]"),
    ],
)
def test_ill_fitting_storage_is_refused(changes, error, words):
    problem, tensors, _ = drawn("cpu", experts=3, shape=(4, 32))
    with pytest.raises(error, match=words):
        stored_four_bit(problem, tensors, **changes)


@pytest.mark.parametrize(
    ("part", "wrong", "words"),
    [
        ("outer_absmax", torch.zeros(2), "nested.absmax must have 3 elements, got 2"),
        ("outer_code", torch.zeros(16), "nested.code must have 256 elements, got 16"),
        ("absmax", torch.zeros(6), "absmax must be torch.uint8"),
    ],
)
def test_ill_fitting_nested_statistics_are_refused(part, wrong, words):
    problem = FourBitProblem(experts=3, shape=(4, 32), outer_blocksize=2)
    tensors = {**reference.draw_four_bit(problem, seed=0), part: wrong}
    with pytest.raises((TypeError, ValueError), match=words):
        stored_four_bit(problem, tensors)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"dtype": torch.int8}, TypeError, "dtype must be float32"),
        ({"expert_ids": torch.tensor([5])}, ValueError, "holds 5, but experts are 0 to 4"),
        ({"expert_ids": torch.tensor([0, -1])}, ValueError, "holds -1"),
        ({"expert_ids": torch.tensor([[0]])}, ValueError, r"got shape \[1, 1\]"),
        ({"expert_ids": torch.tensor([0.0])}, TypeError, "int64 or int32"),
        ({"expert_ids": [0]}, TypeError, "a tensor, a range or None, got list"),
        ({"expert_ids": range(3, 6)}, ValueError, "holds 5"),
        ({"expert_ids": range(0, 4, 2)}, ValueError, "step 1, got 2"),
        ({"out": torch.empty(4, 6, 16)}, ValueError, "out has shape"),
        ({"out": torch.empty(5, 6, 16).half()}, TypeError, "out is torch.float16"),
    ],
)
def test_bad_arguments_are_refused(name, arguments, error, words):
    stored = every_format("cpu")[name]
    with pytest.raises(error, match=words):
        stored.dense(**{"dtype": torch.float32, **arguments})


def test_a_buffer_that_cannot_be_filled_is_refused():
    stored = every_format("cpu")["nf4"]
    with pytest.raises(ValueError, match="contiguous"):
        stored.dense(dtype=torch.float32, out=torch.empty(5, 16, 6).mT)
    with pytest.raises(ValueError, match="requires a gradient"):
        stored.dense(dtype=torch.float32, out=torch.empty(5, 6, 16, requires_grad=True))
    with pytest.raises(ValueError, match="at most 65535"):
        stored.dense(torch.zeros(65536, dtype=torch.int64), dtype=torch.float32)


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (torch.rand(2), "2 experts but there are 3"),
        (torch.rand(3, 2, 1), "do not divide"),
        (torch.rand(3, 5), "scale must be one element"),
    ],
)
def test_scales_that_fit_nothing_are_refused(scale, words):
    data = torch.zeros(3, 9, 20, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=words):
        Float8.from_scale(data, scale)


def test_the_nested_scale_is_never_contracted(device, monkeypatch):
    _, _, stored = drawn(device, experts=1, shape=(4, 32), outer_blocksize=2)
    options = {}

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, **named: options.update(named)

    monkeypatch.setattr(dequantize, "dequantize_four_bit_kernel", Recorder())
    stored.dense(dtype=torch.float32)
    assert options["enable_fp_fusion"] is False


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("ids", [None, [3, 0, 4]])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_format_is_the_weight_of_a_product_block_by_block(device, name, ids, transposed):
    stored = every_format(device)[name]
    chosen = None if ids is None else torch.tensor(ids, device=device)
    want = stored.dense(chosen, dtype=torch.float16)
    want = want.mT if transposed else want
    for experts_per_block in (None, 2):
        budget = None if experts_per_block is None else 2 * 2 * math.prod(stored.shape)
        weight = StoredWeight(stored=stored, transposed=transposed, budget_bytes=budget).select(
            chosen
        )
        assert weight.shape == tuple(want.shape)
        assert weight.device == want.device
        found = [(first, block.clone()) for first, block in weight.blocks(torch.float16)]
        bounds = [first for first, _ in found] + [len(want)]
        assert bounds == ([0, len(want)] if budget is None else [0, *bounds[1:-1], len(want)])
        assert max(block.shape[0] for _, block in found) <= (experts_per_block or len(want))
        assert torch.equal(torch.cat([block for _, block in found]), want)


def test_bytes_of_a_storage_are_those_of_all_its_tensors(device):
    """Elements: half a byte, or one, or four; scales: fp32, or one byte and their own scales."""
    formats, elements = every_format(device), 5 * 6 * 16
    blocks = math.ceil(5 * 6 * 18 / 64)
    sizes = {
        "nf4": elements // 2 + 4 * (elements // 32) + 4 * 16,
        "nested": 5 * 6 * 9 + blocks + 4 * (16 + math.ceil(blocks / 2) + 256 + 1),
        "fp8": elements + 4 * 5,
        "int8": elements + 4 * 30,
        "dense": 4 * elements,
    }
    assert {name: stored.nbytes for name, stored in formats.items()} == sizes
    kinds = {name: stored.dtype for name, stored in formats.items()}
    assert kinds == {**dict.fromkeys(FORMATS, torch.bfloat16), "dense": torch.float32}
    assert {stored.device.type for stored in formats.values()} == {torch.device(device).type}


FP8 = torch.float8_e4m3fn
GRID = {"data": torch.zeros(2, 9, 20, dtype=FP8), "scale": torch.ones(2, 3, 3), "block": (4, 8)}
ROWS = {"data": torch.zeros(2, 3, 4, dtype=torch.int8), "row_scale": torch.ones(6)}


@pytest.mark.parametrize(
    ("kind", "right", "changes", "error", "words"),
    [
        (Float8, GRID, {"block": (0, 8)}, ValueError, r"at least 1 x 1 elements, got \[0, 8\]"),
        (Float8, GRID, {"block": (4, 4)}, ValueError, r"shape \[2, 3, 5\], got \[2, 3, 3\]"),
        (Float8, GRID, {"scale": torch.ones(3, 3, 3)}, ValueError, r"got \[3, 3, 3\]"),
        (Float8, GRID, {"scale": torch.ones(2, 3, 3).half()}, TypeError, "must be torch.float32"),
        (Float8, GRID, {"scale": torch.ones(2, 3, 3).mT}, ValueError, "scale must be contiguous"),
        (Float8, GRID, {"scale": torch.ones(2, 3, 3, device="meta")}, ValueError, "scale is on m"),
        (Float8, GRID, {"data": torch.zeros(2, 9, 20)}, TypeError, "data must be torch.float8_e4m"),
        (Float8, GRID, {"data": torch.zeros(20, 9, dtype=FP8)}, ValueError, r"got \[20, 9\]"),
        (Float8, GRID, {"data": torch.zeros(2, 0, 20, dtype=FP8)}, ValueError, "and not empty"),
        (Float8, GRID, {"data": torch.zeros(2, 20, 9, dtype=FP8).mT}, ValueError, "data must be c"),
        (Int8RowWise, ROWS, {"row_scale": torch.ones(5)}, ValueError, "6 elements, got 5"),
        (Int8RowWise, ROWS, {"row_scale": torch.ones(6).half()}, TypeError, "torch.float32, got"),
        (Int8RowWise, ROWS, {"row_scale": torch.ones(6, device="meta")}, ValueError, "is on meta"),
        (Int8RowWise, ROWS, {"data": torch.zeros(2, 3, 4)}, TypeError, "data must be torch.int8"),
        (Dense, {}, {"data": torch.zeros(2, 3, 4).long()}, TypeError, "or torch.float64, got"),
        (Dense, {}, {"data": torch.zeros(3, 4)}, ValueError, r"and not empty, got \[3, 4\]"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(kind, right, changes, error, words):
    if right:
        assert kind(**right).experts == 2
    with pytest.raises(error, match=words):
        kind(**{**right, **changes})


NESTED = ("absmax", "code", "offset")


@pytest.mark.parametrize("part", NESTED)
def test_nested_statistics_are_fp32_contiguous_and_beside_their_storage(part):
    problem, tensors, stored = drawn("cpu", experts=3, shape=(4, 32), outer_blocksize=2)
    value = getattr(stored.nested, part)
    for wrong, error, words in (
        (value.half(), TypeError, f"nested.{part} must be torch.float32"),
        (torch.cat([value, value]), ValueError, f"{value.numel()} elements, got"),
        (value.to("meta"), ValueError, f"nested.{part} is on meta"),
    ):
        with pytest.raises(error, match=words):
            stored_four_bit(problem, tensors, nested=replace(stored.nested, **{part: wrong}))
    with pytest.raises(ValueError, match=r"nested.blocksize must be at least 1, got 0"):
        stored_four_bit(problem, tensors, nested=replace(stored.nested, blocksize=0))


@pytest.mark.parametrize("shape", [(4, 0), (4,), (2, 2, 2)])
def test_a_stack_of_no_matrices_is_refused(shape):
    problem, tensors, _ = drawn("cpu", experts=3, shape=(4, 32))
    with pytest.raises(ValueError, match=r"at least one expert of shape \[d1, d2\], got 3 of"):
        stored_four_bit(problem, tensors, shape=shape)
