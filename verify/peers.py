"""What the package is measured beside, as far as it is installed; each is checked before it is
timed.

A peer is a function (case, drawn) -> Arm, or None where it does not take the case. Building one
may fail with ImportError (not installed) or with whatever an unsuited version raises:
`arms_beside` says which.
"""

import importlib
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from . import peer_composition
from .bench_arms import Arm, four_bit_of, layer_arm, leaf
from .bench_cases import PROJECTIONS, BenchCase
from .bench_check import PEER, Judge
from .bench_inputs import BLOCK, SCALING, Drawn, problem_of

Peer = Callable[[BenchCase, Drawn], Arm | None]

COMPOSITION = "torch._grouped_mm composition"
HF = "transformers grouped_mm, no adapter"
HF_PEFT = "transformers grouped_mm + PEFT"
INTEGRATED = "this package in transformers + PEFT"
LIGER = "Liger fused MoE, no adapter"
BITSANDBYTES = "bitsandbytes dequantize_4bit"


def composition(case: BenchCase, drawn: Drawn) -> Arm | None:
    """torch._grouped_mm with a backward written by hand; bf16 alone is native."""
    if case.torch_dtype != torch.bfloat16:
        return None
    if case.kind == "projection":
        return peer_composition.projection_arm(case, drawn)
    if case.kind == "layer":
        weights = {name: _given(drawn[f"weight_{name}"]) for name in PROJECTIONS}
        return peer_composition.layer_arm(case, drawn, weights)
    if case.kind == "qlora-layer":
        weights = {name: _decoding(case, drawn, name) for name in PROJECTIONS}
        return peer_composition.layer_arm(case, drawn, weights)
    return None


def _given(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value


def _decoding(case: BenchCase, drawn: Drawn, projection: str) -> Callable[[], Tensor]:
    """A stack decoded whole whenever it is used: by bitsandbytes, or where it is missing by the
    package.
    """
    try:
        call = _dequantize_4bit(case, drawn, projection)
    except ImportError:
        stack = four_bit_of(importlib.import_module("scattermoe_lora"), drawn, projection)
        return lambda: stack.dense(dtype=case.torch_dtype).mT
    shape = (case.shape.experts, *problem_of(case, projection).shape)
    return lambda: call().view(shape).mT


def _experts(case: BenchCase, drawn: Drawn, *, implementation: str = "grouped_mm") -> nn.Module:
    """transformers' Qwen3 experts over the tensors of a case; other models compute the same."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    shape = case.shape
    config = Qwen3MoeConfig(
        num_experts=shape.experts,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.intermediate,
        num_experts_per_tok=shape.top_k,
        hidden_act="silu",
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    for name in PROJECTIONS:
        stored = drawn[f"weight_{name}"].mT
        setattr(module, f"{name}_proj", nn.Parameter(stored, requires_grad=False))
    return module


def transformers_experts(case: BenchCase, drawn: Drawn) -> Arm | None:
    """transformers' own fast experts, which know no adapter."""
    if case.kind != "layer" or case.torch_dtype != torch.bfloat16:
        return None
    module = _experts(case, drawn)
    leaves = {name: leaf(drawn[name]) for name in ("x", "gates")}
    return _module_arm(case, drawn, module, leaves, adapted=False)


def transformers_peft(case: BenchCase, drawn: Drawn) -> Arm | None:
    """The same with PEFT's adapters on both parameters, in the dtype of the experts: what users
    have.
    """
    if case.kind != "layer" or case.torch_dtype != torch.bfloat16:
        return None
    model, factors = _with_peft(case, drawn)
    leaves = {name: leaf(drawn[name]) for name in ("x", "gates")} | factors
    return _module_arm(case, drawn, model.base_model.model.experts, leaves, adapted=True)


def integrated(case: BenchCase, drawn: Drawn) -> Arm | None:
    """The package as users of transformers and PEFT call it: the cost of the way in, beside the
    layer alone.
    """
    if case.kind != "layer":
        return None
    transformers = importlib.import_module("scattermoe_lora.integrations.transformers")
    attach = importlib.import_module("scattermoe_lora.integrations.peft").attach
    model, factors = _with_peft(case, drawn, implementation=transformers.KEY)
    attach(model)
    leaves = {name: leaf(drawn[name]) for name in ("x", "gates")} | factors
    return _module_arm(case, drawn, model.base_model.model.experts, leaves, adapted=True)


def _with_peft(
    case: BenchCase, drawn: Drawn, *, implementation: str = "grouped_mm"
) -> tuple[Any, dict[str, Tensor]]:
    """transformers' experts with PEFT's adapters, filled with those of the case."""
    from peft import LoraConfig, get_peft_model

    holder: Any = nn.Module()
    holder.experts = _experts(case, drawn, implementation=implementation)
    holder.config = SimpleNamespace(model_type="custom", to_dict=dict)
    targets = [f"experts.{name}_proj" for name in PROJECTIONS]
    config = LoraConfig(
        r=case.rank,
        lora_alpha=SCALING * case.rank,
        target_parameters=targets,
        target_modules=[],
        lora_dropout=0.0,
    )
    model = get_peft_model(holder, config, autocast_adapter_dtype=False)
    return model, _peft_factors(model, drawn)


def _peft_factors(model: nn.Module, drawn: Drawn) -> dict[str, Tensor]:
    """PEFT's parameters, filled with the adapters of the case."""
    from scattermoe_lora import LoRAWeights

    found: dict[str, Tensor] = {}
    wrapper: Any
    for wrapper in model.modules():
        name = str(getattr(wrapper, "parameter_name", "")).removesuffix("_proj")
        if name not in PROJECTIONS:
            continue
        a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        views = LoRAWeights.from_peft(
            a.detach(),
            b.detach(),
            experts=wrapper.num_experts,
            scaling=float(wrapper.scaling["default"]),
            swapped=bool(getattr(wrapper, "_did_swap_in_out_features", False)),
            transposed=False,
        )
        views.a.copy_(drawn[f"lora_a_{name}"])
        views.b.copy_(drawn[f"lora_b_{name}"])
        found |= {f"peft_a_{name}": a, f"peft_b_{name}": b}
    return found


def _module_arm(
    case: BenchCase,
    drawn: Drawn,
    module: nn.Module,
    leaves: dict[str, Tensor],
    *,
    adapted: bool,
) -> Arm:
    """An experts module of transformers; results whose layout is PEFT's own are returned, not
    judged.
    """

    def forward() -> Tensor:
        return module(leaves["x"], drawn["top_k_index"], leaves["gates"])

    def step() -> tuple[Tensor, ...]:
        out = forward()
        return (out.detach(), *torch.autograd.grad(out, list(leaves.values()), drawn["dout"]))

    end = "" if adapted else "_unadapted"
    if case.what == "forward":
        return Arm(call=lambda: (forward().detach(),), outputs=(f"out{end}",))
    return Arm(call=step, outputs=(f"out{end}", *(f"d{name}{end}" for name in leaves)))


def liger(case: BenchCase, drawn: Drawn) -> Arm | None:
    """Liger's fused MoE, forward: its backward always computes the gradient of the frozen weights
    too.
    """
    if case.kind != "layer" or case.what != "forward" or case.torch_dtype != torch.bfloat16:
        return None
    function = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    index = drawn["top_k_index"].to(torch.int32)
    stacks = [drawn[f"weight_{name}"].mT for name in PROJECTIONS]

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function.apply(drawn["x"], *stacks, index, drawn["gates"]),)

    return Arm(call=call, outputs=("out_unadapted",))


