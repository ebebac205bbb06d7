"""4-bit experts in transformers: packing, slices, parts, settings of the format, refusals."""

import copy
from types import SimpleNamespace

import hf_models
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from bitsandbytes import functional
from plain_layer import references  # noqa: F401
from safetensors.torch import load_file, save_file
from test_bitsandbytes import bits, decoded, loaded, parametrised
from torch import nn
from torch.nn.utils import parametrize
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

from scattermoe_lora.integrations import _experts, _factors, _four_bit
from scattermoe_lora.integrations import bitsandbytes as packing
from scattermoe_lora.quant import Dense

pytestmark = [pytest.mark.correctness, pytest.mark.hf, pytest.mark.usefixtures("references")]

NAMES = ("gate_up_proj", "down_proj")
CPU = torch.device("cpu")


def stack(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def same(one, other):
    """Two states of bitsandbytes hold the same."""
    assert torch.equal(bits(one.absmax), bits(other.absmax))
    assert one.nested == other.nested
    assert (one.shape, one.dtype, one.blocksize) == (other.shape, other.dtype, other.blocksize)
    assert one.quant_type == other.quant_type
    if one.nested:
        assert torch.equal(bits(one.state2.absmax), bits(other.state2.absmax))
        assert torch.equal(one.offset, other.offset)
        assert one.state2.blocksize == other.state2.blocksize


@pytest.mark.parametrize("pieces", [1, 2, 100])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize(
    ("quant_type", "blocksize", "shape"),
    [("nf4", 64, (5, 16, 24)), ("fp4", 128, (6, 16, 16)), ("nf4", 64, (3, 6, 6))],
    ids=["nf4", "fp4", "straddling"],
)
def test_packing_in_pieces_is_packing_at_once(
    quant_type, blocksize, shape, nested, pieces, monkeypatch
):
    monkeypatch.setattr(_four_bit, "PACKED_ELEMENTS", pieces * shape[1] * shape[2])
    weight = stack(*shape, dtype=torch.bfloat16)
    settings = {"quant_type": quant_type, "blocksize": blocksize}
    quantize, sizes = functional.quantize_4bit, []

    def watched(piece, **told):
        sizes.append(len(piece))
        return quantize(piece, **told)

    monkeypatch.setattr(functional, "quantize_4bit", watched)
    packed, state = _four_bit.quantized(weight, nested=nested, **settings)
    whole = shape[1] * shape[2] % blocksize or pieces >= shape[0]
    assert (sum(sizes), max(sizes)) == (shape[0], shape[0] if whole else pieces)
    expected, expected_state = quantize(weight, compress_statistics=nested, **settings)
    assert torch.equal(packed, expected)
    same(state, expected_state)


def packed_stack(*shape, nested=False, blocksize=64, **settings):
    packed, state = _four_bit.quantized(
        stack(*shape), quant_type="nf4", blocksize=blocksize, nested=nested, **settings
    )
    entry = nn.Module()
    entry.quant_state = state
    return _four_bit.Parametrised(packed=packed, parametrisation=entry)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 3), slice(1, 4)], ids=str)
