"""Plans of an architecture that is not at hand: those of its shipped table, or its heuristic."""

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from .ahead import Architecture, changed


def shipped_table(lib: ModuleType, device: Any) -> Any:
    """The table that is shipped for a GPU, whatever Triton it was tuned with."""
    tables = importlib.import_module(f"{lib.__name__}.plan_table")
    path = tables.SHIPPED / f"{tables.gpu_name(device)}.json"
    if not path.exists():
        return tables.EMPTY
    content = json.loads(path.read_text())
    plans = {key: tables.plan_from(entry) for key, entry in content["plans"].items()}
    return tables.PlanTable(plans=plans, source=str(path))


@contextmanager
def stated(lib: ModuleType, architecture: Architecture) -> Iterator[None]:
    """Within it, plans are chosen for the architecture, whatever device the operands are on, and
    ids are not checked, as on a GPU.
    """
    plans, tables, routing = (
        importlib.import_module(f"{lib.__name__}.{name}")
        for name in ("plan", "plan_table", "routing")
    )
    facts = architecture.device(lib)
    changes: list[tuple[Any, str, Any]] = [
        (plans.Device, "of", lambda device: facts),
        (tables, "installed_table", lambda device: shipped_table(lib, device)),
        (routing, "_check_values", lambda *facts: None),
    ]
    tables.plan_for.cache_clear()
    try:
        with changed(changes):
            yield
    finally:
        tables.plan_for.cache_clear()
