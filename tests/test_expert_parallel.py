"""Expert parallelism with threads for ranks and the references for kernels."""

import copy
import threading

import distributed_worker
import hf_models
import pytest
import torch
from torch import distributed

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from plain_layer import references  # noqa: F401
from test_distributed import judge
from test_peft import adapted, ours, wrappers

import scattermoe_lora.integrations.transformers as layer
from scattermoe_lora.integrations import bitsandbytes as packing
from scattermoe_lora.integrations import distributed as parallel
from scattermoe_lora.integrations import peft as adapters

pytestmark = [pytest.mark.correctness, pytest.mark.hf, pytest.mark.usefixtures("references")]

RANKS = 2
CPU = torch.device("cpu")
NAMES = ("gate_up_proj", "down_proj")
SECONDS = 60


class Threads:
    """A process group whose ranks are threads; other groups are refused."""

    def __init__(self, ranks):
        self.ranks, self.barrier, self.here = ranks, threading.Barrier(ranks), threading.local()
        self.parts, self.calls, self.rows = [None] * ranks, [], set()

    def install(self, monkeypatch):
        for name in (
            "get_rank",
            "get_world_size",
            "all_gather_into_tensor",
            "reduce_scatter_tensor",
            "all_reduce",
        ):
            monkeypatch.setattr(distributed, name, getattr(self, name))

    def get_rank(self, group=None):
        assert group is self
        return self.here.rank

    def get_world_size(self, group=None):
        assert group is self
        return self.ranks

    def exchange(self, name, value, group):
        assert group is self
        assert value.is_contiguous()
        if self.here.rank == 0:
            self.calls.append(name)
            self.rows |= {value.shape[0]} if name == "gather" else set()
        self.parts[self.here.rank] = value.detach().clone()
        self.barrier.wait(SECONDS)
        parts = list(self.parts)
        self.barrier.wait(SECONDS)
        return parts

    def all_gather_into_tensor(self, out, x, group=None):
        out.copy_(torch.cat(self.exchange("gather", x, group)))

    def reduce_scatter_tensor(self, out, x, group=None):
        total = sum(self.exchange("scatter", x, group))
        out.copy_(total.chunk(self.ranks)[self.here.rank])

    def all_reduce(self, value, op, group=None):
        assert op is distributed.ReduceOp.MAX
        value.copy_(torch.stack(self.exchange("longest", value, group)).amax(0))

    def run(self, scenario):
        """scenario(rank) of every rank, in their order; the first error of any."""
        results, errors = [None] * self.ranks, []

        def one(rank):
            self.here.rank = rank
            try:
                results[rank] = scenario(rank)
            except Exception as error:  # noqa: BLE001 - raised again below
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results


@pytest.fixture
def group(monkeypatch):
    found = Threads(RANKS)
    found.install(monkeypatch)
    return found


def model_of(family="qwen3_moe", *, packed=False, attached=True, **changes):
    model = hf_models.tiny_model(family, **changes)
    if packed:
        packing.quantize_experts(model, nested=True)
    if attached:
        return ours(adapted(model))
    model.set_experts_implementation(layer.KEY)
    return model


