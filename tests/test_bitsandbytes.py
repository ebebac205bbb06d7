"""4-bit experts: packed while loading or afterwards, saved, trained with adapters, merged."""

import copy
import gc
import weakref

import hf_models
import pytest
import torch

pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

import bitsandbytes
import plain_layer
import transformers
from plain_layer import decoding_on_the_cpu, references, where_products_run  # noqa: F401
from test_peft import adapted, merged_by_hand, ours, wrappers
from torch.utils._python_dispatch import TorchDispatchMode

import scattermoe_lora.integrations.transformers as layer
from scattermoe_lora.integrations import _experts, _four_bit
from scattermoe_lora.integrations import bitsandbytes as packing
from scattermoe_lora.integrations import peft as adapters

pytestmark = pytest.mark.hf

NAMES = ("gate_up_proj", "down_proj")


def parametrised(module, name):
    """Packed bytes and state, from bitsandbytes' own attributes."""
    entries = module.parametrizations[name]
    return entries.original, entries[0].quant_state


def decoded(module, name):
    """The dense stack by bitsandbytes, flattened: short rows go wrong on AVX-512 CPUs."""
    packed, state = parametrised(module, name)
    flat = copy.copy(state)
    flat.shape = torch.Size([1, state.shape.numel()])
    return bitsandbytes.functional.dequantize_4bit(packed, flat).reshape(state.shape)


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same_state(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(bits(value), bits(other[name])), name


def loaded(path, *, dtype=torch.bfloat16, **settings):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, experts_implementation=layer.KEY, **settings
    )


@pytest.fixture
def saved(tmp_path):
    """A family's model on disk, dense."""

    def save(family, dtype=torch.bfloat16):
        model = hf_models.tiny_model(family, dtype=dtype)
        model.save_pretrained(tmp_path / "dense")
        return model, tmp_path / "dense"

    return save


@pytest.mark.correctness
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_loading_packs_what_bitsandbytes_would_pack(family, nested, saved):
    dense, path = saved(family)
    config = packing.ExpertsQuantizationConfig(bnb_4bit_use_double_quant=nested)
    model = loaded(path, quantization_config=config)
    (experts,), (reference,) = hf_models.experts_of(model), hf_models.experts_of(dense)
    for name in NAMES:
        packed, state = parametrised(experts, name)
        expected, expected_state = bitsandbytes.functional.quantize_4bit(
            getattr(reference, name).data.to(packed.device),
            quant_type="nf4",
            compress_statistics=nested,
        )
        assert torch.equal(packed, expected)
        assert torch.equal(bits(state.absmax), bits(expected_state.absmax))
        assert not packed.requires_grad
    assert type(model.model.layers[0].self_attn.o_proj).__name__ == "Linear4bit"


