"""A weight that comes a few experts at a time gives what the whole gives, bit for bit."""

import pytest
import torch

import scattermoe_lora as sm
from scattermoe_lora.ops._check import w_map
from scattermoe_lora.quant import Dense, StoredWeight

pytestmark = pytest.mark.correctness

EXPERTS, TOKENS, TOP_K, K, N, RANK = 5, 11, 2, 48, 40, 4
_AT_ONCE = 2


def projected(x, weight, routing, lora):
    rows = sm.expert_linear(
        x, weight, routing, source=sm.RowOrder.TOKEN, target=sm.RowOrder.SLOT, lora=lora
    )
    (dx,) = torch.autograd.grad(rows.square().sum(), x)
    return rows.detach(), dx


@pytest.mark.parametrize("layout", ["nk", "kn"])
def test_blocks_of_a_mapped_weight_are_its_experts(layout, device):
    """Stored [experts, N, K] and [experts, K, N]; of each the forward product and the gradient,
    whose weight has the other layout.
    """
    generator = torch.Generator().manual_seed(3)

    def integers(*shape):
        return torch.randint(-2, 3, shape, generator=generator).float().to(device)

    stored = integers(EXPERTS, *((N, K) if layout == "nk" else (K, N)))
    whole = stored.mT if layout == "nk" else stored
    blocks = StoredWeight(
        stored=Dense(data=stored),
        transposed=layout == "nk",
        budget_bytes=_AT_ONCE * stored[0].numel() * stored.itemsize,
        ids=torch.arange(EXPERTS, device=device),
    )
    assert {w_map(block) for _, block in blocks.blocks(whole.dtype)} == {layout}
    assert len(list(blocks.blocks(whole.dtype))) == -(-EXPERTS // _AT_ONCE)
    index = torch.randint(0, EXPERTS, (TOKENS, TOP_K), generator=generator).to(device)
    routing = sm.Routing.from_top_k(index, EXPERTS)
    lora = sm.LoRAWeights(a=integers(EXPERTS, RANK, K), b=integers(EXPERTS, N, RANK), scaling=0.5)
    x = integers(TOKENS, K).requires_grad_()
    for got, want in zip(
        projected(x, blocks, routing, lora), projected(x, whole, routing, lora), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_blocks_start_where_a_tensor_map_can(offset):
    """Storage that does not is copied, as decoded blocks are."""
    elements = EXPERTS * K * N
    stored = torch.arange(offset + elements).float()[offset:].view(EXPERTS, N, K)
    blocks = StoredWeight(
        stored=Dense(data=stored), transposed=True, budget_bytes=_AT_ONCE * stored[0].nbytes
    )
    found = []
    for _, block in blocks.blocks(torch.float32):
        assert block.data_ptr() % 16 == 0
        found.append(block.clone())
    assert torch.equal(torch.cat(found), stored.mT)
