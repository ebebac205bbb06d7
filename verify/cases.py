"""The cases that every kernel is checked on: shapes, routings, layouts; one list with tags.

smoke   the first thing to run, seconds in the interpreter
edge    small cases, each there for one boundary
real    hidden states, weights and top-k of transformers models on text; needs the hf extra
model   shapes of real models, for a GPU
bench   the model cases that are also timed
"""

from dataclasses import dataclass, field, replace
from typing import Any

from .routings import DROPPING, RoutingKind

LAYOUTS = ("contiguous", "transposed", "strided", "offset")
ORDERS = ("TOKEN", "SLOT", "EXPERT")
VALUES = (*("normal", "offset", "scales", "tiny-x", "tiny-dy", "huge-x", "huge-dy", "not-finite"),)
"""Kinds of values, see `values`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One problem: Y [tokens * top_k, n_out] from X [.., k_in], W [experts, k_in, n_out] and
    rank-`rank` LoRA.

    source, target: names of RowOrder members. gradient: row order of dY, that of the target
    unless stated.
    gated: every row is multiplied by its slot's gate. weight_layout: how W's storage is laid out
    (transposed: stored
    [experts, n_out, k_in]; strided: gaps between columns; offset: starts off the alignment of the
    allocator).
    lora_dtype: "same" as the activations, or "float32". values: one of VALUES.
    family: the transformers model that x, weight and top_k_index are taken from, or empty.
    """

    name: str
    tokens: int
    experts: int
    top_k: int
    k_in: int
    n_out: int
    rank: int = 16
    routing: RoutingKind = field(default_factory=lambda: RoutingKind("uniform"))
    source: str = "TOKEN"
    target: str = "EXPERT"
    weight_layout: str = "contiguous"
    x_layout: str = "contiguous"
    gradient: str = ""
    bias: bool = False
    gated: bool = False
    lora_dtype: str = "same"
    scaling: float = 1.7
    values: str = "normal"
    family: str = ""
    seed: int = 0
    tags: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.weight_layout not in LAYOUTS or self.x_layout not in LAYOUTS:
            raise ValueError(
                f"{self.name}: layouts {self.weight_layout}, {self.x_layout} must be in {LAYOUTS}"
            )
        if self.source not in ORDERS or self.target not in ORDERS[1:]:
            raise ValueError(f"{self.name}: rows cannot go from {self.source} to {self.target}")
        if self.values not in VALUES:
            raise ValueError(f"{self.name}: values {self.values!r} must be in {VALUES}")
        if min(self.experts, self.top_k, self.k_in, self.n_out, self.rank) < 1 or self.tokens < 0:
            raise ValueError(f"{self.name}: sizes must be positive")

    @property
    def rows(self) -> int:
        """Rows of the routed product, dropped ones included."""
        return self.tokens * self.top_k

    @property
    def dy_order(self) -> str:
        """Row order of the incoming gradient."""
        return self.gradient or self.target

    @property
    def dx_order(self) -> str:
        """Row order of the gradient per routed row."""
        return "SLOT" if self.source == "TOKEN" else self.source

    @property
    def drops(self) -> bool:
        """Whether some slots may belong to no expert."""
        return self.routing.name in DROPPING

    @property
    def extreme(self) -> bool:
        """Whether its values are drawn near the limits of a dtype, or past them."""
        return self.values not in ("normal", "offset")

    @property
    def shape(self) -> str:
        """The sizes in one word."""
        return (
            f"T{self.tokens}k{self.top_k}E{self.experts}K{self.k_in}N{self.n_out}R{self.rank}"
            f"-{self.routing}"
        )


def _small(name: str, *tags: str, **changes: Any) -> Case:
    base = Case(
        name=name,
        tokens=37,
        experts=4,
        top_k=2,
        k_in=96,
        n_out=80,
        tags=frozenset(tags or ("edge",)),
    )
    kind = changes.pop("routing", "uniform")
    words = str(kind).split(":")
    routing = RoutingKind(words[0], tuple(int(word) for word in words[1:]))
    return replace(base, routing=routing, **changes)


