"""Layouts of adapters and of experts modules, exactly: what other layouts' values mean here."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import scattermoe_lora as sm
from scattermoe_lora.integrations import _experts, _factors
from scattermoe_lora.quant import Dense, StoredWeight

pytestmark = pytest.mark.correctness

EXPERTS, RANK, K, N = 3, 2, 4, 5


def numbers(*shape: int) -> torch.Tensor:
    """Different integers at every place."""
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)


def delta(lora: sm.LoRAWeights) -> torch.Tensor:
    """scaling (B A)^T of every expert: [experts, k_in, n_out]."""
    return lora.scaling * torch.einsum("erk,enr->ekn", lora.a, lora.b)


def test_flat_factors_are_expert_major():
    lora = sm.LoRAWeights.from_flat(
        numbers(EXPERTS * RANK, K), numbers(N, EXPERTS * RANK), experts=EXPERTS, scaling=0.5
    )
    assert lora.a[1, 1, 2] == numbers(EXPERTS * RANK, K)[1 * RANK + 1, 2]
    assert lora.b[2, 3, 1] == numbers(N, EXPERTS * RANK)[3, 2 * RANK + 1]
    assert (lora.experts, lora.rank, lora.scaling) == (EXPERTS, RANK, 0.5)


def test_a_single_expert_has_flat_factors_too():
    a, b = numbers(RANK, K), numbers(N, RANK)
    lora = sm.LoRAWeights.from_flat(a, b, experts=1, scaling=2.0)
    assert torch.equal(delta(lora), 2.0 * (b @ a).mT[None])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_factors_of_peft_give_pefts_delta(swapped, transposed):
    """PEFT's own formulas: lora_A [E R, a] by expert, lora_B [b, R E] with the expert fastest."""
    first, second = (K, N) if swapped != transposed else (N, K)
    lora_a, lora_b = numbers(EXPERTS * RANK, first), numbers(second, RANK * EXPERTS)
    stored_a, stored_b = lora_a.reshape(EXPERTS, RANK, first), lora_b.reshape(second, RANK, EXPERTS)
    want = 0.5 * torch.einsum("ore,eri->eio", stored_b, stored_a)
    if swapped == transposed:
        want = want.mT
    lora = sm.LoRAWeights.from_peft(
        lora_a, lora_b, experts=EXPERTS, scaling=0.5, swapped=swapped, transposed=transposed
    )
    assert torch.equal(delta(lora), want)
    back = _factors.to_peft(lora, swapped=swapped, transposed=transposed)
    assert torch.equal(back[0], lora_a)
    assert torch.equal(back[1], lora_b)


def part(rank: int, scaling: float, seed: int, dtype=torch.float32) -> sm.LoRAWeights:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randint(-3, 4, shape, generator=generator).to(dtype)

    return sm.LoRAWeights(a=drawn(EXPERTS, rank, K), b=drawn(EXPERTS, N, rank), scaling=scaling)


@pytest.mark.parametrize(
    "scalings", [(2.0, 2.0), (2.0, 0.5), (0.0, 0.5), (0.0, 0.0), (0.5, 0.0)], ids=str
)
def test_adapters_as_one_add_up(scalings):
    parts = [part(rank, scaling, rank) for rank, scaling in zip((2, 3), scalings, strict=True)]
    one = _factors.combined(parts)
    assert one.rank == 5
    assert torch.equal(delta(one), sum(delta(each) for each in parts))


def test_one_adapter_and_none_are_taken_as_they_are():
    only = part(2, 3.0, 1)
    assert _factors.combined([only]) is only
    assert _factors.combined([]) is None


def test_adapters_of_one_dtype_and_scaling_keep_it():
    half = [part(2, 2.0, seed, torch.bfloat16) for seed in (1, 2)]
    assert _factors.combined(half).a.dtype == torch.bfloat16
    for other in (part(2, 1.0, 3, torch.bfloat16), part(2, 2.0, 3)):
        assert _factors.combined([half[0], other]).b.dtype == torch.float32


def wrapper(**changes):
    parts = {"one": part(RANK, 2.0, 1), "two": part(RANK, 0.5, 2)}
    factors = {
        name: _factors.to_peft(lora, swapped=True, transposed=False) for name, lora in parts.items()
    }
    facts = {
        "lora_A": {name: SimpleNamespace(weight=a) for name, (a, _) in factors.items()},
        "lora_B": {name: SimpleNamespace(weight=b) for name, (_, b) in factors.items()},
        "scaling": {name: lora.scaling for name, lora in parts.items()},
        "num_experts": EXPERTS,
        "parameter_name": "up_proj",
        "disable_adapters": False,
        "merged": False,
        "active_adapters": ["one"],
        "_did_swap_in_out_features": True,
    }
    return SimpleNamespace(**{**facts, **changes}), parts


