"""The first step of a layer in a fresh process with an empty compile cache, and the next shapes
after it.

`python -m verify.first_call NAMES..` prints one JSON object, name -> seconds, in the order given;
the first includes the compilation of every kernel, not the start of Python or of CUDA.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import torch

from .bench_arms import arm_of
from .bench_cases import BenchCase, multiplied_as, targets
from .bench_inputs import draw


def measured_cold(cases: Sequence[BenchCase], *, seconds: float = 300) -> dict[str, float]:
    """Seconds of the first call of each case, one after the other in one fresh process.

    Raises:
        subprocess.SubprocessError: the process failed or took too long.
    """
    names = [case.name for case in cases]
    with tempfile.TemporaryDirectory(prefix="compile-cache-") as cache:
        variables = {**os.environ, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-m", __name__, *names]
        ran = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=seconds, check=False
        )
    if ran.returncode:
        raise subprocess.SubprocessError(ran.stderr.strip()[-400:])
    return {name: float(value) for name, value in json.loads(ran.stdout).items()}


def main(names: Sequence[str]) -> int:
    """Run the named cases of `targets` once each, and print how long each took."""
    device = torch.device("cuda")
    torch.zeros(1, device=device)
    lib = importlib.import_module("scattermoe_lora")
    importlib.import_module("scattermoe_lora.layers")
    known = {case.name: case for case in targets()}
    found = {}
    for name in names:
        drawn = draw(known[name], device)
        torch.cuda.synchronize()
        start = time.monotonic()
        with multiplied_as(known[name].dtype):
            arm_of(lib, known[name], drawn).results()
        torch.cuda.synchronize()
        found[name] = round(time.monotonic() - start, 3)
        del drawn
    print(json.dumps(found))  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
