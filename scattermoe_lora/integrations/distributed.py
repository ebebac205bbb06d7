"""Experts and their adapters on several processes of torch.distributed.

Expert parallelism: rank r of a group of n owns experts [r E / n, (r + 1) E / n), dense or packed,
with its slices of every adapter. Every rank brings its own tokens:

    forward    all-gather tokens, choices, weights; local experts; reduce-scatter outputs
    backward   all-gather output gradients; local experts; reduce-scatter input gradients

Choices of other ranks become sentinels and cost no product. A rank that no token is routed to runs
the same collectives, and its adapters get gradients of zero. There is no host synchronisation where
every rank brings equally many tokens.

    expert_parallel(model, group)       after adapters are attached, before the optimiser is built
    ignored_by_ddp(model)               what DistributedDataParallel must leave alone then

FSDP2: `fully_shard` each decoder layer, then the model. Frozen packed experts are sharded as bytes
and gathered with their layer; scales are replicated. Experts or adapters that are not gathered when
they are used are refused. torch 2.11 shards floating-point parameters only (2.13 any): there,

    shardable(model)                    before fully_shard, lets packed experts pass for such
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from ..weights import LoRAWeights
from . import _four_bit
from ._experts import ExpertsLayout, experts_modules

__all__ = ["ExpertShard", "expert_parallel", "ignored_by_ddp", "owned_experts", "shardable"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShard:
    """The experts that one rank of a group owns."""

    first: int
    count: int
    experts: int
    ranks: int

    def local(self, top_k_index: Tensor) -> Tensor:
        """Global expert ids as local ones; `count`, the sentinel, for experts of other ranks."""
        shifted = top_k_index - self.first
        outside = (shifted < 0) | (shifted >= self.count)
        return shifted.masked_fill(outside, self.count)


def owned_experts(experts: int, *, rank: int, ranks: int) -> ExpertShard:
    """The share of rank `rank`.

    Raises:
        ValueError: the experts do not divide evenly, or the rank is outside the group.
    """
    if experts % ranks:
        raise ValueError(f"{experts} experts do not divide evenly among {ranks} ranks")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} is outside a group of {ranks}")
    count = experts // ranks
    return ExpertShard(first=rank * count, count=count, experts=experts, ranks=ranks)


def expert_parallel(
    model: nn.Module,
    group: distributed.ProcessGroup | None = None,
    *,
    equal_tokens: bool = True,
    mean_gradients: bool = True,
) -> ExpertShard:
    """Keep this rank's share of every experts module and its adapters, and exchange tokens.

    Parameters are replaced by smaller ones: build the optimiser afterwards.

    Args:
        equal_tokens: every rank brings equally many tokens to every layer. Otherwise the counts are
            exchanged before each layer, which waits for the device.
        mean_gradients: divide the gradients of adapters by the number of ranks, so that they belong
            to the mean of the ranks' losses, as data parallelism's averaged gradients do.

    Returns:
        The share of this rank.

    Raises:
        ValueError: the experts do not divide evenly; packed experts have blocks that straddle two
            of them; or an adapter is merged.
        UnsupportedExpertsError: as `experts_modules`.
    """
    rank, ranks = distributed.get_rank(group), distributed.get_world_size(group)
    modules = experts_modules(model)
    shards = {
        name: owned_experts(_experts_of(module), rank=rank, ranks=ranks)
        for name, module in modules.items()
    }
    wrappers = _wrappers(model)
    for name, module in modules.items():
        for wrapper in wrappers.get(id(module), ()):
            _slice_adapters(wrapper, shards[name])
        _slice_experts(module, shards[name])
        exchange = _Exchange(
            shard=shards[name],
            group=group,
            equal_tokens=equal_tokens,
            gradient_scale=1 / ranks if mean_gradients else 1.0,
        )
        exchange.install(module)
    return next(iter(shards.values()))


def ignored_by_ddp(model: nn.Module) -> list[str]:
    """Names of the parameters that differ between ranks after `expert_parallel`.

    Give them to `DistributedDataParallel._set_params_and_buffers_to_ignore_for_model`.
    """
    owners = [module for module in model.modules() if hasattr(module, "_expert_shard")]
    wrappers = _wrappers(model)
    owned = {id(parameter) for owner in owners for parameter in owner.parameters()}
    for owner in owners:
        for wrapper in wrappers.get(id(owner), ()):
            for factors in (wrapper.lora_A, wrapper.lora_B):
                owned |= {id(parameter) for parameter in factors.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in owned]


def shardable(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """Hold the bytes of packed experts as numbers of a floating dtype; no bit changes.

    Nothing computes with these numbers. Where FSDP2 has a mixed precision policy, `dtype` must be
    its `param_dtype`: casting them would change the bytes.

    Returns:
        The names of the packed parameters, none where experts are dense.

    Raises:
        ValueError: packed bytes do not fill whole numbers of `dtype`.
        TypeError: dtype is not a floating one.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}")
    names = []
    for name, module in experts_modules(model).items():
        for projection in ExpertsLayout.of(module).projections:
            if _four_bit.parametrised(module, projection) is not None:
                _four_bit.hold_as(module, projection, dtype)
                names.append(f"{name}.{projection}" if name else projection)
    return names


