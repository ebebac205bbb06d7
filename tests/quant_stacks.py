"""Stored experts for tests: drawn by the references, in the types of the package."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.utils import parametrize

from scattermoe_lora.quant import FourBit, NestedScales
from verify import references_quant as reference
from verify.references_quant import FourBitProblem


def nested_scales(tensors, problem):
    if not problem.outer_blocksize:
        return None
    return NestedScales(
        code=tensors["outer_code"],
        absmax=tensors["outer_absmax"],
        offset=tensors["outer_offset"],
        blocksize=problem.outer_blocksize,
    )


def stored_four_bit(problem, tensors, **changes):
    fields = {
        "packed": tensors["packed"],
        "absmax": tensors["absmax"],
        "codebook": tensors["codebook"],
        "blocksize": problem.blocksize,
        "experts": problem.experts,
        "shape": problem.shape,
        "nested": nested_scales(tensors, problem),
    }
    return FourBit(**{**fields, **changes})


def drawn(device, seed=0, **fields):
    problem = FourBitProblem(**fields)
    tensors = reference.draw_four_bit(problem, seed=seed, device=device)
    return problem, tensors, stored_four_bit(problem, tensors)


def state_of(problem, tensors, shape=None):
    """What bitsandbytes would call the QuantState of drawn tensors."""
    outer = None
    if problem.outer_blocksize:
        outer = SimpleNamespace(
            absmax=tensors["outer_absmax"],
            code=tensors["outer_code"],
            blocksize=problem.outer_blocksize,
        )
    return SimpleNamespace(
        absmax=tensors["absmax"],
        code=tensors["codebook"],
        blocksize=problem.blocksize,
        shape=torch.Size(shape or (problem.experts, *problem.shape)),
        dtype=torch.float16,
        state2=outer,
        offset=tensors["outer_offset"].reshape(()) if outer else None,
    )


class Decoding(nn.Module):
    """A parametrisation that must never be asked to decode."""

    def __init__(self, **attributes):
        super().__init__()
        self.asked = False
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, original):
        if self.asked:
            raise AssertionError("the attribute was read, which decodes every expert")
        self.asked = True  # registering reads it once
        return original


def parametrised(original, **attributes):
    module = nn.Module()
    module.weight = nn.Parameter(original, requires_grad=False)
    entry = Decoding(**attributes)
    parametrize.register_parametrization(module, "weight", entry, unsafe=True)
    entry.asked = True
    return module
