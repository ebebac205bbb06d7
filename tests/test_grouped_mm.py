"""The path over torch._grouped_mm, with its product written out: the same bits as the kernels."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import scattermoe_lora as sm
from scattermoe_lora import ops
from scattermoe_lora.ops import _check, grouped_mm

pytestmark = pytest.mark.correctness

EXPERTS, TOKENS, TOP_K, K, N, RANK = 3, 3, 2, 6, 5, 2
ROWS = TOKENS * TOP_K
TOKEN, SLOT, EXPERT = sm.RowOrder
TILE = sm.Tile(block_m=16, block_n=16, block_k=16)
GROUPED = sm.Plan(path=sm.Path.GROUPED_MM, tile=TILE)
TILES = replace(GROUPED, path=sm.Path.TILES)
EPILOGUE = replace(GROUPED, path=sm.Path.EPILOGUE, shrink=TILE)
GRAM = replace(GROUPED, path=sm.Path.GRAM)


def written_out(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
    """torch's definition: groups along the rows of the left, or along the reduction of both; what
    lies past the last group is not written.
    """
    bounds = [0, *offs.tolist()]
    spans = [slice(*pair) for pair in itertools.pairwise(bounds)]
    if right.ndim == 2:
        return torch.stack([left[:, span] @ right[span] for span in spans])
    out = left.new_full((left.shape[0], right.shape[2]), float("nan"))
    for span, matrix in zip(spans, right, strict=True):
        out[span] = left[span] @ matrix
    return out


@pytest.fixture
def native(monkeypatch):
    """Operands of any dtype and device count as native."""
    monkeypatch.setattr(torch, "_grouped_mm", written_out)
    monkeypatch.setattr(grouped_mm, "require_native", lambda *operands: None)


def integers(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).float()


@pytest.fixture(scope="module")
def t(device) -> dict:
    """Expert 1 is idle, one slot is nobody's."""
    index = torch.tensor([[2, 0], [0, -1], [2, 2]], device=device)
    made = {
        "weight": integers(EXPERTS, K, N, seed=1),
        "a": integers(EXPERTS, RANK, K, seed=2),
        "b": integers(EXPERTS, N, RANK, seed=3),
        "bias": integers(EXPERTS, N, seed=4),
        "gates": integers(TOKENS, TOP_K, seed=5),
        **{order: integers(ROWS, K, seed=6) for order in (SLOT, EXPERT)},
        TOKEN: integers(TOKENS, K, seed=7),
        "dy": integers(ROWS, N, seed=8),
        "dout": integers(TOKENS, N, seed=9),
        "xa": integers(ROWS, RANK, seed=10),
        "yb": integers(ROWS, RANK, seed=11),
    }
    tensors = {name: value.to(device) for name, value in made.items()}
    routing = sm.Routing.from_top_k(index, EXPERTS, sentinels=True)
    lora = sm.LoRAWeights(a=tensors["a"], b=tensors["b"], scaling=-2.0)
    return {**tensors, "routing": routing, "lora": lora}


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "bias and gates"])
@pytest.mark.parametrize(
    ("source", "target"), [(TOKEN, SLOT), (SLOT, EXPERT), (EXPERT, SLOT)], ids=str
)
def test_products_are_those_of_the_kernels(native, t, source, target, scaled):
    more = {"bias": t["bias"], "row_scale": t["gates"]} if scaled else {}
    more |= {"source": source, "target": target}

    def base(plan):
        return ops.scatter2scatter(t[source], t["weight"], t["routing"], **more, plan=plan)

    def adapted(plan):
        x, weight, lora = t[source], t["weight"], t["lora"]
        return ops.lora_forward(x, weight, lora, t["routing"], **more, plan=plan)

    assert torch.equal(base(GROUPED), base(TILES))
    for grouped, kernel in zip(adapted(GROUPED), adapted(EPILOGUE), strict=True):
        assert torch.equal(grouped, kernel)


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_are_those_of_the_kernels(native, t, gated):
    dy, order = (t["dout"], TOKEN) if gated else (t["dy"], SLOT)
    scale = {"row_scale": t["gates"] if gated else None}

    def of_input(plan):
        return ops.lora_input_grad(
            dy, t["weight"], t["lora"], t["routing"], source=order, target=TOKEN, **scale, plan=plan
        )

    def of_factors(plan):
        return ops.lora_weight_grad(
            t[TOKEN], dy, t["xa"], t["yb"], t["lora"], t["routing"], x_order=TOKEN, dy_order=order,
            **scale, plan=plan,
        )  # fmt: skip

    def of_weight(plan):
        return (
            ops.expert_weight_grad(
                t[EXPERT], dy, t["routing"], x_order=EXPERT, dy_order=order, **scale, plan=plan
            ),
        )

    for gradients, plan in ((of_input, EPILOGUE), (of_factors, GRAM), (of_weight, GRAM)):
        for grouped, kernel in zip(gradients(GROUPED), gradients(plan), strict=True):
            assert torch.equal(grouped, kernel), gradients.__name__


