"""Weight gradients of experts whose rows are summed in parts."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import scattermoe_lora as sm
from scattermoe_lora import ops
from scattermoe_lora.ops.gram_parts import parts_of

pytestmark = pytest.mark.correctness

EXPERTS, WIDTH, OUT, RANK = 5, 24, 16, 3
HEIGHT = 16


def routing_of(counts: list[int], device: torch.device) -> sm.Routing:
    """A routing of one choice per token that gives each expert so many rows, tokens shuffled."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    return sm.Routing.from_top_k(ids.unsqueeze(1).to(device), len(counts))


def counted(experts: int, rows: int) -> sm.Routing:
    """A routing of which only the counts are read."""
    return sm.Routing(*(torch.empty(0),) * 4, tokens=rows, top_k=1, experts=experts)


def problem_of(experts: int, rows: int, rank: int, width: int) -> sm.Problem:
    """A gradient of adapters on square experts."""
    return sm.Problem(
        operation=sm.Operation.LORA_WEIGHT_GRAD,
        rows=rows,
        experts=experts,
        k=width,
        n=width,
        rank=rank,
        dtype=torch.bfloat16,
        precision=sm.Precision.IEEE,
    )


def gradients(routing: sm.Routing, height: int) -> tuple[torch.Tensor, ...]:
    """dA, dB and dW of operands of small whole numbers, with parts of `height` rows."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float().to(routing.device)

    x, dy = drawn(routing.tokens, WIDTH), drawn(routing.rows, OUT)
    xa, yb = drawn(routing.rows, RANK), drawn(routing.rows, RANK)
    lora = sm.LoRAWeights(
        a=drawn(routing.experts, RANK, WIDTH), b=drawn(routing.experts, OUT, RANK), scaling=1.0
    )
    problem = problem_of(routing.experts, routing.rows, RANK, WIDTH)
    problem = problem._replace(n=OUT, dtype=torch.float32)
    plan = replace(sm.choose(problem, sm.Device.of(routing.device)), part_rows=height)
    orders = {"x_order": sm.RowOrder.TOKEN, "dy_order": sm.RowOrder.EXPERT}
    da, db = ops.lora_weight_grad(x, dy, xa, yb, lora, routing, **orders, plan=plan)
    dw = ops.expert_weight_grad(x, dy, routing, **orders, plan=plan)
    return da, db, dw


COUNTS = {
    "one part more": [0, HEIGHT + 1, 0, 3, 0],
    "exactly a part": [HEIGHT, HEIGHT, 2 * HEIGHT, 2 * HEIGHT + 1, HEIGHT - 1],
    "all cut": [HEIGHT + 5] * EXPERTS,
    "first and last": [4 * HEIGHT, 1, 0, 1, 4 * HEIGHT - 1],
    "one takes all": [0, 0, 0, 0, 5 * HEIGHT + 9],
    "none": [HEIGHT] * EXPERTS,
}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("height", [HEIGHT - 1, HEIGHT])
def test_whole_numbers_add_up_to_the_same_bits_however_experts_are_cut(device, counts, height):
    routing = routing_of(counts, device)
    for cut, whole in zip(gradients(routing, height), gradients(routing, 0), strict=True):
        assert torch.equal(cut, whole)


def test_parts_of_other_experts_change_no_bit_of_an_expert(device):
    """Bitwise: what an expert is cut into depends on its own rows alone."""
    mine = 3 * HEIGHT + 5
    alone = routing_of([mine, 0, 0, 0, 0], device)
    beside = routing_of([mine, 0, 5 * HEIGHT, 2, 2 * HEIGHT], device)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(mine, OUT + WIDTH + RANK, generator=generator).to(device)
    found = []
    for routing in (alone, beside):
        values = torch.randn(routing.rows, rows.shape[1], generator=generator).to(device)
        values[:mine] = rows
        dy, x, low = values.split((OUT, WIDTH, RANK), dim=1)
        lora = sm.LoRAWeights(
            a=x.new_zeros(EXPERTS, RANK, WIDTH), b=x.new_zeros(EXPERTS, OUT, RANK), scaling=1.0
        )
        tile = sm.Tile(block_m=16, block_n=16, block_k=16)
        plan = sm.Plan(path=sm.Path.GRAM, tile=tile, part_rows=HEIGHT)
        by_expert = sm.RowOrder.EXPERT
        found.append(
            ops.lora_weight_grad(
                x, dy, low, low, lora, routing, x_order=by_expert, dy_order=by_expert, plan=plan
            )
        )
    for first, second in zip(*found, strict=True):
        assert torch.equal(first[0], second[0])


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    height=st.integers(1, 50),
)
def test_a_launch_covers_every_part_and_every_cut_expert(counts, height):
    routing = counted(len(counts), sum(counts))
    cut = [count for count in counts if count > height]
    found = parts_of(routing, height)
    assert sum(-(-count // height) for count in cut) <= found.parts
    assert len(cut) <= found.experts


@pytest.mark.parametrize(
    ("experts", "rows", "rank", "part_rows"),
    [
        (1, 2**20, 16, 0),
        (2, 4096, 16, 0),
        (3, 4096, 16, 4096),
        (8, 2**20, 16, 2**18),
        (128, 512, 16, 0),
        (128, 639, 16, 0),
        (128, 640, 16, 512),
        (128, 16384, 16, 512),
        (128, 32768, 16, 1024),
        (128, 65536, 16, 1024),
        (128, 131072, 16, 2048),
        (128, 65536, 32, 1024),
        (128, 65536, 33, 2048),
        (128, 65536, 128, 4096),
        (60, 1020, 16, 512),
    ],
)
def test_an_expert_is_cut_at_twice_an_even_share(experts, rows, rank, part_rows):
    """By the bucket of the plan: a new number of tokens of the same bucket compiles nothing."""
    asked = problem_of(experts, rows, rank, width=2**14)
    assert sm.choose(asked, sm.Device.of(torch.device("cpu"))).part_rows == part_rows
    assert (
        parts_of(counted(experts, rows), part_rows or rows).parts
        * max(16, 1 << (rank - 1).bit_length())
        <= 32 * experts
    )
    whole = asked._replace(operation=sm.Operation.EXPERT_WEIGHT_GRAD)
    assert sm.choose(whole, sm.Device.of(torch.device("cpu"))).part_rows == 0


@pytest.mark.parametrize("rank", [1, 16, 64, 65, 256])
@pytest.mark.parametrize("width", [64, 512, 4096])
@pytest.mark.parametrize("experts", [1, 2, 8])
def test_experts_with_few_tiles_are_cut_until_a_gpu_is_busy(experts, width, rank):
    """256 programs, each of [128, 64] sums over 512 rows or more; no power of two fewer."""
    rows = 2**20
    plan = sm.choose(problem_of(experts, rows, rank, width), sm.Device.of(torch.device("cpu")))
    tiles = -(-2 * width // 128) * -(-rank // 64)
    parts = rows // (plan.part_rows or rows // experts)
    assert plan.part_rows == 0 or plan.part_rows >= 512
    if experts * tiles >= 256:
        assert plan.part_rows == 0 or plan.part_rows >= 2 * rows // experts
    else:
        assert parts * tiles <= 256
        assert parts * tiles > 128 or plan.part_rows == 512


def test_parts_are_of_at_least_no_row():
    with pytest.raises(ValueError, match="part_rows must be at least 0, got -1"):
        sm.Plan(path=sm.Path.GRAM, tile=sm.Tile(block_m=16, block_n=16, block_k=16), part_rows=-1)
