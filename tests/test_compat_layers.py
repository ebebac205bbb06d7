"""Module paths, adapters on modules, and whole blocks under their former names."""

import importlib
from types import SimpleNamespace

import pytest
import torch

from scattermoe_lora import compat

pytestmark = pytest.mark.correctness
EXPERTS, TOKENS, TOP_K, HIDDEN, INNER, RANK, SCALING = 6, 5, 2, 24, 12, 2, 0.5
layers = compat.layers


def drawn(*shape, device="cpu", seed=5):
    """Small integers: every sum of their products is exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).float().to(device)


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("kernels.ops", ("group", "scatter2scatter", "group_bwd_W", "BLOCK_M")),
        ("ops", ("group", "scatter2scatter", "group_bwd_W", "BLOCK_M")),
        ("kernels.lora_ops", ("scatter2scatter_lora", "scatter2scatter_lora_dX", "BLOCK_M")),
        ("kernels.lora_ops", ("group_bwd_lora", "group_bwd_lora_fused", "round_expert_counts")),
        ("kernels.lora_ops", ("_SPLIT_LORA_FWD_THRESHOLD", "_SPLIT_LORA_FWD_MAX_EXPERTS")),
        ("kernels.single", ("single2scatter",)),
        ("lora_ops", ("ParallelExperts", "scatter2scatter_lora", "group_bwd_lora")),
        ("parallel_experts", ("flatten_sort_count", "parallel_linear", "ParallelExperts")),
        ("parallel_experts", ("ParallelLinear", "kernels")),
        ("parallel_linear_lora", ("ScatterMoELoRA", "parallel_linear_lora")),
        ("parallel_linear_lora", ("_compute_lora_input_grad", "get_lora_params_from_wrapper")),
        ("lora_layout", ("peft_lora_to_scattermoe", "validate_scattermoe_lora_shapes")),
        ("layers", ("peft_lora_to_scattermoe", "peft_lora_B_to_scattermoe")),
        ("layers", ("HFScatterMoEGatedMLP", "ScatterMoEGatedMLP", "_route")),
        ("layers", ("_sigmoid_topk_route", "_softmax_topk_route", "_compute_shared_expert")),
        ("layers", ("_unwrap_experts_lora", "_unwrap_gate_lora", "_convert_smoe_lora")),
        ("layers", ("peft_down_proj_lora_to_scattermoe",)),
        ("selective_dequant", ("get_active_experts", "remap_expert_indices")),
        ("selective_dequant", ("selective_expert_weights", "selective_lora_weights")),
        ("selective_dequant", ("_selective_dequant_bnb4", "shared_dequant_across_shards")),
        ("selective_dequant_kernel", ("selective_dequant_nf4_triton",)),
    ],
)
def test_every_path_leads_to_one_object(module, names):
    found = importlib.import_module(f"{compat.__name__}.{module}")
    assert [getattr(found, name) for name in names] == [getattr(compat, name) for name in names]


def test_a_module_adds_its_adapter_until_it_is_taken_away(device):
    index = torch.tensor([[0, 2], [3, 1], [5, 2]], device=device)
    triple = compat.flatten_sort_count(index, EXPERTS)
    x = drawn(3, HIDDEN, device=device)
    a, b = drawn(EXPERTS * RANK, HIDDEN, device=device), drawn(INNER, EXPERTS * RANK, device=device)
    module = compat.ParallelExperts(EXPERTS, HIDDEN, INNER).to(device)
    with torch.no_grad():
        module.weight.copy_(drawn(EXPERTS, INNER, HIDDEN, seed=6))
    names = set(module.state_dict())
    plain = module(x, TOP_K, *triple)
    module.set_lora(a, b, SCALING)
    assert module._lora_A is a
    assert module._lora_B is b
    e = index.reshape(-1)
    rows = x.repeat_interleave(TOP_K, 0)
    low = torch.einsum("lk,lrk->lr", rows, a.unflatten(0, (EXPERTS, RANK))[e])
    added = torch.einsum("lr,nlr->ln", low, b.unflatten(1, (EXPERTS, RANK))[:, e])
    assert torch.equal(module(x, TOP_K, *triple), plain + SCALING * added)
    module.set_lora(a, b, 0.0)
    assert torch.equal(module(x, TOP_K, *triple), plain)
    module.clear_lora()
    assert torch.equal(module(x, TOP_K, *triple), plain)
    assert set(module.state_dict()) == names == {"weight"}


@pytest.mark.parametrize("rows", [1, 3])
def test_one_token_through_its_experts(device, rows):
    x, w = drawn(rows, 100, device=device), drawn(EXPERTS, 100, 36, device=device, seed=6)
    chosen = [4, 0, 3]
    y = compat.single2scatter(x, w, torch.tensor([chosen], device=device))
    want = torch.stack([x[min(j, rows - 1)] @ w[e] for j, e in enumerate(chosen)])
    assert torch.equal(y, want)
    with pytest.raises(ValueError, match="1 or 3 rows, one per choice, got 2"):
        compat.single2scatter(drawn(2, 100, device=device), w, torch.tensor([chosen]))
    with pytest.raises(ValueError, match=r"\[1, k\], got shape \[2, 2\]"):
        compat.single2scatter(x, w, torch.zeros(2, 2, dtype=torch.long))


def test_the_adapters_part_of_the_input_gradient(device):
    index = torch.tensor([[0, 2], [3, 2], [5, 0]], device=device)
    ids, slots, offsets = compat.flatten_sort_count(index, EXPERTS)
    dy, w = drawn(6, INNER, device=device), drawn(EXPERTS, HIDDEN, INNER, device=device, seed=6)
    a, b = drawn(EXPERTS * RANK, HIDDEN, device=device), drawn(INNER, EXPERTS * RANK, device=device)
    part = compat._compute_lora_input_grad(dy, a, b, offsets, EXPERTS, SCALING)
    whole, base = (
        compat.scatter2scatter_lora_dX(dy, w, ids, slots, 1, a, b, scaling, dx_grouped=True)
        for scaling in (SCALING, 0.0)
    )
    assert part.abs().sum() > 0
    assert torch.equal(base + part, whole)
    expert = torch.bucketize(torch.arange(len(dy), device=device), offsets, right=True)
    by_expert = b.unflatten(1, (EXPERTS, RANK)).permute(1, 2, 0)[expert]
    known = torch.einsum("lrn,ln->lr", by_expert, dy)
    given = (dy, a, b, offsets, EXPERTS, SCALING, ids, slots, True)
    assert torch.equal(compat._compute_lora_input_grad(*given, yb=2 * known), 2 * part)


def test_factors_the_wrong_way_round_are_refused():
    w = torch.empty(3, 5, 7)
    a, b = torch.empty(6, 5), torch.empty(7, 6)
    compat.validate_scattermoe_lora_shapes(w, a, b)
    for wrong in ((b.mT, a.mT), (a[:5], b), (a[:, :4], b), (a, b[:, :3]), (a, b[:6])):
        with pytest.raises(ValueError, match="Invalid ScatterMoE LoRA layout"):
            compat.validate_scattermoe_lora_shapes(w, *wrong)


def test_under_autocast_the_sum_is_narrow_and_gradients_are_wide(device):
    kind = torch.device(device).type
    index = torch.tensor([[0, 2], [3, 1]], device=device)
    triple = compat.flatten_sort_count(index, EXPERTS)
    leaves = [
        drawn(2, HIDDEN, device=device), drawn(EXPERTS, HIDDEN, INNER, device=device),
        drawn(EXPERTS * RANK, HIDDEN, device=device), drawn(INNER, EXPERTS * RANK, device=device),
        torch.tensor([[0.5, 1.0], [2.0, 0.25]], device=device),
    ]  # fmt: skip
    x, w, a, b, gates = (leaf.requires_grad_() for leaf in leaves)
    with torch.autocast(kind, dtype=torch.bfloat16):
        out = compat.parallel_linear_lora(x, w, TOP_K, *triple, a, b, SCALING, gates=gates)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert {grad.dtype for grad in grads} == {torch.float32}
    assert all(grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("shape", [(8, 16), (4, 8)], ids=["two blocks each", "block of two"])
def test_packed_experts_whose_state_is_flat(device, shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    flat = torch.randn(4 * shape[0] * shape[1], device=device, dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(
        flat, blocksize=64, quant_type="nf4", compress_statistics=False
    )
    active = torch.tensor([3, 1], device=device)
    select = importlib.import_module(f"{compat.__name__}.selective_dequant")
    got = select._selective_dequant_bnb4(packed, state, active, shape)
    nibbles = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], 1).reshape(-1).long()
    values = state.code[nibbles].reshape(-1, 64) * state.absmax.unsqueeze(1)
    assert torch.equal(got, values.reshape(4, *shape)[active].to(torch.bfloat16))
    with pytest.raises(ValueError, match="not a multiple of 63"):
        select._selective_dequant_bnb4(packed, state, active, (7, 9))


def sigmoid_block(**changes):
    block = {"top_k": TOP_K, "n_routed_experts": EXPERTS, "norm_topk_prob": True}
    return SimpleNamespace(**(block | changes))


def test_the_correction_bias_chooses_but_does_not_weigh():
    weight, hidden = torch.eye(EXPERTS), torch.randn(TOKENS, EXPERTS)
    bias = torch.zeros(EXPERTS)
    bias[4] = 2.0
    p = hidden.sigmoid()
    for block, gate in (
        (sigmoid_block(e_score_correction_bias=bias), SimpleNamespace()),
        (sigmoid_block(), SimpleNamespace(e_score_correction_bias=bias)),
    ):
        weights, experts, top_k, count = layers._route(block, gate, hidden, weight, None)
        assert (top_k, count) == (TOP_K, EXPERTS)
        assert (experts == 4).any(1).all()
        kept = p.gather(1, experts)
        torch.testing.assert_close(weights, kept / kept.sum(1, keepdim=True))
    block.norm_topk_prob, block.routed_scaling_factor = False, 3.0
    torch.testing.assert_close(
        layers._sigmoid_topk_route(block, gate, hidden, weight, None)[0], 3 * kept
    )
    delta = torch.zeros(EXPERTS, EXPERTS)
    delta[4] = -100.0
    moved = layers._sigmoid_topk_route(block, gate, hidden.abs(), weight, delta)
    kept = (hidden.abs() + hidden.abs() @ delta.T).sigmoid().gather(1, moved[1])
    torch.testing.assert_close(moved[0], 3 * kept)


def test_experts_come_from_the_best_groups():
    hidden = torch.randn(40, EXPERTS)
    gate, weight = SimpleNamespace(), torch.eye(EXPERTS)
    block = sigmoid_block(n_group=3, topk_group=1)
    experts = layers._sigmoid_topk_route(block, gate, hidden, weight, None)[1]
    best = hidden.sigmoid().unflatten(1, (3, 2)).sum(-1).argmax(1)
    assert torch.equal(experts // 2, best.unsqueeze(1).expand(-1, TOP_K))
    free, unstated = (
        layers._sigmoid_topk_route(sigmoid_block(n_group=groups), gate, hidden, weight, None)[1]
        for groups in (1, 3)
    )
    assert torch.equal(free, unstated)


@pytest.mark.parametrize("normalised", [True, False])
def test_softmax_weights(normalised):
    hidden, weight = torch.randn(TOKENS, EXPERTS), torch.eye(EXPERTS)
    gate = SimpleNamespace(top_k=TOP_K, num_experts=EXPERTS, norm_topk_prob=normalised)
    weights, experts, *_ = layers._route(SimpleNamespace(), gate, hidden, weight, None)
    kept = hidden.softmax(1).gather(1, experts)
    torch.testing.assert_close(weights, kept / kept.sum(1, keepdim=True) if normalised else kept)
    named = {
        "hidden_states": hidden, "gate_weight": weight, "gate_lora_delta": weight,
        "moe_block": SimpleNamespace(), "base_gate": gate,
    }  # fmt: skip
    steeper = (2 * hidden).softmax(1)
    for router in (layers._route, layers._softmax_topk_route):
        kept = steeper.gather(1, router(**named)[1])
        want = kept / kept.sum(1, keepdim=True) if normalised else kept
        torch.testing.assert_close(router(**named)[0], want)
    for unknown in (SimpleNamespace(n_group=2), SimpleNamespace(moe_statics=0)):
        with pytest.raises(ValueError, match="leaves routing to the model"):
            layers._route(unknown, gate, hidden, weight, None)


def test_shared_experts_pass_their_gate():
    hidden = torch.randn(TOKENS, HIDDEN)
    assert layers._compute_shared_expert(SimpleNamespace(), hidden) is None
    for name in ("shared_expert", "shared_experts", "shared_mlp"):
        block = SimpleNamespace(**{name: lambda x: 2 * x})
        assert torch.equal(layers._compute_shared_expert(block, hidden), 2 * hidden)
        block.shared_expert_gate = lambda x: torch.zeros(len(x), 1)
        assert torch.equal(layers._compute_shared_expert(block, hidden), hidden)


def test_both_projections_of_peft_are_laid_out_alike():
    peft_a, peft_b = drawn(EXPERTS * RANK, HIDDEN), drawn(INNER, EXPERTS * RANK, seed=6)
    want = compat.peft_lora_to_scattermoe(peft_a, peft_b, EXPERTS, RANK)
    down = compat.peft_down_proj_lora_to_scattermoe(peft_a, peft_b, EXPERTS, RANK)
    *factors, scaling = compat._convert_smoe_lora(peft_a, peft_b, EXPERTS, RANK, SCALING)
    assert scaling == SCALING
    for got in (down, factors):
        assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


def test_shards_share_what_any_of_them_decodes():
    module = torch.nn.Module()
    module.up = torch.nn.Parameter(drawn(EXPERTS, INNER, HIDDEN))
    shards = [torch.tensor(ids) for ids in ([0, 3, 3], [3, 5], [1], [0, 0, 5, EXPERTS])]
    union, dense, positions = compat.shared_dequant_across_shards(module, "up", shards, EXPERTS)
    assert union.tolist() == [0, 1, 3, 5]
    assert torch.equal(dense, module.up[union])
    for ids, position in zip(shards, positions, strict=True):
        active = compat.get_active_experts(ids, EXPERTS)
        alone = compat.selective_expert_weights(module, "up", active)
        assert position.dtype == torch.int64
        assert torch.equal(dense[position], alone)
    with pytest.raises(ValueError, match="at least 1 shard, got 0"):
        compat.shared_dequant_across_shards(module, "up", [], EXPERTS)


def gated(x, choice, gate_up, down):
    """sum over choices of weight down[e] (silu(g) u), (g, u) = gate_up[e] x, in fp64."""
    weights, experts = (part.cpu() for part in choice[:2])
    x, gate_up, down = (part.detach().cpu().double() for part in (x, gate_up, down))
    out = torch.zeros_like(x)
    for t, j in torch.cartesian_prod(*map(torch.arange, experts.shape)).tolist():
        g, u = (gate_up[experts[t, j]] @ x[t]).chunk(2)
        out[t] += weights[t, j].double() * (down[experts[t, j]] @ (torch.nn.functional.silu(g) * u))
    return out


def test_blocks_are_their_routing_and_their_experts(device):
    hidden = torch.randn(1, TOKENS, HIDDEN, device=device)
    gate_up = torch.randn(EXPERTS, 2 * INNER, HIDDEN, device=device) / HIDDEN**0.5
    down = torch.randn(EXPERTS, HIDDEN, INNER, device=device) / INNER**0.5
    act = torch.nn.functional.silu
    gate = SimpleNamespace(
        weight=torch.randn(EXPERTS, HIDDEN, device=device), top_k=TOP_K, num_experts=EXPERTS
    )
    experts = SimpleNamespace(gate_up_proj=gate_up, down_proj=down, act_fn=act)
    block = SimpleNamespace(gate=gate, experts=experts)
    choice = layers._route(block, gate, hidden[0], gate.weight, None)
    want = gated(hidden[0], choice, gate_up, down).to(device)
    got = layers.HFScatterMoEGatedMLP.forward(block, hidden)
    # fp32 sums of HIDDEN and of INNER products, one after the other, and of TOP_K rows.
    bound = (HIDDEN + INNER + TOP_K) * torch.finfo(torch.float32).eps
    assert got.shape == hidden.shape
    assert relative(got[0], want) <= bound
    block.shared_mlp = lambda x: 0.5 * x
    shared = layers.HFScatterMoEGatedMLP.forward(block, hidden)
    assert relative(shared[0], want + 0.5 * hidden[0].double()) <= bound
    plain = layers.ScatterMoEGatedMLP()
    plain.router = SimpleNamespace(
        layer=lambda x: x @ gate.weight.mT, top_k=TOP_K, num_experts=EXPERTS
    )
    plain.input_linear, plain.output_linear = (SimpleNamespace(weight=w) for w in (gate_up, down))
    plain.activation = act
    assert relative(plain(hidden)[0], want) <= bound
    experts.is_transposed = True
    with pytest.raises(ValueError, match="has is_transposed=True, and False is known"):
        layers.HFScatterMoEGatedMLP.forward(block, hidden)


@pytest.mark.parametrize(
    ("name", "activation"),
    [("MLP", torch.nn.functional.gelu), ("GLUMLP", torch.nn.functional.silu)],
)
def test_blocks_have_no_bias_and_the_former_activation_unless_told(name, activation):
    block = getattr(compat.mlp, name)(8, 4, 3, 2)
    assert block.activation is activation
    assert block.experts.bias is block.output_experts.bias is None


@pytest.mark.parametrize(("name", "widening"), [("MLP", 1), ("GLUMLP", 2)])
def test_blocks_that_are_given_their_routing(device, name, widening):
    made, sizes, biased = getattr(compat.mlp, name), (HIDDEN, INNER, EXPERTS, TOP_K), False
    with pytest.raises(TypeError, match="bias must be a bool, got ReLU"):
        made(*sizes, torch.nn.ReLU())
    assert set(made(*sizes, bias=True).state_dict()) == {
        f"{part}.{kind}" for part in ("experts", "output_experts") for kind in ("weight", "bias")
    }
    block = made(*sizes, biased, torch.relu).to(device)
    x = torch.randn(TOKENS, HIDDEN, device=device)
    p, chosen = torch.rand(TOKENS, EXPERTS, device=device).topk(TOP_K)
    up, down = (part.weight.detach().double() for part in (block.experts, block.output_experts))
    assert up.shape == (EXPERTS, widening * INNER, HIDDEN)
    h = torch.einsum("th,tkih->tki", x.double(), up[chosen])
    h = h[..., :INNER] * h[..., INNER:].relu() if widening == 2 else h.relu()
    want = torch.einsum("tk,tki,tkhi->th", p.double(), h, down[chosen])
    # Worst case of three sums one after the other; a product of two rows counts the first twice.
    bound = (2 * HIDDEN + INNER + TOP_K) * torch.finfo(torch.float32).eps
    assert relative(block(x, p, chosen).detach(), want) <= bound
    with pytest.raises(ValueError, match="chooses 1 experts per token, top_k is 2"):
        block(x, p[:, :1], chosen[:, :1])


def test_adapters_are_found_behind_the_wrappers_of_peft(device):
    peft = pytest.importorskip("peft")
    olmoe = pytest.importorskip("transformers.models.olmoe.modeling_olmoe")
    config = olmoe.OlmoeConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_experts=EXPERTS,
        num_experts_per_tok=TOP_K, experts_implementation="eager",
    )  # fmt: skip
    block = olmoe.OlmoeSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    assert layers._unwrap_gate_lora(block.gate) == (block.gate, block.gate.weight, None)
    assert layers._unwrap_experts_lora(block.experts) == (block.experts, None, None)
    names = ["gate.weight", "experts.gate_up_proj", "experts.down_proj"]
    adapters = peft.LoraConfig(
        r=RANK, lora_alpha=3, target_modules=[], target_parameters=names, init_lora_weights=False
    )
    model = peft.get_peft_model(torch.nn.ModuleDict({"moe": block}), adapters).to(device)
    block = model.base_model.model["moe"]
    hidden = torch.randn(1, TOKENS, HIDDEN, device=device)
    with torch.no_grad():
        want = block(hidden)
        base, weight, delta = layers._unwrap_gate_lora(block.gate)
        experts, up, down = layers._unwrap_experts_lora(block.experts)
        got = layers.HFScatterMoEGatedMLP.forward(block, hidden)
    assert base is block.gate.base_layer
    assert torch.equal(weight, base.weight)
    assert delta.abs().sum() > 0
    assert experts is block.experts.base_layer.base_layer
    assert up[0].shape == (EXPERTS * RANK, HIDDEN)
    assert up[1].shape == (2 * INNER, EXPERTS * RANK)
    assert down[0].shape == (EXPERTS * RANK, INNER)
    assert up[2] == down[2] == 1.5
    # Both sides are fp32; sums of HIDDEN, RANK and INNER products and of TOP_K rows in each.
    bound = 2 * (HIDDEN + INNER + 2 * RANK + TOP_K) * torch.finfo(torch.float32).eps
    assert relative(got, want.double()) <= bound
    with model.disable_adapter(), torch.no_grad():
        assert layers._unwrap_experts_lora(block.experts)[1:] == (None, None)
        bare = layers.HFScatterMoEGatedMLP.forward(block, hidden)
        assert relative(bare, block(hidden).double()) <= bound
    assert relative(bare, want.double()) > 100 * bound


def test_experts_under_their_former_implementation(monkeypatch):
    moe = pytest.importorskip("transformers.integrations.moe")
    former = importlib.import_module(f"{compat.__name__}.experts")
    present = importlib.import_module("scattermoe_lora.integrations.transformers")
    table = dict(moe.ExpertsInterface._global_mapping)
    monkeypatch.setattr(moe.ExpertsInterface, "_global_mapping", table)
    before = table.copy()
    for _ in range(2):
        former.register_scattermoe_experts()
    assert moe.ALL_EXPERTS_FUNCTIONS["scattermoe"] is former.scattermoe_experts_forward
    assert former.scattermoe_experts_forward is present.experts_forward
    assert table == before | {"scattermoe": present.experts_forward}
