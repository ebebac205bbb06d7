"""Calls that must be refused before anything is launched, as data; numbers are those of the first
case.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..inputs import Inputs
from ..spec import BadInput
from .common import adapter

Run = Callable[[ModuleType, Inputs, Any], Mapping[str, Tensor]]
Change = Callable[[Inputs], dict[str, Tensor]]


def refused(run: Run, name: str, change: Change, error: type[Exception], *words: str) -> BadInput:
    """`run` on inputs of which some are replaced."""

    def call(lib: ModuleType, inputs: Inputs) -> object:
        return run(lib, inputs.having(**change(inputs)), None)

    return BadInput(name=name, call=call, error=error, words=words)


def row_operand(run: Run, name: str, width: str = "96") -> tuple[BadInput, ...]:
    """A row operand of 37 tokens that is not what it should be; `width` is what its width must
    be.
    """
    narrow = str(int(width) - 1)
    return (
        refused(
            run, f"{name} narrow", lambda i: {name: i[name][:, :-1]}, ValueError, width, narrow
        ),
        refused(run, f"{name} short", lambda i: {name: i[name][:-1]}, ValueError, "rows"),
        refused(run, f"{name} flat", lambda i: {name: i[name].reshape(-1)}, ValueError, "shape"),
        refused(run, f"{name} integers", lambda i: {name: i[name].int()}, TypeError, "int32"),
        refused(run, f"{name} double", lambda i: {name: i[name].double()}, TypeError, "float64"),
        refused(run, f"{name} elsewhere", lambda i: {name: i[name].to("meta")}, ValueError, "meta"),
    )


def weight_operand(run: Run) -> tuple[BadInput, ...]:
    """A weight [4, 96, 80] that does not fit x or the routing."""
    return (
        refused(
            run, "weight experts", lambda i: {"weight": i["weight"][:-1]}, ValueError, "3", "4"
        ),
        refused(run, "weight flat", lambda i: {"weight": i["weight"][0]}, ValueError, "weight"),
        refused(run, "weight type", lambda i: {"weight": i["weight"].half()}, TypeError, "float16"),
        refused(
            run,
            "bias shape",
            lambda i: {"bias": torch.zeros(4, 79, device=i.device)},
            ValueError,
            "bias",
            "80",
            "79",
        ),
        refused(
            run,
            "gates shape",
            lambda i: {"gates": torch.zeros(73, device=i.device)},
            ValueError,
            "73",
            "74",
        ),
    )


def adapter_operand(run: Run) -> tuple[BadInput, ...]:
    """Factors [4, 16, 96] and [4, 80, 16] that do not fit each other, the weight or the routing."""
    return (
        refused(run, "rank", lambda i: {"lora_b": i["lora_b"][..., :-1]}, ValueError, "16", "15"),
        refused(run, "factors", lambda i: {"lora_b": i["lora_b"][:-1]}, ValueError, "4", "3"),
        refused(run, "lora_a wide", lambda i: {"lora_a": i["lora_a"][..., :-1]}, ValueError, "95"),
        refused(run, "lora_b wide", lambda i: {"lora_b": i["lora_b"][:, :-1]}, ValueError, "79"),
        refused(run, "lora type", lambda i: {"lora_a": i["lora_a"].half()}, TypeError, "float16"),
        refused(
            run,
            "adapter experts",
            lambda i: {"lora_a": i["lora_a"][:-1], "lora_b": i["lora_b"][:-1]},
            ValueError,
            "3",
            "4",
        ),
    )


def wrong_path(run: Run, plans: Callable[[ModuleType, Inputs], Any]) -> tuple[BadInput, ...]:
    """Plans of another operation, or of operands that are not there."""

    def on(path: str) -> Callable[[ModuleType, Inputs], object]:
        def call(lib: ModuleType, inputs: Inputs) -> object:
            plan = plans(lib, inputs)[0].plan
            return run(lib, inputs, replace(plan, path=lib.Path(path)))

        return call

    grouped = BadInput(
        name="grouped_mm in float32", call=on("grouped_mm"), error=ValueError, words=("float32",)
    )
    return (grouped,)


def _index(name: str, error: type[Exception], index: Tensor, *words: str) -> BadInput:
    def call(lib: ModuleType, inputs: Inputs) -> object:
        return lib.Routing.from_top_k(index.to(inputs.device), 4, validate=True)

    return BadInput(name=name, call=call, error=error, words=words)


ROUTING: tuple[BadInput, ...] = (
    _index("expert beyond", ValueError, torch.tensor([[0, 4]]), "4", "sentinels"),
    _index("expert negative", ValueError, torch.tensor([[0, -1]]), "-1", "sentinels"),
    _index("top_k beyond experts", ValueError, torch.zeros(2, 5, dtype=torch.int64), "5", "4"),
    _index("index of floats", TypeError, torch.zeros(2, 2), "float32"),
    _index("index flat", ValueError, torch.zeros(4, dtype=torch.int64), "[4]"),
    BadInput(
        name="no experts",
        call=lambda lib, inputs: lib.Routing.from_top_k(inputs["top_k_index"], 0),
        error=ValueError,
        words=("0",),
    ),
    BadInput(
        name="scaling infinite",
        call=lambda lib, inputs: adapter(lib, replace(inputs, scaling=float("inf"))),
        error=ValueError,
        words=("inf",),
    ),
    BadInput(
        name="sorted rows of another length",
        call=lambda lib, inputs: lib.Routing.from_sorted(
            torch.zeros(6, dtype=torch.int32, device=inputs.device),
            torch.arange(5, device=inputs.device),
            top_k=1,
            experts=4,
        ),
        error=ValueError,
        words=("6", "5"),
    ),
)
