"""How fast peers were when they were measured with care, to tell a comparison that went wrong.

A peer that is slower here than `SLOWER` times its figure on the same GPU was not run as it should
be: the comparison says nothing. Milliseconds, bf16, R = 16, balanced routing; torch 2.11,
transformers 5.17, PEFT 0.21.
"""

from collections.abc import Mapping

from .peers import COMPOSITION, HF, HF_PEFT, LIGER

SLOWER = 1.1

_PROJECTION_WHATS = ("forward", "input-grad", "weight-grad", "step")
_PROJECTIONS: Mapping[str, tuple[float, float, float, float]] = {
    "qwen3-30b.gate_up": (0.76, 0.81, 0.24, 1.82),
    "mixtral.gate_up": (2.74, 2.01, 0.35, 4.99),
    "olmoe.gate_up": (0.68, 0.65, 0.21, 1.53),
    "qwen3.5-35b.down": (0.67, 0.40, 0.29, 1.34),
}
"""torch._grouped_mm composition at 2048 tokens."""

_LAYERS: Mapping[str, Mapping[str, tuple[float, float]]] = {
    COMPOSITION: {
        "qwen3-30b.t2048": (1.43, 3.36),
        "qwen3-30b.t8192": (3.28, 8.11),
        "qwen3.5-35b.t2048": (1.47, 3.60),
        "qwen3.5-35b.t8192": (3.00, 7.56),
        "olmoe.t2048": (1.26, 3.01),
        "olmoe.t8192": (3.64, 8.92),
        "mixtral.t2048": (3.62, 7.70),
    },
    HF_PEFT: {"qwen3-30b.t2048": (5.53, 9.00), "qwen3-30b.t8192": (7.90, 15.36)},
    HF: {"qwen3-30b.t2048": (1.39, 3.16), "qwen3-30b.t8192": (3.76, 8.97)},
}
"""Forward, and forward with backward."""

_LIGER: Mapping[str, float] = {"qwen3-30b.t2048": 0.858, "qwen3-30b.t8192": 2.199}


def _h100() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}

    def put(name: str, peer: str, milliseconds: float) -> None:
        found.setdefault(name, {})[peer] = milliseconds

    for key, figures in _PROJECTIONS.items():
        for what, figure in zip(_PROJECTION_WHATS, figures, strict=True):
            put(f"projection.{what}.{key}.t2048.r16.balanced", COMPOSITION, figure)
    for peer, layers in _LAYERS.items():
        for key, pair in layers.items():
            for what, figure in zip(("forward", "step"), pair, strict=True):
                put(f"layer.{what}.{key}.r16.balanced", peer, figure)
    for key, figure in _LIGER.items():
        put(f"layer.forward.{key}.r16.balanced", LIGER, figure)
    return found


FIGURES: Mapping[str, Mapping[str, Mapping[str, float]]] = {"NVIDIA H100 80GB HBM3": _h100()}
"""GPU -> benchmark -> peer -> milliseconds."""


def too_slow(gpu: str, name: str, measured: Mapping[str, float]) -> list[str]:
    """The peers of a benchmark that were slower than they should be, one sentence each."""
    known = FIGURES.get(gpu, {}).get(name, {})
    return [
        f"{peer} took {measured[peer]:.3f} ms, its figure on this GPU is {figure:.3f} ms"
        for peer, figure in known.items()
        if peer in measured and measured[peer] > SLOWER * figure
    ]