@pytest.mark.correctness
@pytest.mark.parametrize("linears", [False, True], ids=["experts", "all"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_saving_and_loading_keeps_every_bit(family, nested, linears, saved, tmp_path):
    _, path = saved(family)
    config = packing.ExpertsQuantizationConfig(linears=linears, bnb_4bit_use_double_quant=nested)
    model = loaded(path, quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    read = loaded(tmp_path / "packed")
    same_state(model.state_dict(), read.state_dict())
    read.save_pretrained(tmp_path / "again")
    same_state(model.state_dict(), loaded(tmp_path / "again").state_dict())


@pytest.mark.correctness
def test_packing_a_loaded_model_equals_packing_while_loading(saved, tmp_path):
    model, path = saved("qwen3_moe")
    there = packing.local_device()
    report = packing.quantize_experts(model.to(there))
    config = packing.ExpertsQuantizationConfig(linears=False)
    same_state(model.state_dict(), loaded(path, quantization_config=config).state_dict())
    dense = hf_models.tiny_model("qwen3_moe", dtype=torch.bfloat16).to(there)
    for row, name in zip(report.rows, NAMES, strict=True):
        truth = getattr(hf_models.experts_of(dense)[0], name).double()
        got = decoded(hf_models.experts_of(model)[0], name).double()
        # The report decodes to fp32, bitsandbytes to the dtype of the stack.
        rounding = torch.finfo(torch.bfloat16).eps
        assert abs(row.relative_error - float((got - truth).norm() / truth.norm())) < rounding
        assert row.bytes_after < row.bytes_before / 3
    assert packing.quantize_experts(model).rows == ()
    model.save_pretrained(tmp_path / "packed")
    same_state(model.state_dict(), loaded(tmp_path / "packed").state_dict())


class Peak(TorchDispatchMode):
    """The most bytes that tensors made under it held at once, beside those of `model`."""

    def __init__(self, model=None):
        super().__init__()
        here = [] if model is None else model.state_dict().values()
        self.storages = {value.untyped_storage()._cdata for value in here}
        self.alive, self.peak = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                self.count(value.untyped_storage())
        return result

    def count(self, storage):
        key = storage._cdata
        if key in self.storages or not storage.nbytes():
            return
        self.storages.add(key)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self.gone, key, storage.nbytes())

    def gone(self, key, size):
        self.storages.discard(key)
        self.alive -= size


def many_experts(**settings):
    """A model whose experts are small beside a stack, and the bytes of its largest stack."""
    model = hf_models.tiny_model(
        "qwen3_moe", dtype=torch.bfloat16, num_hidden_layers=3, num_experts=64, **settings
    )
    return model, max(
        getattr(module, name).nbytes for module in hf_models.experts_of(model) for name in NAMES
    )


@pytest.mark.correctness
def test_packing_needs_no_more_than_one_dense_stack(monkeypatch):
    model, stack = many_experts()
    monkeypatch.setattr(_four_bit, "PACKED_ELEMENTS", stack // 64)
    gc.collect()
    with Peak(model) as peak:
        report = packing.quantize_experts(model)
    packed = sum(row.bytes_after for row in report.rows)
    assert packed <= peak.peak <= packed + stack


@pytest.mark.correctness
def test_loading_holds_one_stack_and_what_transformers_makes_it_of(tmp_path):
    model, stack = many_experts()
    model.save_pretrained(tmp_path)
    del model
    gc.collect()
    config = packing.ExpertsQuantizationConfig(linears=False)
    with Peak() as peak:
        model = loaded(tmp_path, quantization_config=config)
    kept = sum(value.nbytes for value in model.state_dict().values())
    assert kept < peak.peak <= kept + 2 * stack


@pytest.mark.gpu
def test_loading_onto_a_device_holds_one_dense_stack_there(tmp_path, device):
    model, stack = many_experts(moe_intermediate_size=512)
    model.save_pretrained(tmp_path)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    config = packing.ExpertsQuantizationConfig(linears=False)
    model = loaded(tmp_path, quantization_config=config, device_map="auto")
    kept = torch.cuda.memory_allocated() - before
    assert torch.cuda.max_memory_allocated() - before <= kept + stack
    assert {value.device.type for value in model.parameters()} == {"cuda"}


@pytest.mark.correctness
def test_one_device_unless_a_framework_places_parameters():
    device = torch.device("cuda", 3)
    for asked in (None, "auto"):
        assert packing.placement(asked, device=device, sharded=False) == {"": device}
        assert packing.placement(asked, device=device, sharded=True) == asked
    chosen = {"model.layers.0": 0, "model.layers.1": 1}
    assert packing.placement(chosen, device=device, sharded=False) == chosen
    assert packing.placement("balanced", device=device, sharded=False) == "balanced"
    assert packing.local_device() == torch.device("cpu") or torch.cuda.is_available()


def states(model):
    return [
        parametrised(module, name)[1] for module in hf_models.experts_of(model) for name in NAMES
    ]


@pytest.mark.correctness
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_packed_experts_move_with_the_model(nested):
    # The meta device stands for another one: `Module.to` moves bytes and leaves bitsandbytes'
    # states behind.
    model = hf_models.tiny_model("qwen3_moe")
    packing.quantize_experts(model, nested=nested)
    model.set_experts_implementation(layer.KEY)
    model.to("meta")
    assert {state.absmax.device.type for state in states(model)} == {"cpu"}
    for name in NAMES:
        stored = _experts.stored_weight(hf_models.experts_of(model)[0], name)
        assert stored.device.type == stored.absmax.device.type == "meta"
    for state in states(model):
        parts = [state.code, state.absmax]
        parts += [state.offset, state.state2.code, state.state2.absmax] if nested else []
        assert {part.device.type for part in parts} == {"meta"}


@pytest.mark.gpu
def test_experts_packed_on_the_cpu_run_on_a_gpu(device):
    model = hf_models.tiny_model("qwen3_moe")
    there = copy.deepcopy(model).to(device)
    ids = hf_models.tokens().to(device)
    logits = []
    for each in (model, there):
        packing.quantize_experts(each, nested=True)
        each.set_experts_implementation(layer.KEY)
        attached = ours(adapted(each)).to(device)
        adapters.merge(attached, requantize=True)
        adapters.unmerge(attached)
        logits.append(attached(input_ids=ids).logits)
    # Both quantisers may differ by a code where a value is half-way between two.
    step = (logits[0] - logits[1]).norm() / logits[1].norm()
    assert step < 0.1


@pytest.mark.correctness
@pytest.mark.usefixtures("decoding_on_the_cpu")
def test_a_base_kept_elsewhere_comes_back_to_where_the_model_is():
    model = hf_models.tiny_model("olmoe")
    packing.quantize_experts(model)
    model = ours(adapted(model))
    adapters.merge(model)
    model.to("meta")
    adapters.unmerge(model)
    (experts,) = hf_models.experts_of(model.get_base_model())
    for name in NAMES:
        assert parametrised(experts, name)[0].device.type == "meta"


@pytest.mark.parametrize(
    ("family", "place"),
    [
        *(
            pytest.param(family, "references", marks=pytest.mark.correctness)
            for family in hf_models.FAMILIES
        ),
        pytest.param("qwen3_moe", "kernels", marks=pytest.mark.correctness),
        pytest.param("gpt_oss", "kernels", marks=pytest.mark.correctness),
        *((f, "kernels") for f in hf_models.FAMILIES if f not in ("qwen3_moe", "gpt_oss")),
    ],
)
def test_adapters_on_packed_experts_are_those_on_the_decoded_ones(
    family, place, monkeypatch, device
):
    if place == "references":
        plain_layer.install(monkeypatch)
        device = torch.device("cpu")
    # PEFT itself is wrong on packed experts since 0.19.1, so it judges on the decoded ones.
    model = hf_models.tiny_model(family).to(device)
    dense = copy.deepcopy(model)
    packing.quantize_experts(model)
    with torch.no_grad():
        for name in NAMES:
            weight = decoded(hf_models.experts_of(model)[0], name)
            getattr(hf_models.experts_of(dense)[0], name).copy_(weight)
    dense, model = adapted(dense), ours(adapted(model))
    copy_adapters(dense, model)
    ids = hf_models.tokens().to(device)
    truth = hf_models.step(hf_models.eager(dense, dtype=torch.float64), ids)
    plain = hf_models.step(hf_models.eager(dense), ids)
    got = hf_models.step(model, ids)
    hf_models.assert_as_good(got, plain, truth)
    again = hf_models.step(model, ids)
    for name, value in got.items():
        assert torch.equal(again[name], value), name


def copy_adapters(source, target):
    """By name: attached wrappers are nested on packed experts as on dense ones."""
    values = {name: value for name, value in source.named_parameters() if "lora_" in name}
    taken = {name: value for name, value in target.named_parameters() if "lora_" in name}
    assert values.keys() == taken.keys()
    with torch.no_grad():
        for name, value in values.items():
            taken[name].copy_(value)


def read_by_us(model, path):
    return adapters.load_adapter(model, path)


def read_by_peft(model, path):
    try:
        return ours(adapters.PeftModel.from_pretrained(model, path))
    except TypeError as error:
        if "distributed_operation" not in str(error):
            raise
        pytest.skip(f"this PEFT cannot load adapters with this transformers: {error}")


@pytest.mark.correctness
@pytest.mark.parametrize("read", [read_by_us, read_by_peft])
def test_an_adapter_trained_on_packed_experts_loads_on_dense_ones(read, tmp_path):
    model = hf_models.tiny_model("olmoe")
    packing.quantize_experts(model)
    model = ours(adapted(model))
    model.save_pretrained(tmp_path)
    dense = hf_models.tiny_model("olmoe")
    dense.set_experts_implementation(layer.KEY)
    by_parameter = {wrapper.parameter_name: wrapper for wrapper in wrappers(model)}
    loaded_wrappers = wrappers(read(dense, tmp_path))
    assert len(loaded_wrappers) == len(by_parameter) == len(NAMES)
    for wrapper in loaded_wrappers:
        other = by_parameter[wrapper.parameter_name]
        assert torch.equal(wrapper.lora_A["default"].weight, other.lora_A["default"].weight)
        assert torch.equal(wrapper.lora_B["default"].weight, other.lora_B["default"].weight)


@pytest.mark.correctness
def test_a_short_target_finds_packed_experts(tmp_path):
    model = adapted(hf_models.tiny_model("olmoe"), targets=["experts.down_proj"])
    ours(model).save_pretrained(tmp_path)
    packed = hf_models.tiny_model("olmoe")
    packing.quantize_experts(packed)
    packed.set_experts_implementation(layer.KEY)
    report = adapters.coverage(adapters.load_adapter(packed, tmp_path, trainable=True))
    assert [bool(row.adapters) for row in report.rows] == [False, True]
    assert report.rows[1].storage == "FourBit float32"
    assert report.trainable > 0


@pytest.mark.correctness
def test_another_implementation_on_packed_experts_is_refused():
    model = hf_models.tiny_model("olmoe")
    packing.quantize_experts(model)
    model = ours(adapted(model))
    model.set_experts_implementation("eager")
    with pytest.raises(RuntimeError, match="PEFT drops or accumulates adapters"):
        model(input_ids=hf_models.tokens())


@pytest.mark.correctness
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
@pytest.mark.usefixtures("decoding_on_the_cpu")
def test_merging_into_packed_experts(family, nested, tmp_path):
    model = hf_models.tiny_model(family, dtype=torch.bfloat16)
    packing.quantize_experts(model, nested=nested)
    model = ours(adapted(model))
    (experts,) = hf_models.experts_of(model.get_base_model())
    before = {name: parametrised(experts, name)[0].clone() for name in NAMES}
    state = {name: bits(value).clone() for name, value in model.state_dict().items()}
    expected = {
        wrapper.parameter_name: merged_by_hand(fp32_of(experts, wrapper.parameter_name), wrapper)
        for wrapper in wrappers(model)
    }
    adapters.merge(model)
    for name in NAMES:
        assert torch.equal(getattr(experts, name), expected[name])
    with pytest.raises(ValueError, match="is dense although"):
        model.get_base_model().save_pretrained(tmp_path)
    adapters.unmerge(model)
    report = adapters.merge(model, requantize=True)
    for row in report.rows:
        merged, got = expected[row.parameter].double(), decoded(experts, row.parameter).double()
        error = float((got - merged).norm() / merged.norm())
        assert abs(row.requantization_error - error) < torch.finfo(torch.bfloat16).eps
        assert f"{row.requantization_error:.2e}" in str(report)
        assert not torch.equal(parametrised(experts, row.parameter)[0], before[row.parameter])
    adapters.unmerge(model)
    after = model.state_dict()
    assert after.keys() == state.keys()
    for name, value in after.items():
        assert torch.equal(bits(value), state[name]), name


@pytest.mark.correctness
@pytest.mark.usefixtures("references")
def test_a_copy_is_merged_apart_from_its_original():
    model = hf_models.tiny_model("olmoe")
    packing.quantize_experts(model)
    model = ours(adapted(model))
    copied, ids = copy.deepcopy(model), hf_models.tokens()
    expected = model(input_ids=ids).logits
    adapters.merge(copied)
    assert torch.equal(model(input_ids=ids).logits, expected)
    for each in (model, copied):
        for name in NAMES:
            assert getattr(hf_models.experts_of(each)[0], name).shape[0] == hf_models.EXPERTS
    adapters.merge(model)
    assert torch.equal(model(input_ids=ids).logits, copied(input_ids=ids).logits)
    for each in (model, copied):
        adapters.unmerge(each)
        assert torch.equal(each(input_ids=ids).logits, expected)


def fp32_of(experts, name):
    """The decoded stack in fp32, which the dtype of the experts has not rounded yet."""
    packed, state = parametrised(experts, name)
    exact = copy.copy(state)
    exact.dtype, exact.shape = torch.float32, torch.Size([1, state.shape.numel()])
    dense = bitsandbytes.functional.dequantize_4bit(packed, exact).reshape(state.shape)
    return Carrier(dense, state.dtype)


class Carrier:
    """fp32 values whose results are of another dtype."""

    def __init__(self, values, dtype):
        self.values, self.dtype = values, dtype

    def __getitem__(self, expert):
        return self.values[expert]

    def empty(self):
        return torch.empty(self.values.shape, dtype=self.dtype)


@pytest.mark.usefixtures("where")
def test_the_fine_tuners_example(saved, tmp_path):
    from peft import LoraConfig

    from scattermoe_lora.integrations.bitsandbytes import ExpertsQuantizationConfig
    from scattermoe_lora.integrations.loading import load_model
    from scattermoe_lora.integrations.peft import coverage, load_adapter, merge

    _, name = saved("qwen3_moe")
    model = load_model(
        name,
        quantization=ExpertsQuantizationConfig(),
        lora=LoraConfig(r=4, lora_alpha=8),
        dtype=torch.bfloat16,
    )
    assert "2 of 2 expert parameters adapted" in str(coverage(model))
    ids = hf_models.tokens().to(model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        trained = model(input_ids=ids).logits
    again = load_model(name, quantization=ExpertsQuantizationConfig(), dtype=torch.bfloat16)
    again = load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, trained)
    assert "quantised again with relative error" in str(merge(again, requantize=True))


@pytest.mark.correctness
def test_linear_layers_that_are_packed_already_are_saved_with_the_experts(saved, tmp_path):
    _, path = saved("qwen3_moe")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    model = loaded(path, quantization_config=config)
    packing.quantize_experts(model, nested=True)
    model.save_pretrained(tmp_path / "packed")
    same_state(model.state_dict(), loaded(tmp_path / "packed").state_dict())
