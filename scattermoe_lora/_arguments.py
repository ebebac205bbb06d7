"""Checks of single arguments, which every other module may import."""

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What kernels take and give."""


def check_type(name: str, value: object, wanted: type) -> None:
    """An argument of the type `wanted`.

    Raises:
        TypeError: it is of another.
    """
    if not isinstance(value, wanted):
        raise TypeError(f"{name} must be of type {wanted.__name__}, got {type(value).__name__}")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """A dtype that kernels take.

    Raises:
        TypeError: it is none of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {dtype}")
