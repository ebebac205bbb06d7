"""Which expert parameters carry which adapters."""

from collections.abc import Sequence
from dataclasses import dataclass

from peft.tuners.lora import layer as peft_layer
from torch import nn

from ._experts import ExpertsLayout, experts_modules, stored_weight
from ._wrappers import WrapperChain, left_out_by, without_wrappers


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRow:
    """One adapter of one expert parameter."""

    adapter: str
    rank: int
    scaling: float
    active: bool
    trainable: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterRow:
    """One expert parameter, experts of [d1, d2] in some storage, and its adapters."""

    module: str
    parameter: str
    experts: int
    shape: tuple[int, int]
    storage: str
    adapters: tuple[AdapterRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Every expert parameter of a model with its adapters; printed as a table."""

    rows: tuple[ParameterRow, ...]

    @property
    def adapted(self) -> int:
        """Expert parameters with at least one adapter."""
        return sum(bool(row.adapters) for row in self.rows)

    @property
    def trainable(self) -> int:
        """Trainable elements in adapters on expert parameters."""
        return sum(adapter.trainable for row in self.rows for adapter in row.adapters)

    def __str__(self) -> str:
        head = (
            "parameter",
            "experts",
            "shape",
            "storage",
            "adapter",
            "rank",
            "scaling",
            "trainable",
        )
        lines = [head]
        for row in self.rows:
            what = (
                f"{row.module}.{row.parameter}",
                str(row.experts),
                f"{row.shape[0]}x{row.shape[1]}",
                row.storage,
            )
            if not row.adapters:
                lines.append((*what, "-", "-", "-", "0"))
            for adapter in row.adapters:
                name = adapter.adapter if adapter.active else f"({adapter.adapter})"
                counts = (str(adapter.rank), f"{adapter.scaling:g}", f"{adapter.trainable:,}")
                lines.append((*what, name, *counts))
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        table = [
            "  ".join(
                cell.rjust(width) if column in (1, 5, 6, 7) else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        total = (
            f"{self.adapted} of {len(self.rows)} expert parameters adapted, "
            f"{self.trainable:,} trainable elements"
        )
        return "\n".join([*table, total])


def coverage_of(model: nn.Module, chains: Sequence[WrapperChain]) -> Coverage:
    """The coverage of a model with those wrappers."""
    wrappers = {
        (chain.name, wrapper.parameter_name): wrapper
        for chain in chains
        for wrapper in chain.wrappers
    }
    rows = []
    for full_name, module in experts_modules(model).items():
        name = without_wrappers(full_name)
        for parameter in ExpertsLayout.of(module).projections:
            stored = stored_weight(module, parameter)
            wrapper = wrappers.get((name, parameter))
            rows.append(
                ParameterRow(
                    module=name,
                    parameter=parameter,
                    experts=stored.experts,
                    shape=stored.shape,
                    storage=f"{type(stored).__name__} {str(stored.dtype).removeprefix('torch.')}",
                    adapters=() if wrapper is None else _adapters(wrapper),
                )
            )
    return Coverage(rows=tuple(rows))


def check_targets(model: nn.Module) -> None:
    """Every entry of every adapter's target_parameters names a parameter that is adapted, and none
    is adapted that another setting leaves out.

    Raises:
        ValueError: an entry matched nothing, or a setting was ignored.
    """
    wrappers = {
        f"{without_wrappers(name)}.{module.parameter_name}": module
        for name, module in model.named_modules()
        if isinstance(module, peft_layer.ParamWrapper)
    }
    names = set(wrappers)
    for adapter, config in getattr(model, "peft_config", {}).items():
        for target in getattr(config, "target_parameters", None) or ():
            if not any(name == target or name.endswith(f".{target}") for name in names):
                raise ValueError(
                    f"target_parameters of adapter {adapter!r} names {target!r}, which matched no "
                    "parameter (quantised parameters are matched by their full names only)"
                )
        if getattr(config, "use_qalora", False) and any(
            adapter in wrapper.lora_A for wrapper in wrappers.values()
        ):
            raise ValueError(
                f"adapter {adapter!r} has use_qalora, which PEFT ignores on expert parameters; "
                "give them an adapter of their own without it"
            )
        for name, wrapper in wrappers.items():
            setting = left_out_by(config, name) if adapter in wrapper.lora_A else None
            if setting is not None:
                raise ValueError(
                    f"{setting} of adapter {adapter!r} leaves {name} out, but PEFT has adapted it: "
                    "it asks that setting for target_modules only. Name the parameters in full in "
                    "target_parameters, or add the adapter by integrations.peft.adapt"
                )


def _adapters(wrapper: peft_layer.ParamWrapper) -> tuple[AdapterRow, ...]:
    active = set() if wrapper.disable_adapters else set(wrapper.active_adapters)
    rows = []
    for name in wrapper.lora_A:
        factors = (wrapper.lora_A[name].weight, wrapper.lora_B[name].weight)
        rows.append(
            AdapterRow(
                adapter=name,
                rank=wrapper.r[name],
                scaling=float(wrapper.scaling[name]),
                active=name in active,
                trainable=sum(factor.numel() for factor in factors if factor.requires_grad),
            )
        )
    return tuple(rows)