def test_active_adapters_are_those_that_the_wrapper_has():
    for names in (["one"], ["two"], ["two", "one"], ["one", "elsewhere"]):
        found, parts = wrapper(active_adapters=names)
        one = _factors.active_factors(found, transposed=False)
        assert torch.equal(delta(one), sum(delta(parts[n]) for n in names if n in parts))


@pytest.mark.parametrize(
    "facts", [{"disable_adapters": True}, {"merged": True}, {"active_adapters": ["elsewhere"]}]
)
def test_no_adapter_counts_that_is_off_merged_or_elsewhere(facts):
    assert _factors.active_factors(wrapper(**facts)[0], transposed=False) is None


def test_a_wrapper_that_says_nothing_did_not_swap():
    assert not _factors.wrapper_swaps(SimpleNamespace())
    assert _factors.wrapper_swaps(wrapper()[0])


@pytest.mark.parametrize(
    ("version", "plain", "transposed"),
    [
        ("0.18.1", False, False),
        ("0.19.0", False, True),
        ("0.19.1", True, False),
        ("0.20", True, False),
        ("1.0.0.dev0", True, False),
        ("0.19.1+local", True, False),
        ("0.19.1rc1", True, False),
    ],
)
def test_versions_of_peft_swap_as_they_do(version, plain, transposed):
    assert _factors.version_swaps(version, transposed=False) is plain
    assert _factors.version_swaps(version, transposed=True) is transposed


def test_what_is_no_version_is_refused():
    with pytest.raises(ValueError, match="'main' is not a version"):
        _factors.version_swaps("main", transposed=False)


BAD_FLAT = {
    "A of 3 dimensions": (numbers(1, 6, 4), numbers(5, 6), "2"),
    "ranks differ": (numbers(6, 4), numbers(5, 9), "6"),
    "ranks do not divide": (numbers(7, 4), numbers(5, 7), "3"),
}


@pytest.mark.parametrize("name", BAD_FLAT)
def test_flat_factors_that_do_not_fit_are_refused(name):
    lora_a, lora_b, word = BAD_FLAT[name]
    with pytest.raises(ValueError, match=word):
        sm.LoRAWeights.from_flat(lora_a, lora_b, experts=EXPERTS, scaling=1.0)


BAD_FACTORS = {
    "integers": ({"a": numbers(3, 2, 4).long()}, TypeError, "lora.a must be floating point"),
    "a matrix": ({"b": numbers(5, 2)}, ValueError, "lora.b must have 3 dimensions"),
    "experts": ({"b": numbers(2, 5, 2)}, ValueError, "3 experts but lora.b has 2"),
    "ranks": ({"b": numbers(3, 5, 3)}, ValueError, "rank 2 but lora.b has rank 3"),
    "rank 0": ({"a": torch.ones(3, 0, 4), "b": torch.ones(3, 5, 0)}, ValueError, "got 0"),
    "dtypes": ({"b": numbers(3, 5, 2).half()}, TypeError, "lora.b is torch.float16"),
    "devices": ({"b": torch.ones(3, 5, 2, device="meta")}, ValueError, "lora.b is on meta"),
    "scaling": ({"scaling": float("inf")}, ValueError, "scaling must be finite"),
    "no number": ({"scaling": float("nan")}, ValueError, "scaling must be finite"),
}


@pytest.mark.parametrize("name", BAD_FACTORS)
def test_factors_that_do_not_fit_are_refused(name):
    changes, error, words = BAD_FACTORS[name]
    right = {"a": numbers(3, 2, 4), "b": numbers(3, 5, 2), "scaling": 1.0}
    assert sm.LoRAWeights(**right).rank == 2
    with pytest.raises(error, match=words):
        sm.LoRAWeights(**{**right, **changes})


class Experts(nn.Module):
    """What the decorator of transformers leaves on an experts module."""

    def __init__(self, *, stacks=True, **flags):
        super().__init__()
        for name, value in flags.items():
            setattr(self, name, value)
        if stacks:
            self.gate_up_proj = nn.Parameter(numbers(2, 8, 3))
            self.down_proj = nn.Parameter(numbers(2, 3, 4))


