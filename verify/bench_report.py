"""Tables of benchmarks for a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_SHORT = {
    "torch._grouped_mm composition": "grouped_mm",
    "transformers grouped_mm, no adapter": "HF, no LoRA",
    "transformers grouped_mm + PEFT": "HF + PEFT",
    "Liger fused MoE, no adapter": "Liger, no LoRA",
    "bitsandbytes dequantize_4bit": "bitsandbytes",
}


def print_benchmarks(console: Console, record: Mapping[str, Any]) -> None:
    """Every benchmark against its floor and the peers, then the means and what failed."""
    table = Table(title="milliseconds, medians; x: times the floor, or times ours")
    for heading in ("benchmark", "path"):
        table.add_column(heading, overflow="fold")
    for heading in ("ms", "floor", "x", "wall", "host", "first s", "MB", "launches"):
        table.add_column(heading, justify="right")
    table.add_column("beside", overflow="fold")
    for entry in record["benchmarks"]:
        table.add_row(*_row(entry))
    console.print(table)
    summary = record["summary"]
    _print_means(console, "over the floor", summary["over_floor"])
    _print_means(console, "times faster than", summary["times_faster_than"])
    for text in summary["invalid"]:
        console.print(f"invalid comparison: {text}", style="yellow", markup=False)
    for failure in record["failures"]:
        text = f"{failure['status']}: {failure['name']}: {failure['reason']}"
        console.print(text, style="red", markup=False)
    left_out = {
        f"{name}: {why}"
        for entry in record["benchmarks"]
        for name, why in entry["detail"]["peers_left_out"].items()
    }
    for text in sorted(left_out):
        console.print(f"left out: {text}", style="dim", markup=False)


def _row(entry: Mapping[str, Any]) -> Sequence[str]:
    ms, detail = entry["ms"], entry["detail"]
    beside = [
        f"{_SHORT.get(name, name)} {peer['ms']:.3f} ({peer['ms'] / ms:.2f}x{_mb(peer)})"
        for name, peer in entry["peers"].items()
    ]
    beside += [
        f"{name} {other:.3f} ({ms / other - 1:+.1%})" for name, other in detail["controls"].items()
    ]
    if "one_thread_wall_ms" in detail:
        beside.append(f"wall on one thread {detail['one_thread_wall_ms']:.3f}")
    graph = detail.get("graph")
    if graph and "ms" in graph:
        beside.append(f"graph {graph['wall_ms']:.3f}{'' if graph['bitwise_equal'] else ' DIFFERS'}")
    elif graph:
        beside.append(f"graph: {graph['error'][:60]}")
    return (
        entry["name"],
        entry["path"],
        f"{ms:.3f}",
        f"{entry['floor_ms']:.3f}",
        f"{ms / entry['floor_ms']:.2f}",
        f"{entry['wall_ms']:.3f}",
        f"{detail['host_ms']:.3f}",
        f"{entry['first_call_s']:.2f}",
        "" if entry["peak_bytes"] is None else f"{entry['peak_bytes'] / 1e6:.0f}",
        "" if entry["launches"] is None else str(entry["launches"]),
        "; ".join(beside),
    )


def _mb(peer: Mapping[str, Any]) -> str:
    return "" if peer["peak_bytes"] is None else f", {peer['peak_bytes'] / 1e6:.0f} MB"


def _print_means(console: Console, title: str, means: Mapping[str, Mapping[str, Any]]) -> None:
    if not means:
        return
    lines: Iterable[str] = (
        f"  {key:70} {found['geometric_mean']:6.2f} (worst {found['worst']:.2f}, {found['count']})"
        for key, found in means.items()
    )
    console.print(title, style="bold")
    for line in lines:
        console.print(line, markup=False, highlight=False)
