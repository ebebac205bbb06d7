"""Decoding of stored experts: 4-bit with plain and nested statistics, int8 row-wise, fp8.

A case is read as: `experts` matrices [k_in, n_out], of which `tokens` are selected by the ids that
its routing draws; model cases decode the whole stack and nothing else. The expected value is
rounded to the dtype of the output and allowed no variance, so every output is judged to the bit.
"""

import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import references_quant as reference
from ..cases import Case
from ..expected import Expected
from ..inputs import Inputs
from ..models import Arithmetic
from ..numerics import Uncertain
from ..references_quant import FourBitProblem
from ..spec import BadInput, KernelSpec, Mutant, NamedPlan
from .common import bytes_of, submodule
from .quant_cases import FAR_APART, FOUR_BIT, SCALED, UNKNOWN_IDS, Grid, placed

__all__ = ["DEQUANTIZE_FOUR_BIT", "DEQUANTIZE_SCALED"]

_SELECTED_RANGE = range(1, 2)
"""Decoded besides the drawn ids and the whole stack, wherever there are two experts."""
_NOT_ALL_KNOWN = (-1, 0, 1)
"""Ids for a stack of one expert: what is not there is NaN."""

_FLOAT8 = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def _problem(case: Case) -> FourBitProblem:
    blocks = FOUR_BIT[case]
    return FourBitProblem(
        experts=case.experts,
        shape=(case.k_in, case.n_out),
        blocksize=blocks.size,
        codebook=blocks.codebook,
        outer_blocksize=blocks.outer,
    )


def _inputs(
    case: Case, dtype: torch.dtype, mode: str, device: torch.device, seed: int, stored: Any
) -> Inputs:
    ids = case.routing.draw(
        tokens=case.tokens, top_k=1, experts=case.experts, seed=case.seed + 7919 * seed
    )
    return Inputs(
        case=case,
        mode=mode,
        dtype=dtype,
        scaling=1.0,
        tensors={"top_k_index": ids.to(device), **stored},
    )


def _four_bit_inputs(
    case: Case, dtype: torch.dtype, mode: str, device: torch.device, *, seed: int = 0
) -> Inputs:
    stored = reference.draw_four_bit(_problem(case), seed=case.seed + seed, device=device)
    return _inputs(case, dtype, mode, device, seed, stored)


def _scaled_inputs(
    case: Case, dtype: torch.dtype, mode: str, device: torch.device, *, seed: int = 0
) -> Inputs:
    grid = SCALED[case]
    generator = torch.Generator(device=device).manual_seed(case.seed + seed)
    shape = (case.experts, case.k_in, case.n_out)
    # The infinities and NaNs of fp8 differ from format to format.
    finite = {"int8": 128, "e4m3fn": 127, "e5m2": 124}[grid.encoding]
    bound = 128 if grid.every_byte else finite
    size = torch.randint(bound, shape, generator=generator, device=device, dtype=torch.uint8)
    sign = torch.randint(2, shape, generator=generator, device=device, dtype=torch.uint8) * 128
    counts = (case.k_in, 1) if grid.encoding == "int8" else _grid_shape(case, grid)
    scale = torch.rand(case.experts, *counts, generator=generator, device=device) + 0.01
    return _inputs(case, dtype, mode, device, seed, {"data": size + sign, "scale": scale})


