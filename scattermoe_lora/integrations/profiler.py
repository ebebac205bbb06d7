"""A memory snapshot and a Chrome trace over chosen steps of a `transformers.Trainer`.

    with ProfilerCallback("profile", first=5, steps=3) as profile:
        Trainer(model, arguments, train_dataset=data, callbacks=[profile]).train()

Both files are complete whenever they exist: they are written under another name and renamed, when
the last of the steps ends, when training ends before that, or when it fails. As a context manager
the callback also sees failures; used without `with`, it writes when it is collected or the process
exits.
"""

# ruff: noqa: ARG002 - transformers calls its callbacks with all of these

import weakref
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

__all__ = ["ProfilerCallback"]

MEMORY_EVENTS = 1_000_000


class ProfilerCallback(TrainerCallback):
    """Profiles optimiser steps `first` to `first + steps - 1`, counted from 0.

    Files in `directory`: `trace.json` (chrome://tracing, Perfetto) and, where there is a CUDA
    device, `snapshot.pickle` (pytorch.org/memory_viz); `-rank<n>` is added to the names where there
    are several processes. With first = 0 memory is recorded from the construction of the callback,
    so that what training allocates before its first step is on it.

    Raises:
        ValueError: first is negative or steps is not positive.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        first: int = 0,
        steps: int = 1,
        memory: bool = True,
        trace: bool = True,
    ) -> None:
        if first < 0 or steps < 1:
            raise ValueError(
                f"first must be at least 0 and steps at least 1, got {first} and {steps}"
            )
        self.first = first
        self.steps = steps
        self.recording = Recording(Path(directory), memory=memory, trace=trace)
        self._finalizer = weakref.finalize(self, self.recording.finish)
        if first == 0:
            self.recording.start_memory()

    def __enter__(self) -> "ProfilerCallback":
        return self

    def __exit__(self, *error: object) -> None:
        self.recording.finish()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Learns which process this is."""
        if args.world_size > 1:
            self.recording.suffix = f"-rank{args.process_index}"

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts before step `first`, or at once where training resumed after it."""
        if self.first <= state.global_step < self.first + self.steps:
            self.recording.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes both files after the last step."""
        if state.global_step >= self.first + self.steps:
            self.recording.finish()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes what there is when training ends before the last step."""
        self.recording.finish()


class Recording:
    """One recording of memory and time: started once, finished once, in this order."""

    def __init__(self, directory: Path, *, memory: bool, trace: bool) -> None:
        self.directory = directory
        self.memory = memory and torch.cuda.is_available()
        self.trace = trace
        self.suffix = ""
        self.profiler: torch.profiler.profile | None = None
        self.remembering = False
        self.finished = False

    def start_memory(self) -> None:
        """Start recording allocations with their stacks."""
        if self.memory and not self.remembering and not self.finished:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
            self.remembering = True

    def start(self) -> None:
        """Start both; does nothing when both run or the recording is over."""
        self.start_memory()
        if not self.trace or self.finished or self.profiler is not None:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(
            activities=activities, record_shapes=True, profile_memory=True, with_stack=True
        )
        self.profiler.start()

    def finish(self) -> None:
        """Stop both and write their files; does nothing the second time."""
        if self.finished:
            return
        self.finished = True
        try:
            if self.profiler is not None:
                self.profiler.stop()
                self._write("trace", ".json", self.profiler.export_chrome_trace)
        finally:
            if self.remembering:
                try:
                    self._write("snapshot", ".pickle", torch.cuda.memory._dump_snapshot)
                finally:
                    torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, name: str, ending: str, write: Any) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self.directory / f"{name}{self.suffix}{ending}"
        unfinished = file.with_name(f"unfinished-{file.name}")
        write(str(unfinished))
        unfinished.replace(file)
