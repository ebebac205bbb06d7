"""The models that `verify train` trains: ours, and transformers' eager experts with a LoRA of its
own.

The reference keeps transformers' forward. Its stacks of experts are replaced by objects that give
one expert's weight, which meets `torch.nn.functional.linear` with the adapter beside it:

    y = x W^T + s (x A^T) B^T         every product in the dtype of x, in one of two orders

Nothing here uses the package except for the model under test.
"""

import enum
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .captured import Unavailable
from .references_quant import FourBitProblem, four_bit, nf4_codebook

ARMS = ("lora", "nf4")
NAMES = ("gate_up_proj", "down_proj")
BLOCK = 64
VOCABULARY = 256
TEXT_BYTES = 4 * 2**20


class Run(enum.Enum):
    """Who trains. OTHER_ORDER is EAGER with the terms of every sum in another order."""

    OURS = "scattermoe_lora"
    EAGER = "eager"
    OTHER_ORDER = "eager, other order"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A small Qwen3-MoE, its adapters and their training: `batch` sequences of `length` bytes a
    step, `distinct` batches over and over.
    """

    steps: int
    distinct: int
    layers: int = 2
    hidden: int = 256
    intermediate: int = 128
    experts: int = 8
    top_k: int = 2
    rank: int = 8
    batch: int = 8
    length: int = 128
    learning_rate: float = 3e-3
    scaling: float = 2.0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise ValueError(f"a curve has at least 2 steps, got {self.steps}")
        if self.hidden % BLOCK or self.intermediate % BLOCK:
            raise ValueError(
                f"hidden {self.hidden} and intermediate {self.intermediate} must be multiples of "
                f"{BLOCK}, the block of NF4"
            )
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"{self.top_k} experts per token of {self.experts}")
        if self.distinct < 1:
            raise ValueError(f"training takes at least 1 batch, got {self.distinct}")

    @classmethod
    def of(cls, device: torch.device, steps: int | None) -> "Settings":
        """The settings of a GPU, or smaller ones for Triton's interpreter."""
        if device.type == "cuda":
            return cls(steps=steps or 300, distinct=steps or 300)
        return cls(
            steps=steps or 30,
            distinct=3,
            hidden=64,
            intermediate=64,
            experts=4,
            batch=1,
            length=16,
            learning_rate=2e-2,
            dtype="float32",
        )


def standard_library() -> Tensor:
    """The modules of Python's standard library in alphabetical order, as int64 bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(file.read_bytes() for file in files)[:TEXT_BYTES]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def batches(text: Tensor, settings: Settings, seed: int) -> Tensor:
    """Sequences [distinct, batch, length] from anywhere in the text."""
    generator = torch.Generator().manual_seed(seed)
    shape = (settings.distinct, settings.batch, 1)
    starts = torch.randint(text.numel() - settings.length, shape, generator=generator)
    return text[starts + torch.arange(settings.length)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainee:
    """A model with adapters. disabled: a context in which they are off."""

    model: Any
    parameters: Sequence[nn.Parameter]
    disabled: Callable[[], Any]


def trainee(settings: Settings, arm: str, run: Run, *, device: torch.device, seed: int) -> Trainee:
    """The same model with the same adapters for every run of an arm.

    Raises:
        Unavailable: an optional package is missing.
    """
    model = base_model(settings, seed)
    factors = initial_factors(settings, seed + 1)
    if run is Run.OURS:
        return _ours(model.to(device), settings, arm, factors)
    return _eager(model.to(device), settings, arm, factors, halves=run is Run.OTHER_ORDER)


def base_model(settings: Settings, seed: int) -> Any:
    """A random model whose layers have unit gain, on the CPU.

    Raises:
        Unavailable: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise Unavailable("transformers is not installed; install the extra hf") from error
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.hidden,
        moe_intermediate_size=settings.intermediate,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=settings.hidden // 4,
        num_experts=settings.experts,
        num_experts_per_tok=settings.top_k,
        norm_topk_prob=True,
        max_position_embeddings=settings.length,
        attn_implementation="eager",
        use_cache=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.requires_grad_(requires_grad=False)
    model.set_experts_implementation("eager")
    return model.to(getattr(torch, settings.dtype)).train()


Factors = dict[tuple[int, str], tuple[Tensor, Tensor]]
"""(layer, parameter) -> A [E, R, K] and B [E, N, R], fp32."""


def initial_factors(settings: Settings, seed: int) -> Factors:
    """A of unit gain, B of zeros."""
    generator = torch.Generator().manual_seed(seed)
    widths = {
        "gate_up_proj": (settings.hidden, 2 * settings.intermediate),
        "down_proj": (settings.intermediate, settings.hidden),
    }
    found: Factors = {}
    for layer in range(settings.layers):
        for name, (k, n) in widths.items():
            a = torch.randn(settings.experts, settings.rank, k, generator=generator) * k**-0.5
            found[layer, name] = (a, torch.zeros(settings.experts, n, settings.rank))
    return found


def _experts(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "is_transposed")]


