"""Every kernel that is verified. Adding one is one entry here."""

from ..spec import KernelSpec
from .glu import GLU_BACKWARD, GLU_FORWARD
from .gradients import EXPERT_BIAS_GRAD, EXPERT_WEIGHT_GRAD, LORA_WEIGHT_GRAD
from .layer import EXPERTS_MLP
from .linear import LORA_FORWARD, LORA_INPUT_GRAD, SCATTER2SCATTER, SHRINK
from .projection import EXPERT_LINEAR
from .quant import DEQUANTIZE_FOUR_BIT, DEQUANTIZE_SCALED
from .routing import ROUTING
from .rows import COMBINE, COMBINE_GRAD, GROUP

KERNELS: tuple[KernelSpec, ...] = (
    ROUTING,
    SCATTER2SCATTER,
    SHRINK,
    LORA_FORWARD,
    LORA_INPUT_GRAD,
    LORA_WEIGHT_GRAD,
    EXPERT_WEIGHT_GRAD,
    EXPERT_BIAS_GRAD,
    GROUP,
    COMBINE,
    COMBINE_GRAD,
    GLU_FORWARD,
    GLU_BACKWARD,
    EXPERT_LINEAR,
    EXPERTS_MLP,
    DEQUANTIZE_FOUR_BIT,
    DEQUANTIZE_SCALED,
)
