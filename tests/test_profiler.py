"""The profiler callback of a Trainer."""

import gc
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from transformers import Trainer, TrainingArguments

from scattermoe_lora.integrations.profiler import ProfilerCallback

pytestmark = [pytest.mark.correctness, pytest.mark.hf]


class Model(torch.nn.Module):
    """One weight; step number `fails_at` raises."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4))
        self.calls, self.fails_at = 0, fails_at

    def forward(self, x):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("the model fails")
        with torch.profiler.record_function(f"step {self.calls - 1}"):
            return {"loss": (self.weight * x).square().sum()}


def train(directory, callback, *, steps, model=None):
    arguments = TrainingArguments(
        output_dir=str(directory / "out"),
        max_steps=steps,
        per_device_train_batch_size=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"x": torch.ones(4)} for _ in range(8)]
    Trainer(model or Model(), arguments, train_dataset=data, callbacks=[callback]).train()


def steps_in(file):
    """The steps whose forward is in a trace."""
    events = json.loads(file.read_text())["traceEvents"]
    names = {event.get("name", "") for event in events}
    return {int(name.split()[1]) for name in names if name.startswith("step ")}


@pytest.mark.parametrize(("first", "steps"), [(0, 1), (2, 2)])
def test_the_chosen_steps_are_traced(tmp_path, first, steps):
    train(tmp_path, ProfilerCallback(tmp_path / "p", first=first, steps=steps), steps=6)
    assert steps_in(tmp_path / "p" / "trace.json") == set(range(first, first + steps))


def test_training_that_ends_early_leaves_a_whole_trace(tmp_path):
    train(tmp_path, ProfilerCallback(tmp_path, first=1, steps=100), steps=3)
    assert steps_in(tmp_path / "trace.json") == {1, 2}


def test_training_that_fails_leaves_a_whole_trace(tmp_path):
    with (
        pytest.raises(RuntimeError, match="the model fails"),
        ProfilerCallback(tmp_path, first=0, steps=9) as callback,
    ):
        train(tmp_path, callback, steps=6, model=Model(fails_at=3))
    assert steps_in(tmp_path / "trace.json") == {0, 1}


def test_without_a_context_a_failure_is_written_when_the_callback_goes(tmp_path):
    callback = ProfilerCallback(tmp_path, first=0, steps=9)
    callback.on_step_begin(None, SimpleNamespace(global_step=0), None)
    torch.ones(2).sum()
    del callback
    gc.collect()
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_training_that_ends_before_the_first_step_writes_nothing(tmp_path):
    train(tmp_path, ProfilerCallback(tmp_path / "p", first=5), steps=2)
    assert not (tmp_path / "p").exists()


@pytest.fixture
def memory(monkeypatch):
    """The calls that a CUDA device would see."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda.memory,
        "_record_memory_history",
        lambda enabled="all", **settings: calls.append(enabled),
    )

    def dump(path):
        calls.append("dump")
        torch.save({}, path)

    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    return calls


def test_memory_is_recorded_from_construction_and_dumped_once(tmp_path, memory):
    callback = ProfilerCallback(tmp_path, first=0, steps=2, trace=False)
    assert memory == ["all"]
    arguments = SimpleNamespace(world_size=2, process_index=1)
    callback.on_train_begin(arguments, SimpleNamespace(), None)
    for step in range(3):
        callback.on_step_begin(arguments, SimpleNamespace(global_step=step), None)
        callback.on_step_end(arguments, SimpleNamespace(global_step=step + 1), None)
    callback.on_train_end(arguments, SimpleNamespace(), None)
    assert memory == ["all", "dump", None]
    assert [file.name for file in tmp_path.iterdir()] == ["snapshot-rank1.pickle"]


def test_memory_starts_with_a_later_first_step(tmp_path, memory):
    callback = ProfilerCallback(tmp_path, first=1, trace=False)
    callback.on_step_begin(None, SimpleNamespace(global_step=0), None)
    assert memory == []
    callback.on_step_begin(None, SimpleNamespace(global_step=1), None)
    assert memory == ["all"]
    callback.recording.finish()


@pytest.mark.parametrize("wrong", [{"first": -1}, {"steps": 0}], ids=str)
def test_steps_that_cannot_be_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="first must be at least 0 and steps at least 1"):
        ProfilerCallback(tmp_path, **wrong)