def stack(shape=(2, 16, 16), dtype=torch.bfloat16, offset=0) -> Tensor:
    base = torch.zeros(torch.Size(shape).numel() + offset, dtype=dtype)
    return base[offset:].view(shape)


@pytest.mark.parametrize(
    ("weight", "layout"),
    [
        (stack(), "kn"),
        (stack().mT, "nk"),
        (stack((2, 16, 8)), "kn"),
        (stack((2, 16, 7)), ""),
        (stack((2, 16, 12)), ""),
        (stack((2, 7, 16)), "kn"),
        (stack((2, 7, 16)).mT, "nk"),
        (stack((2, 16, 12)).mT, ""),
        (stack((2, 16, 4), torch.float32), "kn"),
        (stack((2, 16, 8))[:, :, :7], ""),
        (stack((2, 16, 8))[:, :, :7].mT, ""),
        (stack((2, 16, 8))[:, :, :1], ""),
        (stack(offset=1), ""),
        (stack(offset=8), "kn"),
        (stack()[:, :, ::2], ""),
        (stack((1, 16, 16)).expand(2, 16, 16), ""),
        (stack((2, 1, 16)).expand(2, 16, 16), ""),
        (stack((2, 16, 24)).flatten()[: 2 * 380].view(2, 380)[:, :320].view(2, 20, 16), ""),
        (stack((2, 16, 24)).flatten()[: 2 * 380].view(2, 380)[:, :320].view(2, 20, 16).mT, ""),
        (stack((1, 16, 16)).expand(2, 16, 16).mT, ""),
        (stack((2, 1, 16)).expand(2, 16, 16).mT, ""),
    ],
    ids=range(21),
)
def test_tensor_maps_address_aligned_rows_of_16_bytes_alone(weight, layout):
    assert _check.w_map(weight) == layout


@pytest.mark.parametrize(
    ("x", "fits"),
    [
        (stack()[0], True),
        (stack((1, 3, 8))[0], True),
        (stack((1, 3, 7))[0], False),
        (stack((1, 3, 12))[0], False),
        (stack((1, 3, 8))[0, :, :7], False),
        (stack((1, 3, 16))[0, :, :9], True),
        (stack()[0].mT, False),
        (stack(offset=1)[0], False),
        (stack((1, 1, 16))[0].expand(3, 16), False),
    ],
    ids=range(9),
)
def test_rows_come_through_a_tensor_map_where_it_can_address_them(x, fits):
    assert _check.addressable(x) is fits


@pytest.mark.parametrize(
    "operand",
    [stack(dtype=torch.float32), stack(), stack((2, 16, 12)), stack()[:, ::2, ::2]],
    ids=["float32", "cpu", "narrow", "strided"],
)
def test_what_is_not_native_is_refused(operand):
    with pytest.raises(ValueError, match="needs bfloat16 on CUDA, got"):
        grouped_mm.require_native(operand)
    assert not _check.fits_grouped_mm(operand[0])


@pytest.mark.parametrize("start", [0, 1])
def test_rows_in_expert_order_are_copied_only_from_a_bad_address(t, start):
    """torch._grouped_mm takes addresses that are multiples of 16 bytes, and raises on others."""
    storage = torch.arange(ROWS * 8 + 8, dtype=torch.bfloat16)
    x = storage[start : start + ROWS * 8].view(ROWS, 8)
    found = grouped_mm.by_expert(x, t["routing"], EXPERT)
    assert found.data_ptr() % 16 == 0
    assert torch.equal(found, x)
    assert (found.data_ptr() == x.data_ptr()) == (start == 0)
