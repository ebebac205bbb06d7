"""How a routed operation is launched: a frozen plan, a pure function of problem and device.

Choice: the plan that the caller passes > this machine's tuned table > the table shipped for this
GPU > the heuristic below, which is within 2% of a search in the geometric mean (H100, bf16).

What was tried on an H100 (bf16, rank 16, torch 2.11, Triton 3.6; times of the operation or step
that is named), for whoever looks further:

- 128x256x64, 8 warps, 4 stages is the best tile of a routed product nearly everywhere; 3 stages
  win 4% from 2048 rows per expert on, 64x256x64 with 4 warps at 64 rows.
- 128x128x64 with 3 stages, so that two programs share a multiprocessor: 3 to 10% slower where K is
  at most 1024 (down of the finer models), 19 to 33% elsewhere; 64x256x64 and 64x128x64 likewise,
  7 to 75%.
- X through a tensor map where its rows are in expert order: 5 to 10%. Gathering X first to allow
  it pays from N = 8192 on.
- A last tile of at most 64 rows computed at half height: forward of Qwen3-30B gate_up 353 to
  339 us at 2048 tokens, 775 to 720 at 8192. Not with X through a tensor map: Mixtral loses 6%.
- The low-rank operands and the target rows asked for before the K loop, up to rank 32: down of
  Qwen3-30B 221 to 210 us at 2048 tokens, 499 to 471 at 8192. They have to pass through a select
  after the loop, or Triton stages them, and waits, before it.
- Experts with many rows, summed in parts in dA and dB. Those of Qwen3-30B gate_up with half of the
  rows in one expert: 329 to 61 us at 2048 tokens. Parts of twice an even share instead of eight
  times, at 8192 tokens with half of the rows, with Zipf's, and balanced: 247 to 133, 241 to 148 and
  130 to 133; OLMoE 410 to 156, 380 to 185, 121 to 124. Expert by expert instead of one product
  after the other, balanced routings lost 8 to 10% at 8192 tokens.
- Slots divided in 32 bits: 8 to 20 registers less in dA and dB, and no branches in their loop.
- A K loop that the compiler cannot prove to run at least once: 25% slower, because ptxas serialises
  its wgmma (C7515).
- Persistent programs, with and without flattened loops: within 4%, either way.
- The shrinks of down and its gradient inside the activation kernels: two launches less, but 36 us
  against 33 (forward) and 105 against 79 (backward) for Qwen3-30B at 2048 tokens: a program that
  owns whole rows has too few loads in flight.
- SwiGLU in the epilogue of gate_up, gate and up columns in two accumulators of 128 x 128: equal bit
  for bit; product and activation together 378 to 372 us for Qwen3-30B at 2048 tokens, 873 to 832 at
  8192, for OLMoE 1051 to 996. That is at most 1.4% of a layer step, and one kernel more to trust:
  it is not here. Its gradient in the epilogue of down's: 500 to 2900 bytes per thread on a stack in
  every tile that was compiled; not run.
- dA and dB in steps of 32 rows, from 256 rows per expert on, against 64 and 128: 1 to 13% faster in
  eight of twelve problems, 1 to 12% slower in three, all of Mixtral.
- Triton 3.6's warp specialisation on Hopper: its passes fail on a loop whose rows are masked.
- Counting 32 chunks per step in the routing sort: no change at 128 experts, twice as slow at 256.
"""

import enum
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from ._arguments import check_dtype, check_type
from ._row_tiles import ROW_TILES
from ._sizes import ceil_div, next_power_of_two, power_of_two


class Path(enum.StrEnum):
    """The algorithm that computes an operation."""

    __hash__ = str.__hash__

    TILES = "tiles"
    """One product over per-expert row tiles."""
    FUSED = "fused"
    """X A^T accumulated beside X W in one loop over K, B in the epilogue."""
    SPLIT = "split"
    """Base, shrink and expand as separate products, then an add."""
    EPILOGUE = "epilogue"
    """X A^T once, then one more reduction step of width R inside the base product."""
    GROUPED_MM = "grouped_mm"
    """torch._grouped_mm over gathered rows; native for bf16 on CUDA only."""
    GRAM = "gram"
    """Per-expert products of saved [rows, R] and [rows, K] operands."""
    RECOMPUTE = "recompute"
    """The same, with the [rows, R] operand recomputed in every output block."""


class Operation(enum.StrEnum):
    """What a plan is for."""

    __hash__ = str.__hash__

    SCATTER2SCATTER = "scatter2scatter"
    SHRINK = "shrink"
    LORA_FORWARD = "lora_forward"
    LORA_INPUT_GRAD = "lora_input_grad"
    LORA_WEIGHT_GRAD = "lora_weight_grad"
    EXPERT_WEIGHT_GRAD = "expert_weight_grad"


