"""The layer on two processes: divided experts, FSDP2, DDP."""

import socket

import distributed_worker
import pytest
import torch
from packaging.version import Version
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessException

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from scattermoe_lora.integrations._experts import experts_modules
from scattermoe_lora.integrations._four_bit import parametrised, parts
from scattermoe_lora.integrations.distributed import owned_experts, shardable

pytestmark = pytest.mark.hf

RANKS = 2
SCENARIOS = (
    "experts_divided",
    "packed_experts_divided",
    "fewer_experts_than_choices",
    "a_rank_without_rows",
    "fully_sharded",
    "replicated",
    "sharded_as_bytes",
)


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=pytest.mark.multi_gpu)])
def outcomes(request):
    """(scenario, rank) -> result; two processes run every scenario, until one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        failure = "no process said why"
        try:
            multiprocessing.spawn(
                distributed_worker.run,
                (RANKS, port, request.param, SCENARIOS, results),
                nprocs=RANKS,
            )
        except ProcessException as error:
            failure = str(error)
        return dict(results), failure


def results_of(outcomes, scenario):
    """The results of every rank."""
    results, failure = outcomes
    if (scenario, RANKS - 1) not in results or (scenario, 0) not in results:
        pytest.fail(f"{scenario} did not end: {failure}")
    return [results[scenario, rank] for rank in range(RANKS)]


def close(got, expected, what):
    """Equal up to the order of fp32 sums: each of the K products of a sum may round once more."""
    terms = 256
    limit = terms * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (got - expected).abs().max() <= limit, what


def judge(results):
    for rank, result in enumerate(results):
        close(*result["logits"], f"logits of rank {rank}")
        assert result["grads"]
        for name, (got, expected) in result["grads"].items():
            assert got.shape == expected.shape, name
            assert expected.any(), name
            close(got, expected, f"{name} of rank {rank}")


@pytest.mark.parametrize(
    ("scenario", "owned"),
    [
        ("experts_divided", 2),
        ("packed_experts_divided", 2),
        ("fewer_experts_than_choices", 1),
    ],
)
def test_divided_experts_equal_one_process(outcomes, scenario, owned):
    results = results_of(outcomes, scenario)
    judge(results)
    for result in results:
        assert result["sizes"] == [owned, owned]


def test_a_rank_without_rows_takes_part_and_gets_zeros(outcomes):
    first, second = results_of(outcomes, "a_rank_without_rows")
    assert first.keys() == second.keys()
    assert all(value > 0 for value in first.values())
    assert set(second.values()) == {0.0}


def test_fsdp2_with_frozen_packed_experts_equals_one_process(outcomes):
    judge(results_of(outcomes, "fully_sharded"))


@pytest.mark.skipif(
    Version(torch.__version__).release < (2, 13),
    reason="this torch shards floating-point parameters only",
)
def test_fsdp2_takes_packed_experts_as_they_are(outcomes):
    judge(results_of(outcomes, "sharded_as_bytes"))


def test_ddp_equals_one_process(outcomes):
    judge(results_of(outcomes, "replicated"))


@pytest.mark.correctness
def test_experts_are_divided_in_order():
    shards = [owned_experts(8, rank=rank, ranks=4) for rank in range(4)]
    assert [shard.first for shard in shards] == [0, 2, 4, 6]
    index = torch.tensor([[0, 7], [2, 3]])
    assert shards[1].local(index).tolist() == [[2, 2], [0, 1]]
    assert shards[3].local(index).tolist() == [[2, 1], [2, 2]]
    with pytest.raises(ValueError, match="8 experts do not divide evenly among 3 ranks"):
        owned_experts(8, rank=0, ranks=3)
    with pytest.raises(ValueError, match="rank 2 is outside a group of 2"):
        owned_experts(8, rank=2, ranks=2)


@pytest.mark.correctness
def test_packed_experts_that_pass_for_numbers_keep_every_bit():
    model = distributed_worker.adapted_model(torch.device("cpu"), packed=True)
    base = model.get_base_model()
    ids = distributed_worker.batches(1, torch.device("cpu"))[0]
    before, state = model(input_ids=ids).logits, _packed_bytes(base)
    names = shardable(model, torch.float16)
    stacks = {name: p for name, p in base.named_parameters() if name.endswith(".original")}
    assert len(names) == len(stacks) == 2
    assert {stack.dtype for stack in stacks.values()} == {torch.float16}
    assert not any(stack.requires_grad for stack in stacks.values())
    assert torch.equal(model(input_ids=ids).logits, before)
    assert all(torch.equal(state[name], value) for name, value in _packed_bytes(base).items())
    with pytest.raises(TypeError, match=r"dtype must be floating point, got torch\.int32"):
        shardable(model, torch.int32)


def _packed_bytes(model) -> dict[str, torch.Tensor]:
    """What is saved of the packed stacks."""
    return {
        f"{name}.{part}": value
        for name, module in experts_modules(model).items()
        for projection in ("gate_up_proj", "down_proj")
        for part, value in parts(parametrised(module, projection)).items()
    }
