"""PEFT's layout of an adapter on experts, and the one of the former kernels."""

from torch import Tensor


def peft_lora_to_scattermoe(
    peft_A: Tensor, peft_B: Tensor, num_experts: int, rank: int
) -> tuple[Tensor, Tensor]:
    """PEFT factors (0.19.1 and newer: A on the input side) as lora_A [R E, K], lora_B [N, R E]."""
    if peft_A.shape[0] != num_experts * rank or peft_B.shape[1] != num_experts * rank:
        raise ValueError(
            f"{num_experts} experts of rank {rank} need {num_experts * rank} rank rows and "
            f"columns, got shapes {list(peft_A.shape)} and {list(peft_B.shape)}"
        )
    return peft_A, peft_lora_B_to_scattermoe(peft_B, num_experts, rank)


def peft_down_proj_lora_to_scattermoe(
    peft_A: Tensor, peft_B: Tensor, num_experts: int, rank: int
) -> tuple[Tensor, Tensor]:
    """`peft_lora_to_scattermoe`: both projections are laid out alike."""
    return peft_lora_to_scattermoe(peft_A, peft_B, num_experts, rank)


def peft_lora_B_to_scattermoe(peft_B: Tensor, num_experts: int, rank: int) -> Tensor:
    """PEFT's lora_B [N, R E], the expert index fastest, as lora_B with expert-major columns."""
    by_expert = peft_B.unflatten(1, (rank, num_experts)).transpose(1, 2)
    return by_expert.reshape(peft_B.shape)


def validate_scattermoe_lora_shapes(expert_weights: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """Whether factors fit weights [E, K, N]: lora_A [R E, K], lora_B [N, R E].

    Raises:
        ValueError: they do not; a square projection does not tell which factor is which.
    """
    experts, k, n = expert_weights.shape
    rows = lora_A.shape[0]
    if rows % experts or lora_A.shape != (rows, k) or lora_B.shape != (n, rows):
        raise ValueError(
            f"Invalid ScatterMoE LoRA layout: weights of shape {[experts, k, n]} need lora_A "
            f"[R * {experts}, {k}] and lora_B [{n}, R * {experts}], got {list(lora_A.shape)} and "
            f"{list(lora_B.shape)}"
        )