def bitsandbytes(case: BenchCase, drawn: Drawn) -> Arm | None:
    """bitsandbytes' dequantisation of a plain NF4 stack."""
    if case.kind != "dequant" or case.what != "nf4":
        return None
    call = _dequantize_4bit(case, drawn, case.projection)
    shape = (case.shape.experts, *problem_of(case, case.projection).shape)
    return Arm(call=lambda: (call().view(shape),), outputs=("dense",))


def _dequantize_4bit(case: BenchCase, drawn: Drawn, projection: str) -> Callable[[], Tensor]:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    tensors, problem = drawn.stored[projection], problem_of(case, projection)
    state = functional.QuantState(
        absmax=tensors["absmax"],
        shape=torch.Size((problem.elements,)),
        code=tensors["codebook"],
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=case.torch_dtype,
    )
    packed = tensors["packed"].view(-1, 1)
    return lambda: functional.dequantize_4bit(packed, quant_state=state)


PEERS: Mapping[str, Peer] = {
    COMPOSITION: composition,
    HF: transformers_experts,
    HF_PEFT: transformers_peft,
    INTEGRATED: integrated,
    LIGER: liger,
    BITSANDBYTES: bitsandbytes,
}


def arms_beside(
    case: BenchCase, drawn: Drawn, judge: Judge, names: tuple[str, ...] = tuple(PEERS)
) -> tuple[dict[str, Arm], dict[str, str]]:
    """Peers whose results are right on these tensors, and why others are left out."""
    arms: dict[str, Arm] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            arm = PEERS[name](case, drawn)
            if arm is None:
                continue
            results = arm.results()
            if case.kind == "layer" and any(key.endswith("_unadapted") for key in results):
                problem = _unadapted_problem(case, drawn, results, judge)
            else:
                problem = judge.problem_of(results, slack=PEER)
        except ModuleNotFoundError as error:
            left_out[name] = f"not installed: {error.name}"
        except Exception as error:  # noqa: BLE001 - a peer that fails is left out aloud
            left_out[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            if problem:
                left_out[name] = problem
            else:
                arms[name] = arm
    return arms, left_out


def _unadapted_problem(
    case: BenchCase, drawn: Drawn, results: Mapping[str, Tensor], judge: Judge
) -> str:
    """Peers without an adapter are judged by the package without one."""
    lib = importlib.import_module("scattermoe_lora")
    bare = Drawn(
        case=drawn.case,
        tensors={k: v for k, v in drawn.tensors.items() if not k.startswith("lora_")},
        stored=drawn.stored,
    )
    truth = layer_arm(lib, case, bare, adapters=False).results()
    own = Judge(
        truth={k: v for k, v in truth.items() if k in ("out", "dx", "dgates")},
        errors=judge.errors,
    )
    named = {key.removesuffix("_unadapted"): value for key, value in results.items()}
    return own.problem_of(named, slack=PEER)
