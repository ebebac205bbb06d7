"""Experts of transformers models on text: the truth is their own computation, and the kernels
meet it.
"""

import copy
from dataclasses import replace

import pytest
import torch

import scattermoe_lora as lib
from conftest import DEVICE
from verify.cases import REAL
from verify.compare import compare
from verify.inputs import DTYPES, captured
from verify.models import Arithmetic
from verify.references import GatedActivation, Groups, experts_mlp
from verify.run import Problem, guarded_run
from verify.specs.layer import EXPERTS_MLP
from verify.specs.linear import LORA_FORWARD

pytest.importorskip("transformers")
pytestmark = [pytest.mark.correctness, pytest.mark.hf]

CASES = [case for case in EXPERTS_MLP.cases if case.family]
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)


def own_computation(case, inputs) -> torch.Tensor:
    """What the model's own experts module makes of the same operands, in fp64 on the CPU."""
    module = copy.deepcopy(captured(case, case.seed).experts)
    with torch.no_grad():
        module.gate_up_proj.copy_(inputs["weight_up"].mT)
        module.down_proj.copy_(inputs["weight_down"].mT)
        operands = (inputs["x"].double(), inputs["top_k_index"], inputs["gates"].double())
        return module.double()(*(operand.cpu() for operand in operands))


@by_name
def test_the_router_uses_several_experts_and_the_text_matters(case):
    first, second = captured(case, 0), captured(case, 1)
    assert first.hidden.shape == (case.tokens, case.k_in)
    assert len(first.top_k_index.unique()) > case.top_k
    assert not first.hidden.equal(second.hidden)


@by_name
def test_the_reference_is_the_models_own_computation(case):
    inputs = EXPERTS_MLP.inputs(case, torch.float32, "balanced", torch.device("cpu"))
    groups = Groups.of(inputs["top_k_index"], case.experts)
    names = ("x", "gates", "weight_up", "weight_down")
    tensors = {name: inputs[name] for name in names}
    truth = experts_mlp(tensors, groups, GatedActivation(), scaling=1.0)
    torch.testing.assert_close(truth, own_computation(case, inputs))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@by_name
def test_the_kernels_compute_what_the_model_computes(case, dtype):
    device = torch.device(DEVICE)
    drawn = EXPERTS_MLP.inputs(case, dtype, "balanced", device)
    silent = {
        name: torch.zeros_like(drawn[name]) for name in drawn.tensors if name.startswith("lora_b")
    }
    inputs = drawn.having(**silent)
    outputs, problems = guarded_run(lib, EXPERTS_MLP, inputs, None)
    assert problems == ()
    expected = EXPERTS_MLP.reference(inputs, Arithmetic())["out"]
    own = replace(expected, value=own_computation(case, inputs).to(device))
    found = compare("out", outputs["out"], own)
    assert found.ok, str(found)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("spec", [LORA_FORWARD, EXPERTS_MLP], ids=lambda spec: spec.name)
@pytest.mark.parametrize("case", REAL, ids=lambda case: case.family)
def test_adapters_on_real_input(case, spec, dtype):
    case = next(own for own in spec.cases if own.name == case.name)
    problem = Problem(
        lib=lib, spec=spec, case=case, dtype=dtype, mode="balanced", device=torch.device(DEVICE)
    )
    outcomes = list(problem.check(lambda plan: plan.quick))
    assert outcomes
    assert not [str(outcome) for outcome in outcomes if not outcome.ok]
