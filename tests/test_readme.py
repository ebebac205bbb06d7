"""The examples of the README, run as they stand; a tiny model takes the place of the large one."""

import re
from pathlib import Path

import hf_models
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

pytestmark = [pytest.mark.correctness, pytest.mark.hf]

README = (Path(__file__).parent.parent / "README.md").read_text()
MODEL = "Qwen/Qwen3-30B-A3B"


def examples(heading):
    """The Python blocks of a section."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


def run(code, **names):
    exec(compile(code, "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("place", [0, 1], ids=["LoRA", "QLoRA"])
def test_fine_tuning(place, tmp_path, capsys, device):
    code = examples("Fine-tuning a transformers model")[place]
    assert code.count(MODEL) == 1
    hf_models.tiny_model("qwen3_moe", dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = run(code.replace(MODEL, str(tmp_path)))["model"].to(device)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"2 of 2 expert parameters adapted, {trainable:,} trainable" in capsys.readouterr().out
    ids = hf_models.tokens().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_every_example_of_fine_tuning_is_run():
    assert len(examples("Fine-tuning a transformers model")) == 2
    assert len(examples("Writing a layer or a kernel")) == 1


def test_writing_a_layer():
    (code,) = examples("Writing a layer or a kernel")
    names = run(code)
    assert names["y"].shape == names["x"].shape
    assert names["y"].isfinite().all()
    assert names["y"].any()
    sm = names["sm"]
    orders = {"source": sm.RowOrder.TOKEN, "target": sm.RowOrder.SLOT}
    usual = sm.expert_linear(
        names["x"], names["w1"].mT, names["routing"], lora=names["lora"], **orders
    )
    assert len(names["plans"]) > 1
    # Two sums of 256 products in fp32, whose sizes add up to about 10 and to no more than 20.
    torch.testing.assert_close(names["h"], usual, rtol=0, atol=2 * 256 * 2.0**-24 * 20)
