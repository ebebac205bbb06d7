"""Every plan worth trying for a problem: tiles around the heuristic's choice, on every path."""

from dataclasses import replace

from ._row_tiles import ROW_TILES
from .plan import (
    GRADIENTS,
    PATHS,
    Device,
    Operation,
    Plan,
    Problem,
    Tile,
    choose,
    fit,
    rows_per_expert,
    tallest_tile,
    with_path,
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
    tallest = min(2 * rows_per_expert(problem), _tallest(base.tile, problem, device))
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


def _tallest(tile: Tile, problem: Problem, device: Device) -> int:
    """Most rows of a tile: what `tallest_tile` allows a product, and no limit for a gradient."""
    if problem.operation in GRADIENTS:
        return max(ROW_TILES)
    return tallest_tile(problem.dtype, problem.rank, device, mapped=tile.descriptor)


def _keeps_registers(tile: Tile, operation: Operation) -> bool:
    """Whether a tile has at most 192 accumulators per thread, which leaves it 63 registers."""
    height = tile.block_k if operation in GRADIENTS else tile.block_m
    return height * tile.block_n <= 192 * 32 * tile.warps
