"""What is known to go wrong with versions and devices, and what to do about it.

`gather` reads the machine, `diagnose` is a pure function of what was read.
"""

import os
import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "peft", "bitsandbytes", "accelerate"),
    *("rich", "pytest", "hypothesis", "pytest-benchmark", "jinja2"),
)
STATUSES = ("good", "note", "bad")
_OLDEST = {"torch": (2, 11), "triton": (3, 6), "transformers": (5, 17), "peft": (0, 18, 1)}
_SHARED_MEMORY = 99 * 1024
_NEWEST_TRITON = (3, 9)
"""The newest Triton that anything here was tried with."""
_TRITON_OF_TORCH: dict[tuple[int, ...], tuple[int, int]] = {
    (2, 11): (3, 6),
    (2, 12): (3, 7),
    (2, 13): (3, 7),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What matters of one GPU. shared_memory, memory: bytes."""

    name: str
    capability: tuple[int, int]
    shared_memory: int
    memory: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """A machine. versions: of the packages that are installed. cuda: the version torch was built
    for, or empty.

    interpret: the value of TRITON_INTERPRET, or empty. avx512: whether the CPU has it.
    """

    python: str = platform.python_version()
    versions: dict[str, str] = field(default_factory=dict)
    cuda: str = ""
    driver: str = ""
    gpus: tuple[Gpu, ...] = ()
    nvidia: bool = False
    interpret: str = ""
    avx512: bool = False

    def version(self, name: str) -> tuple[int, ...]:
        """The release of a package as numbers; () where it is not installed."""
        words = self.versions.get(name, "").partition("+")[0].split(".")
        numbers = []
        for word in words:
            digits = word[: len(word) - len(word.lstrip("0123456789"))]
            if not digits:
                break
            numbers.append(int(digits))
        return tuple(numbers)

    @property
    def interpreting(self) -> bool:
        """Whether kernels would run in Triton's interpreter."""
        return not self.gpus or self.interpret.lower() in ("1", "true", "yes", "on", "y")


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """One thing looked at. status: good, note (some feature is affected) or bad. advice: what to
    do.
    """

    subject: str
    status: str
    found: str
    advice: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {name: getattr(self, name) for name in ("subject", "status", "found", "advice")}


def gather() -> Facts:
    """Read this machine."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found: Any = torch.cuda.get_device_properties(index)
            gpus.append(
                Gpu(
                    name=found.name,
                    capability=(found.major, found.minor),
                    shared_memory=found.shared_memory_per_block_optin,
                    memory=found.total_memory,
                )
            )
    return Facts(
        versions=versions,
        cuda=torch.version.cuda or "",
        driver=_driver(),
        gpus=tuple(gpus),
        nvidia=Path("/dev/nvidiactl").exists(),
        interpret=os.environ.get("TRITON_INTERPRET", ""),
        avx512="avx512f" in _cpu_flags(),
    )


def _driver() -> str:
    file = Path("/proc/driver/nvidia/version")
    if not file.is_file():
        return ""
    words = file.read_text().split()
    return next((word for word in words if word[:1].isdigit() and word.count(".") >= 1), "")


def _cpu_flags() -> set[str]:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def diagnose(facts: Facts) -> tuple[Diagnosis, ...]:
    """Everything that is known about a machine, in the order of importance."""
    return (*_devices(facts), *_triton(facts), *_hugging_face(facts), *_bitsandbytes(facts))


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in numbers)


def _devices(facts: Facts) -> list[Diagnosis]:
    found = [_required(facts, "torch")]
    if not facts.gpus:
        found.append(_no_gpu(facts))
    for gpu in facts.gpus:
        found += _gpu(gpu)
    if any(gpu.capability[0] == 9 for gpu in facts.gpus) and facts.version("triton")[:2] == (3, 6):
        found.append(
            Diagnosis(
                subject="Triton 3.6 on this GPU",
                status="note",
                found="its ptxas (CUDA 12.8) compiles some LoRA products wrongly whose weight no "
                "tensor map can address (widths that are no multiple of 8)",
                advice="nothing: such kernels are not launched here; `python -m verify compile` "
                "looks for their like in yours",
            )
        )
    if facts.gpus and facts.interpret:
        found.append(
            Diagnosis(
                subject="TRITON_INTERPRET",
                status="bad" if facts.interpreting else "note",
                found=f"TRITON_INTERPRET={facts.interpret} on a machine with a GPU: "
                "kernels run on the CPU, a thousand times slower",
                advice="unset TRITON_INTERPRET, or say --device cpu where that is what you want",
            )
        )
    return found


def _no_gpu(facts: Facts) -> Diagnosis:
    if facts.nvidia:
        build = f"built for CUDA {facts.cuda}" if facts.cuda else "a CPU build"
        return Diagnosis(
            subject="GPU",
            status="bad",
            found=f"there is an NVIDIA driver, but torch {facts.versions.get('torch')} ({build}) "
            "sees no device",
            advice="install a CUDA build of torch that this driver supports, and look at "
            "CUDA_VISIBLE_DEVICES",
        )
    return Diagnosis(
        subject="GPU",
        status="note",
        found="no GPU: kernels run in Triton's interpreter, which knows no race, "
        "no shared memory and no speed",
        advice="fine for correctness; measure and fuzz on a GPU",
    )


def _gpu(gpu: Gpu) -> list[Diagnosis]:
    capability = _dotted(gpu.capability)
    if gpu.capability < (8, 0):
        return [
            Diagnosis(
                subject=gpu.name,
                status="bad",
                found=f"compute capability {capability}; Triton supports 8.0 and newer, and there "
                "are no bf16 tensor cores below",
                advice="use an Ampere GPU (A100, RTX 30) or newer",
            )
        ]
    found = [Diagnosis(subject=gpu.name, status="good", found=f"compute capability {capability}")]
    if gpu.shared_memory <= _SHARED_MEMORY:
        found.append(
            Diagnosis(
                subject=gpu.name,
                status="note",
                found=f"{gpu.shared_memory // 1024} KB of shared memory per block",
                advice="tiles are smaller than on a data centre GPU; run "
                "`python -m verify tune` for its own plans",
            )
        )
    if gpu.capability < (9, 0):
        found.append(
            Diagnosis(
                subject=gpu.name,
                status="note",
                found="no tensor maps below compute capability 9.0",
                advice="plans load through pointers; nothing to do",
            )
        )
    return found


def _required(facts: Facts, name: str) -> Diagnosis:
    oldest = _OLDEST[name]
    if not facts.version(name):
        return Diagnosis(
            subject=name, status="bad", found="not installed", advice=f"pip install {name}"
        )
    if facts.version(name) < oldest:
        return Diagnosis(
            subject=name,
            status="bad",
            found=f"{facts.versions[name]} is older than {_dotted(oldest)}",
            advice=f"pip install '{name}>={_dotted(oldest)}'",
        )
    return Diagnosis(subject=name, status="good", found=facts.versions[name])


def _triton(facts: Facts) -> list[Diagnosis]:
    found = [_required(facts, "triton")]
    triton, numpy, torch_version = (facts.version(name) for name in ("triton", "numpy", "torch"))
    if facts.interpreting and triton[:2] == (3, 6) and numpy >= (2, 4):
        found.append(
            Diagnosis(
                subject="Triton's interpreter and numpy",
                status="bad",
                found=f"the interpreter of Triton {facts.versions['triton']} raises TypeError at "
                f"every loop with run-time bounds under numpy {facts.versions['numpy']}",
                advice="pip install 'numpy<2.4', or Triton 3.7 or newer",
            )
        )
    if facts.interpreting and (3, 6) <= triton[:2] <= _NEWEST_TRITON:
        found.append(
            Diagnosis(
                subject="bf16 in Triton's interpreter",
                status="note",
                found=f"Triton {facts.versions['triton']} multiplies and adds the bit patterns of "
                "bf16 as integers, and cuts off where it should round",
                advice="nothing here: importing scattermoe_lora corrects it, tests itself and "
                "refuses bf16 otherwise; results of other kernels in bf16 mean nothing",
            )
        )
    if triton[:2] > _NEWEST_TRITON:
        found.append(
            Diagnosis(
                subject=f"Triton {facts.versions['triton']}",
                status="note",
                found=f"newer than {_dotted(_NEWEST_TRITON)}, the newest that was tried; 3.10 no "
                "longer fuses products with sums unless told to, so results and registers differ",
                advice="run `python -m verify` before you trust it, and compare no compiled "
                "baseline of an older Triton",
            )
        )
    expected = _TRITON_OF_TORCH.get(torch_version[:2])
    if facts.cuda and triton and expected and triton[:2] != expected:
        found.append(
            Diagnosis(
                subject="torch and Triton",
                status="bad" if triton[:2] < expected else "note",
                found=f"torch {facts.versions['torch']} is built against Triton "
                f"{_dotted(expected)}, and {facts.versions['triton']} is installed",
                advice="reinstall torch, which pins its Triton; torch.compile relies on the match",
            )
        )
    if facts.interpreting and not facts.version("numpy"):
        found.append(
            Diagnosis(
                subject="numpy",
                status="bad",
                found="not installed, and Triton's interpreter needs it",
                advice="pip install numpy",
            )
        )
    return found


def _hugging_face(facts: Facts) -> list[Diagnosis]:
    found = []
    for name in ("transformers", "peft"):
        if facts.version(name):
            found.append(_required(facts, name))
    found += _peft(facts)
    transformers, peft = facts.version("transformers"), facts.version("peft")
    if transformers >= (5, 23) and () < peft < (0, 20):
        found.append(
            Diagnosis(
                subject=f"transformers {facts.versions['transformers']} and PEFT "
                f"{facts.versions['peft']}",
                status="note",
                found="load_adapter of transformers refuses PEFT older than 0.20",
                advice="pip install 'peft>=0.20', or load adapters with "
                "scattermoe_lora.integrations.peft.load_adapter",
            )
        )
    if transformers and facts.version("bitsandbytes"):
        found.append(
            Diagnosis(
                subject=f"transformers {facts.versions['transformers']} and bitsandbytes",
                status="note",
                found="load_in_4bit leaves fused experts in 16 bit, without a word, and "
                "save_pretrained of packed experts fails",
                advice="load with scattermoe_lora.integrations.loading.load_model",
            )
        )
    return found


def _peft(facts: Facts) -> list[Diagnosis]:
    peft = facts.version("peft")
    if peft == (0, 19, 0):
        return [
            Diagnosis(
                subject="PEFT 0.19.0",
                status="bad",
                found="it swaps the dimensions of expert adapters under the wrong condition: "
                "their factors have other shapes than in every other version",
                advice="pip install 'peft>=0.19.1'; adapters saved by 0.19.0 are read by "
                "scattermoe_lora, not by PEFT",
            )
        ]
    if not peft or not facts.version("bitsandbytes"):
        return []
    what = "merging changes nothing, without a word"
    if (0, 19, 1) <= peft < (0, 21):
        what = f"its forward pass ignores and never trains one of two adapters; {what}"
    elif (0, 21) <= peft <= (0, 21, 2):
        what = (
            f"every forward pass adds the adapter anew, and the second training step raises; {what}"
        )
    return [
        Diagnosis(
            subject=f"PEFT {facts.versions['peft']} on experts quantised by bitsandbytes",
            status="note",
            found=what,
            advice="use the integration of scattermoe_lora, which goes round it and merges "
            "by itself; take no result of plain PEFT as a reference",
        )
    ]


def _bitsandbytes(facts: Facts) -> list[Diagnosis]:
    version = facts.version("bitsandbytes")
    if not version:
        return []
    found = []
    if facts.version("torch") < (2, 13):
        found.append(
            Diagnosis(
                subject="FSDP2 and packed experts",
                status="note",
                found=f"fully_shard of torch {facts.versions.get('torch')} takes floating-point "
                "parameters only (2.13 takes bytes)",
                advice="call scattermoe_lora.integrations.distributed.shardable(model) first",
            )
        )
    if (0, 49) <= version < (0, 51) and facts.avx512:
        found.append(
            Diagnosis(
                subject=f"bitsandbytes {facts.versions['bitsandbytes']} on this CPU",
                status="note",
                found="with AVX-512 it dequantises wrongly, by 15 to 30%, wherever the last "
                "dimension is not a multiple of the block size",
                advice="nothing on a GPU, nor with scattermoe_lora's kernels; on the CPU flatten "
                "the shape first",
            )
        )
    good = Diagnosis(subject="bitsandbytes", status="good", found=facts.versions["bitsandbytes"])
    return found or [good]
