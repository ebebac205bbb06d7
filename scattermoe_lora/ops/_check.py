"""What the launchers demand of their operands, stated once."""

from functools import lru_cache

import torch
from torch import Tensor

from .._arguments import check_dtype, check_type
from .._interpreter import require_supported
from ..plan import Plan
from ..routing import Routing, RowOrder
from ..weights import BlockedWeight, LoRAWeights


def check_rows(name: str, value: Tensor, routing: Routing, order: RowOrder) -> None:
    """A row operand [row_count(order), width]: dtype in DTYPES, on the routing's device."""
    check_tensor(name, value)
    check_type("routing", routing, Routing)
    check_type(f"the row order of {name}", order, RowOrder)
    check_dtype(name, value.dtype)
    if value.ndim != 2:
        raise ValueError(f"{name} must be [rows, width], got shape {list(value.shape)}")
    if value.device != routing.device:
        raise ValueError(f"{name} is on {value.device} but the routing is on {routing.device}")
    expected = routing.row_count(order)
    if value.shape[0] != expected:
        raise ValueError(
            f"{name} has {value.shape[0]} rows, but {order.value} order of this routing "
            f"has {expected}"
        )
    require_supported(value.dtype, value.device)


def check_number(name: str, value: Tensor) -> None:
    """Floating point, and not the codes of 8 bits and less that need a scale."""
    if not value.dtype.is_floating_point or value.itemsize < 2:
        raise TypeError(f"{name} must be floating point of 16 bits or more, got {value.dtype}")


def check_plan(plan: object) -> None:
    """A plan that the caller states, or None for the package's choice."""
    if plan is not None:
        check_type("plan", plan, Plan)