SMOKE: tuple[Case, ...] = (
    _small("plain", "smoke"),
    _small("scattered", "smoke", source="EXPERT", target="SLOT", bias=True, scaling=-1.3),
    _small("holes", "smoke", routing="holes:50", experts=6, weight_layout="transposed", rank=5),
)


def _valued(name: str, values: str, **changes: Any) -> Case:
    sizes = {"tokens": 14, "k_in": 40, "n_out": 34, "rank": 4}
    return _small(name, "edge", values=values, **{**sizes, **changes})


EXTREMES: tuple[Case, ...] = (
    _valued("scaled-experts", "scales", experts=6, bias=True, gradient="TOKEN"),
    _valued("scaled-experts-slot", "scales", experts=5, source="SLOT", target="SLOT", gated=True),
    _valued("subnormal", "tiny-x", bias=True),
    _valued("subnormal-gradient", "tiny-dy", source="EXPERT", target="SLOT", bias=True),
    _valued("near-overflow", "huge-x", bias=True, target="SLOT"),
    _valued("near-overflow-gradient", "huge-dy", source="SLOT"),
    _valued("not-finite", "not-finite", bias=True, top_k=1, tokens=20),
    _valued(
        "not-finite-sentinels", "not-finite", source="SLOT", target="SLOT", gated=True,
        routing="sentinels:40",
    ),
)  # fmt: skip

EDGES: tuple[Case, ...] = (
    _small("no-tokens", tokens=0),
    _small("one-token", tokens=1, bias=True),
    _small("one-row", tokens=1, top_k=1, gated=True),
    _small("one-expert", experts=1, top_k=1, tokens=70, routing="one"),
    _small("one-takes-all", routing="one:1", tokens=40),
    _small("last-takes-all", routing="last", tokens=33, source="SLOT"),
    _small("first-empty", routing="first-empty", target="SLOT"),
    _small("last-empty", routing="last-empty", source="SLOT", target="SLOT", bias=True),
    _small("only-one-alive", routing="only:2", source="EXPERT"),
    _small("every-expert", routing="all", top_k=4, tokens=17),
    _small("repeated", routing="repeated", target="SLOT"),
    _small("sentinels", routing="sentinels:30", bias=True),
    _small("sentinels-slot", routing="sentinels:60", source="SLOT", target="SLOT", bias=True),
    _small("all-dropped", routing="all-sentinels", tokens=9),
    _small("boundary-16", routing="boundary:16:0", tokens=31),
    _small("boundary-32", routing="boundary:32:1", tokens=63, bias=True),
    _small("boundary-64", routing="boundary:64:2", tokens=96, experts=3),
    _small("boundary-128", routing="boundary:128:0", tokens=256, top_k=1, experts=2, k_in=64),
    _small("boundary-192", routing="boundary:192:0", tokens=576, top_k=1, experts=3, k_in=48),
    _small("boundary-wide", routing="boundary:16:0", tokens=31, k_in=24, n_out=300),
    _small("alternating", routing="alternating", experts=6, tokens=51),
    _small("zipf", routing="zipf", experts=8, tokens=60, top_k=3, rank=8),
    _small("power", routing="power:3", experts=8, tokens=60, source="SLOT"),
    _small("tails", k_in=67, n_out=51, rank=7, bias=True),
    _small("narrow", k_in=9, n_out=5, rank=3, tokens=20),
    _small("rank-1", rank=1, tokens=50),
    _small("rank-33", rank=33, k_in=64),
    _small("rank-64", rank=64, n_out=64, k_in=64),
    _small("rank-256", rank=256, n_out=64, k_in=64, tokens=20),
    _small("deep", k_in=512, n_out=33, tokens=24, experts=2, seed=3),
    _small("wide", k_in=40, n_out=300, tokens=20, experts=3),
    _small("columns", k_in=24, n_out=2120, tokens=5, experts=2, rank=4),
    _small("odd-rows-one-expert", k_in=17, n_out=32, rank=64, tokens=40, experts=1, top_k=1),
    _small("odd-rows-wide", k_in=17, n_out=128, rank=4, tokens=72, experts=1, top_k=1),
    _small("long-rows", k_in=2120, n_out=24, tokens=5, experts=2, rank=4, source="SLOT"),
    _small("strided", weight_layout="strided", x_layout="strided", bias=True, gated=True),
    _small("strided-one-choice", x_layout="strided", gated=True, top_k=1, target="SLOT"),
    _small("offset", weight_layout="offset", x_layout="offset"),
    _small("turned-rows", x_layout="transposed", tokens=21, k_in=40, n_out=34, rank=4),
    _small("turned-deep", x_layout="transposed", tokens=13, k_in=150, n_out=34, rank=4),
    _small("transposed-tails", weight_layout="transposed", k_in=70, n_out=90, x_layout="strided"),
    _small("fp32-adapter", lora_dtype="float32", scaling=-1.3),
    _small("fp32-adapter-slot", lora_dtype="float32", source="SLOT", target="SLOT", rank=6),
    _small("gated", gated=True, bias=True, target="SLOT"),
    _small("gated-shared-gradient", gated=True, source="EXPERT", target="SLOT", gradient="TOKEN"),
    _small("gated-sentinels", gated=True, routing="sentinels:40", source="SLOT", rank=12),
    _small("power-of-two-scaling", scaling=0.25),
    _small("offset-values", values="offset", k_in=130),
    *EXTREMES,
)


