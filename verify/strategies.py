"""Hypothesis strategies over cases: a kind of routing and a few integers, so that failures shrink
well.
"""

from hypothesis import strategies as st

from .captured import FAMILIES
from .cases import LAYOUTS, ORDERS, VALUES, Case
from .routings import KINDS, TILE_HEIGHTS, RoutingKind

_PARAMETERS = {
    "one": st.tuples(st.integers(0, 7)),
    "only": st.tuples(st.integers(0, 7)),
    "power": st.tuples(st.integers(1, 4)),
    "holes": st.tuples(st.integers(0, 100)),
    "sentinels": st.tuples(st.integers(0, 100)),
    "boundary": st.tuples(st.sampled_from(TILE_HEIGHTS), st.integers(0, 2)),
}


@st.composite
def routing_kinds(draw: st.DrawFn) -> RoutingKind:
    """Any kind of routing, uniform first."""
    name = draw(st.sampled_from(sorted(KINDS, key=lambda kind: (kind != "uniform", kind))))
    return RoutingKind(name, draw(_PARAMETERS.get(name, st.just(()))))


@st.composite
def cases(draw: st.DrawFn, *, largest_rows: int = 160, largest_width: int = 160) -> Case:
    """A small case: any routing, orders, layouts, tails and rank."""
    experts = draw(st.integers(1, 8))
    top_k = draw(st.integers(1, min(experts, 4)))
    return Case(
        name="drawn",
        tokens=draw(st.integers(0, largest_rows // top_k)),
        experts=experts,
        top_k=top_k,
        k_in=draw(st.integers(1, largest_width)),
        n_out=draw(st.integers(1, largest_width)),
        rank=draw(st.one_of(st.integers(1, 40), st.sampled_from((64, 128, 256)))),
        routing=draw(routing_kinds()),
        source=draw(st.sampled_from(ORDERS)),
        target=draw(st.sampled_from(ORDERS[1:])),
        weight_layout=draw(st.sampled_from(LAYOUTS)),
        x_layout=draw(st.sampled_from(LAYOUTS)),
        bias=draw(st.booleans()),
        lora_dtype=draw(st.sampled_from(("same", "float32"))),
        scaling=draw(st.sampled_from((1.7, -1.3, 0.5))),
        values=draw(st.sampled_from(VALUES)),
        seed=draw(st.integers(0, 99)),
    )


@st.composite
def captured_cases(draw: st.DrawFn) -> Case:
    """A small case whose rows, weights and routing are those of a transformers model on text."""
    experts = draw(st.integers(1, 8))
    return Case(
        name="captured",
        family=draw(st.sampled_from(FAMILIES)),
        tokens=draw(st.integers(1, 40)),
        experts=experts,
        top_k=draw(st.integers(1, min(experts, 4))),
        k_in=4 * draw(st.integers(1, 20)),
        n_out=2 * draw(st.integers(1, 40)),
        rank=draw(st.integers(1, 40)),
        target=draw(st.sampled_from(ORDERS[1:])),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )
