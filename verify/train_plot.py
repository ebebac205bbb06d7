"""The curves of a training run, and how far apart they are, as one picture."""

from pathlib import Path
from typing import Any

from .captured import Unavailable
from .train import Training
from .train_models import Run


def plot(training: Training, file: Path) -> None:
    """Write the picture; its format follows the ending of the name.

    Raises:
        Unavailable: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unavailable("matplotlib is not installed; install the extra dev") from error
    arms = list(training.curves)
    figure = Figure(figsize=(6 * len(arms), 7), layout="constrained")
    grid: Any = figure.subplots(2, len(arms), squeeze=False, sharex=True)
    for column, arm in enumerate(arms):
        _column(grid[0, column], grid[1, column], training, arm)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _column(above: Any, below: Any, training: Training, arm: str) -> None:
    curves = training.curves[arm].losses
    for run, style in ((Run.EAGER, "-"), (Run.OTHER_ORDER, "--"), (Run.OURS, ":")):
        above.plot(curves.get(run, []), style, label=run.value)
    above.set(title=arm, ylabel="loss")
    above.legend()
    eager, other = curves.get(Run.EAGER, []), curves.get(Run.OTHER_ORDER, [])
    ours = curves.get(Run.OURS, [])
    apart = [abs(a - b) for a, b in zip(eager, other, strict=False)]
    off = [abs(o - (a + b) / 2) for o, a, b in zip(ours, eager, other, strict=False)]
    below.plot(apart, label="between the eager runs")
    below.plot(off, label=f"{Run.OURS.value} from their middle")
    below.set(yscale="log", xlabel="step", ylabel="difference of losses")
    below.legend()