FLAGS = {"is_transposed": False, "has_gate": True}


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({}, ("gate_up_proj", True, False, False, False)),
        ({"has_gate": False}, ("up_proj", False, False, False, False)),
        ({"is_transposed": True}, ("gate_up_proj", True, True, False, False)),
        ({"is_concatenated": False}, ("gate_up_proj", True, False, True, False)),
        ({"is_concatenated": True, "has_bias": True}, ("gate_up_proj", True, False, False, True)),
    ],
)
def test_flags_of_an_experts_module_say_its_layout(flags, wanted):
    layout = _experts.ExpertsLayout.of(Experts(**{**FLAGS, **flags}))
    found = (layout.up, layout.gated, layout.transposed, layout.interleaved, layout.biased)
    assert found == wanted
    assert layout.projections == (wanted[0], "down_proj")


def test_modules_of_experts_are_found_by_their_flags_or_refused():
    model = nn.Sequential(nn.Linear(2, 2), Experts(**FLAGS))
    assert list(_experts.experts_modules(model)) == ["1"]
    for wrong, words in (
        (Experts(), "no is_transposed and has_gate"),
        (Experts(is_transposed=True), "no is_transposed and has_gate"),
        (Experts(**FLAGS, has_post_expert_norm=True), "normalises the output"),
    ):
        with pytest.raises(_experts.UnsupportedExpertsError, match=words):
            _experts.experts_modules(nn.Sequential(wrong))
    with pytest.raises(ValueError, match="Sequential holds no experts"):
        _experts.experts_modules(nn.Sequential(nn.Linear(2, 2)))
    two_dimensions = nn.Linear(2, 2)
    two_dimensions.register_parameter("down_proj", nn.Parameter(torch.ones(2, 2)))
    with pytest.raises(ValueError, match="holds no experts"):
        _experts.experts_modules(nn.Sequential(two_dimensions))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_dense_weight_is_a_view_of_its_parameter(transposed):
    module = Experts(**{**FLAGS, "is_transposed": transposed})
    layout = _experts.ExpertsLayout.of(module)
    weight, dtype = _experts.projection_weight(module, "gate_up_proj", layout)
    parameter = module.gate_up_proj
    assert dtype == torch.float32
    assert torch.equal(weight, parameter if transposed else parameter.mT)
    assert weight.data_ptr() == parameter.data_ptr()
    assert weight.requires_grad


def test_biases_are_those_of_the_projection():
    module = Experts(**FLAGS, has_bias=True)
    module.gate_up_proj_bias, module.down_proj_bias = numbers(2, 8), numbers(2, 3)
    layout = _experts.ExpertsLayout.of(module)
    assert _experts.bias_of(module, "down_proj", layout) is module.down_proj_bias
    assert _experts.bias_of(module, "gate_up_proj", layout) is module.gate_up_proj_bias
    assert (
        _experts.bias_of(module, "down_proj", _experts.ExpertsLayout.of(Experts(**FLAGS))) is None
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("ids", [None, [2, 0]])
def test_stored_experts_come_in_blocks_of_one_buffer(transposed, ids):
    data = numbers(4, 3, 8).double()
    chosen = None if ids is None else torch.tensor(ids)
    stack = StoredWeight(
        stored=Dense(data=data), transposed=transposed, budget_bytes=4 * 3 * 8 + 1, ids=chosen
    )
    count = 4 if ids is None else 2
    assert stack.shape == ((count, 8, 3) if transposed else (count, 3, 8))
    want = data.float() if ids is None else data.float()[chosen]
    places, buffers = [], set()
    for first, block in stack.blocks(torch.float32):
        places.append(first)
        buffers.add(block.data_ptr())
        assert torch.equal(
            block, want[first : first + 1].mT if transposed else want[first : first + 1]
        )
        assert not block.requires_grad
    assert places == list(range(count))
    assert len(buffers) == 1
    assert [b.shape for _, b in stack.mT.blocks(torch.float32)] == [
        torch.Size((1, *stack.shape[:0:-1]))
    ] * count
    assert stack.select(torch.tensor([3])).shape[0] == 1


def test_dense_experts_of_the_asked_dtype_are_handed_out_as_they_are():
    data = numbers(4, 3, 8)
    whole = StoredWeight(stored=Dense(data=data), transposed=False)
    ((first, block),) = whole.blocks(torch.float32)
    assert (first, block.data_ptr()) == (0, data.data_ptr())
    strided = StoredWeight(stored=Dense(data=numbers(4, 8, 3).mT), transposed=False)
    ((_, block),) = strided.blocks(torch.float32)
    assert block.is_contiguous()
    assert torch.equal(block, numbers(4, 8, 3).mT)


@pytest.mark.parametrize(("width", "word"), [(8, "nk"), (7, ""), (16, "nk"), (12, "")])
def test_tensor_maps_need_rows_of_16_bytes(width, word):
    stack = StoredWeight(stored=Dense(data=numbers(2, 3, width)), transposed=True)
    assert stack.map == word
    assert stack.mT.map == {"nk": "kn", "": ""}[word]
