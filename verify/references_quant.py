"""What quantised experts decode to, in plain torch, and stacks to decode.

Written from the definitions of the formats: NF4 from quantiles of the normal distribution, FP4 from
its bits, the codebook of nested statistics from its dynamic exponent, fp8 by torch's own
conversion. Nothing here comes from the package under test or from bitsandbytes.

A decoded value is one fp32 product rounded once to the output's dtype; a nested scale rounds after
its multiplication and after its addition. torch computes both that way, so equality is to the bit.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

NF4_TAIL = 0.9677083
"""Probability at which NF4 cuts the normal distribution off."""
INT8_STEP = 1 / 127


def nf4_codebook() -> Tensor:
    """fp32 [16], ascending: 7 quantiles below zero, zero, 8 above, scaled to a largest of 1."""
    above = torch.linspace(NF4_TAIL, 0.5, 9)[:-1].tolist()
    below = torch.linspace(NF4_TAIL, 0.5, 8)[:-1].tolist()
    normal = NormalDist()
    values = [normal.inv_cdf(p) for p in above] + [0.0] + [-normal.inv_cdf(p) for p in below]
    codes = torch.tensor(sorted(values), dtype=torch.float32)
    return codes / codes.max()


def fp4_codebook() -> Tensor:
    """fp32 [16] in the order of the bits s e e m, scaled to a largest magnitude of 1.

    Exponents 01, 10, 11 stand for 8, 4 and 2 times 1.m; exponent 00 for m / 16.
    """
    powers = {1: 8.0, 2: 4.0, 3: 2.0}
    sizes = [
        powers[bits >> 1] * (1 + (bits & 1) / 2) if bits >> 1 else (bits & 1) / 16
        for bits in range(8)
    ]
    codes = torch.tensor(sizes + [-size for size in sizes], dtype=torch.float32)
    return codes / codes.max()


def dynamic_codebook() -> Tensor:
    """fp32 [256], ascending: 7 decades, each twice as finely divided as the one below, 0 and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (bounds[:-1] + bounds[1:]) / 2
        values += (10 ** (decade - 6) * middles).tolist()
        values += (-(10 ** (decade - 6)) * middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


CODEBOOKS = {"nf4": nf4_codebook, "fp4": fp4_codebook}


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBitProblem:
    """A stack to draw: experts [d1, d2], blocks, and blocks of statistics (0: not nested)."""

    experts: int
    shape: tuple[int, int]
    blocksize: int = 64
    codebook: str = "nf4"
    outer_blocksize: int = 0

    @property
    def elements(self) -> int:
        """Elements of the stack."""
        return self.experts * math.prod(self.shape)

    @property
    def blocks(self) -> int:
        """Blocks of the flattened stack, the last of which may be short."""
        return -(-self.elements // self.blocksize)


def draw_four_bit(
    problem: FourBitProblem, *, seed: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Uniform nibbles and scales over three decades.

    Returns:
        packed uint8, absmax (fp32, or uint8 if nested), codebook fp32 [16]; if nested also
        outer_code fp32 [256], outer_absmax fp32 and outer_offset fp32 [1].
    """
    generator = torch.Generator(device=device).manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    def byte(count: int) -> Tensor:
        return torch.randint(256, (count,), generator=generator, device=device, dtype=torch.uint8)

    packed = byte(-(-problem.elements // 2))
    codebook = CODEBOOKS[problem.codebook]().to(device)
    if not problem.outer_blocksize:
        absmax = torch.pow(10.0, uniform(problem.blocks) * 3 - 3)
        return {"packed": packed, "absmax": absmax, "codebook": codebook}
    outer = -(-problem.blocks // problem.outer_blocksize)
    return {
        "packed": packed,
        "absmax": byte(problem.blocks),
        "codebook": codebook,
        "outer_code": dynamic_codebook().to(device),
        "outer_absmax": uniform(outer) * 0.05 + 0.01,
        "outer_offset": uniform(1) * 0.1 + 0.05,
    }


def block_scales(tensors: Mapping[str, Tensor], outer_blocksize: int) -> Tensor:
    """fp32 [blocks]: absmax itself, or code[absmax] outer[block // outer_blocksize] + offset."""
    absmax = tensors["absmax"]
    if not outer_blocksize:
        return absmax
    outer = tensors["outer_absmax"].repeat_interleave(outer_blocksize)[: absmax.numel()]
    product = tensors["outer_code"][absmax.long()] * outer
    return product + tensors["outer_offset"]


def four_bit(
    tensors: Mapping[str, Tensor],
    problem: FourBitProblem,
    *,
    dtype: torch.dtype,
    expert_ids: Tensor | None = None,
) -> Tensor:
    """[selected, d1, d2] of `dtype`, one expert at a time."""
    scales = block_scales(tensors, problem.outer_blocksize)
    size = math.prod(problem.shape)
    ids = range(problem.experts) if expert_ids is None else expert_ids.tolist()
    decoded = [_expert(tensors, scales, problem, expert * size, size) for expert in ids]
    if not decoded:
        return torch.empty(0, *problem.shape, dtype=dtype, device=scales.device)
    return torch.stack(decoded).to(dtype).view(-1, *problem.shape)


def _expert(
    tensors: Mapping[str, Tensor], scales: Tensor, problem: FourBitProblem, start: int, size: int
) -> Tensor:
    """fp32 [size]: elements start .. start + size of the flattened stack."""
    element = torch.arange(start, start + size, device=scales.device)
    byte = tensors["packed"].reshape(-1)[element // 2].long()
    nibble = torch.where(element % 2 == 0, byte // 16, byte % 16)
    return tensors["codebook"][nibble] * scales[element // problem.blocksize]


def quantise_four_bit(weight: Tensor, problem: FourBitProblem) -> dict[str, Tensor]:
    """Nearest codes of `weight` [experts, d1, d2], with plain statistics."""
    flat = weight.float().reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, problem.blocks * problem.blocksize - flat.numel()))
    blocks = padded.view(problem.blocks, problem.blocksize)
    absmax = blocks.abs().amax(1)
    codebook = CODEBOOKS[problem.codebook]().to(weight.device)
    share = blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    nibble = (share[..., None] - codebook).abs().argmin(-1).view(-1)[: flat.numel()]
    packed = (nibble[0::2] * 16 + nibble[1::2]).to(torch.uint8)
    return {"packed": packed, "absmax": absmax, "codebook": codebook}


def int8_row_wise(data: Tensor, row_scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """int8 [experts, d1, d2] and fp32 [experts * d1]: q * scale / 127, rounded after each step."""
    scaled = data.float() * row_scale.reshape(data.shape[0], data.shape[1], 1)
    return (scaled * INT8_STEP).to(dtype)


def float8(data: Tensor, scale: Tensor, block: tuple[int, int], *, dtype: torch.dtype) -> Tensor:
    """fp8 [experts, d1, d2] and fp32 [experts, g1, g2], one scale per block of elements."""
    _, d1, d2 = data.shape
    full = scale.repeat_interleave(block[0], 1)[:, :d1].repeat_interleave(block[1], 2)[:, :, :d2]
    return (data.float() * full).to(dtype)
