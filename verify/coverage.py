"""What a launch reached: pairs of kernel and path with plan, boundary, tail, routing, layout and
dtype.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .cases import Case
from .draws import Draw
from .routings import expert_counts

DIMENSIONS = ("plan", "boundary", "tail", "routing", "layout", "form")
_HEIGHT = 64


def features(draw: Draw, plan: Any, top_k_index: torch.Tensor) -> tuple[str, ...]:
    """The features of one launch, each "dimension|kernel|path|what"."""
    head = f"{draw.kernel}|{draw.path}"
    case = draw.case
    tile = getattr(plan, "tile", None)
    counts = expert_counts(top_k_index.cpu(), case.experts)
    found = [f"plan|{head}|{draw.label}|{draw.dtype}"]
    found += [f"boundary|{head}|{word}" for word in boundaries(counts, tile)]
    found += [f"tail|{head}|{draw.dtype}|{word}" for word in tails(case, tile)]
    found.append(f"routing|{head}|{case.routing.name}")
    found += [
        f"layout|{head}|w {case.weight_layout}",
        f"layout|{head}|x {case.x_layout}",
        f"layout|{head}|{case.source} to {case.target}",
    ]
    extras = "".join(letter for letter, present in (("b", case.bias), ("g", case.gated)) if present)
    adapter = "" if case.lora_dtype == "same" else " adapter " + case.lora_dtype
    found.append(f"form|{head}|{draw.dtype} {draw.mode}{adapter}{' ' + extras if extras else ''}")
    return tuple(found)


def boundaries(counts: Sequence[int], tile: Any) -> list[str]:
    """Where the rows per expert lie with regard to the height of a tile."""
    height = getattr(tile, "block_m", _HEIGHT)
    words = set()
    if not sum(counts):
        words.add("no rows")
    for count in counts:
        if count == 0:
            words.add("empty expert")
        elif count == 1:
            words.add("one row")
        elif count % height == 0:
            words.add("at")
        elif count % height == height - 1:
            words.add("under")
        elif count % height == 1:
            words.add("over")
        elif count < height:
            words.add("part of a tile")
        else:
            words.add("several tiles")
    return sorted(words)


def tails(case: Case, tile: Any) -> list[str]:
    """Whether K, N and R are below, a multiple of, or past a multiple of the blocks of the tile."""
    blocks = {
        "K": (case.k_in, getattr(tile, "block_k", _HEIGHT)),
        "N": (case.n_out, getattr(tile, "block_n", _HEIGHT)),
        "R": (case.rank, 16),
    }
    words = []
    for name, (size, block) in blocks.items():
        kind = "even" if size % block == 0 else "below" if size < block else "tail"
        words.append(f"{name} {kind}")
    return words


class Coverage:
    """The features seen so far."""

    def __init__(self) -> None:
        self._seen: Counter[str] = Counter()
        self.paths: set[str] = set()
        """The paths launched so far, as "kernel [path]": asked for before each launch."""

    def add(self, found: Iterable[str]) -> bool:
        """Count features; whether one of them is new."""
        found = tuple(found)
        new = any(feature not in self._seen for feature in found)
        self._seen.update(found)
        self.paths.update("{1} [{2}]".format(*feature.split("|")) for feature in found)
        return new

    @property
    def total(self) -> int:
        """How many different features were seen."""
        return len(self._seen)

    def by_dimension(self) -> dict[str, int]:
        """How many different features were seen of each dimension."""
        counts = Counter(feature.partition("|")[0] for feature in self._seen)
        return {dimension: counts[dimension] for dimension in DIMENSIONS}

    def by_path(self) -> dict[str, dict[str, int]]:
        """ "kernel [path]" -> launches, and different features of each dimension."""
        table: dict[str, dict[str, int]] = {}
        for feature, count in sorted(self._seen.items()):
            dimension, kernel, path, *_ = feature.split("|")
            row = table.setdefault(
                f"{kernel} [{path}]", {"launches": 0} | dict.fromkeys(DIMENSIONS, 0)
            )
            row[dimension] += 1
            if dimension == "plan":
                row["launches"] += count
        return table


def missing_paths(
    pools: Mapping[str, Sequence[Mapping[str, Any]]], seen: Iterable[str]
) -> list[str]:
    """Paths that could be run and were never reached, as "kernel [path]"."""
    wanted = {
        f"{kernel} [{plan['path']}]"
        for kernel, plans in pools.items()
        for plan in plans
        if not plan["unavailable"]
    }
    return sorted(wanted - set(seen))


def enough_to_reach_all(launches: int, paths: int) -> bool:
    """Whether a path that so many launches did not reach is one that cannot be reached.

    Half of the fresh launches go to paths not reached yet, so a path that can be reached is
    reached within a few times `paths` launches.
    """
    return launches >= 100 * paths
