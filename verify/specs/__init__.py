"""Every kernel that is verified. Adding one is one entry here."""

from ..spec import KernelSpec
from .linear import LORA_FORWARD, LORA_INPUT_GRAD, SCATTER2SCATTER, SHRINK

KERNELS: tuple[KernelSpec, ...] = (
    SCATTER2SCATTER,
    SHRINK,
    LORA_FORWARD,
    LORA_INPUT_GRAD,
)
