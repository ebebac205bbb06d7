"""Faults planted on the path over torch._grouped_mm, which a CPU runs with its product written out.

Each must make a result that the kernels of the unchanged package do not: `old` becomes `new`.
"""

from pathlib import Path

import pytest
import torch
from test_grouped_mm import EXPERTS, RANK, ROWS, TOKENS, TOP_K, K, N, integers, written_out

import scattermoe_lora
from scattermoe_lora.plan import PATHS
from verify.revision import edited, unload

pytestmark = pytest.mark.correctness

PACKAGE = Path(scattermoe_lora.__path__[0])
GROUPED, LORA, WEIGHT_GRAD = "ops/grouped_mm.py", "ops/lora.py", "ops/weight_grad.py"
PRODUCTS = ("scatter2scatter", "lora_forward", "lora_input_grad")
FACTORS, WEIGHT = "lora_weight_grad", "expert_weight_grad"

FAULTS = {
    "the bias is lost": (
        GROUPED, PRODUCTS[:2], "y + bias.to(y.dtype).index_select(0, kept)", "y",
    ),
    "dropped rows get a bias": (
        GROUPED, PRODUCTS[:2], "zero_dropped(y + bias.to(y.dtype).index_select(0, kept), routing)",
        "y + bias.to(y.dtype).index_select(0, kept)",
    ),
    "the bias of the next expert": (
        GROUPED, PRODUCTS[:2], "bias.to(y.dtype)", "bias.to(y.dtype).roll(1, 0)",
    ),
    "coefficients by row": (
        GROUPED, (*PRODUCTS, FACTORS, WEIGHT), ".index_select(0, routing.slots).unsqueeze(1)",
        ".unsqueeze(1)",
    ),
    "the factor per row is lost": (
        GROUPED, PRODUCTS, "y = zero_dropped(scaled(y, row_scale, routing), routing)", "pass",
    ),
    "rows of no expert stay unwritten": (
        GROUPED, PRODUCTS, "return y.masked_fill_(", "return y if True else y.masked_fill_(",
    ),
    "each expert ends where it begins": (
        GROUPED, PRODUCTS, "(x, weight, offs=routing.offsets[1:])",
        "(x, weight, offs=routing.offsets[:-1])",
    ),
    "the weight of the next expert": (
        GROUPED, PRODUCTS, "torch._grouped_mm(x, weight,",
        "torch._grouped_mm(x, weight.roll(1, 0),",
    ),
    "rows of tokens are read by slot": (
        GROUPED, (*PRODUCTS, FACTORS, WEIGHT), "routing.slots // routing.fan_out(order)",
        "routing.slots.clamp(max=x.shape[0] - 1)",
    ),
    "rows go to the slots of others": (
        GROUPED, PRODUCTS, "index_copy_(0, routing.slots, y)",
        "index_copy_(0, routing.slots.flip(0), y)",
    ),
    "results stay in expert order": (
        GROUPED, PRODUCTS, "if target is RowOrder.EXPERT:", "if True:",
    ),
    "the scaling is lost": (
        LORA, PRODUCTS[1:], "grouped(x, down.mT, routing) * scaling",
        "grouped(x, down.mT, routing)",
    ),
    "the low-rank term counts twice": (
        LORA, PRODUCTS[1:], "y.add_(grouped_product(low,", "y.add_(grouped_product(low + low,",
    ),
    "the low-rank term adds the bias again": (
        LORA, PRODUCTS[1:2], "            rows = rows._replace(bias=None)\n", "",
    ),
    "gradients end where the expert begins": (
        GROUPED, (FACTORS, WEIGHT), "(p.t(), q, offs=routing.offsets[1:])",
        "(p.t(), q, offs=routing.offsets[:-1])",
    ),
    "gradients go to the next expert": (
        GROUPED, (FACTORS, WEIGHT), "torch._grouped_mm(p.t(), q, offs=routing.offsets[1:])",
        "torch._grouped_mm(p.t(), q, offs=routing.offsets[1:]).roll(1, 0)",
    ),
    "the last row of an expert is left out": (
        GROUPED, (FACTORS, WEIGHT), "p.t(), q,", "p.t() * (torch.arange(len(p), device=p.device) "
        "!= routing.offsets[-1] - 1), q,",
    ),
    "experts without rows get no zeros": (
        GROUPED, (FACTORS, WEIGHT), "return torch._grouped_mm(p.t(), q, offs=routing.offsets[1:])",
        "made = torch._grouped_mm(p.t(), q, offs=routing.offsets[1:])\n"
        "    return made.where((routing.offsets.diff() > 0)[:, None, None], torch.nan)",
    ),
    "gates are lost in the gradients of an adapter": (
        WEIGHT_GRAD, (FACTORS,), "xa, yb = (scaled(low, row_scale, routing) for low in (xa, yb))",
        "pass",
    ),
    "dA of s x A^T": (
        WEIGHT_GRAD, (FACTORS,), "grouped_gram(yb, by_expert(x,", "grouped_gram(xa, by_expert(x,",
    ),
    "dB of s dy B": (
        WEIGHT_GRAD, (FACTORS,), "by_expert(dy, routing, dy_order), xa,",
        "by_expert(dy, routing, dy_order), yb,",
    ),
    "gates are lost in the gradient of a weight": (
        WEIGHT_GRAD, (WEIGHT,), "scaled(by_expert(dy, routing, dy_order), row_scale, routing)",
        "by_expert(dy, routing, dy_order)",
    ),
    "gates count twice in the gradient of a weight": (
        WEIGHT_GRAD, (WEIGHT,), "grouped_gram(by_expert(x, routing, x_order), rows,",
        "grouped_gram(by_expert(x, routing, x_order), scaled(rows, row_scale, routing),",
    ),
}  # fmt: skip


