"""Training parity: our experts against transformers' eager ones, on real text, step by step.

Per arm (LoRA, NF4 + LoRA) three runs from the same seeds: ours, eager, and eager with its sums in
another order, which measures how far rounding alone drives two curves apart.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

import torch

from .train_criteria import Finding, findings
from .train_models import Run, Settings, Trainee, batches, standard_library, trainee


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One step that was taken."""

    arm: str
    run: Run
    step: int
    loss: float


@dataclass(slots=True, kw_only=True)
class Curves:
    """What the runs of one arm lost, step by step. on, off: our loss on the last batch after
    training, with the adapter and without.
    """

    losses: dict[Run, list[float]] = field(default_factory=dict)
    on: float | None = None
    off: float | None = None

    def findings(self, arm: str, steps: int) -> list[Finding]:
        """All criteria; none before every run is complete."""
        if set(self.losses) != set(Run) or self.on is None or self.off is None:
            return []
        if any(len(curve) != steps for curve in self.losses.values()):
            return []
        curves = {
            "ours": self.losses[Run.OURS],
            "eager": self.losses[Run.EAGER],
            "other": self.losses[Run.OTHER_ORDER],
        }
        return findings(arm, curves, on=self.on, off=self.off)


@dataclass(slots=True, kw_only=True)
class Training:
    """Every run of every arm; `run` fills `curves` while it goes."""

    settings: Settings
    arms: tuple[str, ...]
    device: torch.device
    seed: int
    curves: dict[str, Curves] = field(default_factory=dict)

    def run(self) -> Iterator[Progress]:
        """Train, step by step.

        Raises:
            Unavailable: an optional package is missing.
        """
        drawn = batches(standard_library(), self.settings, self.seed + 2).to(self.device)
        for arm in self.arms:
            curves = self.curves.setdefault(arm, Curves())
            for run in Run:
                curve = curves.losses.setdefault(run, [])
                who = trainee(self.settings, arm, run, device=self.device, seed=self.seed)
                for loss in steps(who, drawn, self.settings):
                    curve.append(loss)
                    yield Progress(arm=arm, run=run, step=len(curve), loss=loss)
                if run is Run.OURS:
                    last = drawn[(self.settings.steps - 1) % len(drawn)]
                    curves.on, curves.off = on_and_off(who, last)

    def findings(self) -> list[Finding]:
        """All criteria of the arms that are complete."""
        return [
            finding
            for arm, curves in self.curves.items()
            for finding in curves.findings(arm, self.settings.steps)
        ]

    @property
    def complete(self) -> bool:
        """Whether every arm has its criteria."""
        return all(
            arm in self.curves and self.curves[arm].findings(arm, self.settings.steps)
            for arm in self.arms
        )

    def as_json(self) -> Mapping[str, object]:
        """Settings, criteria and curves of a record."""
        found = self.findings()
        return {
            "summary": {
                "passed": sum(finding.passed for finding in found),
                "failed": sum(not finding.passed for finding in found),
                "complete": self.complete,
            },
            "settings": asdict(self.settings),
            "findings": [{**asdict(finding), "passed": finding.passed} for finding in found],
            "curves": {
                arm: {
                    "on": curves.on,
                    "off": curves.off,
                    **{run.value: losses for run, losses in curves.losses.items()},
                }
                for arm, curves in self.curves.items()
            },
        }


def steps(who: Trainee, drawn: torch.Tensor, settings: Settings) -> Iterator[float]:
    """The loss of every step of AdamW on the adapters, without decay."""
    optimizer = torch.optim.AdamW(who.parameters, lr=settings.learning_rate, weight_decay=0.0)
    for step in range(settings.steps):
        ids = drawn[step % len(drawn)]
        loss = who.model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach())


@torch.no_grad()
def on_and_off(who: Trainee, ids: torch.Tensor) -> tuple[float, float]:
    """The loss with the adapter and without."""
    on = float(who.model(input_ids=ids, labels=ids).loss)
    with who.disabled():
        return on, float(who.model(input_ids=ids, labels=ids).loss)
