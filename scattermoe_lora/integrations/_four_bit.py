"""Parametrised 4-bit parameters of bitsandbytes: read, made, taken apart and put back."""

import copy
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..quant import FourBit, four_bit

PACKED_ELEMENTS = 2**24
"""Elements that are packed at a time, where one expert has fewer."""
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Elements per scale that bitsandbytes packs with."""
NESTED_BLOCKSIZE = 256
"""Scales per second-level scale, as in bitsandbytes."""
_READS = "_reads_packed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parametrised:
    """Packed bytes and the bitsandbytes state that decodes them."""

    packed: Tensor
    parametrisation: nn.Module

    @property
    def state(self) -> Any:
        """The `QuantState`."""
        return self.parametrisation.quant_state

    def stored(self) -> FourBit:
        """The same as stored experts."""
        return four_bit(self.packed, state_on(self.state, self.packed.device))

    def on(self, device: torch.device) -> "Parametrised":
        """The same on a device; itself where it is there."""
        if self.packed.device == device:
            return self
        return Parametrised(packed=self.packed.to(device), parametrisation=self.parametrisation)


def state_on(state: Any, device: torch.device) -> Any:
    """A `QuantState` with its tensors on a device; itself where they are there."""
    if state.absmax.device == device:
        return state
    moved = copy.copy(state)
    moved.state2 = copy.copy(state.state2)
    moved.to(device)
    return moved


def follow(module: nn.Module, name: str) -> None:
    """Put the state of a 4-bit parameter where its bytes are; does nothing for other parameters.

    bitsandbytes keeps it as a plain attribute, which `Module.to` does not move.
    """
    found = parametrised(module, name)
    if found is not None:
        entry: Any = found.parametrisation
        entry.quant_state = state_on(entry.quant_state, found.packed.device)


def parametrised(module: nn.Module, name: str) -> Parametrised | None:
    """The 4-bit storage behind a parameter, None where it has none. Decodes nothing."""
    lists = module._modules.get("parametrizations")
    entries = None if lists is None else lists._modules.get(name)
    if entries is None:
        return None
    original = entries._parameters.get("original")
    for entry in entries.children():
        if original is not None and getattr(entry, "quant_state", None) is not None:
            return Parametrised(packed=original.data, parametrisation=entry)
    return None


def check_settings(quant_type: str, blocksize: int) -> None:
    """Refuse what bitsandbytes cannot pack, before anything is packed.

    Raises:
        ValueError: quant_type is neither nf4 nor fp4, or blocksize is no power of two in 32..4096.
    """
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type of experts must be 'nf4' or 'fp4', got {quant_type!r}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(
            f"blocksize of experts must be one of {', '.join(map(str, BLOCKSIZES))}, "
            f"got {blocksize}"
        )


def quantized(
    weight: Tensor,
    *,
    quant_type: str,
    blocksize: int,
    nested: bool,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Any]:
    """Packed bytes and state of a dense stack [experts, d1, d2], as bitsandbytes packs it whole.

    Experts are packed a few at a time: only those few, and what they are packed to, are beside
    the result on `device`, and in the fp32 that some backends work in. Where blocks straddle
    experts, or all of them are few, they are packed at once.
    """
    from bitsandbytes import functional

    weight = weight.detach()
    device = weight.device if device is None else torch.device(device)
    settings = {"blocksize": blocksize, "quant_type": quant_type}
    elements = weight[0].numel()
    step = max(1, PACKED_ELEMENTS // elements)
    if elements % blocksize or step >= weight.shape[0]:
        return functional.quantize_4bit(
            weight.to(device).contiguous(), compress_statistics=nested, **settings
        )
    total = weight.numel()
    packed = torch.empty((total // 2, 1), dtype=torch.uint8, device=device)
    absmax = torch.empty(total // blocksize, dtype=torch.float32, device=device)
    for first in range(0, weight.shape[0], step):
        piece = weight[first : first + step].to(device).contiguous()
        low, high = first * elements, first * elements + piece.numel()
        part, state = functional.quantize_4bit(piece, **settings)
        packed[low // 2 : high // 2] = part
        absmax[low // blocksize : high // blocksize] = state.absmax
    state.shape, state.absmax = weight.shape, absmax
    if nested:
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = functional.quantize_blockwise(
            state.absmax - state.offset, blocksize=NESTED_BLOCKSIZE
        )
        state.nested = True
    return packed, state


def install(module: nn.Module, name: str, packed: Tensor, state: Any) -> None:
    """Put packed bytes in the place of a parameter, with the parametrisation and its hooks."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized

    module._parameters.pop(name, None)
    module.register_parameter(name, nn.Parameter(packed, requires_grad=False))
    if not getattr(module, _READS, False):
        module.register_load_state_dict_pre_hook(_read_packed)
        setattr(module, _READS, True)
    # The packed form is exact: shapes and dtypes are JSON, tables are copied.
    replace_parameter_4bit_prequantized(
        module, name, dict(state.as_dict(packed=True)), device=packed.device
    )


