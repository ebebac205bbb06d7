"""Plans found by searching on a GPU: read from a file, looked up by problem, and written.

For the operands of a launch: this machine's tuned file > the table shipped for this GPU > the
heuristic. A table belongs to one GPU, one Triton version and one state of the kernels. A table that
is malformed or stale is refused aloud, and the next source is used. `python -m verify tune` writes
tables.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Any

import torch
import triton

from ._sizes import next_power_of_two
from ._syntax import device_code
from .plan import Device, Operation, Path, Plan, Precision, Problem, Tile, choose, part_rows

SCHEMA = 1
SHIPPED = FilePath(__file__).parent / "plans"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanTable:
    """Plans by bucket; `source` is where they were read from."""

    plans: Mapping[str, Plan]
    source: str = ""

    def lookup(self, problem: Problem) -> Plan | None:
        """The plan found for a problem's bucket, with the problem's own precision and parts."""
        plan = self.plans.get(bucket(problem))
        if plan is None:
            return None
        return replace(plan, precision=problem.precision, part_rows=part_rows(problem))


EMPTY = PlanTable(plans=MappingProxyType({}))


def bucket(problem: Problem) -> str:
    """What problems share a plan: sizes of the model; rows per expert and rank by powers of two."""
    rows = next_power_of_two(problem.rows // problem.experts)
    rank = 0 if problem.rank == 0 else max(16, next_power_of_two(problem.rank))
    dtype = str(problem.dtype).removeprefix("torch.")
    layout = problem.w_map or "pointers"
    sizes = f"m{rows} k{problem.k} n{problem.n} r{rank}"
    return f"{problem.operation.value} {dtype} {sizes} {layout}"


@lru_cache(maxsize=4096)
def plan_for(
    operation: Operation,
    rows_per_expert: int,
    experts: int,
    k: int,
    n: int,
    rank: int,
    dtype: torch.dtype,
    precision: Precision,
    layout: str,
    device: torch.device,
) -> Plan:
    """The plan for the operands of a launch, by their plain facts."""
    rows = rows_per_expert * experts
    problem = Problem(operation, rows, experts, k, n, rank, dtype, precision, layout)
    facts = Device.of(device)
    return installed_table(facts).lookup(problem) or choose(problem, facts)


@cache
def installed_table(device: Device) -> PlanTable:
    """This machine's tuned table, else the one shipped for the GPU, else an empty one."""
    if device.interpreted:
        return EMPTY
    for path in (tuned_path(device), SHIPPED / f"{gpu_name(device)}.json"):
        if not path.exists():
            continue
        try:
            return read_table(path, device)
        except ValueError as error:
            warnings.warn(f"plan table {path} is not used: {error}", stacklevel=2)
    return EMPTY


def gpu_name(device: Device) -> str:
    """The GPU's name in lower case, with one hyphen for all between its letters and digits."""
    return re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")


def tuned_path(device: Device) -> FilePath:
    """Where `python -m verify tune` keeps this machine's table: the user's cache directory."""
    return FilePath.home() / ".cache" / "scattermoe_lora" / "plans" / f"{gpu_name(device)}.json"


def read_table(path: FilePath, device: Device) -> PlanTable:
    """The table in a file.

    Raises:
        ValueError: the file is malformed, or was made for another GPU, Triton or state of the
            kernels.
    """
    try:
        content = json.loads(path.read_text())
        stamp = {name: content[name] for name in stamp_of(device)}
        plans = {key: plan_from(entry) for key, entry in content["plans"].items()}
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"it is malformed ({type(error).__name__}: {error})") from error
    for name, expected in stamp_of(device).items():
        if stamp[name] != expected:
            raise ValueError(f"its {name} is {stamp[name]!r}, but here it is {expected!r}")
    return PlanTable(plans=MappingProxyType(plans), source=str(path))


def write_table(path: FilePath, device: Device, plans: Mapping[str, Plan]) -> None:
    """Write plans by bucket, stamped with what they depend on."""
    entries = {key: plan_entry(plan) for key, plan in sorted(plans.items())}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**stamp_of(device), "plans": entries}, indent=1) + "\n")


def stamp_of(device: Device) -> dict[str, Any]:
    """What a table's validity depends on."""
    return {
        "schema": SCHEMA,
        "gpu": device.name,
        "triton": ".".join(triton.__version__.split(".")[:2]),
        "kernels": kernel_fingerprint(),
    }


@cache
def kernel_fingerprint() -> str:
    """A hash of the device code that plans steer."""
    folder = FilePath(__file__).parent
    digest = hashlib.sha256()
    for name in ("scatter2scatter", "fused", "gram", "gram_parts", "recompute", "_tile"):
        digest.update(device_code((folder / "ops" / f"{name}.py").read_text()).encode())
    return digest.hexdigest()[:16]


def plan_entry(plan: Plan) -> dict[str, Any]:
    """A plan as JSON, without the precision, which is a setting, and the parts, which depend on the
    number of experts: neither is found by searching.
    """
    entry = asdict(plan)
    del entry["precision"], entry["part_rows"]
    return {**entry, "path": plan.path.value}


def plan_from(entry: Mapping[str, Any]) -> Plan:
    """The plan of an entry."""
    shrink = entry["shrink"]
    return Plan(
        path=Path(entry["path"]),
        tile=Tile(**entry["tile"]),
        shrink=None if shrink is None else Tile(**shrink),
        gather=bool(entry["gather"]),
    )
