"""The machine a record was made on, and the choice between its GPU and Triton's interpreter.

Importing this module imports neither Triton nor anything that does, so that the choice can be made
before Triton is first imported.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

import torch

_OPTIONAL = ("bitsandbytes", "transformers", "peft", "accelerate")


def prepare_interpreter(device: str | None = None) -> str:
    """Chooses where kernels run, before Triton is imported; returns "cuda" or "cpu".

    Without a CUDA device, or with `device="cpu"`, Triton is told to interpret; a value of
    TRITON_INTERPRET that is already set is kept.

    Raises:
        RuntimeError: Triton would have to interpret but was imported before; or `device` names a
            CUDA device and there is none.
    """
    available = torch.cuda.is_available()
    if device is not None and not device.startswith("cpu") and not available:
        raise RuntimeError(f"device {device!r} was asked for, but torch sees no CUDA device")
    if available and device != "cpu":
        return "cpu" if _interpreting() else "cuda"
    if not _interpreting() and "triton" in sys.modules:
        raise RuntimeError(
            "triton was imported before it could be told to interpret: set TRITON_INTERPRET=1 "
            "in the environment, or choose the device before importing triton"
        )
    os.environ.setdefault("TRITON_INTERPRET", "1")
    return "cpu"


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def environment(device: str | torch.device) -> dict[str, Any]:
    """What every record says of the machine, its software and `device`, as plain JSON values.

    Packages that are not installed are left out; what a CPU has not is null.
    """
    device = torch.device(device)
    versions = {name: _version(name) for name in ("triton", "numpy", *_OPTIONAL)}
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        **{name: version for name, version in versions.items() if version is not None},
        "cuda": torch.version.cuda,
        "driver": None,
        "device": platform.processor() or platform.machine(),
        "capability": None,
        "interpreted": _interpreting(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "driver": _driver(),
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
    return facts


def gpu_directory_name(name: str) -> str:
    """The directory of a GPU's records: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    answer = subprocess.run(
        [command, "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 else None