def test_a_slice_decodes_as_the_whole_did(rows, nested):
    whole = packed_stack(4, 16, 24, nested=nested)
    part = _four_bit.sliced(whole, rows)
    count = rows.stop - rows.start
    expected = whole.stored().dense(range(rows.start, rows.stop), dtype=torch.float32)
    assert torch.equal(part.stored().dense(dtype=torch.float32), expected)
    assert part.packed.shape == (count * 16 * 24 // 2, 1)
    assert part.packed.untyped_storage().nbytes() == part.packed.nbytes
    assert part.state.absmax.untyped_storage().nbytes() == part.state.absmax.nbytes
    assert tuple(part.state.shape) == (count, 16, 24)
    assert (part.state.nested, part.state.dtype) == (False, torch.float32)


def test_blocks_that_straddle_experts_are_not_divided():
    with pytest.raises(ValueError, match="experts of 36 elements share blocks of 64"):
        _four_bit.sliced(packed_stack(4, 6, 6), slice(0, 2))


def test_the_error_of_packing_is_that_of_the_whole_stack():
    dense = stack(3, 16, 24)
    packed = packed_stack(3, 16, 24)
    got = _four_bit.relative_error(packed.stored(), dense)
    values = packed.stored().dense(dtype=torch.float32).double()
    want = float((values - dense.double()).norm() / dense.double().norm())
    assert abs(got - want) <= 16 * torch.finfo(torch.float32).eps * want
    assert _four_bit.relative_error(packed.stored(), torch.zeros_like(dense)) == 0.0


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("shape", [(8, 16), (3, 10)], ids=["whole blocks", "shared blocks"])
def test_the_report_decodes_as_the_reference_does(shape, nested):
    settings = {"quant_type": "nf4", "blocksize": 32, "nested": nested}
    stored = _four_bit.four_bit(*_four_bit.quantized(stack(5, *shape), **settings))
    expected = stored.dense(dtype=torch.float32)
    for expert in range(5):
        assert torch.equal(_four_bit.decoded(stored, expert), expected[expert])


def test_states_are_moved_only_where_they_have_to_be():
    packed = packed_stack(2, 16, 16, nested=True)
    assert packed.on(CPU) is packed
    assert _four_bit.state_on(packed.state, CPU) is packed.state
    there = packed.on(torch.device("meta"))
    assert (there.packed.device.type, there.parametrisation) == ("meta", packed.parametrisation)
    moved = _four_bit.state_on(packed.state, torch.device("meta"))
    assert packed.state.absmax.device == packed.state.state2.absmax.device == CPU
    assert {moved.absmax.device.type, moved.state2.absmax.device.type} == {"meta"}


def test_parameters_that_are_not_packed_are_left_alone():
    module = nn.Module()
    module.down_proj = nn.Parameter(torch.ones(2, 2, 2))
    _four_bit.follow(module, "down_proj")
    assert _four_bit.parametrised(module, "down_proj") is None
    parametrize.register_parametrization(module, "down_proj", nn.Identity())
    assert _four_bit.parametrised(module, "down_proj") is None
    model = hf_models.tiny_model("qwen3_moe")
    packing.quantize_experts(model)
    (experts,) = hf_models.experts_of(model)
    assert _four_bit.parametrised(experts, "elsewhere") is None
    assert not any(parameter.requires_grad for parameter in experts.parameters())


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_parts_put_together_are_the_stack(nested):
    whole, module = packed_stack(3, 16, 24, nested=nested), nn.Module()
    found = _four_bit.parts(whole)
    wanted = set(packing.PARTS)
    wanted -= set() if nested else {name for name in wanted if name.startswith("nested")}
    assert set(found) == wanted
    for name in ("data", "absmax", "quant_map", "quant_state"):
        without = {part: value for part, value in found.items() if part != name}
        for less in (without, {**found, name: found[name][:0]}):
            with pytest.raises(ValueError, match=f"holds no {name} of the packed parameter w"):
                _four_bit.install_parts(nn.Module(), "w", less)
    _four_bit.install_parts(module, "w", dict(found))
    again = _four_bit.parametrised(module, "w")
    assert torch.equal(again.packed, whole.packed)
    same(again.state, whole.state)
    with torch.no_grad():
        assert torch.equal(decoded(module, "w"), whole.stored().dense(dtype=torch.float32))


def test_a_model_without_experts_is_not_packed():
    with pytest.raises(ValueError, match="Linear holds no experts module"):
        packing.quantize_experts(nn.Linear(2, 2))


@pytest.mark.parametrize("part", ["data", "absmax", "quant_map", "quant_state"])
def test_a_saved_model_without_a_part_is_refused(part, tmp_path):
    model = hf_models.tiny_model("qwen3_moe")
    packing.quantize_experts(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    del state[f"model.layers.0.mlp.experts.four_bit_down_proj_{part}"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"holds no {part} of the packed parameter down_proj"):
        loaded(tmp_path)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_the_loader_is_shown_what_was_saved(nested):
    (experts,) = hf_models.experts_of(hf_models.tiny_model("qwen3_moe"))
    packing._expect_parts(experts, "down_proj", nested=nested)
    shown = {name: value.dtype for name, value in experts._buffers.items()}
    saved = _four_bit.parts(packed_stack(4, 64, 32, nested=nested))
    assert shown == {f"four_bit_down_proj_{part}": value.dtype for part, value in saved.items()}
    assert {value.device.type for value in experts._buffers.values()} == {"meta"}
    assert list(experts._parameters) == ["gate_up_proj"]
    assert experts._is_hf_initialized is True


def test_settings_of_the_format():
    config = packing.ExpertsQuantizationConfig()
    assert (config.linears, config.experts_blocksize, config.experts_nested) == (True, 64, False)
    assert config.experts_quant_type == config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert config.quant_method == packing.METHOD == "scattermoe_lora_4bit"
    assert config.load_in_4bit
    follows = packing.ExpertsQuantizationConfig(
        bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True, quant_method="any"
    )
    assert (follows.experts_quant_type, follows.experts_nested) == ("fp4", True)
    own = packing.ExpertsQuantizationConfig(
        linears=False,
        experts_blocksize=128,
        experts_quant_type="fp4",
        experts_nested=False,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float16,
        load_in_8bit=False,
    )
    found = (own.experts_quant_type, own.experts_nested, own.bnb_4bit_quant_type, own.linears)
    assert found == ("fp4", False, "nf4", False)
    assert own.bnb_4bit_compute_dtype == torch.float16
    for each in (config, follows, own):
        saved = each.to_dict()
        assert saved == each.to_diff_dict()
        assert not any("load_in" in key for key in saved)
        read = AutoQuantizationConfig.from_dict(copy.deepcopy(saved))
        assert type(read) is packing.ExpertsQuantizationConfig
        assert read.to_dict() == saved
    with pytest.raises(ValueError, match="load_in_8bit is for linear layers only"):
        packing.ExpertsQuantizationConfig(load_in_8bit=True)


def quantizer(**settings):
    config = packing.ExpertsQuantizationConfig(**settings)
    found = AutoHfQuantizer.from_config(config, pre_quantized=False)
    assert type(found) is packing.ExpertsQuantizer
    return found


def test_stacks_are_told_from_other_parameters():
    model = hf_models.tiny_model("gpt_oss")
    with torch.device("meta"):
        ours = quantizer()
        model.experts_beside = nn.Linear(2, 2)
    base = "model.layers.0.mlp.experts."
    for name, stacked, wanted in (
        ("gate_up_proj", True, True),
        ("down_proj", True, True),
        ("down_proj_bias", False, False),
        ("four_bit_down_proj_data", False, True),
    ):
        assert ours.is_stack(model, base + name) is stacked
        assert ours.param_needs_quantization(model, base + name) is wanted
    (experts,) = hf_models.experts_of(model)
    assert ours.is_stack(experts, "down_proj")
    router = "model.layers.0.mlp.router.weight"
    assert not ours.is_stack(model, router)
    assert not ours.param_needs_quantization(model, router)
    assert not quantizer(linears=False).param_needs_quantization(
        model, "model.layers.0.self_attn.o_proj.weight"
    )
    assert not ours.is_stack(model, "model.layers.0.self_attn.o_proj.down_proj")


def test_a_stack_is_packed_as_it_arrives():
    model, ours = hf_models.tiny_model("qwen3_moe"), quantizer(experts_nested=True)
    ours.device = CPU
    name = "model.layers.0.mlp.experts.down_proj"
    value = stack(4, 64, 32)
    expected = _four_bit.quantized(value, quant_type="nf4", blocksize=64, nested=True)
    for given in (value, [value]):
        found = ours.get_quantize_ops().convert({name: given}, model=model)
        assert list(found) == [name]
        assert torch.equal(found[name], expected[0])
        assert isinstance(found[name], nn.Parameter)
        assert not found[name].requires_grad
        same(ours.states.pop(name), expected[1])


def test_stacks_are_put_together_in_host_memory_for_another_device(monkeypatch):
    monkeypatch.setattr(
        packing.Bnb4BitHfQuantizer,
        "update_weight_conversions",
        lambda self, conversions, *more: [*conversions, *more],
    )

    def conversions():
        return [
            SimpleNamespace(target_patterns=["mlp.experts.gate_up_proj"], force_cpu=False),
            SimpleNamespace(target_patterns=["mlp.gate.weight"], force_cpu=False),
            SimpleNamespace(target_patterns=["mlp.experts.down_proj"]),
        ]

    for device, pre_quantized, forced in (
        (torch.device("cuda"), False, True),
        (torch.device("cuda"), True, False),
        (CPU, False, False),
        (None, False, False),
    ):
        ours = quantizer()
        ours.device, ours.pre_quantized = device, pre_quantized
        found = conversions()
        more = SimpleNamespace()
        rest = ours.update_weight_conversions(list(found), more)
        assert [id(each) for each in rest] == [id(each) for each in (*found, more)]
        assert [getattr(each, "force_cpu", None) for each in found] == [forced, False, None]


def test_the_device_is_the_one_of_the_map(monkeypatch):
    ours = quantizer()
    for given, device in (
        ({"": "cuda:0"}, torch.device("cuda", 0)),
        ({"": "cpu"}, CPU),
        ({"a": "cpu", "b": "meta"}, None),
        ("balanced", None),
    ):
        ours.device = "unset"
        assert ours.update_device_map(given) == given
        assert ours.device == device
    for asked in (None, "auto"):
        assert ours.update_device_map(asked) == {"": packing.local_device()}
        assert ours.device == packing.local_device()
    for name in ("is_fsdp_enabled", "is_deepspeed_zero3_enabled"):
        with monkeypatch.context() as patched:
            patched.setattr(packing, name, lambda: True)
            assert ours.update_device_map("auto") == "auto"
            assert ours.device is None


def test_the_device_of_a_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert packing.local_device() == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert packing.local_device() == torch.device("cuda", 2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(
        torch.distributed, "get_node_local_rank", lambda fallback_rank: 10 + fallback_rank
    )
    assert packing.local_device() == torch.device("cuda", 12)


def test_packing_a_loaded_model_takes_its_settings():
    model = hf_models.tiny_model("qwen3_moe", dtype=torch.bfloat16)
    dense = copy.deepcopy(hf_models.experts_of(model)[0])
    report = packing.quantize_experts(model, quant_type="fp4", blocksize=128, nested=True)
    (experts,) = hf_models.experts_of(model)
    sizes = [(row.bytes_before, row.bytes_after) for row in report.rows]
    for name, row in zip(NAMES, report.rows, strict=True):
        assert row.name == f"model.layers.0.mlp.experts.{name}"
        state = parametrised(experts, name)[1]
        assert (state.quant_type, state.blocksize, state.nested) == ("fp4", 128, True)
        assert row.bytes_before == getattr(dense, name).nbytes
        assert row.bytes_after == _experts.stored_weight(experts, name).nbytes
    worst = max(row.relative_error for row in report.rows)
    before, after = (sum(column) for column in zip(*sizes, strict=True))
    text = f"2 expert parameters: {before:,} -> {after:,} bytes, worst relative error {worst:.3g}"
    assert str(report) == text
    assert str(packing.QuantizationReport(rows=())).startswith("0 expert parameters: 0 -> 0 bytes")
    config = model.config.quantization_config
    found = (config.linears, config.experts_blocksize, config.experts_quant_type)
    assert found == (False, 128, "fp4")
    assert config.experts_nested
    assert model.is_quantized
    assert model.quantization_method == config.quant_method == packing.METHOD
    assert model.hf_quantizer.quantization_config is config
    assert not model.hf_quantizer.pre_quantized
    present = model.hf_quantizer
    assert packing.quantize_experts(model).rows == ()
    assert model.hf_quantizer is present


def test_packing_leaves_other_formats_and_other_modules_as_they_are():
    model = hf_models.tiny_model("qwen3_moe")
    model.hf_quantizer = present = SimpleNamespace()
    packing.quantize_experts(model)
    assert model.hf_quantizer is present
    (experts,) = hf_models.experts_of(hf_models.tiny_model("qwen3_moe"))
    names = [row.name for row in packing.quantize_experts(experts).rows]
    assert names == list(NAMES)
    assert not hasattr(experts, "hf_quantizer")
    for wrong in (torch.int8, torch.bfloat16):
        (experts,) = hf_models.experts_of(hf_models.tiny_model("qwen3_moe"))
        values = torch.zeros(4, 64, 32, dtype=wrong)
        values = values if wrong == torch.int8 else values[0]
        experts.down_proj = nn.Parameter(values, requires_grad=False)
        with pytest.raises((TypeError, ValueError), match=r"down_proj|data must be \[experts"):
            packing.quantize_experts(experts)


def test_a_dense_stack_is_not_saved_as_packed(tmp_path):
    model = hf_models.tiny_model("qwen3_moe")
    packing.quantize_experts(model)
    (experts,) = hf_models.experts_of(model)
    state, more = model.hf_quantizer.get_state_dict_and_metadata(model)
    assert more == {}
    base = "model.layers.0.mlp.experts."
    parts = [part for part in packing.PARTS if not part.startswith("nested")]
    wanted = {f"{base}four_bit_{name}_{part}" for name in NAMES for part in parts}
    assert {name for name in state if "experts" in name} == wanted
    _four_bit.remove(experts, "down_proj")
    experts.down_proj = nn.Parameter(stack(4, 64, 32))
    with pytest.raises(ValueError, match=r"experts\.down_proj is dense although the model's"):
        model.save_pretrained(tmp_path)


def test_a_model_that_is_loaded_packed_has_its_settings(tmp_path):
    hf_models.tiny_model("qwen3_moe", dtype=torch.bfloat16).save_pretrained(tmp_path)
    for linears in (False, True):
        config = packing.ExpertsQuantizationConfig(
            linears=linears, experts_blocksize=128, experts_quant_type="fp4", experts_nested=True
        )
        model = loaded(tmp_path, quantization_config=config)
        (experts,) = hf_models.experts_of(model)
        for name in NAMES:
            state = parametrised(experts, name)[1]
            assert (state.quant_type, state.blocksize, state.nested) == ("fp4", 128, True)
        kind = type(model.model.layers[0].self_attn.o_proj).__name__
        assert kind == ("Linear4bit" if linears else "Linear")
        assert model.hf_quantizer.states == {}
    # What transformers packs itself it packs as its own configuration says.
    plain = loaded(
        tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map=None
    )
    assert _four_bit.parametrised(hf_models.experts_of(plain)[0], "down_proj") is None


class Sharded(torch.Tensor):
    """Stands for a parameter that was not gathered."""


def test_what_is_not_gathered_is_refused(monkeypatch):
    sharded = stack(2, 6, 4).as_subclass(Sharded)
    monkeypatch.setattr(_experts, "DTensor", Sharded)
    monkeypatch.setattr(_factors, "DTensor", Sharded)
    monkeypatch.setattr(_experts, "stored_experts", lambda *_: Dense(data=sharded))
    with pytest.raises(RuntimeError, match=r"Module\.down_proj is a sharded DTensor .*\[2, 6, 4\]"):
        _experts.stored_weight(nn.Module(), "down_proj")
    flat = SimpleNamespace(weight=stack(6, 4)), SimpleNamespace(weight=sharded)
    for a, b in (flat, flat[::-1]):
        wrapper = SimpleNamespace(
            lora_A={"one": a}, lora_B={"one": b}, scaling={"one": 1.0}, parameter_name="down_proj"
        )
        with pytest.raises(RuntimeError, match="adapter 'one' of down_proj is a sharded DTensor"):
            _factors.adapter_factors(wrapper, "one", transposed=False)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_packed_experts_are_decoded_within_a_bound(family, monkeypatch):
    model = hf_models.tiny_model(family)
    packing.quantize_experts(model)
    (experts,) = hf_models.experts_of(model)
    layout = _experts.ExpertsLayout.of(experts)
    assert 2**26 <= _experts.DECODED_BYTES <= 2**30
    for bound in (2**40, 1):
        monkeypatch.setattr(_experts, "DECODED_BYTES", bound)
        for name in NAMES:
            weight, dtype = _experts.projection_weight(experts, name, layout)
            assert dtype == torch.float32
            assert weight.transposed is not layout.transposed
            one = weight.stored.shape[0] * weight.stored.shape[1] * 4
            assert weight.budget_bytes == max(bound, one)
            blocks = [(first, block.clone()) for first, block in weight.blocks(dtype)]
            assert len(blocks) == (1 if bound > 1 else 4)
            whole = decoded(experts, name)
            whole = whole if layout.transposed else whole.mT
            assert torch.equal(torch.cat([block for _, block in blocks]), whole)
