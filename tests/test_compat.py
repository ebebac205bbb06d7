"""The former call signatures against a dense fp64 truth, by position and by keyword."""

import pytest
import torch

from scattermoe_lora import compat

pytestmark = pytest.mark.correctness
EXPERTS, TOKENS, TOP_K, K, N, RANK, SCALING = 5, 11, 2, 48, 40, 3, 1.7


class Problem:
    """Operands in the former layouts, expert 3 idle, and the truth in fp64."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(3)
        index = torch.tensor([0, 1, 2, 4], device=device)[torch.randint(0, 4, (TOKENS, TOP_K))]
        self.triple = compat.flatten_sort_count(index, EXPERTS)
        self.ids, self.slots, self.offsets = self.triple
        self.expert_of_slot = index.reshape(-1)
        self.x = torch.randn(TOKENS, K, device=device)
        self.w = torch.randn(EXPERTS, K, N, device=device) / K**0.5
        self.a = torch.randn(EXPERTS * RANK, K, device=device) / K**0.5
        self.b = torch.randn(N, EXPERTS * RANK, device=device) / RANK**0.5
        self.bias = torch.randn(EXPERTS, N, device=device)
        self.gates = torch.rand(TOKENS, TOP_K, device=device)
        self.dy = torch.randn(TOKENS * TOP_K, N, device=device)

    def truth(self, x, w, a, b, bias, gates=None):
        """[L, N] by slot, or [T, N] with gates; x [T, K]."""
        rows = []
        for slot, expert in enumerate(self.expert_of_slot.tolist()):
            part = slice(expert * RANK, (expert + 1) * RANK)
            row = x[slot // TOP_K]
            low = SCALING * (row @ a[part].T)
            rows.append(row @ w[expert] + low @ b[:, part].T + bias[expert])
        y = torch.stack(rows)
        if gates is None:
            return y
        return (y.unflatten(0, (TOKENS, TOP_K)) * gates.unsqueeze(-1)).sum(1)


@pytest.fixture(name="p")
def problem(device):
    return Problem(device)


def assert_agrees(got: torch.Tensor, want: torch.Tensor, terms: int) -> None:
    """Norm-relative, within the worst case of fp32 sums of `terms` products per element."""
    error = (got.double() - want).norm() / want.norm()
    assert got.shape == want.shape
    assert error <= terms * torch.finfo(torch.float32).eps / 2, f"error {error}"


def doubles(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("x_grouped", [False, True])
@pytest.mark.parametrize("y_grouped", [False, True])
def test_forward(p, x_grouped, y_grouped):
    want = p.truth(p.x.double(), p.w.double(), p.a.double(), p.b.double(), p.bias.double())
    x = compat.group(p.x, p.slots, fan_out=TOP_K) if x_grouped else p.x
    if y_grouped:
        want = want[p.slots]
    k = 1 if x_grouped else TOP_K
    got = compat.scatter2scatter_lora(
        x, p.w, p.ids, p.slots, k, p.a, p.b, SCALING, p.bias, x_grouped, y_grouped
    )
    assert_agrees(got, want, K + RANK + 2)
    out = torch.full_like(got, torch.nan)
    base = compat.scatter2scatter(
        X=x, W=p.w, sorted_expert_idxs=p.ids, sorted_scattered_idxs=p.slots, k=k,
        x_grouped=x_grouped, y_grouped=y_grouped, out=out, int64_indices=True,
    )  # fmt: skip
    assert base is out
    zero = torch.zeros_like
    plain = p.truth(p.x.double(), p.w.double(), zero(p.a).double(), p.b.double(), zero(p.bias))
    assert_agrees(base, plain[p.slots] if y_grouped else plain, K)


def test_gradients(p):
    x, a, b = doubles(p.x, p.a, p.b)
    p.truth(x, p.w.double(), a, b, p.bias.double()).backward(p.dy.double())
    dy = compat.group(p.dy, p.slots)
    x_rows = compat.group(p.x, p.slots, fan_out=TOP_K)
    terms = K + N + TOKENS * TOP_K
    for da, db in (
        compat.group_bwd_lora(dy, x_rows, p.a, p.b, p.offsets, EXPERTS, SCALING),
        compat.group_bwd_lora(dy, p.x, p.a, p.b, p.offsets, EXPERTS, SCALING, p.slots, TOP_K),
        compat.group_bwd_lora_fused(
            p.dy, p.x, p.a, p.b, p.offsets, p.slots, E=EXPERTS, k=TOP_K, scaling=SCALING
        ),
    ):
        assert_agrees(da, a.grad, terms)
        assert_agrees(db, b.grad, terms)
        idle = slice(3 * RANK, 4 * RANK)
        assert not da[idle].any()
        assert not db[:, idle].any()
    dx = compat.scatter2scatter_lora_dX(dy, p.w, p.ids, p.slots, 1, p.a, p.b, SCALING)
    assert_agrees(dx.unflatten(0, (TOKENS, TOP_K)).sum(1), x.grad, terms)


def test_padding_adds_nothing(p):
    ids, slots, offsets, real = compat.round_expert_counts(p.ids, p.slots, p.offsets, EXPERTS, 8)
    assert ids.numel() == offsets[-1]
    assert not (offsets % 8).any()
    assert torch.equal(real, p.offsets)
    plain = compat.group_bwd_lora_fused(
        p.dy, p.x, p.a, p.b, p.offsets, p.slots, EXPERTS, TOP_K, SCALING
    )
    padded = compat.group_bwd_lora_fused(
        p.dy, p.x, p.a, p.b, offsets, slots, EXPERTS, TOP_K, SCALING, real
    )
    for expected, got in zip(plain, padded, strict=True):
        assert torch.equal(expected, got)


def test_full_weight_gradient(p):
    w, bias = doubles(p.w, p.bias)
    p.truth(p.x.double(), w, p.a.double(), p.b.double(), bias).backward(p.dy.double())
    dw, db = compat.group_bwd_W(
        compat.group(p.dy, p.slots), compat.group(p.x, p.slots, fan_out=TOP_K), p.offsets,
        EXPERTS, has_bias=True,
    )  # fmt: skip
    assert_agrees(dw, w.grad, TOKENS * TOP_K)
    assert_agrees(db, bias.grad, TOKENS * TOP_K)


@pytest.mark.parametrize("gated", [False, True])
def test_autograd(p, gated):
    leaves = [t.clone().requires_grad_() for t in (p.x, p.w, p.a, p.b, p.bias, p.gates)]
    x, w, a, b, bias, gates = leaves
    out = compat.ScatterMoELoRA.apply(
        x, w, TOP_K, *p.triple, a, b, SCALING, bias, gates if gated else None, False, False, True,
        False,
    )  # fmt: skip
    truths = doubles(p.x, p.w, p.a, p.b, p.bias, p.gates)
    want = p.truth(*truths[:5], gates=truths[5] if gated else None)
    terms = K + N + RANK + TOKENS * TOP_K
    assert_agrees(out, want, terms)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    want.backward(upstream.double())
    for leaf, truth in zip(leaves if gated else leaves[:5], truths, strict=False):
        assert_agrees(leaf.grad, truth.grad, terms)


def test_module_and_grouped_down_projection_with_gates(p):
    module = compat.ParallelExperts(EXPERTS, K, N, bias=True).to(p.x.device)
    rows = compat.group(p.x, p.slots, fan_out=TOP_K)
    got = module(rows, 1, *p.triple, gates=p.gates, grouped_in=True)
    zero = torch.zeros_like
    want = p.truth(
        p.x.double(), module.weight.mT.double(), zero(p.a).double(), p.b.double(),
        module.bias.double(), p.gates.double(),
    )  # fmt: skip
    assert_agrees(got.detach(), want.detach(), K + TOP_K)


def test_peft_factors_are_reordered(p):
    per_expert = p.b.unflatten(1, (EXPERTS, RANK))
    peft_b = per_expert.transpose(1, 2).reshape(N, RANK * EXPERTS)
    a, b = compat.peft_lora_to_scattermoe(p.a, peft_b, EXPERTS, RANK)
    assert torch.equal(a, p.a)
    assert torch.equal(b, p.b)


def test_gates_with_a_grouped_output_are_refused(p):
    with pytest.raises(ValueError, match="cannot be grouped"):
        compat.parallel_linear(p.x, p.w, TOP_K, *p.triple, gates=p.gates, grouped_out=True)
