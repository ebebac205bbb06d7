"""Real input: what the experts of small random transformers models are given on tokenised text.

Bytes of Python's own standard library are the text, and a byte is a token. The hidden states are
what the
model's attention and norms make of it, and the top-k is that of the model's own router.
"""

import argparse
import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FAMILIES = ("qwen3-moe", "olmoe", "mixtral")


class Unavailable(RuntimeError):  # noqa: N818 - a state, not a fault
    """Something optional is not installed; the message says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """The operands of one experts module, fp32 on the CPU, and the module itself.

    hidden [T, H]; top_k_index, top_k_weights [T, k]; gate_up [E, 2 I, H]; down [E, H, I].
    """

    hidden: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor
    experts: Any

    @property
    def gate_up(self) -> Tensor:
        """[E, 2 I, H]."""
        return self.experts.gate_up_proj.detach()

    @property
    def down(self) -> Tensor:
        """[E, H, I]."""
        return self.experts.down_proj.detach()


def text_tokens(count: int, seed: int) -> Tensor:
    """`count` bytes of the standard library's source, int64 [1, count]."""
    text = inspect.getsource(argparse).encode()
    start = 997 * seed % (len(text) - count)
    return torch.tensor(list(text[start : start + count]))[None]


@functools.lru_cache(maxsize=16)
def capture(
    family: str, *, tokens: int, hidden: int, intermediate: int, experts: int, top_k: int, seed: int
) -> Captured:
    """Run a random one-layer model of `family` on text and keep what its experts were called with.

    Raises:
        Unavailable: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise Unavailable("transformers is not installed; install the extra hf") from error
    sizes = {
        "vocab_size": 256,
        "hidden_size": hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts_per_tok": top_k,
        "max_position_embeddings": max(tokens, 16),
        "attn_implementation": "eager",
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    configurations = {
        "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
            **sizes,
            num_experts=experts,
            moe_intermediate_size=intermediate,
            intermediate_size=intermediate,
            head_dim=hidden // 2,
        ),
        "olmoe": lambda: transformers.OlmoeConfig(
            **sizes, num_experts=experts, intermediate_size=intermediate
        ),
        "mixtral": lambda: transformers.MixtralConfig(
            **sizes, num_local_experts=experts, intermediate_size=intermediate
        ),
    }
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = transformers.AutoModel.from_config(configurations[family](), dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        model.set_experts_implementation("eager")
        module = next(m for m in model.modules() if hasattr(m, "gate_up_proj"))
        calls: list[tuple[Tensor, ...]] = []
        handle = module.register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
        model.eval()(input_ids=text_tokens(tokens, seed))
        handle.remove()
    states, index, weights = calls[0]
    return Captured(
        hidden=states.reshape(-1, hidden).clone(),
        top_k_index=index.clone(),
        top_k_weights=weights.float().clone(),
        experts=module,
    )
