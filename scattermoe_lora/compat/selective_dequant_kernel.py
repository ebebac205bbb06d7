"""Packed 4-bit experts as dense ones under their former module."""

from ..compat_selective import NF4_CODEBOOK, selective_dequant_nf4_triton

__all__ = ["NF4_CODEBOOK", "selective_dequant_nf4_triton"]
