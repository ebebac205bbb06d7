"""The references in the place of the kernels, for laws about what the integrations hand to them.

A model of transformers costs seconds under Triton's interpreter and milliseconds here. Whether the
kernels compute what the references do is for other tests.
"""

import pytest
import torch

import scattermoe_lora.integrations.transformers as layer
from scattermoe_lora._interpreter import INTERPRETED
from scattermoe_lora.ops.glu import Gate
from scattermoe_lora.quant import FourBit
from verify import references as plain
from verify import references_quant as plain_quant


def install(monkeypatch):
    """Replace the routing, both products and the decoding of 4-bit experts until the test ends."""
    monkeypatch.setattr(layer, "Routing", Routing)
    monkeypatch.setattr(layer, "experts_mlp", experts_mlp)
    monkeypatch.setattr(layer, "expert_linear", expert_linear)
    monkeypatch.setattr(FourBit, "dense", four_bit)


class Routing:
    """Groups by the interface of the layer's routing."""

    @staticmethod
    def from_top_k(top_k_index, experts, *, sentinels=False):
        assert sentinels or top_k_index.numel() == 0 or int(top_k_index.min()) >= 0
        assert sentinels or top_k_index.numel() == 0 or int(top_k_index.max()) < experts
        return plain.Groups.of(top_k_index, experts)


def tensors_of(x, weight, lora, bias, suffix=""):
    """The operands of a projection by the names of the references, and the dtype it runs in.

    The layer takes one dtype, of autocast where that is on, and factors in it or in fp32.
    """
    dtype, cast = x.dtype, torch.is_autocast_enabled("cpu")
    if cast:
        dtype = torch.get_autocast_dtype("cpu")
    if not isinstance(weight, torch.Tensor):
        blocks = list(weight.blocks(dtype))
        assert blocks[0][0] == 0
        weight = torch.cat([block.clone() for _, block in blocks])
    found = {"weight": weight.to(dtype)}
    assert cast or weight.dtype == dtype
    if lora is not None:
        assert cast or lora.a.dtype == lora.b.dtype
        assert cast or lora.a.dtype in (torch.float32, dtype)
        found |= {"lora_a": lora.a, "lora_b": lora.b.double() * lora.scaling}
    if bias is not None:
        found["bias"] = bias
    return {f"{name}{suffix}": value for name, value in found.items()}, dtype


def experts_mlp(hidden, gates, routing, *, gate_up, down, activation):
    """`layers.experts_mlp`."""
    up, dtype = tensors_of(hidden, gate_up.weight, gate_up.lora, gate_up.bias, "_up")
    last, _ = tensors_of(hidden, down.weight, down.lora, down.bias, "_down")
    fields = {name: getattr(activation, name) for name in ("alpha", "shift", "limit")}
    act = plain.GatedActivation(
        tanh=activation.gate is Gate.TANH, interleaved=activation.interleaved, **fields
    )
    operands = {"x": hidden.to(dtype), "gates": gates, **up, **last}
    return plain.experts_mlp(operands, routing, act, scaling=1.0).to(dtype)


def expert_linear(x, weight, routing, *, source, target, lora=None, bias=None, gates=None):
    """`autograd.expert_linear`."""
    tensors, dtype = tensors_of(x, weight, lora, bias)
    tensors["x"] = x.to(dtype)
    rows = {"scaling": 1.0, "source": source.name, "target": target.name}
    y = plain.expert_linear(tensors, routing, **rows)
    if gates is not None:
        assert target.name == "SLOT"
        y = y.view(routing.tokens, routing.top_k, -1) * gates.double()[..., None]
        y = y.sum(1)
    return y.to(dtype)


def four_bit(stored, expert_ids=None, *, dtype, out=None, plan=None):
    """`FourBit.dense`."""
    nested = stored.nested
    tensors = {name: getattr(stored, name) for name in ("packed", "absmax", "codebook")}
    if nested is not None:
        tensors |= {"outer_code": nested.code, "outer_absmax": nested.absmax}
        tensors |= {"outer_offset": nested.offset}
    problem = plain_quant.FourBitProblem(
        experts=stored.experts,
        shape=stored.shape,
        blocksize=stored.blocksize,
        outer_blocksize=0 if nested is None else nested.blocksize,
    )
    ids = range(stored.experts) if expert_ids is None else expert_ids
    ids = torch.as_tensor(list(ids) if isinstance(ids, range) else ids)
    found = plain_quant.four_bit(tensors, problem, dtype=dtype, expert_ids=ids)
    return found if out is None else out.copy_(found)


@pytest.fixture
def decoding_on_the_cpu(monkeypatch):
    """4-bit experts on the CPU are decoded: by the kernel, or where it is compiled for a GPU by the
    reference.
    """
    if not INTERPRETED:
        monkeypatch.setattr(FourBit, "dense", four_bit)


@pytest.fixture
def references(monkeypatch):
    """The references in the place of the kernels."""
    install(monkeypatch)


@pytest.fixture(
    name="where", params=[pytest.param("references", marks=pytest.mark.correctness), "kernels"]
)
def where_products_run(request, monkeypatch, device):
    """The device of a test: that of the kernels, or the CPU for the references in their place,
    which the merge gate takes.
    """
    if request.param == "kernels":
        return device
    install(monkeypatch)
    return torch.device("cpu")