def _read_packed(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take what a state dict holds of packed parameters, which bitsandbytes writes and cannot read.

    Nothing is taken that does not fit: torch then says which keys are missing and unexpected.
    """
    lists: Any = module._modules.get("parametrizations")
    for name in [] if lists is None else list(lists):
        packed, key = parametrised(module, name), f"{prefix}{name}"
        found = {
            entry[len(key) + 1 :]: state[entry] for entry in state if entry.startswith(f"{key}.")
        }
        if packed is None or key not in state or "absmax" not in found:
            continue
        from bitsandbytes.functional import QuantState
        from bitsandbytes.nn.parametrize import Bnb4bitParametrization

        device = packed.packed.device
        # Reading takes entries out of what it is given.
        read = QuantState.from_dict(dict(found), device=device)
        if read.shape != packed.state.shape:
            continue
        data = state.pop(key).to(device)
        for entry in found:
            del state[f"{key}.{entry}"]
        restore(
            module,
            name,
            Parametrised(packed=data, parametrisation=Bnb4bitParametrization(read)),
        )
        state[f"{prefix}parametrizations.{name}.original"] = data


def parts(packed: Parametrised) -> dict[str, Tensor]:
    """A packed stack as named tensors; shapes and dtypes are bytes of JSON in `quant_state`."""
    data = packed.packed
    found = {"data": data if data.dtype == torch.uint8 else data.view(torch.uint8).reshape(-1, 1)}
    for key, value in packed.state.as_dict(packed=True).items():
        name = "quant_state" if key.startswith("quant_state.") else key
        found[name] = value.to(packed.packed.device)
    return found


def hold_as(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Hold the bytes of a packed parameter as numbers of another dtype; the bits stay.

    Raises:
        ValueError: the bytes do not fill whole numbers.
    """
    found = parametrised(module, name)
    assert found is not None, "the parameter is packed"
    bytes_ = found.packed.view(torch.uint8).reshape(-1)
    if bytes_.numel() % dtype.itemsize:
        raise ValueError(
            f"{name} has {bytes_.numel()} packed bytes, which are no whole numbers of "
            f"{dtype.itemsize} bytes ({dtype})"
        )
    lists: Any = module._modules["parametrizations"]
    numbers = bytes_.view(dtype).reshape(-1, 1)
    lists[name]._parameters["original"] = nn.Parameter(numbers, requires_grad=False)


def install_parts(module: nn.Module, name: str, found: dict[str, Tensor]) -> None:
    """The inverse of `parts`, put in the place of a parameter.

    Raises:
        ValueError: a part is missing.
    """
    from bitsandbytes.functional import QuantState

    for part in ("data", "absmax", "quant_map", "quant_state"):
        if part not in found or found[part].numel() == 0:
            raise ValueError(f"the checkpoint holds no {part} of the packed parameter {name}")
    data = found["data"]
    settings = json.loads(bytes(found["quant_state"].cpu().tolist()))
    tables = {key: value for key, value in found.items() if key not in ("data", "quant_state")}
    tables[f"quant_state.bitsandbytes__{settings['quant_type']}"] = found["quant_state"].cpu()
    install(module, name, data, QuantState.from_dict(tables, device=data.device))


def sliced(packed: Parametrised, experts: slice) -> Parametrised:
    """Consecutive experts of a packed stack, which decode as before; nested scales become plain.

    Raises:
        ValueError: blocks straddle experts, so that neighbours share a scale.
    """
    from bitsandbytes import functional
    from bitsandbytes.nn.parametrize import Bnb4bitParametrization

    state = packed.state
    elements = math.prod(state.shape[1:])
    if elements % state.blocksize:
        raise ValueError(
            f"experts of {elements} elements share blocks of {state.blocksize}, so they cannot be "
            "divided among ranks"
        )
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    low, high = experts.start * elements, experts.stop * elements
    part = functional.QuantState(
        absmax=absmax[low // state.blocksize : high // state.blocksize].float().clone(),
        shape=torch.Size([experts.stop - experts.start, *state.shape[1:]]),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    flat = packed.packed.view(torch.uint8).reshape(-1)[low // 2 : high // 2]
    return Parametrised(
        packed=flat.reshape(-1, 1).clone(), parametrisation=Bnb4bitParametrization(part)
    )


def remove(module: nn.Module, name: str) -> None:
    """Take parametrisation and parameter off; the hooks that came with it do nothing then.

    torch takes the property of the parameter off the class, which copies of a module share, so that
    a copy would lose it too: the module gets a class of its own first.
    """
    kind = type(module)
    module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    module._parameters.pop(name, None)


def restore(module: nn.Module, name: str, base: Parametrised) -> None:
    """Put back what `remove` took off or `replace` replaced: the same bytes and state."""
    if parametrised(module, name) is not None:
        remove(module, name)
    module._parameters.pop(name, None)
    module.register_parameter(name, nn.Parameter(base.packed, requires_grad=False))
    parametrize.register_parametrization(module, name, base.parametrisation, unsafe=True)


def replace(module: nn.Module, name: str, merged: Tensor, *, like: Parametrised) -> float:
    """Quantise `merged` as `like` is and put it in its place.

    Returns:
        ||decoded - merged|| / ||merged|| in fp32.
    """
    from bitsandbytes.nn.parametrize import Bnb4bitParametrization

    state = like.state
    packed, new_state = quantized(
        merged, quant_type=state.quant_type, blocksize=state.blocksize, nested=state.nested
    )
    restore(
        module,
        name,
        Parametrised(packed=packed, parametrisation=Bnb4bitParametrization(new_state)),
    )
    return relative_error(four_bit(packed, new_state), merged)


def decoded(stored: FourBit, expert: int) -> Tensor:
    """One expert in fp32, [d1, d2], as `FourBit.dense` has it, but by torch.

    So experts are packed, and the error is reported, also where no kernel runs.
    """
    elements = math.prod(stored.shape)
    low, high = expert * elements, (expert + 1) * elements
    pairs = stored.packed.reshape(-1)[low // 2 : high // 2]
    codes = torch.stack((pairs >> 4, pairs & 15), dim=1).reshape(-1)
    first = low // stored.blocksize
    scales = stored.absmax.reshape(-1)[first : math.ceil(high / stored.blocksize)]
    if stored.nested is not None:
        blocks = torch.arange(first, first + scales.numel(), device=stored.device)
        outer = stored.nested.absmax.reshape(-1)[blocks // stored.nested.blocksize]
        scales = stored.nested.code[scales.int()] * outer + stored.nested.offset
    scale = scales.repeat_interleave(stored.blocksize)[low % stored.blocksize :][:elements]
    return (stored.codebook[codes.int()] * scale).view(stored.shape)


def dense(packed: Parametrised, dtype: torch.dtype | None = None) -> Tensor:
    """All experts, [experts, d1, d2], in `dtype` or the one they were packed from."""
    stored = packed.stored()
    shape = (stored.experts, *stored.shape)
    weight = torch.empty(shape, dtype=dtype or stored.dtype, device=stored.device)
    for expert in range(stored.experts):
        weight[expert] = decoded(stored, expert)
    return weight


def relative_error(stored: FourBit, dense: Tensor) -> float:
    """||decoded - dense|| / ||dense||, one expert at a time."""
    difference = torch.zeros((), dtype=torch.float64, device=stored.device)
    norm = torch.zeros_like(difference)
    for expert in range(stored.experts):
        truth = dense[expert].to(stored.device).float()
        error = decoded(stored, expert).sub_(truth)
        difference += torch.linalg.vector_norm(error, dtype=torch.float64).square()
        norm += torch.linalg.vector_norm(truth, dtype=torch.float64).square()
    return float((difference / norm).sqrt()) if float(norm) else 0.0
