"""Packed 4-bit experts as dense ones under their former module."""

from ..compat_selective import selective_dequant_nf4_triton

__all__ = ["selective_dequant_nf4_triton"]
