"""Layers built from the routed projection."""

from .experts_mlp import ExpertsMLP, Projection, experts_mlp

__all__ = ["ExpertsMLP", "Projection", "experts_mlp"]