def _ours(model: Any, settings: Settings, arm: str, factors: Factors) -> Trainee:
    """The model as a user makes it, its adapters set to the given ones."""
    try:
        from peft import LoraConfig

        from scattermoe_lora import LoRAWeights
        from scattermoe_lora.integrations import peft as adapters
        from scattermoe_lora.integrations.transformers import KEY

        if arm == "nf4":
            from scattermoe_lora.integrations.bitsandbytes import quantize_experts

            quantize_experts(model, quant_type="nf4", blocksize=BLOCK)
    except ImportError as error:
        raise Unavailable(f"{error.name} is not installed; install the extras hf, bnb") from error
    model.set_experts_implementation(KEY)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.scaling * settings.rank)
    model = adapters.adapt(model, config)
    layers = {id(module): layer for layer, module in enumerate(_experts(model.get_base_model()))}
    with torch.no_grad():
        for wrapper in model.modules():
            if not isinstance(wrapper, adapters.ParamWrapper):
                continue
            experts = wrapper.get_base_layer()
            views = LoRAWeights.from_peft(
                wrapper.lora_A["default"].weight,
                wrapper.lora_B["default"].weight,
                experts=settings.experts,
                scaling=settings.scaling,
                swapped=bool(getattr(wrapper, "_did_swap_in_out_features", False)),
                transposed=False,
            )
            a, b = factors[layers[id(experts)], wrapper.parameter_name]
            views.a.copy_(a)
            views.b.copy_(b)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Trainee(model=model, parameters=parameters, disabled=model.disable_adapter)


class AdaptedWeight:
    """One expert's weight for `torch.nn.functional.linear`, with its adapter."""

    def __init__(self, stack: "AdaptedStack", expert: Tensor | int) -> None:
        self.stack, self.expert = stack, expert

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None
    ) -> Tensor:
        """x W^T + s (x A^T) B^T.

        Raises:
            TypeError: the function is not `linear` without a bias.
        """
        if function is not nn.functional.linear or keywords or len(arguments) != 2:
            raise TypeError(f"the reference has no {function} of {types}")
        x, weight = arguments
        return weight.stack.product(x, weight.expert)


class AdaptedStack(nn.Module):
    """The stack [E, N, K] of one parameter and its adapter. halves: sums over K in two halves,
    which are rounded before they are added, and the adapter's term first.
    """

    def __init__(
        self, weight: Tensor, a: Tensor, b: Tensor, *, scaling: float, halves: bool
    ) -> None:
        super().__init__()
        self.weight = weight
        self.a = nn.Parameter(a.to(weight.device))
        self.b = nn.Parameter(b.to(weight.device))
        self.scaling, self.halves, self.enabled = scaling, halves, True

    def __getitem__(self, expert: Tensor | int) -> AdaptedWeight:
        return AdaptedWeight(self, expert)

    def product(self, x: Tensor, expert: Tensor | int) -> Tensor:
        """Rows x [M, K] times one expert."""
        linear = self._by_halves if self.halves else nn.functional.linear
        base = linear(x, self.weight[expert])
        if not self.enabled:
            return base
        a, b = self.a[expert].to(x.dtype), self.b[expert].to(x.dtype)
        delta = nn.functional.linear(linear(x, a) * self.scaling, b)
        return delta + base

    @staticmethod
    def _by_halves(x: Tensor, weight: Tensor) -> Tensor:
        middle = x.shape[1] // 2
        high = nn.functional.linear(x[:, middle:], weight[:, middle:])
        return high + nn.functional.linear(x[:, :middle], weight[:, :middle])


def _eager(model: Any, settings: Settings, arm: str, factors: Factors, *, halves: bool) -> Trainee:
    stacks = []
    for layer, module in enumerate(_experts(model)):
        for name in NAMES:
            weight = getattr(module, name).data
            if arm == "nf4":
                weight = nf4_values(weight)
            a, b = factors[layer, name]
            stack = AdaptedStack(weight, a, b, scaling=settings.scaling, halves=halves)
            delattr(module, name)
            setattr(module, name, stack)
            stacks.append(stack)

    @contextmanager
    def disabled() -> Iterator[None]:
        for stack in stacks:
            stack.enabled = False
        try:
            yield
        finally:
            for stack in stacks:
                stack.enabled = True

    parameters = [parameter for stack in stacks for parameter in stack.parameters()]
    return Trainee(model=model, parameters=parameters, disabled=disabled)


def nf4_values(weight: Tensor) -> Tensor:
    """What bitsandbytes' NF4 bytes of a stack [E, N, K] stand for, decoded by the judge.

    Raises:
        Unavailable: bitsandbytes is not installed.
    """
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise Unavailable("bitsandbytes is not installed; install the extra bnb") from error
    packed, state = functional.quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
    experts, d1, d2 = weight.shape
    tensors = {
        "packed": packed.view(torch.uint8).reshape(-1),
        "absmax": state.absmax,
        "codebook": nf4_codebook().to(weight.device),
    }
    problem = FourBitProblem(experts=experts, shape=(d1, d2), blocksize=BLOCK)
    return four_bit(tensors, problem, dtype=weight.dtype)
