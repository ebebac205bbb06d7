"""What each process of `test_distributed` runs; imported by name in the new processes."""

import copy
import os

import torch
from torch import distributed


def run(rank, ranks, port, backend, scenarios, results):
    """Join the group, run the scenarios one after the other, hand each result back."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(rank)
        device = torch.device("cuda", rank)
    else:
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)
    distributed.init_process_group(backend, rank=rank, world_size=ranks)
    try:
        for scenario in scenarios:
            results[scenario, rank] = globals()[scenario](rank, ranks, device)
    finally:
        distributed.destroy_process_group()


def adapted_model(device, *, packed, family="qwen3_moe", layers=1, **changes):
    """The model of every scenario, on every process the same."""
    import hf_models
    import test_peft

    from scattermoe_lora.integrations import bitsandbytes as packing

    model = hf_models.tiny_model(family, num_hidden_layers=layers, **changes)
    if packed:
        packing.quantize_experts(model, nested=True)
    return test_peft.ours(test_peft.adapted(model)).to(device)


def loss_of(model, ids, seed):
    logits = model(input_ids=ids).logits
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    return logits, (logits * direction.to(logits.device)).sum()


def batches(ranks, device):
    import hf_models

    return [
        hf_models.tokens(batch=1, length=4 + rank, seed=9 + rank).to(device)
        for rank in range(ranks)
    ]


def reference(model, ranks, device):
    """Logits of every batch, and gradients of the mean of the losses, on one process."""
    logits = []
    for rank, ids in enumerate(batches(ranks, device)):
        out, loss = loss_of(model, ids, seed=rank)
        (loss / ranks).backward()
        logits.append(out.detach().cpu())
    grads = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return logits, grads


def experts_divided(rank, ranks, device, *, packed=False, **changes):
    """Expert parallelism against one process; batches of different lengths."""
    from test_peft import wrappers

    from scattermoe_lora.integrations.distributed import expert_parallel, ignored_by_ddp

    model = adapted_model(device, packed=packed, **changes)
    expected = reference(copy.deepcopy(model), ranks, device)
    shard = expert_parallel(model, equal_tokens=False)
    ignored = set(ignored_by_ddp(model))
    logits, loss = loss_of(model, batches(ranks, device)[rank], seed=rank)
    loss.backward()
    whole = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        assert name in ignored, name
        grad = parameter.grad.cpu()
        if "lora_A" in name:
            whole[name] = (grad, expected[1][name].unflatten(0, (shard.experts, -1)))
        else:
            whole[name] = (grad, expected[1][name].unflatten(1, (-1, shard.experts)))
    rows = slice(shard.first, shard.first + shard.count)
    grads = {
        name: (
            grad,
            full[rows].flatten(0, 1) if "lora_A" in name else full[:, :, rows].flatten(1),
        )
        for name, (grad, full) in whole.items()
    }
    sizes = [wrapper.num_experts for wrapper in wrappers(model)]
    return {
        "logits": (logits.detach().cpu(), expected[0][rank]),
        "grads": grads,
        "sizes": sizes,
    }


def packed_experts_divided(rank, ranks, device):
    return experts_divided(rank, ranks, device, packed=True)


def fewer_experts_than_choices(rank, ranks, device):
    """One expert per rank, two choices per token."""
    return experts_divided(rank, ranks, device, num_experts=ranks)


def a_rank_without_rows(rank, ranks, device):
    """Every token goes to experts of rank 0."""
    from scattermoe_lora.integrations.distributed import expert_parallel

    model = adapted_model(device, packed=False)
    expert_parallel(model, equal_tokens=True)
    router = model.get_base_model().model.layers[0].mlp.gate
    bias = torch.zeros(router.weight.shape[0], device=device)
    bias[: bias.numel() // ranks] = 1e4

    def to_first(module, arguments, outputs):
        logits, *_ = outputs
        weights, index = torch.topk(torch.softmax(logits.float() + bias, dim=-1), 2, dim=-1)
        return logits, weights.to(logits.dtype), index

    router.register_forward_hook(to_first)
    ids = batches(1, device)[0]
    _, loss = loss_of(model, ids, seed=rank)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {name: None if grad is None else float(grad.abs().max()) for name, grad in grads.items()}


def sharded_as_bytes(rank, ranks, device):
    """FSDP2 with frozen packed experts against one process."""
    return fully_sharded(rank, ranks, device, as_bytes=True)


def fully_sharded(rank, ranks, device, *, as_bytes=False):
    """The same with experts that pass for numbers."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from scattermoe_lora.integrations.distributed import shardable

    model = adapted_model(device, packed=True, layers=2)
    expected = reference(copy.deepcopy(model), ranks, device)
    assert as_bytes or len(shardable(model)) == 4
    mesh = init_device_mesh(device.type, (ranks,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    logits, loss = loss_of(model, batches(ranks, device)[rank], seed=rank)
    loss.backward()
    grads = {
        name: (parameter.grad.full_tensor().cpu(), expected[1][name])
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    assert grads.keys() == expected[1].keys()
    return {"logits": (logits.detach().cpu(), expected[0][rank]), "grads": grads}


def replicated(rank, ranks, device):
    """DistributedDataParallel against one process."""
    from torch.nn.parallel import DistributedDataParallel

    model = adapted_model(device, packed=True)
    expected = reference(copy.deepcopy(model), ranks, device)
    parallel = DistributedDataParallel(model)
    logits, loss = loss_of(parallel, batches(ranks, device)[rank], seed=rank)
    loss.backward()
    grads = {
        n: (p.grad.cpu(), expected[1][n]) for n, p in model.named_parameters() if p.grad is not None
    }
    assert grads.keys() == expected[1].keys()
    return {"logits": (logits.detach().cpu(), expected[0][rank]), "grads": grads}