def check_tensor(name: str, value: object) -> None:
    """An operand that must be a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_target(order: RowOrder) -> None:
    """Products are written per row; sums over the choices of a token belong to `combine`."""
    check_type("target", order, RowOrder)
    if order is RowOrder.TOKEN:
        raise ValueError("target must be RowOrder.SLOT or RowOrder.EXPERT, got RowOrder.TOKEN")


def check_same(name: str, value: Tensor, x_name: str, x: Tensor) -> None:
    """Two operands of one product: same dtype, same device."""
    check_tensor(name, value)
    if value.dtype != x.dtype:
        raise TypeError(f"{name} is {value.dtype} but {x_name} is {x.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device} but {x_name} is on {x.device}")


def check_stack(name: str, weight: object) -> None:
    """A stack of experts: a tensor, or stored experts that come in blocks."""
    if not isinstance(weight, Tensor) and not hasattr(weight, "blocks"):
        raise TypeError(f"{name} must be a tensor or come in blocks, got {type(weight).__name__}")


def check_weight(
    name: str,
    weight: Tensor | BlockedWeight,
    routing: Routing,
    *,
    dtype: torch.dtype,
    device: torch.device,
    width: int | None = None,
    x_name: str = "x",
    k_name: str = "",
) -> None:
    """A stack [experts, width, n] for an x of these facts, as a tensor or as blocks.

    width: that of x, or of the operand k_name; None where x is as wide as the outputs.
    """
    check_stack(name, weight)
    if len(weight.shape) != 3:
        raise ValueError(f"{name} must be [experts, k, n], got shape {list(weight.shape)}")
    if isinstance(weight, Tensor) and weight.dtype != dtype:
        raise TypeError(f"{name} is {weight.dtype} but {x_name} is {dtype}")
    if weight.device != device:
        raise ValueError(f"{name} is on {weight.device} but {x_name} is on {device}")
    if weight.shape[0] != routing.experts:
        raise ValueError(
            f"{name} has {weight.shape[0]} experts but the routing has {routing.experts}"
        )
    if width is not None and weight.shape[1] != width:
        raise ValueError(
            f"{name} takes inputs of width {weight.shape[1]} but {k_name or x_name} has {width}"
        )
    if min(weight.shape) < 1:
        raise ValueError(f"{name} must not be empty, got shape {list(weight.shape)}")


def check_bias(
    bias: Tensor | None,
    routing: Routing,
    width: int,
    device: torch.device,
    *,
    name: str = "bias",
    x_name: str = "x",
) -> None:
    """A bias [experts, width] of any floating dtype of 16 bits or more."""
    if bias is None:
        return
    check_tensor(name, bias)
    check_number(name, bias)
    if tuple(bias.shape) != (routing.experts, width):
        raise ValueError(
            f"{name} must have shape {[routing.experts, width]}, got {list(bias.shape)}"
        )
    if bias.device != device:
        raise ValueError(f"{name} is on {bias.device} but {x_name} is on {device}")


def check_row_scale(name: str, scale: Tensor | None, routing: Routing) -> None:
    """One coefficient per slot, of 16 bits or more: [rows] in slot order, or [tokens, top_k]."""
    if scale is None:
        return
    check_tensor(name, scale)
    check_number(name, scale)
    shapes = [[routing.rows], [routing.tokens, routing.top_k]]
    if list(scale.shape) not in shapes:
        raise ValueError(
            f"{name} must have shape {shapes[0]} or {shapes[1]}, got {list(scale.shape)}"
        )
    if scale.device != routing.device:
        raise ValueError(f"{name} is on {scale.device} but the routing is on {routing.device}")


def check_gates(gates: Tensor | None, routing: Routing) -> None:
    """One coefficient per choice, of 16 bits or more, [tokens, top_k]."""
    check_type("routing", routing, Routing)
    if gates is None:
        return
    check_tensor("gates", gates)
    if tuple(gates.shape) != (routing.tokens, routing.top_k):
        raise ValueError(
            f"gates must have shape {[routing.tokens, routing.top_k]}, got {list(gates.shape)}"
        )
    check_row_scale("gates", gates, routing)


def check_lora(
    lora: LoRAWeights,
    routing: Routing,
    k: int,
    n: int,
    x: Tensor,
    *,
    name: str = "lora",
    x_name: str = "x",
    k_name: str = "",
    n_name: str = "the weight",
) -> None:
    """An adapter for a product [rows, k] -> [rows, n]; its dtype is that of x, or float32.

    k_name, n_name: the operands that k (x, unless stated) and n are the widths of.
    """
    check_type(name, lora, LoRAWeights)
    if lora.experts != routing.experts:
        raise ValueError(f"{name} has {lora.experts} experts but the routing has {routing.experts}")
    if lora.a.shape[2] != k:
        raise ValueError(
            f"{name}.a takes inputs of width {lora.a.shape[2]} but {k_name or x_name} has width {k}"
        )
    if lora.b.shape[1] != n:
        raise ValueError(f"{name}.b has output width {lora.b.shape[1]} but {n_name} has {n}")
    if lora.a.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"{name} is {lora.a.dtype}; with {x_name} in {x.dtype} it must be that or float32"
        )
    if lora.a.device != x.device:
        raise ValueError(f"{name} is on {lora.a.device} but {x_name} is on {x.device}")


def w_map(weight: Tensor) -> str:
    """The layout of [experts, k, n] that a tensor map can address: "nk", "kn", or "" for none.

    A tensor map needs a 16-byte aligned start, a contiguous last dimension and 16-byte strides.
    """
    if weight.data_ptr() % 16:
        return ""
    return _stack_map(weight.shape, weight.stride(), weight.itemsize)


@lru_cache(maxsize=4096)
def _stack_map(shape: torch.Size, strides: tuple[int, ...], itemsize: int) -> str:
    expert, row, column = strides
    if row == 1 and _aligned(expert, column, itemsize) and shape[1] * itemsize >= 16:
        return "nk"
    if column == 1 and _aligned(expert, row, itemsize) and shape[2] * itemsize >= 16:
        return "kn"
    return ""


def addressable(x: Tensor) -> bool:
    """Whether a tensor map can address the rows of x."""
    if x.data_ptr() % 16:
        return False
    row, column = x.stride()
    size = x.itemsize
    return column == 1 and row > 0 and row * size % 16 == 0 and x.shape[1] * size >= 16


def _aligned(expert: int, row: int, itemsize: int) -> bool:
    return all(stride > 0 and stride * itemsize % 16 == 0 for stride in (expert, row))


def fits_grouped_mm(x: Tensor, *stacks: Tensor) -> bool:
    """Whether torch._grouped_mm is native here: bf16, CUDA sm_90 or newer, 16-byte strides."""
    if x.dtype != torch.bfloat16 or x.device.type != "cuda":
        return False
    if torch.cuda.get_device_capability(x.device) < (9, 0) or x.shape[1] * 2 % 16:
        return False
    return all(w_map(stack) != "" for stack in stacks)
