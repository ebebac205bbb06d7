"""Copies of the package with one deliberate fault: `python tests/broken_kernels.py KERNEL FAULT
DIR`.

stray    writes a little before its output
wild     writes far outside of any buffer
spin     never ends
nan      NaN for one expert (of the activation: one row)
compile  does not compile for plans of one height (of the activation: for one path)
"""

import argparse
import shutil
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "scattermoe_lora"
FAULTS = ("stray", "wild", "spin", "nan", "compile")

_SCALED = "    acc *= scale\n"
_RESULT = "    tl.store(ptrs, result.to(act.ptr.dtype.element_ty), mask=i < width)\n"
_SPIN = (
    "    turns = 0\n    while tl.load({}, volatile=True) {}:\n        turns += 1\n    {} += turns\n"
)
_EDITS = {
    "scatter2scatter": (
        "ops/scatter2scatter.py",
        _SCALED,
        {
            "stray": "    tl.store(y.ptr - 3, 0.0)\n",
            "wild": "    tl.store(y.ptr + (1 << 44), 0.0)\n",
            "spin": _SPIN.format("slots + row", ">= 0", "acc"),
            "nan": '    if expert == 1:\n        acc *= float("nan")\n',
            "compile": "    tl.static_assert(BLOCK_M != 32)\n",
        },
    ),
    "glu_forward": (
        "ops/glu.py",
        _RESULT,
        {
            "stray": "    tl.store(act.ptr - 3, 0.0)\n",
            "wild": "    tl.store(act.ptr + (1 << 44), 0.0)\n",
            "spin": _SPIN.format("h.ptr", "< 1e30", "result"),
            "nan": '    if row == 1:\n        result *= float("nan")\n',
            "compile": "    tl.static_assert(not INTERLEAVED)\n",
        },
    ),
}


def plant(kernel: str, fault: str, destination: Path) -> Path:
    """Write the package with a fault to `destination`; returns its directory."""
    file, anchor, faults = _EDITS[kernel]
    tree = destination / "scattermoe_lora"
    shutil.copytree(PACKAGE, tree, ignore=shutil.ignore_patterns("__pycache__"))
    text = (tree / file).read_text()
    assert text.count(anchor) == 1, f"{file} has {text.count(anchor)} lines {anchor!r}"
    (tree / file).write_text(text.replace(anchor, faults[fault] + anchor))
    return tree


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernel", choices=sorted(_EDITS))
    parser.add_argument("fault", choices=FAULTS)
    parser.add_argument("destination", type=Path)
    chosen = parser.parse_args()
    plant(chosen.kernel, chosen.fault, chosen.destination)
