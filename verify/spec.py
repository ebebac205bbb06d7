"""What verify knows about one kernel. Adding a kernel is one `KernelSpec` in
`verify.specs.KERNELS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import ModuleType
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from .cases import Case
from .expected import Expected
from .inputs import Inputs, make_inputs
from .models import Arithmetic


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedPlan:
    """A plan to run, the dispatch path it takes, and whether the quick selection runs it."""

    path: str
    plan: Any
    quick: bool = True
    unavailable: str = ""
    """Why this machine cannot run it, or empty."""

    @property
    def label(self) -> str:
        """The knobs of the plan in one word, the same for equal plans."""
        return describe(self.plan)


def describe(plan: Any) -> str:
    """A plan's fields in one word: values only, nested ones in brackets."""
    if plan is None:
        return "default"
    if not is_dataclass(plan):
        return str(getattr(plan, "value", plan))
    words = [describe_field(getattr(plan, item.name)) for item in fields(plan)]
    return ":".join(word for word in words if word)


def describe_field(value: Any) -> str:
    """One field of a plan."""
    if value is None or value is False:
        return ""
    if value is True:
        return "yes"
    if is_dataclass(value):
        return "[" + "x".join(str(getattr(value, item.name)) for item in fields(value)) + "]"
    return str(getattr(value, "value", value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A wrong kernel: in `file` of the package, `old` (found exactly once) becomes `new`.

    `what` says what is broken. equivalent: why no check could see it, or empty. unseen_on_gpu: why
    none does on a GPU, where one in the interpreter does.
    """

    id: str
    what: str
    file: str
    old: str
    new: str
    equivalent: str = ""
    unseen_on_gpu: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BadInput:
    """A call that must raise `error`, with all of `words` in its message, before anything is
    launched.
    """

    name: str
    call: Callable[[ModuleType, Inputs], object]
    error: type[Exception]
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """One kernel, or one pipeline of kernels, and all that is known of it.

    run: (lib, inputs, plan) -> outputs by name; lib is the package under test, which a spec never
    imports.
    reference: (inputs, arithmetic) -> what the outputs should be, on the device of the inputs.
    arithmetic: (lib, inputs, plan) -> how the plan computes; references are shared by plans that
    agree in it.
    plans: (lib, inputs) -> every path, and the plans worth running on each.
    cost: (case, dtype) -> (floating-point operations, bytes moved if every operand is touched
    once).
    modes: input modes that make sense. inputs: (case, dtype, mode, device, seed=) -> Inputs.
    ops: public operations of the package that this entry covers. source: module path of its kernel.
    thrift: of the cases that are not smoke cases, the quick selection takes one in `thrift`:
    pipelines of kernels that have entries of their own need fewer.
    prepare: (lib, inputs) -> what `run` finds in inputs.prepared; built once per case, since it is
    a kernel of
    its own with its own entry. None where run builds everything.
    admits: whether the kernel is defined for a case that is not listed.
    timed_at: the projection, gate_up or down, whose sizes it is timed at. ranked: whether it is
    timed at every rank that is asked for, since its work depends on it.
    """

    name: str
    run: Callable[[ModuleType, Inputs, Any], Mapping[str, Tensor]]
    reference: Callable[[Inputs, Arithmetic], Mapping[str, Expected]]
    cases: tuple[Case, ...]
    plans: Callable[[ModuleType, Inputs], tuple[NamedPlan, ...]]
    cost: Callable[[Case, torch.dtype], tuple[float, float]]
    source: str
    ops: tuple[str, ...]
    arithmetic: Callable[[ModuleType, Inputs, Any], Arithmetic] = lambda lib, inputs, plan: (
        Arithmetic()
    )
    prepare: Callable[[ModuleType, Inputs], Any] | None = None
    modes: tuple[str, ...] = ("balanced", "lora-only", "exact")
    inputs: Callable[..., Inputs] = make_inputs
    mutants: tuple[Mutant, ...] = ()
    bad_inputs: tuple[BadInput, ...] = ()
    thrift: int = 1
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    admits: Callable[[Case], bool] = lambda case: True
    timed_at: str = "gate_up"
    ranked: bool = False

    def runs(self, case: Case) -> tuple[tuple[torch.dtype, str], ...]:
        """Every (dtype, mode) in which a case is worth running.

        Exact arithmetic needs no model of errors: it is for small cases. The LoRA part alone adds
        little where
        the slope of the LoRA term is judged anyway: it runs on the smoke and the timed model cases.
        """
        tags = case.tags
        modes = [
            mode
            for mode in self.modes
            if mode == "balanced"
            or (mode == "exact" and "model" not in tags and not case.extreme)
            or (mode == "lora-only" and tags & {"smoke", "bench"})
        ]
        return tuple((dtype, mode) for dtype in self.dtypes for mode in modes)

    def quick_runs(self, case: Case) -> tuple[tuple[torch.dtype, str], ...]:
        """Of a smoke case every dtype and every mode; of extreme values and of tiles that are
        just full two dtypes, one of them of 16 bits; of others one balanced run, or an exact one
        too.

        The names of kernel and case draw the dtypes where few are enough, so that every dtype
        meets every kind of case somewhere and a new case changes nothing for the others.
        """
        smoke = "smoke" in case.tags
        turn, place = divmod(crc32(f"{self.name} {case.name}".encode()), self.thrift)
        if place and not smoke and not case.extreme:
            return ()
        turn, first = divmod(turn, len(self.dtypes))
        dtype, other = (self.dtypes[(first + step) % len(self.dtypes)] for step in (0, 1))
        if smoke:
            runs = [(each, "balanced") for each in self.dtypes]
            runs += [(dtype, "exact"), (other, "lora-only")]
        elif case.extreme or case.routing.name == "boundary":
            runs = [(dtype, "balanced")]
            runs += [(other, "balanced")] if self.thrift == 1 else []
        else:
            runs = [(dtype, "balanced"), *([(other, "exact")] if turn % 3 == 0 else [])]
        return tuple(run for run in dict.fromkeys(runs) if run in self.runs(case))
