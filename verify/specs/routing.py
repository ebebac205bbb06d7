"""The routing itself: rows sorted by expert, offsets, and the tables of row tiles.

Every number is exact. It is built twice: from top-k ids, and from the rows that this gives.
"""

import itertools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..cases import CASES, Case
from ..expected import Expected
from ..inputs import Inputs
from ..models import Arithmetic
from ..numerics import Uncertain
from ..references import Groups
from ..spec import KernelSpec
from .common import groups_of, only_default, submodule

HEIGHTS = (16, 32, 64, 128)
_UNUSED = -1
_DROPPED = -2


def _long(name: str, tokens: int, kind: str) -> Case:
    """More rows than one chunk of the sort, which other cases do not have."""
    base = next(case for case in CASES if case.name == kind)
    changes = {"tokens": tokens, "top_k": 2, "experts": 5, "tags": frozenset({"edge"})}
    fields = {key: getattr(base, key) for key in ("routing", "k_in", "n_out")}
    return Case(name=name, **{**fields, **changes})


def _distinct() -> tuple[Case, ...]:
    """One case of each routing and number of tokens, choices and experts."""
    small = [case for case in CASES if "model" not in case.tags and not case.family]
    found = {
        (case.routing, case.tokens, case.top_k, case.experts): case for case in reversed(small)
    }
    return tuple(reversed(found.values()))


_CASES = (
    *_distinct(),
    _long("two-chunks", 150, "plain"),
    _long("nine-chunks", 1100, "sentinels"),
    Case(
        name="one-row-of-many-experts", tokens=1, top_k=1, experts=33, k_in=16, n_out=16,
        tags=frozenset({"edge"}),
    ),
)  # fmt: skip


def _inputs(
    case: Case, dtype: torch.dtype, mode: str, device: torch.device, *, seed: int = 0
) -> Inputs:
    ids = case.routing.draw(
        tokens=case.tokens, top_k=case.top_k, experts=case.experts, seed=case.seed + 7919 * seed
    )
    tensors = {"top_k_index": ids.to(device)}
    return Inputs(case=case, mode=mode, dtype=dtype, scaling=1.0, tensors=tensors)


def _run(lib: ModuleType, inputs: Inputs, plan: Any) -> Mapping[str, Tensor]:
    del plan
    case = inputs.case
    first = lib.Routing.from_top_k(inputs["top_k_index"], case.experts, sentinels=case.drops)
    again = lib.Routing.from_sorted(
        first.expert_of_row,
        first.slots,
        top_k=case.top_k,
        experts=case.experts,
        validate=False,  # where nothing is launched, there is nothing in them
    )
    found = {}
    for name, value in (("top_k", first), ("sorted", again)):
        parts = {
            "slots": value.slots,
            "expert_of_row": value.expert_of_row,
            "offsets": value.offsets,
            "entries": torch.tensor([value.tiles.shape[0]], device=value.device),
            **_tables(lib, value.tiles, inputs),
        }
        found.update({f"{name} {part}": tensor.double() for part, tensor in parts.items()})
    return found


def _tables(lib: ModuleType, tiles: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    """The table of each height; of entries that are not in use only the mark is looked at."""
    case, module = inputs.case, submodule(lib, "_row_tiles")
    tables = {}
    for height in HEIGHTS if case.rows else ():
        start, count = module.row_tile_range(case.rows, case.experts, height)
        table = tiles[start : start + count].clone()
        table[:, 1:].masked_fill_((table[:, 0] == _UNUSED)[:, None], 0)
        tables[f"tiles {height}"] = table
    return tables


def _expected_table(groups: Groups, height: int) -> Tensor:
    """Room for any routing of as many rows: whole tiles, and one more per group."""
    entries: list[tuple[int, int, int, int]] = []
    bounds = (*groups.bounds, groups.rows)
    for group, (begin, end) in enumerate(itertools.pairwise(bounds)):
        expert = group if group < groups.experts else _DROPPED
        tiles = -(-(end - begin) // height)
        entries += [(expert, len(entries), begin, end)] * tiles
    entries += [(_UNUSED, 0, 0, 0)] * (_capacity(groups, height) - len(entries))
    return torch.tensor(entries).reshape(-1, 4)


def _capacity(groups: Groups, height: int) -> int:
    return groups.rows // height + min(groups.experts + 1, groups.rows)


def _reference(inputs: Inputs, how: Arithmetic) -> Mapping[str, Expected]:
    del how
    groups = groups_of(inputs)
    flat = inputs["top_k_index"].reshape(-1)
    known = (flat >= 0) & (flat < groups.experts)
    dropped = torch.nonzero(~known).reshape(-1)
    ids = torch.where(known, flat, groups.experts)
    slots = torch.cat([groups.slots, dropped])
    entries = sum(_capacity(groups, height) for height in HEIGHTS)
    parts = {
        "slots": slots,
        "expert_of_row": ids[slots],
        "offsets": torch.tensor(groups.bounds),
        "entries": torch.tensor([entries]),
    }
    if groups.rows:
        parts |= {f"tiles {height}": _expected_table(groups, height) for height in HEIGHTS}
    return {
        f"{name} {part}": _exactly(value.to(flat.device))
        for name in ("top_k", "sorted")
        for part, value in parts.items()
    }


def _exactly(value: Tensor) -> Expected:
    vectors = len(value) if value.ndim > 1 else 1
    owner = torch.zeros(vectors, dtype=torch.int64, device=value.device)
    return Expected(
        value=value.double(),
        model=Uncertain.exact(value.double()),
        dtype=torch.float64,
        expert=owner,
        sources=torch.ones_like(owner),
        zero=torch.zeros_like(owner, dtype=torch.bool),
    )


def _cost(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    del dtype
    return 0.0, float(case.rows * (8 + 8 + 4 + 16))


ROUTING = KernelSpec(
    name="routing",
    run=_run,
    reference=_reference,
    inputs=_inputs,
    cases=_CASES,
    plans=only_default,
    cost=_cost,
    modes=("balanced",),
    dtypes=(torch.float32,),
    source="_sort.py",
    ops=("routing",),
)
