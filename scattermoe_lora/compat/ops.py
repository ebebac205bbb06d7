"""`kernels.ops` under a shorter path."""

from .kernels.ops import BLOCK_M, group, group_bwd_W, scatter2scatter

__all__ = ["BLOCK_M", "group", "group_bwd_W", "scatter2scatter"]