def results(lib, *, grouped: bool) -> dict[str, list[torch.Tensor]]:
    """Operation -> its results. Expert 1 is idle, one slot is nobody's."""
    order, tile = lib.RowOrder, lib.Tile(block_m=16, block_n=16, block_k=16)
    ops = lib.ops

    def plan(path):
        return lib.Plan(path=lib.Path.GROUPED_MM if grouped else path, tile=tile, shrink=tile)

    index = torch.tensor([[2, 0], [0, -1], [2, 2]])
    routing = lib.Routing.from_top_k(index, EXPERTS, sentinels=True)
    weight, bias = integers(EXPERTS, K, N, seed=1), integers(EXPERTS, N, seed=4)
    a, b = integers(EXPERTS, RANK, K, seed=2), integers(EXPERTS, N, RANK, seed=3)
    lora = lib.LoRAWeights(a=a, b=b, scaling=-2.0)
    gates, dout = integers(TOKENS, TOP_K, seed=5), integers(TOKENS, N, seed=9)
    tokens, slots = integers(TOKENS, K, seed=7), integers(ROWS, K, seed=6)
    xa, yb = integers(ROWS, RANK, seed=10), integers(ROWS, RANK, seed=11)
    scale = {"bias": bias, "row_scale": gates}
    rows = {"source": order.TOKEN, "target": order.SLOT}
    sums = {"x_order": order.TOKEN, "dy_order": order.TOKEN, "row_scale": gates}
    tiles, epilogue, gram = (plan(p) for p in (lib.Path.TILES, lib.Path.EPILOGUE, lib.Path.GRAM))
    return {
        "scatter2scatter": [
            ops.scatter2scatter(tokens, weight, routing, **rows, plan=tiles),
            ops.scatter2scatter(tokens, weight, routing, **rows, **scale, plan=tiles),
            ops.scatter2scatter(
                slots, weight, routing, source=order.EXPERT, target=order.EXPERT, bias=bias,
                plan=tiles,
            ),
        ],
        "lora_forward": [
            *ops.lora_forward(tokens, weight, lora, routing, **rows, plan=epilogue),
            *ops.lora_forward(tokens, weight, lora, routing, **rows, **scale, plan=epilogue),
            *ops.lora_forward(tokens, weight, lora, routing, **rows, bias=bias, plan=epilogue),
        ],
        "lora_input_grad": [
            part
            for target in (order.TOKEN, order.SLOT)
            for part in ops.lora_input_grad(
                dout, weight, lora, routing, source=order.TOKEN, target=target, row_scale=gates,
                plan=epilogue,
            )
        ],
        FACTORS: [
            *ops.lora_weight_grad(tokens, dout, xa, yb, lora, routing, **sums, plan=gram),
        ],
        WEIGHT: [ops.expert_weight_grad(tokens, dout, routing, **sums, plan=gram)],
    }  # fmt: skip


@pytest.fixture(scope="module")
def right(device):
    if device.type != "cpu":
        pytest.skip("a GPU runs the path itself")
    return results(scattermoe_lora, grouped=False)


def wrong_in(lib, monkeypatch, right) -> set[str]:
    """The operations whose results are other ones on the path over torch._grouped_mm."""
    monkeypatch.setattr(torch, "_grouped_mm", written_out)
    monkeypatch.setattr(lib.ops.grouped_mm, "require_native", lambda *operands: None)
    found = results(lib, grouped=True)
    return {
        name
        for name, values in right.items()
        if not all(torch.equal(*pair) for pair in zip(found[name], values, strict=True))
    }


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_on_the_path_is_seen(monkeypatch, right, what):
    file, operations, old, new = FAULTS[what]
    source = (PACKAGE / file).read_text()
    assert source.count(old) == 1
    lib = edited(PACKAGE, {file: source.replace(old, new)}, "faulty_grouped_mm")
    try:
        assert wrong_in(lib, monkeypatch, right) == set(operations)
    finally:
        unload(lib.__name__)


def test_without_a_fault_nothing_is_seen(monkeypatch, right):
    assert wrong_in(scattermoe_lora, monkeypatch, right) == set()


def test_eight_faults_are_planted_in_every_operation_that_has_the_path():
    for operation, paths in PATHS.items():
        if scattermoe_lora.Path.GROUPED_MM in paths:
            seen = [what for what, (_, names, *_) in FAULTS.items() if operation.value in names]
            assert len(seen) >= 8, operation
