"""Options that several commands share, and the choice of what to check."""

import argparse
import difflib
import importlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console, RenderableType

from ..environment import prepare_interpreter

PACKAGE = "scattermoe_lora"
_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_LISTED = 30
"""Names that a refusal lists; of more, it lists the nearest."""


def add_common(parser: argparse.ArgumentParser) -> None:
    """--json, --device, --seed."""
    add_json(parser)
    add_device(parser)
    parser.add_argument("--seed", type=int, default=0)


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument("--device", help="cpu or cuda; a GPU if there is one, unless stated")


def add_selection(parser: argparse.ArgumentParser) -> None:
    """--kernels, --paths, --cases, --dtypes, --modes."""
    for option, meaning in (
        ("kernels", "names of kernels"),
        ("paths", "dispatch paths"),
        ("cases", "names of cases, or tags: smoke, edge, model, bench"),
        ("modes", "balanced, lora-only, exact"),
    ):
        parser.add_argument(f"--{option}", type=separated, default=(), metavar="A,B", help=meaning)
    meaning = "float32, float16, bfloat16, or fp32, fp16, bf16"
    parser.add_argument("--dtypes", type=dtypes, default=(), metavar="A,B", help=meaning)


def separated(text: str) -> tuple[str, ...]:
    """Names between commas, for argparse."""
    return tuple(word for word in text.split(",") if word)


def dtypes(text: str) -> tuple[str, ...]:
    """Names of dtypes between commas, as torch has them or shorter, for argparse."""
    return tuple(_SHORT.get(word, word) for word in separated(text))


def integers(text: str) -> tuple[int, ...]:
    """Whole numbers between commas, for argparse."""
    return tuple(int(word) for word in separated(text))


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def count(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def amount(text: str) -> int:
    """A whole number that may be 0, for argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def refuse_unused(
    which: str,
    arguments: argparse.Namespace,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    unused: Iterable[str],
) -> None:
    """Refuse options, by the names of their values, that `which` makes no use of.

    Raises:
        SystemExit: one of them is not what it is where nothing is stated.
    """
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    given = [name for name in unused if getattr(arguments, name) != parser.get_default(name)]
    if given:
        words = ", ".join(_stated(name, getattr(arguments, name)) for name in given)
        raise SystemExit(f"{which} makes no use of {words}")


def _stated(name: str, value: Any) -> str:
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    return f"--{option} {','.join(map(str, value)) if isinstance(value, list | tuple) else value}"


def prepare(device: str | None) -> torch.device:
    """Choose the device, before Triton is imported.

    Raises:
        SystemExit: there is no such device.
    """
    try:
        chosen = prepare_interpreter(device)
        return torch.device(chosen if device in (None, "cpu") else device)
    except RuntimeError as error:
        raise SystemExit(f"--device: {error}") from None


def package() -> ModuleType:
    """The package under test."""
    return importlib.import_module(PACKAGE)


def source_directory() -> Path:
    """Where its sources are."""
    return Path(package().__path__[0])


def check_names(option: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse names that select nothing.

    Raises:
        SystemExit: a name is unknown; the message lists the known ones, of many the nearest.
    """
    known = list(dict.fromkeys(known))
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    listed = ", ".join(known)
    if len(known) > _LISTED:
        near = [other for name in unknown for other in difflib.get_close_matches(name, known, n=5)]
        listed = f"{len(known)} names" + (f"; near it: {', '.join(near)}" if near else "")
    raise SystemExit(f"--{option}: {', '.join(unknown)} is none of {listed}")


class Pulse:
    """Says how far a long run is where nobody sees a bar: on a console that is no terminal, a line
    now and then.
    """

    def __init__(self, console: Console, *, seconds: float = 30.0) -> None:
        self._console, self._seconds = console, seconds
        self._next = time.monotonic() + seconds

    def __call__(self, shown: RenderableType) -> None:
        """Print it, if it is time."""
        if self._console.is_terminal or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._seconds
        self._console.print(shown, markup=False, highlight=False, soft_wrap=True)


def on_a_gpu(which: str, device: str | None) -> torch.device:
    """The device of a command whose times mean something on a GPU alone: a CPU has to be stated.

    Raises:
        SystemExit: no device is stated and there is no GPU, or there is no such device.
    """
    if device is None and not torch.cuda.is_available():
        raise SystemExit(
            f"{which} times kernels on a GPU, and there is none in use; --device cpu tries the "
            "command in Triton's interpreter, whose times say nothing of a GPU"
        )
    return prepare(device)
