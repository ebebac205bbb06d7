"""Decoding of stored experts: 4-bit with plain and nested statistics, int8 row-wise, fp8.

A case is read as: `experts` matrices [k_in, n_out], of which `tokens` are selected by the ids that
its routing draws; model cases decode the whole stack and nothing else. The expected value is
rounded to the dtype of the output and allowed no variance, so every output is judged to the bit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
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
from ..routings import RoutingKind
from ..spec import BadInput, KernelSpec, Mutant, NamedPlan
from .common import bytes_of, submodule

__all__ = ["DEQUANTIZE_FOUR_BIT", "DEQUANTIZE_SCALED"]

_SELECTED_RANGE = range(1, 2)
"""Decoded besides the drawn ids and the whole stack, wherever there are two experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """How the statistics of a 4-bit case are laid out; outer 0 is not nested."""

    size: int = 64
    codebook: str = "nf4"
    outer: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The storage of an 8-bit case: int8 with a scale per row, or fp8 with one per block."""

    encoding: str
    block: tuple[int, int] = (1, 1)


def _case(
    name: str, experts: int, d1: int, d2: int, *tags: str, selected: int = 5, ids: str = "uniform"
) -> Case:
    return Case(
        name=name,
        tokens=selected,
        experts=experts,
        top_k=1,
        k_in=d1,
        n_out=d2,
        routing=RoutingKind(ids),
        tags=frozenset(tags or ("edge",)),
    )


FOUR_BIT: Mapping[Case, Blocks] = {
    _case("nf4", 4, 12, 64, "smoke"): Blocks(),
    _case("nf4-nested", 7, 6, 40, "smoke"): Blocks(size=32, outer=5),
    _case("fp4", 5, 5, 6, "smoke"): Blocks(size=32, codebook="fp4"),
    _case("fp4-nested", 5, 8, 64, ids="one"): Blocks(codebook="fp4", outer=256),
    _case("blocks-straddle-rows", 4, 10, 48): Blocks(size=128),
    _case("blocks-straddle-experts", 7, 6, 40): Blocks(size=64),
    _case("block-of-several-experts", 9, 8, 32): Blocks(size=4096),
    _case("expert-of-odd-bytes", 5, 5, 6): Blocks(size=32, outer=2),
    _case("expert-of-half-a-word", 5, 6, 6): Blocks(size=64),
    _case("smallest", 1, 1, 2, selected=1, ids="one"): Blocks(size=32),
    _case("none-selected", 4, 8, 32, selected=0): Blocks(outer=4),
    _case("block-of-no-power-of-two", 4, 8, 30): Blocks(size=24),
    _case("block-of-half-words", 4, 5, 8): Blocks(size=12),
    _case("qwen3-gate-up", 128, 1536, 2048, "model", "bench", selected=128): Blocks(),
    _case("qwen3-gate-up-nested", 128, 1536, 2048, "model", "bench", selected=128): Blocks(
        outer=256
    ),
}

SCALED: Mapping[Case, Grid] = {
    _case("int8", 4, 10, 48, "smoke"): Grid(encoding="int8"),
    _case("e4m3fn-blocks", 3, 20, 24, "smoke"): Grid(encoding="e4m3fn", block=(16, 16)),
    _case("e5m2-blocks", 3, 12, 40, "smoke"): Grid(encoding="e5m2", block=(8, 32)),
    _case("e4m3fn-rows", 3, 9, 31): Grid(encoding="e4m3fn", block=(1, 31)),
    _case("e4m3fn-experts", 5, 7, 16): Grid(encoding="e4m3fn", block=(7, 16)),
    _case("e5m2-columns", 3, 12, 17): Grid(encoding="e5m2", block=(12, 1)),
    _case("int8-tails", 5, 3, 1): Grid(encoding="int8"),
    _case("int8-wide", 2, 2, 1030): Grid(encoding="int8"),
    _case("e4m3fn-qwen3-gate-up", 128, 1536, 2048, "model", "bench", selected=128): Grid(
        encoding="e4m3fn", block=(128, 128)
    ),
}

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
    # Every byte but the infinities and NaNs of fp8, which differ from format to format.
    bound = {"int8": 128, "e4m3fn": 127, "e5m2": 124}[grid.encoding]
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
    fields = {
        "packed": inputs["packed"],
        "absmax": inputs["absmax"],
        "codebook": inputs["codebook"],
        "blocksize": blocks.size,
        "experts": case.experts,
        "shape": (case.k_in, case.n_out),
        "nested": nested,
    }
    return quant.FourBit(**{**fields, **changes})


def _scaled(lib: ModuleType, inputs: Inputs) -> Any:
    quant, grid = submodule(lib, "quant"), SCALED[inputs.case]
    if grid.encoding == "int8":
        data = inputs["data"].view(torch.int8)
        return quant.Int8RowWise(data=data, row_scale=inputs["scale"].reshape(-1))
    data = inputs["data"].view(_FLOAT8[grid.encoding])
    return quant.Float8(data=data, scale=inputs["scale"], block=grid.block)


def _run(stored: Any, inputs: Inputs, plan: Any) -> Mapping[str, Tensor]:
    return {
        name: stored.dense(which, dtype=inputs.dtype, plan=plan)
        for name, which in _selections(inputs).items()
    }


def _selections(inputs: Inputs) -> dict[str, Tensor | range | None]:
    if "model" in inputs.case.tags:
        return {"all": None}
    some: dict[str, Tensor | range | None] = {
        "all": None,
        "selected": inputs["top_k_index"].reshape(-1),
    }
    if inputs.case.experts > 1:
        some["range"] = _SELECTED_RANGE
    return some


def _run_four_bit(lib: ModuleType, inputs: Inputs, plan: Any) -> Mapping[str, Tensor]:
    return _run(_four_bit(lib, inputs), inputs, plan)


def _run_scaled(lib: ModuleType, inputs: Inputs, plan: Any) -> Mapping[str, Tensor]:
    return _run(_scaled(lib, inputs), inputs, plan)


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
