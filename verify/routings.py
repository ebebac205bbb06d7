"""Routings to test with: a kind and a few integers, expanded by a seeded generator.

Every kind is one function (draw, *parameters) -> top_k_index int64 [tokens, top_k]. Kinds that fix
the number of rows per expert deal the wanted counts out over the slots; a token may then choose an
expert twice.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_HEIGHTS = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What a kind may look at."""

    tokens: int
    top_k: int
    experts: int
    generator: torch.Generator

    @property
    def rows(self) -> int:
        """tokens * top_k."""
        return self.tokens * self.top_k


@dataclass(frozen=True, slots=True)
class RoutingKind:
    """A kind of routing by name, with its integer parameters."""

    name: str
    parameters: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise ValueError(f"routing kind {self.name!r} is none of {sorted(KINDS)}")

    def __str__(self) -> str:
        return self.name + "".join(f"-{value}" for value in self.parameters)

    def draw(self, *, tokens: int, top_k: int, experts: int, seed: int) -> Tensor:
        """top_k_index int64 [tokens, top_k] on the CPU, the same for the same arguments."""
        generator = torch.Generator().manual_seed(seed)
        draw = Draw(tokens=tokens, top_k=top_k, experts=experts, generator=generator)
        return KINDS[self.name](draw, *self.parameters)


def expert_counts(top_k_index: Tensor, experts: int) -> list[int]:
    """Rows per expert, sentinels not counted."""
    known = top_k_index[(top_k_index >= 0) & (top_k_index < experts)]
    return known.bincount(minlength=experts).tolist()


def describe_counts(top_k_index: Tensor, experts: int) -> str:
    """Rows per expert in words, for a failure message."""
    counts = expert_counts(top_k_index, experts)
    dropped = top_k_index.numel() - sum(counts)
    shown = " ".join(str(count) for count in counts[:32]) + (" ..." if experts > 32 else "")
    return f"rows per expert [{shown}]" + (f", {dropped} dropped" if dropped else "")


def _weighted(draw: Draw, weights: Tensor) -> Tensor:
    """Distinct experts per token, drawn with probability ~ weights (Gumbel top-k)."""
    noise = torch.rand(draw.tokens, draw.experts, generator=draw.generator, dtype=torch.float64)
    keys = weights.double().log() - (-(noise.clamp_min(1e-300)).log()).log()
    order = torch.randperm(draw.experts, generator=draw.generator)
    return order[keys.topk(draw.top_k, dim=1).indices] if draw.tokens else _none(draw)


def _none(draw: Draw) -> Tensor:
    return torch.empty((0, draw.top_k), dtype=torch.int64)


def _dealt(draw: Draw, counts: list[int]) -> Tensor:
    """Slots in random order, `counts[e]` of them for expert e; the last non-empty one takes what
    is left.
    """
    experts = torch.arange(draw.experts).repeat_interleave(torch.tensor(counts))[: draw.rows]
    if experts.numel() < draw.rows:
        last = max((e for e, count in enumerate(counts) if count), default=0)
        rest = torch.full((draw.rows - experts.numel(),), last)
        experts = torch.cat([experts, rest])
    order = torch.randperm(draw.rows, generator=draw.generator)
    return experts[order].reshape(draw.tokens, draw.top_k)


def _uniform(draw: Draw) -> Tensor:
    return _weighted(draw, torch.ones(draw.experts))


def _zipf(draw: Draw) -> Tensor:
    return _weighted(draw, 1 / torch.arange(1, draw.experts + 1))


def _power(draw: Draw, exponent: int = 2) -> Tensor:
    return _weighted(draw, torch.arange(1, draw.experts + 1).double() ** -exponent)


def _one_expert(draw: Draw, expert: int = 0) -> Tensor:
    return torch.full((draw.tokens, draw.top_k), expert % draw.experts)


def _last_expert(draw: Draw) -> Tensor:
    return _one_expert(draw, draw.experts - 1)


def _without(draw: Draw, empty: list[int]) -> Tensor:
    alive = torch.tensor([e for e in range(draw.experts) if e not in empty] or [0])
    choice = torch.randint(alive.numel(), (draw.tokens, draw.top_k), generator=draw.generator)
    return alive[choice]


def _first_empty(draw: Draw) -> Tensor:
    return _without(draw, [0])


def _last_empty(draw: Draw) -> Tensor:
    return _without(draw, [draw.experts - 1])


def _only(draw: Draw, expert: int = 1) -> Tensor:
    return _without(draw, [e for e in range(draw.experts) if e != expert % draw.experts])


def _holes(draw: Draw, percent: int = 50) -> Tensor:
    order = torch.randperm(draw.experts, generator=draw.generator).tolist()
    return _without(draw, order[: draw.experts * percent // 100])


def _boundary(draw: Draw, height: int = 64, offset: int = 0) -> Tensor:
    """Counts of height-1, height, height+1, ... starting at `offset`, while rows last."""
    counts, left = [], draw.rows
    for expert in range(draw.experts):
        wanted = height + (expert + offset) % 3 - 1
        counts.append(min(wanted, left))
        left -= counts[-1]
    return _dealt(draw, counts)


def _alternating(draw: Draw) -> Tensor:
    """Every other expert empty, the rest equal."""
    alive = max(draw.experts // 2, 1)
    share = [draw.rows // alive if e % 2 else 0 for e in range(draw.experts)]
    return _dealt(draw, share)


def _all_experts(draw: Draw) -> Tensor:
    """Every token chooses experts 0 .. top_k - 1, each token in its own order."""
    keys = torch.rand(draw.tokens, draw.top_k, generator=draw.generator)
    return keys.argsort(dim=1)


def _repeated(draw: Draw) -> Tensor:
    """Every token chooses one expert top_k times."""
    choice = torch.randint(draw.experts, (draw.tokens, 1), generator=draw.generator)
    return choice.expand(draw.tokens, draw.top_k).contiguous()


def _sentinels(draw: Draw, percent: int = 30) -> Tensor:
    """Some slots hold ids that are no expert: -1, experts, and beyond."""
    index = _uniform(draw)
    drop = torch.rand(index.shape, generator=draw.generator) * 100 < percent
    wrong = torch.tensor([-1, draw.experts, draw.experts + 7])
    choice = torch.randint(3, index.shape, generator=draw.generator)
    return torch.where(drop, wrong[choice], index)


def _all_sentinels(draw: Draw) -> Tensor:
    return torch.full((draw.tokens, draw.top_k), -1)


KINDS: dict[str, Callable[..., Tensor]] = {
    "uniform": _uniform,
    "zipf": _zipf,
    "power": _power,
    "one": _one_expert,
    "last": _last_expert,
    "first-empty": _first_empty,
    "last-empty": _last_empty,
    "only": _only,
    "holes": _holes,
    "boundary": _boundary,
    "alternating": _alternating,
    "all": _all_experts,
    "repeated": _repeated,
    "sentinels": _sentinels,
    "all-sentinels": _all_sentinels,
}
DROPPING = frozenset({"sentinels", "all-sentinels"})
"""Kinds whose ids may lie outside the experts."""