class _Exchange:
    """The hooks around an experts module: tokens of all ranks in, outputs of this rank's tokens
    out.
    """

    def __init__(
        self,
        *,
        shard: ExpertShard,
        group: distributed.ProcessGroup | None,
        equal_tokens: bool,
        gradient_scale: float,
    ) -> None:
        self.shard = shard
        self.group = group
        self.equal_tokens = equal_tokens
        self.gradient_scale = gradient_scale

    def install(self, module: Any) -> None:
        """Wrap the forward of an experts module."""
        forward = module.forward

        def exchanged(
            hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **kwargs: Any
        ) -> Tensor:
            if "adapters" in kwargs:
                kwargs["adapters"] = self._scaled(kwargs["adapters"])
            tokens = hidden_states.shape[0]
            padding = self._padding(hidden_states)
            index = nn.functional.pad(top_k_index, (0, 0, 0, padding), value=self.shard.experts)
            hidden = _Gather.apply(_padded(hidden_states, padding), self.group)
            weights = _Gather.apply(_padded(top_k_weights, padding), self.group)
            index = self.shard.local(_gathered(index, self.group))
            out = forward(hidden, index, weights, **kwargs)
            return _Scatter.apply(out, self.group)[:tokens]

        module.forward = exchanged
        module._expert_shard = self.shard

    def _padding(self, hidden: Tensor) -> int:
        if self.equal_tokens:
            return 0
        longest = torch.tensor(hidden.shape[0], device=hidden.device)
        distributed.all_reduce(longest, distributed.ReduceOp.MAX, group=self.group)
        return int(longest) - hidden.shape[0]

    def _scaled(self, adapters: Mapping[str, LoRAWeights]) -> dict[str, LoRAWeights]:
        return {
            name: LoRAWeights(
                a=_ScaledGradient.apply(lora.a, self.gradient_scale),
                b=_ScaledGradient.apply(lora.b, self.gradient_scale),
                scaling=lora.scaling,
            )
            for name, lora in adapters.items()
        }


class _Gather(torch.autograd.Function):
    """Rows of all ranks; backward: each rank's rows get the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        """[rows, ...] -> [ranks * rows, ...]."""
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """[ranks * rows, ...] -> [rows, ...]."""
        return _reduced(grad, ctx.group), None


class _Scatter(torch.autograd.Function):
    """This rank's rows of the sum over ranks; backward: the gradients of all ranks' rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        """[ranks * rows, ...] -> [rows, ...]."""
        ctx.group = group
        return _reduced(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """[rows, ...] -> [ranks * rows, ...]."""
        return _gathered(grad, ctx.group), None


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        """x as it is."""
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The scaled gradient."""
        return grad * ctx.scale, None


def _gathered(x: Tensor, group: Any) -> Tensor:
    ranks = distributed.get_world_size(group)
    out = x.new_empty((ranks * x.shape[0], *x.shape[1:]))
    distributed.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _reduced(x: Tensor, group: Any) -> Tensor:
    ranks = distributed.get_world_size(group)
    out = x.new_empty((x.shape[0] // ranks, *x.shape[1:]))
    distributed.reduce_scatter_tensor(out, x.contiguous(), group=group)
    return out


def _padded(x: Tensor, rows: int) -> Tensor:
    return nn.functional.pad(x, (0, 0, 0, rows)) if rows else x


def _experts_of(module: Any) -> int:
    name = ExpertsLayout.of(module).down
    packed = _four_bit.parametrised(module, name)
    return packed.stored().experts if packed is not None else module._parameters[name].shape[0]


def _wrappers(model: nn.Module) -> dict[int, tuple[Any, ...]]:
    """PEFT's wrappers by the id of their experts module; none where PEFT is not there."""
    if importlib.util.find_spec("peft") is None:
        return {}
    from ._wrappers import wrapper_chains

    return {id(chain.experts): chain.adapting for chain in wrapper_chains(model)}


def _slice_experts(module: Any, shard: ExpertShard) -> None:
    layout = ExpertsLayout.of(module)
    rows = slice(shard.first, shard.first + shard.count)
    for name in layout.projections:
        packed = _four_bit.parametrised(module, name)
        if packed is not None:
            _four_bit.restore(module, name, _four_bit.sliced(packed, rows))
        else:
            _slice(module, name, rows)
        if layout.biased:
            _slice(module, f"{name}_bias", rows)
    module.num_experts = shard.count
    module._is_expert_parallel = True


def _slice(module: nn.Module, name: str, rows: slice) -> None:
    whole = module._parameters[name]
    assert whole is not None
    module._parameters[name] = nn.Parameter(
        whole.detach()[rows].clone(), requires_grad=whole.requires_grad
    )


def _slice_adapters(wrapper: Any, shard: ExpertShard) -> None:
    if wrapper.merged:
        raise ValueError(
            f"{', '.join(wrapper.merged_adapters)} is merged into {wrapper.parameter_name}; "
            "unmerge before the experts are divided"
        )
    rows = slice(shard.first, shard.first + shard.count)
    for name in wrapper.lora_A:
        a, b = wrapper.lora_A[name], wrapper.lora_B[name]
        whole_a = a.weight.detach().unflatten(0, (shard.experts, -1))[rows].flatten(0, 1)
        whole_b = b.weight.detach().unflatten(1, (-1, shard.experts))[:, :, rows].flatten(1)
        a.weight = nn.Parameter(whole_a.clone(), requires_grad=a.weight.requires_grad)
        b.weight = nn.Parameter(whole_b.clone(), requires_grad=b.weight.requires_grad)
        a.out_features, b.in_features = a.weight.shape[0], b.weight.shape[1]
    wrapper.num_experts = shard.count
