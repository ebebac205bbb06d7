"""A fault of ptxas, found in SASS: a wgmma whose operand is described by the wrong register.

Accesses of global memory name a pair of uniform registers, loaded from constant bank 0 at 0x208;
wgmma names others, which describe its operands in shared memory. The ptxas of CUDA 12.8 (Triton
3.6) gave some kernels with two products in a row the pair of global memory for such a description:
they compute nonsense.
"""

import re

_INSTRUCTION = re.compile(
    r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Za-z0-9_.]+)\s+(.*?)\s*;"
)
_OPERANDS = re.compile(r",(?![^\[]*\])")
_DESCRIBED = re.compile(r"gdesc\[UR(\d+)\]")
_REGISTER = re.compile(r"\bUR(\d+)\b")
_MEMORY = "c[0x0][0x208]"


def misread(sass: str) -> tuple[str, ...]:
    """The instructions that read the pair of global memory as a number or as an operand's
    description, of one kernel as nvdisasm prints it.
    """
    memory: set[int] = set()
    found = []
    for line in sass.splitlines():
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, operands = match[1], [word.strip() for word in _OPERANDS.split(match[2])]
        target = re.fullmatch(r"UR(\d+)", operands[0])
        if memory & _read(name, operands[1:] if target else operands):
            found.append(f"{name} {match[2]}")
        if target is not None:
            first = int(target[1])
            pair = {first, first + 1} if ".64" in name else {first}
            memory -= pair
            if name == "ULDC.64" and operands[1] == _MEMORY:
                memory |= pair
    return tuple(found)


def _read(name: str, sources: list[str]) -> set[int]:
    """The uniform registers that an instruction reads other than to address global memory."""
    numbers: set[int] = set()
    for source in sources:
        described = _DESCRIBED.search(source)
        if described is not None:
            # With its left operand in registers, wgmma has one description, else two.
            first, in_registers = int(described[1]), re.fullmatch(r"R\d+", sources[1])
            numbers |= set(range(first, first + (2 if in_registers else 4)))
        elif name.startswith("U"):
            numbers |= {int(number) for number in _REGISTER.findall(source)}
    return numbers