PATHS: dict[Operation, tuple[Path, ...]] = {
    Operation.SCATTER2SCATTER: (Path.TILES, Path.GROUPED_MM),
    Operation.SHRINK: (Path.TILES,),
    Operation.LORA_FORWARD: (Path.EPILOGUE, Path.FUSED, Path.SPLIT, Path.GROUPED_MM),
    Operation.LORA_INPUT_GRAD: (Path.EPILOGUE, Path.FUSED, Path.SPLIT, Path.GROUPED_MM),
    Operation.LORA_WEIGHT_GRAD: (Path.GRAM, Path.RECOMPUTE, Path.GROUPED_MM),
    Operation.EXPERT_WEIGHT_GRAD: (Path.GRAM, Path.GROUPED_MM),
}
GRADIENTS = (Operation.LORA_WEIGHT_GRAD, Operation.EXPERT_WEIGHT_GRAD)
"""Operations that reduce over rows: their tiles are block_k x block_n, block_m rows a step."""


class Precision(enum.StrEnum):
    """How fp32 operands are multiplied; 16-bit operands are exact in either."""

    __hash__ = str.__hash__

    IEEE = "ieee"
    TF32 = "tf32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Launch knobs of one kernel.

    block_m: rows (in weight gradients, the rows reduced per step).
    block_n: output columns.
    block_k: reduction step (in weight gradients, output rows).
    descriptor: W through a tensor map.
    x_descriptor: X through one too, where its rows are in expert order and can be addressed.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3
    descriptor: bool = False
    x_descriptor: bool = False

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k", "warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        if min(self.block_m, self.block_n, self.block_k) < 16:
            raise ValueError(f"tile dimensions must be at least 16, got {self}")
        if self.stages < 1:
            raise ValueError(f"stages must be at least 1, got {self.stages}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that an operation needs to be told besides its operands.

    tile: the main kernel. shrink: the kernel of X A^T, where the path has one of its own.
    gather: copy X into expert order first (tiles and epilogue paths): worth it where N is so large
    that reading X through a tensor map saves more than the copy costs.
    part_rows: an expert with more rows is summed in parts of so many (gram path); 0: never.
    """

    path: Path
    tile: Tile
    shrink: Tile | None = None
    precision: Precision = Precision.IEEE
    gather: bool = False
    part_rows: int = 0

    def __post_init__(self) -> None:
        for name, kind in (("path", Path), ("tile", Tile), ("precision", Precision)):
            check_type(f"the {name} of a plan", getattr(self, name), kind)
        if self.shrink is not None:
            check_type("the shrink tile of a plan", self.shrink, Tile)
        if self.part_rows < 0:
            raise ValueError(f"part_rows must be at least 0, got {self.part_rows}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The facts about a device that a plan may depend on.

    capability: (major, minor), (0, 0) for Triton's interpreter. shared_memory: bytes per block.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter."""
        return self.capability == (0, 0)

    @property
    def has_descriptors(self) -> bool:
        """Whether tensor maps can be loaded."""
        return self.interpreted or self.capability >= (9, 0)

    @classmethod
    def of(cls, device: torch.device) -> "Device":
        """Facts about a torch device; read once per device."""
        if device.type != "cuda":
            return INTERPRETER
        return _cuda_device(
            device.index if device.index is not None else torch.cuda.current_device()
        )


INTERPRETER = Device(
    name="triton interpreter", capability=(0, 0), multiprocessors=1, shared_memory=2**31
)


@cache
def _cuda_device(index: int) -> Device:
    properties: Any = torch.cuda.get_device_properties(index)
    return Device(
        name=properties.name,
        capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        shared_memory=properties.shared_memory_per_block_optin,
    )


class Problem(NamedTuple):
    """The facts about operands that a plan may depend on.

    rows: routed rows. k: reduction width (in weight gradients, output rows). n: output width.
    rank: 0 without LoRA. w_map: the layout of W that a tensor map can address, "nk", "kn", or "".
    """

    operation: Operation
    rows: int
    experts: int
    k: int
    n: int
    rank: int
    dtype: torch.dtype
    precision: Precision
    w_map: str = ""


def current_precision(dtype: torch.dtype) -> Precision:
    """torch's own setting for fp32 products, read now; 16-bit products have no such choice."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return Precision.IEEE
    return Precision.TF32


def check_problem(problem: Problem, device: Device) -> None:
    """What a plan can be chosen for.

    Raises:
        TypeError: a field has another type or dtype, or `device` is none of `Device.of`.
        ValueError: a size or the layout cannot be.
    """
    if not isinstance(device, Device):
        kind = type(device).__name__
        raise TypeError(f"device must be the facts that Device.of tells of a device, got {kind}")
    check_type("problem", problem, Problem)
    check_type("the operation of a problem", problem.operation, Operation)
    check_type("the precision of a problem", problem.precision, Precision)
    check_type("the dtype of a problem", problem.dtype, torch.dtype)
    check_dtype("the dtype of a problem", problem.dtype)
    for name, least in (("rows", 0), ("experts", 1), ("k", 1), ("n", 1), ("rank", 0)):
        if getattr(problem, name) < least:
            raise ValueError(
                f"{name} of a problem must be at least {least}, got {getattr(problem, name)}"
            )
    if problem.w_map not in ("nk", "kn", ""):
        raise ValueError(f"w_map must be 'nk', 'kn' or '', got {problem.w_map!r}")


def choose(problem: Problem, device: Device) -> Plan:
    """The plan for a problem on a device; rows per expert count as the next power of two.

    Raises:
        TypeError, ValueError: as `check_problem`.
    """
    check_problem(problem, device)
    bucket = problem.experts * rows_per_expert(problem)
    return _choose(problem._replace(rows=bucket), device)


_PROGRAMS = 256
"""Programs that keep a large GPU busy, about two for each multiprocessor."""
GATHER_WIDTH = 8192
"""From this N on a copy of X pays: 2 M K bytes twice against 13% of 2 M K N operations (H100)."""


@lru_cache(maxsize=4096)
def _choose(problem: Problem, device: Device) -> Plan:
    operation = problem.operation
    precision = problem.precision
    if operation is Operation.SHRINK:
        return Plan(path=Path.TILES, tile=shrink_tile(problem, device), precision=precision)
    if operation in GRADIENTS:
        tile = gram_tile(problem, device)
        return Plan(path=Path.GRAM, tile=tile, precision=precision, part_rows=part_rows(problem))
    path = Path.TILES if operation is Operation.SCATTER2SCATTER else Path.EPILOGUE
    shrink = shrink_tile(problem, device) if path is Path.EPILOGUE else None
    tile = product_tile(problem, device)
    gather = tile.x_descriptor and problem.n >= GATHER_WIDTH and not device.interpreted
    return Plan(path=path, tile=tile, shrink=shrink, precision=precision, gather=gather)


def rows_per_expert(problem: Problem) -> int:
    return next_power_of_two(max(1, problem.rows // problem.experts))


def product_tile(problem: Problem, device: Device) -> Tile:
    """Tile of a routed product with a wide output."""
    rows = rows_per_expert(problem)
    block_n_limit = power_of_two(problem.n, low=16, high=256)
    if device.interpreted:
        return Tile(
            block_m=power_of_two(rows, low=16, high=128),
            block_n=min(block_n_limit, 128),
            block_k=power_of_two(problem.k, low=16, high=128),
            descriptor=bool(problem.w_map),
            x_descriptor=bool(problem.w_map),
        )
    wide = problem.dtype.itemsize == 4
    descriptor = bool(problem.w_map) and device.has_descriptors
    limit = tallest_tile(problem.dtype, problem.rank, device, mapped=descriptor)
    if wide:
        return Tile(
            block_m=power_of_two(rows, low=16, high=64),
            block_n=min(block_n_limit, 64),
            block_k=32,
            warps=4,
            stages=3,
        )
    if min(rows, limit) > 64:
        tile = Tile(
            block_m=128,
            block_n=block_n_limit,
            block_k=64,
            warps=8,
            stages=4 if rows < 2048 else 3,
            descriptor=descriptor,
            x_descriptor=descriptor,
        )
    else:
        tile = Tile(
            block_m=power_of_two(rows, low=16, high=min(limit, 64)),
            block_n=block_n_limit,
            block_k=64,
            warps=4,
            stages=4,
            descriptor=descriptor,
            x_descriptor=descriptor,
        )
    return fit(tile, problem, device)


def tallest_tile(dtype: torch.dtype, rank: int, device: Device, *, mapped: bool) -> int:
    """Most rows of a tile of a routed product with a low-rank term, or with rank 0 without one.

    mapped: W comes through a tensor map. 32 on sm_90 where it comes through pointers: from 64 rows
    on tiles are multiplied by wgmma, and the ptxas of Triton 3.6 (CUDA 12.8) gives some of those
    kernels a wrong descriptor of their operand in shared memory, hence wrong results: seen with
    widths of 1, 2, 3 and 17. `python -m verify compile` looks for such code.
    """
    doubtful = device.capability[0] == 9 and dtype.itemsize == 2
    return 32 if doubtful and rank > 0 and not mapped else max(ROW_TILES)


def check_height(plan: Plan, dtype: torch.dtype, rank: int, device: Device) -> None:
    """Refuse a stated plan of a LoRA product whose tile is too tall to be compiled right.

    Raises:
        ValueError: the tile has more rows than `tallest_tile` allows.
    """
    if plan.path not in (Path.EPILOGUE, Path.FUSED):
        return
    limit = tallest_tile(dtype, rank, device, mapped=plan.tile.descriptor)
    if plan.tile.block_m > limit:
        raise ValueError(
            f"the plan has {plan.tile.block_m} rows per tile, but a LoRA product of {dtype} on "
            f"{device.name} that loads W through pointers is compiled right with at most {limit}"
        )


def shrink_tile(problem: Problem, device: Device) -> Tile:
    """Tile of X A^T: the output is as narrow as the rank."""
    rows = rows_per_expert(problem)
    block_n = power_of_two(problem.rank, low=16, high=64)
    if device.interpreted:
        return Tile(
            block_m=power_of_two(rows, low=16, high=128),
            block_n=block_n,
            block_k=power_of_two(problem.k, low=16, high=256),
        )
    tile = Tile(block_m=power_of_two(rows, low=16, high=64), block_n=block_n, block_k=64, stages=4)
    return fit(tile, problem, device)


def gram_tile(problem: Problem, device: Device) -> Tile:
    """Tile of a weight gradient: block_k rows and block_n columns of it, block_m rows per step."""
    narrow = problem.operation is Operation.LORA_WEIGHT_GRAD
    columns = problem.rank if narrow else problem.n
    if device.interpreted:
        return Tile(
            block_m=power_of_two(rows_per_expert(problem), low=16, high=128),
            block_n=power_of_two(columns, low=16, high=128),
            block_k=power_of_two(problem.k, low=16, high=128),
        )
    narrow_dtype = problem.dtype.itemsize == 2
    high = 128 if narrow_dtype else 64
    tile = Tile(
        block_m=64 if narrow_dtype and not narrow else 32,
        block_n=power_of_two(columns, low=16, high=high),
        block_k=power_of_two(problem.k, low=16, high=high),
        warps=4,
        stages=2 if narrow else 3,
    )
    return fit(tile, problem, device)


def part_rows(problem: Problem) -> int:
    """Rows of one expert that one program of a LoRA gradient sums; 0 for all of them, where the
    rows of the bucket are no more.

    Twice an even share, rounded up to a power of two, which balanced routings do not exceed, but
    512 rows at least, and 1024 where the share is 256. Beyond rank 32 more, in proportion: the sums
    of parts, in fp32, are about as large as gradients of rank 32, at most. Fewer, and not below
    512, where whole experts have less than _PROGRAMS output tiles: parts then make up that many. A
    full gradient has programs enough without.
    """
    if problem.operation is not Operation.LORA_WEIGHT_GRAD:
        return 0
    share = max(1, next_power_of_two(problem.rank) // 32) * rows_per_expert(problem)
    rows = max(2 * share, min(4 * share, 1024), 512)
    tiles = ceil_div(problem.k + problem.n, 128) * ceil_div(problem.rank, 64)
    if problem.experts * tiles < _PROGRAMS:
        busy = next_power_of_two(ceil_div(problem.rows * tiles, _PROGRAMS))
        rows = min(rows, max(busy, 512))
    return rows if problem.rows > rows else 0


def stage_bytes(tile: Tile, dtype: torch.dtype) -> int:
    """Shared memory that one pipeline stage of a tile holds, in bytes."""
    return (tile.block_m + tile.block_n) * tile.block_k * dtype.itemsize


def fit(tile: Tile, problem: Problem, device: Device) -> Tile:
    """The tile, with fewer stages and then smaller blocks until the shared memory holds it."""
    reserve = 8 * 1024
    while stage_bytes(tile, problem.dtype) * tile.stages + reserve > device.shared_memory:
        if tile.stages > 2:
            tile = replace(tile, stages=tile.stages - 1)
        elif tile.block_n > 32:
            tile = replace(tile, block_n=tile.block_n // 2)
        elif tile.block_k > 16:
            tile = replace(tile, block_k=tile.block_k // 2)
        else:
            return tile
    return tile


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