def _model(name: str, experts: int, k_in: int, n_out: int, top_k: int) -> tuple[Case, ...]:
    """The 2048-token case at rank 16, which is timed, and variations around it."""
    tags = frozenset({"model"})
    base = Case(
        name=f"{name}-t2048-r16",
        tokens=2048,
        experts=experts,
        top_k=top_k,
        k_in=k_in,
        n_out=n_out,
        tags=tags | {"bench"},
        weight_layout="transposed",
    )
    ranks = tuple(
        replace(base, name=f"{name}-t2048-r{rank}", rank=rank, tags=tags) for rank in (4, 64, 128)
    )
    long = replace(base, name=f"{name}-t8192-r16", tokens=8192, routing=RoutingKind("zipf"))
    return (base, *ranks, long)


MODELS: tuple[Case, ...] = (
    *_model("qwen3.5-gate-up", 256, 2048, 1024, 8),
    *_model("qwen3.5-down", 256, 512, 2048, 8),
    *_model("qwen3-gate-up", 128, 2048, 1536, 8),
    *_model("qwen3-down", 128, 768, 2048, 8),
    *_model("olmoe-gate-up", 64, 2048, 2048, 8),
    *_model("olmoe-down", 64, 1024, 2048, 8),
    *_model("mixtral-gate-up", 8, 4096, 28672, 2),
    *_model("mixtral-down", 8, 14336, 4096, 2),
)


def _real(family: str, experts: int, top_k: int) -> Case:
    """Hidden states, weights and top-k of a small random model of `family` on text."""
    return Case(
        name=f"real-{family}",
        family=family,
        tokens=48,
        experts=experts,
        top_k=top_k,
        k_in=64,
        n_out=96,
        weight_layout="transposed",
        tags=frozenset({"real"}),
    )


REAL: tuple[Case, ...] = (
    _real("qwen3-moe", 8, 3),
    _real("olmoe", 8, 2),
    _real("mixtral", 4, 2),
)
CASES: tuple[Case, ...] = (*SMOKE, *EDGES, *REAL, *MODELS)


def tagged(*tags: str) -> tuple[Case, ...]:
    """The cases that carry any of `tags`."""
    return tuple(case for case in CASES if case.tags & set(tags))
