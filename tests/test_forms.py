"""A launch that is remembered for a form fits every call of that form, and is found again.

Triton compiles another variant where an integer is 1 or a multiple of 16, where an operand is
absent, or of another type. The package keeps one variant for each of its forms, so all calls of a
form must be equal in what Triton looks at. The interpreter has no variants, hence another process.
"""

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.correctness, pytest.mark.compile]

CALLS = """
import itertools, json, sys
from collections import defaultdict
from dataclasses import replace

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

import scattermoe_lora as lib
from verify.ahead import ARCHITECTURES, redirected
from verify.footprint import stated
from verify.specs import KERNELS
from verify.specs.glu import of_package
from verify.references import GatedActivation

torch.set_num_threads(1)
launch_type = sys.modules["scattermoe_lora._launch"].Launch


def seen(value, free):
    # What Triton looks at, by its documentation of specialisation.
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), value.data_ptr() % 16 == 0)
    if isinstance(value, TensorDescriptor):
        return (str(value.base.dtype), tuple(value.block_shape))
    if isinstance(value, tuple):
        return tuple(seen(item, free) for item in value)
    if isinstance(value, int) and not free:
        return "one" if value == 1 else "sixteens" if value % 16 == 0 else "integer"
    return type(value).__name__


forms, calls, names = defaultdict(set), 0, {}


def call(self, grid, device, args, pointers):
    global calls
    if pointers % 16:
        return
    calls += 1
    free = [parameter.do_not_specialize for parameter in self.kernel.params]
    names[id(self)] = self
    forms[id(self)].add(tuple(seen(value, mark) for value, mark in zip(args, free)))


def routed(inputs):
    # Kernels run nothing here, and some operations of torch read the routing.
    index, experts = inputs["top_k_index"], inputs.case.experts
    made = lib.Routing.from_top_k(index, experts, sentinels=True)
    ids = index.reshape(-1)
    order, made_slots = ids.where((ids >= 0) & (ids < experts), experts).sort(stable=True)
    made.slots.copy_(made_slots)
    made.expert_of_row.copy_(order)
    return made


def by_hand(name, drawn):
    # What callers may leave out, or hand over otherwise, and no spec does.
    routing, gates = drawn.prepared, drawn["gates"]
    for given in (gates, None, gates.bfloat16()):
        if name == "glu_backward":
            made = of_package(lib, GatedActivation())
            lib.ops.glu_backward(drawn["h"], drawn["dact"], routing, made, gates=given)
            continue
        y = drawn["y"]
        out = y.new_empty(drawn.case.tokens, y.shape[1])
        for written in (out, padded(out)):
            lib.ops.combine(y, routing, gates=given, out=written)


def cut(drawn, side):
    # The same strides, 8 columns fewer: of what goes in, or of what comes out.
    inner, outer = (slice(-8), slice(None)) if side == "in" else (slice(None), slice(-8))
    return drawn.having(
        x=drawn["x"][:, inner], weight=drawn["weight"][:, inner, outer],
        lora_a=drawn["lora_a"][..., inner], lora_b=drawn["lora_b"][:, outer],
    )


def padded(value):
    # The same values, each row of which is followed by 8 others.
    wider = value.new_zeros((*value.shape[:-1], value.shape[-1] + 8))
    wider[..., : value.shape[-1]] = value
    return wider[..., : value.shape[-1]]


def launched(spec, inputs):
    for plan in spec.plans(lib, inputs):
        if plan.quick and not plan.unavailable:
            spec.run(lib, inputs, plan.plan)


VARIED = (
    {}, {"top_k": 1}, {"n_out": 72}, {"k_in": 88}, {"rank": 17}, {"weight_layout": "transposed"},
    {"lora_dtype": "float32"}, {"bias": True}, {"gated": True, "target": "SLOT"},
    {"gated": True, "target": "SLOT", "gradient": "TOKEN"}, {"source": "SLOT"},
)
cpu, forgotten = torch.device("cpu"), []
with redirected(lib, lambda *facts: None), stated(lib, ARCHITECTURES[90]):
    launch_type.__call__ = call
    for spec, changes in itertools.product(KERNELS, VARIED):
        if spec.name.startswith("dequantize"):
            continue  # Triton's own dispatch launches them.
        if spec.name == "expert_linear" and changes == {"gated": True, "target": "SLOT"}:
            continue  # Its rows are summed, and so is their gradient.
        if spec.name == "experts_mlp" and "source" in changes:
            continue  # It takes tokens.
        bases = [case for case in spec.cases if case.name in ("plain", "scattered")]
        for case, dtype in itertools.product(bases, spec.dtypes):
            if changes and dtype == torch.float16:
                continue  # It takes the forms of bfloat16.
            case = replace(case, **changes)
            drawn = spec.inputs(case, dtype, spec.modes[-1], cpu, seed=0)
            drawn = replace(drawn, prepared=routed(drawn) if spec.prepare else None)
            if not changes and spec.name in ("combine", "glu_backward"):
                by_hand(spec.name, drawn)
            if not changes and spec.name == "routing":
                for kind in (torch.int32, torch.int16, torch.uint8):
                    routed(drawn.having(top_k_index=drawn["top_k_index"].to(kind)))
            wide = [name for name, value in drawn.tensors.items() if value.ndim > 1]
            varied = [drawn, *(drawn.having(**{name: padded(drawn[name])}) for name in wide)]
            if not changes and case.name == "plain" and spec.name == "lora_forward":
                varied += [cut(drawn, side) for side in ("in", "out")]
            for inputs in varied:
                launched(spec, inputs)
            # Other tensors of the same kinds are launches that are remembered.
            known, drawn = set(names), spec.inputs(case, dtype, spec.modes[-1], cpu, seed=0)
            launched(spec, replace(drawn, prepared=routed(drawn) if spec.prepare else None))
            forgotten += [f"{spec.name} {changes}"] * (not names.keys() <= known)
wrong = {
    names[key].kernel.__name__: [repr(item) for item in sorted(found, key=repr)]
    for key, found in forms.items()
    if len(found) > 1
}
kernels = sorted({launch.kernel.__name__ for launch in names.values()})
found = {"calls": calls, "forms": len(forms), "kernels": kernels, "wrong": wrong}
json.dump({**found, "forgotten": forgotten}, sys.stdout)
"""


def test_calls_of_one_form_are_one_variant():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-W", "ignore", "-c", CALLS]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout)
    assert found["wrong"] == {}
    assert found["forgotten"] == []
