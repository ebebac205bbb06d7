"""The layer on two processes: divided experts, FSDP2, DDP."""

import socket

import distributed_worker
import pytest
import torch
from torch import multiprocessing

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from scattermoe_lora.integrations.distributed import owned_experts

pytestmark = pytest.mark.hf

RANKS = 2
SCENARIOS = (
    "experts_divided",
    "packed_experts_divided",
    "fewer_experts_than_choices",
    "a_rank_without_rows",
    "fully_sharded",
    "replicated",
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
        except multiprocessing.ProcessException as error:
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