def gradients(model, group, rank, ids, **settings):
    """The share of a rank, and the gradients of its adapters after one step."""
    model = copy.deepcopy(model)
    shard = parallel.expert_parallel(model, group, **settings)
    _, loss = distributed_worker.loss_of(model, ids, seed=rank)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return shard, grads


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_divided_experts_equal_one_process(family, packed, group, monkeypatch):
    whole = model_of(family, packed=packed)
    monkeypatch.setattr(distributed_worker, "adapted_model", lambda *a, **k: copy.deepcopy(whole))
    divide = parallel.expert_parallel
    monkeypatch.setattr(
        parallel, "expert_parallel", lambda model, **settings: divide(model, group, **settings)
    )
    results = group.run(lambda rank: distributed_worker.experts_divided(rank, RANKS, CPU))
    judge(results)
    assert [result["sizes"] for result in results] == [[hf_models.EXPERTS // RANKS] * 2] * RANKS
    assert "longest" in group.calls


def test_gradients_are_those_of_the_mean_or_of_the_sum(group):
    model, ids = model_of(), hf_models.tokens()
    mean = group.run(lambda rank: gradients(model, group, rank, ids))
    assert "longest" not in group.calls
    assert group.rows == {ids.numel()}
    total = group.run(lambda rank: gradients(model, group, rank, ids, mean_gradients=False))
    counted = group.run(lambda rank: gradients(model, group, rank, ids, equal_tokens=False))
    for (_, one), (_, other), (_, third) in zip(mean, total, counted, strict=True):
        assert len(one) == 2 * len(NAMES)
        for name, value in one.items():
            # Halving is exact.
            assert torch.equal(RANKS * value, other[name]), name
            assert torch.equal(value, third[name]), name


def test_a_rank_has_its_share_of_everything(group):
    model = model_of("gpt_oss")
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
    (before,) = hf_models.experts_of(model)

    def divided(rank):
        mine = copy.deepcopy(model)
        return parallel.expert_parallel(mine, group), mine

    for rank, (shard, mine) in enumerate(group.run(divided)):
        count = hf_models.EXPERTS // RANKS
        expected = {"first": rank * count, "count": count, "experts": hf_models.EXPERTS}
        assert shard == parallel.ExpertShard(ranks=RANKS, **expected)
        (experts,) = hf_models.experts_of(mine)
        rows = slice(rank * count, (rank + 1) * count)
        for name in (*NAMES, *(f"{name}_bias" for name in NAMES)):
            part, full = getattr(experts, name), getattr(before, name)
            assert torch.equal(part, full[rows]), name
            assert part.requires_grad == full.requires_grad, name
        assert experts.num_experts == count
        assert experts._is_expert_parallel is True
        for wrapper, full in zip(wrappers(mine), wrappers(model), strict=True):
            a, b = wrapper.lora_A["default"], wrapper.lora_B["default"]
            assert (a.out_features, b.in_features) == (a.weight.shape[0], b.weight.shape[1])
            assert a.out_features == b.in_features == count * wrapper.r["default"]
            for one, other in ((a, full.lora_A["default"]), (b, full.lora_B["default"])):
                assert one.weight.requires_grad == other.weight.requires_grad
        whole = {id(p) for p in mine.parameters()}
        ignored = set(parallel.ignored_by_ddp(mine))
        assert ignored == {
            name for name, _ in mine.named_parameters() if "experts" in name or "lora_" in name
        }
        assert len(whole) == len(list(model.parameters()))
        for name, parameter in mine.named_parameters():
            # Nothing of what other ranks own stays in memory.
            held = parameter.untyped_storage().nbytes()
            assert name not in ignored or held == parameter.nbytes, name
    assert parallel.ignored_by_ddp(model) == []


def test_experts_without_adapters_are_divided_too(group):
    model, ids = model_of(attached=False), hf_models.tokens()
    expected = model(input_ids=ids).logits

    def logits(rank):
        mine = copy.deepcopy(model)
        parallel.expert_parallel(mine, group)
        assert parallel.ignored_by_ddp(mine)
        return mine(input_ids=ids).logits

    for got in group.run(logits):
        limit = 256 * torch.finfo(torch.float32).eps * expected.abs().max()
        assert (got - expected).abs().max() <= limit


def test_a_rank_without_rows_takes_part_and_gets_zeros(group, monkeypatch):
    whole = model_of()
    monkeypatch.setattr(distributed_worker, "adapted_model", lambda *a, **k: copy.deepcopy(whole))
    divide = parallel.expert_parallel
    monkeypatch.setattr(
        parallel, "expert_parallel", lambda model, **settings: divide(model, group, **settings)
    )
    first, second = group.run(lambda r: distributed_worker.a_rank_without_rows(r, RANKS, CPU))
    assert first.keys() == second.keys()
    assert all(value > 0 for value in first.values())
    assert set(second.values()) == {0.0}


def test_what_cannot_be_divided_is_refused(group):
    merged = model_of()
    adapters.merge(merged)
    straddling = hf_models.tiny_model("qwen3_moe", hidden_size=36, moe_intermediate_size=36)
    packing.quantize_experts(straddling, blocksize=128)
    for model, words in (
        (merged, "default is merged into gate_up_proj; unmerge"),
        (model_of(num_experts=3), "3 experts do not divide evenly among 2 ranks"),
        (straddling, "elements share blocks of 128"),
    ):
        with pytest.raises(ValueError, match=words):
            group.run(lambda rank, model=model: gradients(model, group, rank, hf_models.tokens()))
