"""Where a module keeps its experts: finds the storage behind a parameter's name.

A parametrised attribute decodes all its experts when it is read. Nothing here reads
`module.<name>`: the storage is taken from the module's own dictionaries, and quantisation states
are known by their attributes, so bitsandbytes is neither needed nor imported.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .formats import Dense, Float8, FourBit, Int8RowWise, NestedScales, StoredExperts

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_SUFFIXES = ("_scale_inv", "_scale")
"""What follows a parameter's name in the name of its scales; both multiply."""


def stored_experts(module: nn.Module, name: str) -> StoredExperts:
    """The experts that `module` keeps under `name`, without decoding any.

    Recognised: a parametrisation with a `quant_state` (bitsandbytes 4-bit) or with `row_stats`
    (int8 row-wise); a parameter with a `quant_state` (`Params4bit`); an fp8 parameter with scales
    beside it, named `<name>_scale_inv` or `<name>_scale`, and the module's `block_size` where it
    has one; a floating-point parameter. PEFT's own parametrisations are passed over: they add an
    adapter and store nothing.

    Raises:
        AttributeError: the module keeps no tensor of that name.
        TypeError: the storage is of an unknown kind; the attribute is not read instead.
        ValueError: the parts of the storage do not fit together.
    """
    lists = module._modules.get("parametrizations")
    found = None if lists is None else lists._modules.get(name)
    if found is not None:
        return _parametrised(found, name)
    tensor = _own(module, name)
    if tensor is None:
        raise AttributeError(f"{type(module).__name__} keeps no parameter or buffer named {name!r}")
    if hasattr(tensor, "quant_state"):
        if tensor.quant_state is None:
            raise ValueError(
                f"{name} is a {type(tensor).__name__} that was not quantised yet: its quant_state "
                "is None until it is moved to a device"
            )
        return four_bit(tensor.data, tensor.quant_state)
    if tensor.dtype in FLOAT8:
        return _float8(module, name, tensor)
    return _dense(tensor, name)


def four_bit(packed: Tensor, state: Any) -> FourBit:
    """Packed bytes and their bitsandbytes `QuantState`, or anything with the same attributes.

    packed: 2 elements per byte, in any shape and any dtype of storage. The state's shape must be
    [experts, d1, d2].

    Raises:
        TypeError, ValueError: as `FourBit`; or the state describes no stack of experts.
    """
    shape = None if state.shape is None else tuple(state.shape)
    if shape is None or len(shape) != 3:
        raise ValueError(
            f"the quantisation state describes shape {None if shape is None else list(shape)}, "
            "but a stack of experts has 3 dimensions"
        )
    packed = packed.detach()
    if not packed.is_contiguous():
        raise ValueError(f"packed must be contiguous, got strides {list(packed.stride())}")
    nested = None if state.state2 is None else _nested(state, packed.device)
    return FourBit(
        packed=packed.view(torch.uint8).reshape(-1) if packed.ndim else packed,
        absmax=state.absmax if nested is not None else state.absmax.to(torch.float32),
        codebook=state.code.to(torch.float32),
        blocksize=int(state.blocksize),
        experts=shape[0],
        shape=(shape[1], shape[2]),
        nested=nested,
        dtype=state.dtype,
    )


def _nested(state: Any, device: torch.device) -> NestedScales:
    offset = torch.as_tensor(state.offset, dtype=torch.float32, device=device)
    return NestedScales(
        code=state.state2.code.to(torch.float32),
        absmax=state.state2.absmax.to(torch.float32),
        offset=offset.reshape(1),
        blocksize=int(state.state2.blocksize),
    )


def _parametrised(parametrisations: nn.Module, name: str) -> StoredExperts:
    original = _own(parametrisations, "original")
    if original is None:
        raise TypeError(f"{name} is parametrised by several tensors, which no known storage is")
    others = [entry for entry in parametrisations.children() if not _is_adapter(entry)]
    for entry in others:
        state, rows = getattr(entry, "quant_state", None), getattr(entry, "row_stats", None)
        if state is not None:
            _only(others, name)
            return four_bit(original, state)
        if isinstance(rows, Tensor):
            _only(others, name)
            return _int8(original.detach(), rows, name)
    if others:
        raise TypeError(
            f"{name} is parametrised by {_names(others)}, which is not a known storage format"
        )
    return _dense(original, name)


def _only(entries: list[nn.Module], name: str) -> None:
    if len(entries) > 1:
        raise TypeError(
            f"{name} is parametrised by {_names(entries)}: what is applied to decoded experts "
            "would be lost"
        )


def _names(entries: Iterable[nn.Module]) -> str:
    return ", ".join(type(entry).__name__ for entry in entries)


def _is_adapter(entry: nn.Module) -> bool:
    return type(entry).__module__.partition(".")[0] == "peft"


def _int8(data: Tensor, row_stats: Tensor, name: str) -> Int8RowWise:
    if data.ndim != 3:
        raise ValueError(
            f"{name} is stored as {list(data.shape)}, but a stack of experts has 3 dimensions"
        )
    return Int8RowWise(data=data, row_scale=row_stats.detach().to(torch.float32).reshape(-1))


def _float8(module: nn.Module, name: str, tensor: Tensor) -> Float8:
    for suffix in SCALE_SUFFIXES:
        scale = _own(module, name + suffix)
        if scale is not None:
            block = getattr(module, "block_size", None)
            return Float8.from_scale(
                tensor.detach(), scale, block=None if block is None else (block[0], block[1])
            )
    wanted = " or ".join(repr(name + suffix) for suffix in SCALE_SUFFIXES)
    raise ValueError(f"{name} is {tensor.dtype}, but {type(module).__name__} keeps no {wanted}")


def _dense(tensor: Tensor, name: str) -> Dense:
    if not tensor.dtype.is_floating_point:
        raise TypeError(
            f"{name} holds {tensor.dtype} of shape {list(tensor.shape)} and nothing that says how "
            "to decode it"
        )
    return Dense(data=tensor)


def _own(module: nn.Module, name: str) -> Tensor | None:
    tensor = module._parameters.get(name)
    return tensor if tensor is not None else module._buffers.get(name)
