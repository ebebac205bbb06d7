"""What each argument of the former signatures does, one at a time, and what is refused."""

import pytest
import torch

from scattermoe_lora import compat, compat_selective

pytestmark = pytest.mark.correctness
EXPERTS, TOKENS, TOP_K, K, N, RANK, SCALING = 4, 7, 2, 24, 20, 2, -1.3
ROWS = TOKENS * TOP_K


class Problem:
    """Operands with integer values, so that every path gives the same bits; expert 2 is idle."""

    def __init__(self, device):
        generator = torch.Generator().manual_seed(8)

        def drawn(*shape):
            return torch.randint(-2, 3, shape, generator=generator).float().to(device)

        ids = torch.tensor([0, 1, 3])[torch.randint(0, 3, (TOKENS, TOP_K), generator=generator)]
        self.index = ids.to(device)
        self.triple = compat.flatten_sort_count(self.index, EXPERTS)
        self.ids, self.slots, self.offsets = self.triple
        self.x, self.dy = drawn(TOKENS, K), drawn(ROWS, N)
        self.w, self.bias = drawn(EXPERTS, K, N), drawn(EXPERTS, N)
        self.a, self.b = drawn(EXPERTS * RANK, K), drawn(N, EXPERTS * RANK)
        self.gates = drawn(TOKENS, TOP_K)
        self.x_rows = self.x[self.slots // TOP_K]

    def base(self, rows):
        """x W [L, N] of rows in expert order."""
        return torch.stack([row @ self.w[e] for row, e in zip(rows, self.ids, strict=True)])

    def by_slot(self, rows):
        return torch.empty_like(rows).index_copy(0, self.slots, rows)

    def adapted(self, **changes):
        given = {"a": self.a, "b": self.b, "scaling": 2.0} | changes
        return compat.scatter2scatter_lora(
            self.x, self.w, self.ids, self.slots, TOP_K, given["a"], given["b"], given["scaling"]
        )


@pytest.fixture(name="p")
def problem(device):
    return Problem(device)


def test_the_triple_sorts_slots_and_puts_dropped_ones_last(device):
    index = torch.tensor([[3, 0], [-1, 3], [9, 1]], device=device)
    ids, slots, offsets = compat.flatten_sort_count(index, EXPERTS)
    assert ids.tolist() == [0, 1, 3, 3, 4, 4]
    assert slots.tolist() == [1, 5, 0, 3, 2, 4]
    assert offsets.tolist() == [1, 2, 2, 4]
    assert ids.dtype == slots.dtype == offsets.dtype == torch.int64


def test_group_copies_scales_and_fills_a_buffer(p):
    assert torch.equal(compat.group(p.dy, p.slots), p.dy[p.slots])
    assert torch.equal(compat.group(p.x, p.slots, None, TOP_K), p.x_rows)
    halves = p.x.half()
    coefficients = torch.full((TOKENS, TOP_K), 1 / 3, device=p.x.device)
    scaled = compat.group(halves, p.slots, coefficients, TOP_K)
    assert torch.equal(scaled, (p.x_rows / 3).half())
    per_slot = compat.group(p.x, p.slots, p.gates, TOP_K)
    assert torch.equal(per_slot, p.x_rows * p.gates.reshape(-1)[p.slots, None])
    out = torch.full_like(p.x_rows, torch.nan)
    assert compat.group(p.x, p.slots, fan_out=TOP_K, out=out) is out
    assert torch.equal(out, p.x_rows)


def test_rows_in_expert_order_may_be_of_any_number(p):
    x, dy, offsets = p.x_rows[:-1], p.dy[:-1], p.offsets.clamp(max=ROWS - 1)
    dw, db = compat.group_bwd_W(dy, x, offsets, EXPERTS, has_bias=True)
    low = 0
    for expert, high in enumerate(offsets.tolist()):
        assert torch.equal(dw[expert], x[low:high].mT @ dy[low:high])
        assert torch.equal(db[expert], dy[low:high].sum(0))
        low = high


def test_bias_and_residual_are_added_once(p):
    plain = compat.scatter2scatter(p.x, p.w, p.ids, p.slots, TOP_K)
    assert torch.equal(plain, p.by_slot(p.base(p.x_rows)))
    biased = compat.scatter2scatter(p.x, p.w, p.ids, p.slots, TOP_K, p.bias)
    assert torch.equal(biased - plain, p.by_slot(p.bias[p.ids]))
    both = compat.scatter2scatter(p.x, p.w, p.ids, p.slots, TOP_K, p.bias, residual=p.dy)
    assert torch.equal(both, biased + p.dy)
    lora = compat.scatter2scatter_lora(
        p.x, p.w, p.ids, p.slots, TOP_K, p.a, p.b, 0.0, p.bias, out=torch.empty_like(p.dy)
    )
    assert torch.equal(lora, biased)


def test_scaling_is_a_factor_of_the_adapter(p):
    plain = compat.scatter2scatter(p.x, p.w, p.ids, p.slots, TOP_K)
    low = torch.stack(
        [
            row @ p.a.unflatten(0, (EXPERTS, RANK))[e].T
            for row, e in zip(p.x_rows, p.ids, strict=True)
        ]
    )
    up = p.b.unflatten(1, (EXPERTS, RANK))
    term = torch.stack([t @ up[:, e].T for t, e in zip(low, p.ids, strict=True)])
    assert torch.equal(p.adapted() - plain, 2 * p.by_slot(term))
    assert torch.equal(p.adapted(scaling=-4.0) - plain, -4 * p.by_slot(term))


def test_operands_of_other_dtypes_are_cast_to_that_of_x(p):
    halves = compat.scatter2scatter(p.x.half(), p.w, p.ids, p.slots, TOP_K)
    assert halves.dtype == torch.float16
    assert torch.equal(halves.float(), compat.scatter2scatter(p.x, p.w, p.ids, p.slots, TOP_K))
    lora = compat.scatter2scatter_lora(
        p.x.half(), p.w, p.ids, p.slots, TOP_K, p.a.bfloat16(), p.b.bfloat16(), 2.0
    )
    assert torch.equal(lora.float(), p.adapted())
    dx = compat.scatter2scatter_lora_dX(
        p.dy.half(), p.w, p.ids, p.slots, 1, p.a, p.b, 2.0, dy_grouped=False
    )
    assert dx.dtype == torch.float16
    rows = p.x_rows.half()
    factors = p.a.bfloat16(), p.b.bfloat16()
    da, db = compat.group_bwd_lora(p.dy[p.slots].half(), rows, *factors, p.offsets, EXPERTS, 2.0)
    assert (da.dtype, db.dtype) == (torch.bfloat16, torch.bfloat16)
    out = compat.parallel_linear(p.x.half(), p.w, TOP_K, *p.triple)
    assert out.dtype == torch.float16


@pytest.mark.parametrize(("dy_grouped", "dx_grouped"), [(False, False), (True, True)])
def test_input_gradient_in_either_order(p, dy_grouped, dx_grouped):
    w = p.w[p.ids]
    rows = p.dy[p.slots]
    per_row = torch.einsum("mn,mkn->mk", rows, w)
    down, up = p.a.unflatten(0, (EXPERTS, RANK))[p.ids], p.b.unflatten(1, (EXPERTS, RANK))[:, p.ids]
    low = torch.einsum("mn,nmr->mr", rows, up)
    want = per_row + 2 * torch.einsum("mr,mrk->mk", low, down)
    out = torch.empty_like(want)
    got = compat.scatter2scatter_lora_dX(
        rows if dy_grouped else p.dy, p.w, p.ids, p.slots, 1, p.a, p.b, 2.0,
        dy_grouped, dx_grouped, out,
    )  # fmt: skip
    assert got is out
    assert torch.equal(got, want if dx_grouped else p.by_slot(want))


def test_weight_gradients_come_in_the_dtype_of_the_rows(p):
    rows, dy = p.x_rows.half(), p.dy[p.slots].half()
    dw, nothing = compat.group_bwd_W(dy, rows, p.offsets, EXPERTS)
    assert nothing is None
    want = torch.zeros_like(p.w)
    want.index_add_(0, p.ids, p.x_rows[:, :, None] * p.dy[p.slots][:, None])
    assert torch.equal(dw.float(), want)
    _, db = compat.group_bwd_W(dy, rows, p.offsets, EXPERTS, has_bias=True)
    assert db.dtype == torch.float16
    assert torch.equal(db.float(), torch.zeros_like(p.bias).index_add_(0, p.ids, p.dy[p.slots]))


@pytest.mark.parametrize(("block_m", "dy_grouped"), [(1, True), (4, True), (8, False)])
def test_padded_counts_change_no_gradient(p, block_m, dy_grouped):
    plain = compat.group_bwd_lora_fused(
        p.dy, p.x, p.a, p.b, p.offsets, p.slots, EXPERTS, TOP_K, 2.0
    )
    ids, slots, offsets, real = compat.round_expert_counts(
        p.ids, p.slots, p.offsets, EXPERTS, block_m
    )
    counts = p.offsets.diff(prepend=p.offsets.new_zeros(1))
    assert offsets.diff(prepend=offsets.new_zeros(1)).tolist() == [
        -(-count // block_m) * block_m for count in counts.tolist()
    ]
    assert ids.dtype == p.ids.dtype
    assert real is not p.offsets
    for expert in range(EXPERTS):
        own, padded = p.slots[p.ids == expert], slots[ids == expert]
        assert padded[: own.numel()].equal(own)
        assert bool((padded[own.numel() :] == own[-1:]).all())
    dy = p.dy[slots] if dy_grouped else p.dy
    got = compat.group_bwd_lora_fused(
        dy, p.x, p.a, p.b, offsets, slots, EXPERTS, TOP_K, 2.0, real, dy_grouped
    )
    assert all(torch.equal(one, other) for one, other in zip(plain, got, strict=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_padded_ids_are_of_the_dtype_of_the_ids(p, dtype):
    ids, *_ = compat.round_expert_counts(p.ids.to(dtype), p.slots, p.offsets, EXPERTS, 4)
    assert ids.dtype == dtype


def test_rows_after_the_last_padded_one_change_no_gradient(p):
    """Buffers may be longer than what the padded counts fill."""
    _, slots, offsets, real = compat.round_expert_counts(p.ids, p.slots, p.offsets, EXPERTS, 4)
    longer = torch.cat([slots, slots[:3]])
    facts = (EXPERTS, TOP_K, 2.0, real)
    want = compat.group_bwd_lora_fused(p.dy, p.x, p.a, p.b, offsets, slots, *facts)
    got = compat.group_bwd_lora_fused(p.dy, p.x, p.a, p.b, offsets, longer, *facts)
    assert all(torch.equal(one, other) for one, other in zip(want, got, strict=True))


def test_padding_is_to_128_rows_unless_stated(p):
    assert compat.round_expert_counts(*p.triple, EXPERTS)[2].tolist() == [128, 256, 256, 384]


@pytest.mark.parametrize(("grouped_in", "grouped_out"), [(False, True), (True, False)])
def test_every_entry_gives_the_rows_of_the_products(p, grouped_in, grouped_out):
    x, k = (p.x_rows, 1) if grouped_in else (p.x, TOP_K)
    want = compat.scatter2scatter_lora(
        x, p.w, p.ids, p.slots, k, p.a, p.b, 2.0, p.bias, grouped_in, grouped_out
    )
    ordered = p.x_rows, p.base(p.x_rows) + p.bias[p.ids]
    flags = {"grouped_in": grouped_in, "grouped_out": grouped_out}
    got = compat.parallel_linear_lora(
        x, p.w, k, *p.triple, p.a, p.b, 2.0, p.bias, None, grouped_in, grouped_out
    )
    assert torch.equal(got, want)
    plain = compat.parallel_linear(x, p.w, k, *p.triple, p.bias, **flags)
    assert torch.equal(plain, ordered[1] if grouped_out else p.by_slot(ordered[1]))
    module = compat.ParallelExperts(EXPERTS, K, N, bias=True).to(x.device)
    module.load_state_dict({"weight": p.w.mT, "bias": p.bias})
    assert torch.equal(module(x, k, *p.triple, None, grouped_in, grouped_out).detach(), plain)


def test_without_scaling_the_adapter_counts_once(p):
    one = compat.parallel_linear_lora(p.x, p.w, TOP_K, *p.triple, p.a, p.b)
    assert torch.equal(one, p.adapted(scaling=1.0))
    without = compat.parallel_linear_lora(p.x, p.w, TOP_K, *p.triple, None, p.b)
    assert torch.equal(without, compat.scatter2scatter(p.x, p.w, p.ids, p.slots, TOP_K))


@pytest.mark.parametrize("grouped_in", [False, True])
def test_gates_sum_rows_that_have_a_row_each(p, grouped_in):
    """The second projection of a layer: k is 1, and the gates say how many choices there are."""
    rows = p.x_rows if grouped_in else p.by_slot(p.x_rows)
    out = compat.parallel_linear_lora(
        rows, p.w, 1, *p.triple, p.a, p.b, 2.0, p.bias, p.gates, grouped_in
    )
    y = p.adapted() + p.by_slot(p.bias[p.ids])
    want = (y.unflatten(0, (TOKENS, TOP_K)) * p.gates[..., None]).sum(1)
    assert torch.equal(out, want)
    from_tokens = compat.parallel_linear_lora(
        p.x, p.w, TOP_K, *p.triple, p.a, p.b, 2.0, p.bias, p.gates
    )
    assert torch.equal(from_tokens, want)


def test_a_module_starts_near_zero_and_says_its_sizes():
    torch.manual_seed(0)
    module = compat.ParallelExperts(3, 100, 200, bias=True)
    deviation = float(module.weight.detach().std())
    assert abs(deviation / 0.02 - 1) < 6 / (2 * module.weight.numel()) ** 0.5
    assert not module.bias.any()
    assert (module.num_experts, module.input_size, module.output_size) == (3, 100, 200)
    assert "num_experts=3, input_size=100, output_size=200" in repr(module)
    assert compat.ParallelExperts(2, 3, 4).bias is None


def test_active_experts_and_their_numbers(device):
    ids = torch.tensor([-1, 0, 0, 2, 2, 4, 4], device=device)
    active = compat_selective.get_active_experts(ids, 4)
    assert active.tolist() == [0, 2]
    offsets = torch.tensor([2, 2, 4, 4], device=device)
    compact, counts = compat_selective.remap_expert_indices(ids[1:], offsets, active, 4)
    assert compact.tolist() == [0, 0, 1, 1, 2, 2]
    assert counts.tolist() == [2, 4]
    narrow, _ = compat_selective.remap_expert_indices(ids[1:].int(), offsets, active, 4)
    assert narrow.dtype == torch.int32


REFUSED = {
    "gates with rows grouped": (
        lambda p: compat.ScatterMoELoRA.apply(
            p.x, p.w, TOP_K, *p.triple, None, None, 1.0, gates=p.gates, grouped_out=True
        ),
        "cannot be grouped",
    ),
    "offsets of other experts": (
        lambda p: compat.group_bwd_W(p.dy, p.x_rows, p.offsets[:-1], EXPERTS),
        f"{EXPERTS - 1} entries, E is {EXPERTS}",
    ),
    "offsets to remap": (
        lambda p: compat_selective.remap_expert_indices(p.ids, p.offsets, p.ids[:1], EXPERTS + 1),
        f"{EXPERTS} entries but there are {EXPERTS + 1}",
    ),
    "rank rows of PEFT's A": (
        lambda p: compat.peft_lora_to_scattermoe(p.a[1:], p.b, EXPERTS, RANK),
        f"need {EXPERTS * RANK} rank rows",
    ),
    "rank columns of PEFT's B": (
        lambda p: compat.peft_lora_to_scattermoe(p.a, p.b[:, 1:], EXPERTS, RANK),
        f"need {EXPERTS * RANK} rank rows",
    ),
    "rank rows to select": (
        lambda p: compat_selective.selective_lora_weights(p.a[1:], p.b[:, 1:], p.ids[:1], EXPERTS),
        f"multiple of {EXPERTS}",
    ),
    "factors of two ranks": (
        lambda p: compat_selective.selective_lora_weights(
            p.a, p.b[:, :-EXPERTS], p.ids[:1], EXPERTS
        ),
        f"{EXPERTS * RANK} rank rows and lora_B {EXPERTS * RANK - EXPERTS}",
    ),
    "half an expert": (
        lambda p: compat_selective.selective_dequant_nf4_triton(
            torch.zeros(9, dtype=torch.uint8), torch.ones(1), p.ids[:1], (4, 3), 64
        ),
        "18 elements, not a multiple of 12",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(p, name):
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        call(p)