def _grid_shape(case: Case, grid: Grid) -> tuple[int, int]:
    return -(-case.k_in // grid.block[0]), -(-case.n_out // grid.block[1])


def _four_bit(lib: ModuleType, inputs: Inputs, **changes: Any) -> Any:
    quant, case = submodule(lib, "quant"), inputs.case
    blocks = FOUR_BIT[case]
    nested = None
    if blocks.outer:
        nested = quant.NestedScales(
            code=inputs["outer_code"],
            absmax=inputs["outer_absmax"],
            offset=inputs["outer_offset"],
            blocksize=blocks.outer,
        )
    packed, absmax = inputs["packed"], inputs["absmax"]
    if blocks.start or blocks.apart > 1:
        experts = packed.view(case.experts, -1)
        packed = placed(experts, start=blocks.start, apart=blocks.apart).view(-1)
    fields = {
        "packed": packed,
        "absmax": placed(absmax, apart=blocks.apart) if blocks.apart > 1 else absmax,
        "codebook": inputs["codebook"],
        "blocksize": blocks.size,
        "experts": (case.experts - 1) * blocks.apart + 1,
        "shape": (case.k_in, case.n_out),
        "nested": nested,
    }
    return quant.FourBit(**{**fields, **changes})


def _scaled(lib: ModuleType, inputs: Inputs) -> Any:
    quant, grid = submodule(lib, "quant"), SCALED[inputs.case]
    if grid.encoding == "int8":
        data = inputs["data"].view(torch.int8)
        return quant.Int8RowWise(data=data, row_scale=inputs["scale"].reshape(-1))
    data, scale = inputs["data"], inputs["scale"]
    if grid.apart > 1:
        data, scale = placed(data, apart=grid.apart), placed(scale, apart=grid.apart)
    return quant.Float8(data=data.view(_FLOAT8[grid.encoding]), scale=scale, block=grid.block)


def _run(stored: Any, inputs: Inputs, plan: Any, apart: int) -> Mapping[str, Tensor]:
    chosen = _selections(inputs)
    if apart > 1:
        ids = (chosen["selected"] * apart).to(torch.int32)
        chosen = {"selected": ids, "range": range(apart, apart + 1)}
    return {
        name: stored.dense(which, dtype=inputs.dtype, plan=plan) for name, which in chosen.items()
    }


def _selections(inputs: Inputs) -> dict[str, Any]:
    """None is the whole stack."""
    if "model" in inputs.case.tags:
        return {"all": None}
    some: dict[str, Any] = {"selected": inputs["top_k_index"].reshape(-1)}
    if inputs.case.name != FAR_APART:
        some["all"] = None
    if inputs.case.experts > 1:
        some["range"] = _SELECTED_RANGE
    return some


def _run_four_bit(lib: ModuleType, inputs: Inputs, plan: Any) -> Mapping[str, Tensor]:
    stored = _four_bit(lib, inputs)
    found = _run(stored, inputs, plan, FOUR_BIT[inputs.case].apart)
    if inputs.case.name != UNKNOWN_IDS:
        return found
    decoded = submodule(lib, "ops.dequantize").dequantize_four_bit(
        stored.packed,
        stored.absmax,
        stored.codebook,
        _not_all_known(lib, inputs),
        blocksize=stored.blocksize,
        nested=stored.nested,
        experts=stored.experts,
        out=_buffer(inputs),
        plan=plan,
    )
    return {**found, "unknown": decoded}


def _run_scaled(lib: ModuleType, inputs: Inputs, plan: Any) -> Mapping[str, Tensor]:
    stored = _scaled(lib, inputs)
    found = _run(stored, inputs, plan, SCALED[inputs.case].apart)
    if inputs.case.name != UNKNOWN_IDS:
        return found
    decoded = submodule(lib, "ops.dequantize_scaled").dequantize_scaled(
        stored.data,
        stored.scale,
        _not_all_known(lib, inputs),
        rows=stored.block[0],
        columns=stored.block[1],
        step=1.0,
        out=_buffer(inputs),
        plan=plan,
    )
    return {**found, "unknown": decoded}


def _not_all_known(lib: ModuleType, inputs: Inputs) -> Any:
    """Ids past the check that is made on a CPU, and on a GPU never."""
    ids = torch.tensor(_NOT_ALL_KNOWN, device=inputs.device)
    return submodule(lib, "ops._selection").Selection(ids=ids, first=0, count=len(ids))


def _buffer(inputs: Inputs) -> Tensor:
    shape = (len(_NOT_ALL_KNOWN), inputs.case.k_in, inputs.case.n_out)
    return torch.empty(shape, dtype=inputs.dtype, device=inputs.device)


def _expected(inputs: Inputs, decoded: Tensor) -> Mapping[str, Expected]:
    """From the whole stack, fp32 [experts, d1, d2]."""
    every = torch.arange(inputs.case.experts, device=inputs.device)
    expected = {}
    for name, which in _selections(inputs).items():
        if which is None:
            ids = every
        elif isinstance(which, range):
            ids = every[which.start : which.stop]
        else:
            ids = which
        expected[name] = _exactly(decoded[ids], ids, inputs.dtype)
    if inputs.case.name == UNKNOWN_IDS:
        ids = torch.tensor(_NOT_ALL_KNOWN, device=inputs.device)
        known = (ids == 0)[:, None, None]
        expected["unknown"] = _exactly(
            torch.where(known, decoded, torch.nan), ids * 0, inputs.dtype
        )
    return expected


def _exactly(value: Tensor, ids: Tensor, dtype: torch.dtype) -> Expected:
    labels = ids.repeat_interleave(value.shape[1])
    rounded = value.to(dtype).double()
    return Expected(
        value=rounded,
        model=Uncertain.exact(rounded),
        dtype=dtype,
        expert=labels,
        sources=torch.ones_like(labels),
        zero=torch.zeros_like(labels, dtype=torch.bool),
    )


def _four_bit_reference(inputs: Inputs, how: Arithmetic) -> Mapping[str, Expected]:
    del how
    decoded = reference.four_bit(inputs.tensors, _problem(inputs.case), dtype=torch.float32)
    return _expected(inputs, decoded)


def _scaled_reference(inputs: Inputs, how: Arithmetic) -> Mapping[str, Expected]:
    del how
    grid, data, scale = SCALED[inputs.case], inputs["data"], inputs["scale"]
    if grid.encoding == "int8":
        decoded = reference.int8_row_wise(
            data.view(torch.int8), scale.reshape(-1), dtype=torch.float32
        )
    else:
        decoded = reference.float8(
            data.view(_FLOAT8[grid.encoding]), scale, grid.block, dtype=torch.float32
        )
    return _expected(inputs, decoded)


def _plans(lib: ModuleType, inputs: Inputs) -> tuple[NamedPlan, ...]:
    quant = submodule(lib, "quant")
    sizes = ((2048, 4), (4096, 4), (8192, 8)) if "model" in inputs.case.tags else ((256, 4),)
    plans = [quant.DequantizePlan(block=block, warps=warps) for block, warps in sizes]
    default = NamedPlan(path="decode", plan=None)
    return (default, *(NamedPlan(path="decode", plan=plan) for plan in plans))


def _four_bit_cost(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    blocks, selected = FOUR_BIT[case], case.tokens * case.k_in * case.n_out
    scales = selected / blocks.size
    scale_bytes = scales * (1 + 4 / blocks.outer) if blocks.outer else scales * 4
    return float(selected), selected / 2 + scale_bytes + bytes_of(dtype, selected)


def _scaled_cost(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    grid, selected = SCALED[case], case.tokens * case.k_in * case.n_out
    counts = (case.k_in, 1) if grid.encoding == "int8" else _grid_shape(case, grid)
    scale_bytes = 4.0 * case.tokens * math.prod(counts)
    return 2.0 * selected, selected + scale_bytes + bytes_of(dtype, selected)


def _bad(name: str, error: type[Exception], *words: str, **arguments: Any) -> BadInput:
    """A call of `dense` with one wrong argument."""

    def call(lib: ModuleType, inputs: Inputs) -> object:
        ids = inputs["top_k_index"].reshape(-1)
        return _four_bit(lib, inputs).dense(
            **{"expert_ids": ids, "dtype": inputs.dtype, **arguments}
        )

    return BadInput(name=name, call=call, error=error, words=words)


def _ill_stored(name: str, *words: str, **changes: Any) -> BadInput:
    """A stack whose parts do not fit together."""
    return BadInput(
        name=name,
        call=lambda lib, inputs: _four_bit(lib, inputs, **changes),
        error=ValueError,
        words=words,
    )


_KERNEL = "ops/dequantize.py"
_SCALED_KERNEL = "ops/dequantize_scaled.py"


def _mutant(id: str, what: str, old: str, new: str, file: str = _KERNEL) -> Mutant:  # noqa: A002
    return Mutant(id=f"dequantize-{id}", what=what, file=file, old=old, new=new)


DEQUANTIZE_FOUR_BIT = KernelSpec(
    name="dequantize_four_bit",
    run=_run_four_bit,
    reference=_four_bit_reference,
    cases=tuple(FOUR_BIT),
    plans=_plans,
    cost=_four_bit_cost,
    source=_KERNEL,
    ops=("dequantize_four_bit",),
    modes=("balanced",),
    inputs=_four_bit_inputs,
    mutants=(
        _mutant("nibbles-swapped", "low nibble first", "((j * 4) ^ 4)", "(j * 4)"),
        _mutant(
            "aligned-blocks",
            "blocks restart at every expert",
            "((element % BLOCKSIZE).to(tl.int32) + item * UNIT) // BLOCKSIZE",
            "(item * UNIT) // BLOCKSIZE",
        ),
        _mutant(
            "aligned-outer-blocks",
            "outer blocks restart at every program",
            "((base % OUTER_BLOCKSIZE).to(tl.int32) + distance) // OUTER_BLOCKSIZE",
            "distance // OUTER_BLOCKSIZE",
        ),
        _mutant("no-offset", "nested scales without offset", " + tl.load(outer_offset)", ""),
        _mutant(
            "ids-ignored",
            "the first experts instead of the selected ones",
            "expert = tl.load(expert_ids + slot).to(tl.int64)",
            "expert = slot",
        ),
        _mutant("range-ignored", "a range starts at 0", "expert = slot + first", "expert = slot"),
        _mutant(
            "one-item-more",
            "one item past the end of the expert is written",
            "item < tl.minimum(items - start, BLOCK)",
            "item <= tl.minimum(items - start, BLOCK)",
        ),
        _mutant(
            "one-item-less",
            "the last item of an expert stays unwritten",
            "tl.minimum(items - start, BLOCK).to",
            "tl.minimum(items - start - 1, BLOCK).to",
        ),
        _mutant(
            "words-across-blocks",
            "words where blocks are not made of whole ones",
            " and blocksize % 8 == 0",
            "",
        ),
        _mutant(
            "rounded-scale",
            "the scale is rounded to fp16 before the product",
            'scale = tl.where(known, scale, float("nan"))',
            'scale = tl.where(known, scale, float("nan")).to(tl.float16).to(tl.float32)',
        ),
    ),
    bad_inputs=(
        _bad("float-ids", TypeError, "int64 or int32", expert_ids=torch.zeros(2)),
        _bad("unknown-expert", ValueError, "expert_ids holds", "0 to", expert_ids=range(10**6)),
        _bad("range-with-step", ValueError, "step 1", expert_ids=range(0, 3, 2)),
        _bad("integer-output", TypeError, "dtype must be", dtype=torch.int32),
        _bad("small-buffer", ValueError, "out has shape", out=torch.empty(1, 1, 1)),
        _ill_stored("odd-blocksize", "blocksize must be even", "7", blocksize=7),
        _ill_stored("shared-bytes", "3 elements", shape=(1, 3)),
        _ill_stored("too-few-bytes", "packed must have", packed=torch.zeros(3, dtype=torch.uint8)),
    ),
)

DEQUANTIZE_SCALED = KernelSpec(
    name="dequantize_scaled",
    run=_run_scaled,
    reference=_scaled_reference,
    cases=tuple(SCALED),
    plans=_plans,
    cost=_scaled_cost,
    source=_SCALED_KERNEL,
    ops=("dequantize_scaled",),
    modes=("balanced",),
    inputs=_scaled_inputs,
    mutants=(
        _mutant(
            "sign-lost",
            "e4m3fn without its sign",
            "((bits.to(tl.uint16) & 0x80) << 8) | ",
            "",
            _SCALED_KERNEL,
        ),
        _mutant("bias", "e4m3fn with the bias of fp16", " * 256.0", "", _SCALED_KERNEL),
        _mutant(
            "first-column-scale",
            "one scale per row of blocks",
            "(c_first + c) // columns",
            "c_first // columns + c * 0",
            _SCALED_KERNEL,
        ),
        _mutant(
            "first-row-scale",
            "one scale per tile",
            "(r_first + r) // rows",
            "r_first // rows + r * 0",
            _SCALED_KERNEL,
        ),
        _mutant(
            "step-lost",
            "int8 in units of 1",
            "value * factor * step",
            "value * factor",
            _SCALED_KERNEL,
        ),
        _mutant(
            "next-expert",
            "the expert after the selected one",
            "data + expert * d1 * d2",
            "data + (expert + 1) * d1 * d2",
            _SCALED_KERNEL,
        ),
        _mutant(
            "wrong-slot",
            "every selected expert in the place of the first",
            "out + slot * d1 * d2",
            "out",
            _SCALED_KERNEL,
        ),
        _mutant(
            "column-tail",
            "one column past the width is written",
            "(c < d2 - c_first)[None, :]",
            "(c <= d2 - c_first)[None, :]",
            _SCALED_KERNEL,
        ),
        _mutant(
            "expert-scale-lost",
            "the scales of expert 0",
            "expert * g1 * g2 + group_r",
            "group_r",
            _SCALED_KERNEL,
        ),
    ),
)
