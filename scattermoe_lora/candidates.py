"""Every plan worth trying for a problem: tiles around the heuristic's choice, on every path."""

from dataclasses import replace

from ._row_tiles import ROW_TILES
from ._sizes import next_power_of_two
from .plan import (
    PATHS,
    Device,
    Operation,
    Path,
    Plan,
    Problem,
    Tile,
    choose,
    fit,
    rows_per_expert,
    shrink_tile,
    stage_bytes,
    tallest_tile,
)


def candidates(problem: Problem, device: Device) -> tuple[Plan, ...]:
    """Every plan worth trying for a problem, the heuristic's choice first; never empty.

    Tiles vary around the choice and stay within the shared memory of the device; none has more
    than 192 accumulators per thread.

    Raises:
        TypeError, ValueError: as `check_problem`.
    """
    base = choose(problem, device)
    plans = [base]
    plans.extend(with_path(base, path, problem, device) for path in PATHS[problem.operation])
    mapped = base.tile.descriptor
    limit = tallest_tile(problem.dtype, problem.rank, device, mapped=mapped)
    tallest = min(2 * rows_per_expert(problem), limit)
    for block_m in ROW_TILES:
        if block_m <= tallest:
            tile = fit(replace(base.tile, block_m=block_m), problem, device)
            if _keeps_registers(tile, problem.operation):
                plans.append(replace(base, tile=tile))
    if not device.interpreted:
        plans.extend(replace(base, tile=tile) for tile in variations(base.tile, problem, device))
    return tuple(dict.fromkeys(plans))


def variations(tile: Tile, problem: Problem, device: Device) -> tuple[Tile, ...]:
    """Tiles of other depth, width and warps than `tile` that fit the device."""
    n, k = tile.block_n, tile.block_k
    changes = (
        (n, k, tile.warps, tile.stages - 1),
        (n, k, tile.warps, tile.stages + 1),
        (n // 2, k, tile.warps, tile.stages),
        (n // 2, k, 4, tile.stages),
        (n, k * 2, tile.warps, 2),
        (n, k, 4 if tile.warps == 8 else 8, tile.stages),
    )
    found = []
    for block_n, block_k, warps, stages in changes:
        if block_n < 16 or stages < min(tile.stages, 2):
            continue
        varied = replace(tile, block_n=block_n, block_k=block_k, warps=warps, stages=stages)
        if not _keeps_registers(varied, problem.operation):
            continue
        if fit(varied, problem, device) == varied:
            found.append(varied)
    return tuple(found)


def _keeps_registers(tile: Tile, operation: Operation) -> bool:
    """Whether a tile has at most 192 accumulators per thread, which leaves it 63 registers."""
    gradient = operation in (Operation.LORA_WEIGHT_GRAD, Operation.EXPERT_WEIGHT_GRAD)
    height = tile.block_k if gradient else tile.block_m
    return height * tile.block_n <= 192 * 32 * tile.warps


def with_path(plan: Plan, path: Path, problem: Problem, device: Device) -> Plan:
    """The same plan on another path, with the tiles that the path needs."""
    shrink, tile, gather = plan.shrink, plan.tile, plan.gather
    if path in (Path.EPILOGUE, Path.SPLIT) and shrink is None:
        shrink = shrink_tile(problem, device)
    if path is Path.FUSED:
        limit = tallest_tile(problem.dtype, problem.rank, device, mapped=False)
        tile = replace(tile, block_m=min(tile.block_m, limit))
    if path in (Path.FUSED, Path.RECOMPUTE):
        tile, gather = whole_rank_tile(tile, problem, device), False
    return replace(plan, path=path, tile=tile, shrink=shrink, gather=gather)


def whole_rank_tile(tile: Tile, problem: Problem, device: Device) -> Tile:
    """Tile of a kernel that holds the whole rank besides its output: loads through pointers.

    Its accumulators are block_m (block_n + rank) fp32 values, at most 192 per thread.
    """
    rank = max(16, next_power_of_two(problem.rank))
    tile = replace(tile, descriptor=False, x_descriptor=False)
    if device.interpreted:
        return tile
    warps = 8 if rank > 64 else 4
    block_m = min(tile.block_m, 64 if problem.dtype.itemsize == 2 else 32)
    registers = 192 * 32 * warps // block_m
    block_n = min(tile.block_n, 128)
    while block_n + rank > registers and block_n > 16:
        block_n //= 2
    tile = replace(tile, block_m=block_m, block_n=block_n, block_k=32, warps=warps, stages=3)
    while (stage_bytes(tile, problem.dtype) + rank * 32 * problem.dtype.itemsize) * tile.stages + (
        rank * tile.block_n * problem.dtype.itemsize
    ) > device.shared_memory and tile.stages > 1:
        tile = replace(tile, stages=tile.stages - 1)
    return tile
