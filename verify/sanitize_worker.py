"""A process that compute-sanitizer watches: `FILE DEVICE [TREE]` runs the draws in a file,
judging nothing.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch

from .draws import Draw, plan_of
from .environment import prepare_interpreter
from .inputs import DTYPES
from .spec import KernelSpec


def launch(lib: ModuleType, spec: KernelSpec, draw: Draw, device: torch.device) -> None:
    """One launch on inputs as they come; a plan that cannot run here is passed over."""
    mode = draw.mode if draw.mode in spec.modes else spec.modes[0]
    inputs = spec.inputs(draw.case, DTYPES[draw.dtype], mode, device, seed=draw.seed)
    plan = plan_of(lib, spec, inputs, draw)
    if plan.unavailable:
        return
    prepared = spec.prepare(lib, inputs) if spec.prepare is not None else None
    spec.run(lib, replace(inputs, prepared=prepared), plan.plan)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    """Run every draw."""
    file, device, *tree = sys.argv[1:]
    prepare_interpreter(device)
    from .fuzz_worker import package_of
    from .specs import KERNELS

    lib, kernels = package_of("".join(tree)), {spec.name: spec for spec in KERNELS}
    for values in json.loads(Path(file).read_text()):
        draw = Draw.from_json(values)
        launch(lib, kernels[draw.kernel], draw, torch.device(device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
