"""Which plans are compiled for which architectures, what is demanded of them, and the baseline.

A baseline belongs to one Triton version: registers and instructions move from one to the next.
"""

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from .ahead import ARCHITECTURES, Architecture, Compiled, compiling, redirected
from .entries import BY_ENTRY, dtype_of, inputs_of, plan_of, prepared, sized
from .stated import shipped_table, stated

PACKAGE = "scattermoe_lora"
BASELINES = Path(__file__).parent / "baselines"
_WARPGROUP = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A projection of a real model: W [experts, k, n] stored [experts, n, k]."""

    name: str
    experts: int
    k: int
    n: int
    top_k: int
    tokens: int = 2048
    rank: int = 16
    dtype: str = "bfloat16"

    @property
    def rows(self) -> int:
        """tokens * top_k."""
        return self.tokens * self.top_k

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of activations and weights."""
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[
            self.dtype
        ]

    @property
    def label(self) -> str:
        """The shape in one word."""
        return f"{self.name}-t{self.tokens}-r{self.rank}-{self.dtype}"


QWEN3 = Shape(name="qwen3-gate-up", experts=128, k=2048, n=1536, top_k=8)
MIXTRAL = Shape(name="mixtral-gate-up", experts=8, k=4096, n=28672, top_k=2)
_PLANNED: tuple[tuple[str, str, Shape], ...] = (
    ("scatter2scatter", "tiles", QWEN3),
    ("scatter2scatter", "tiles", replace(QWEN3, dtype="float32")),
    ("lora_forward", "epilogue", QWEN3),
    ("lora_forward", "epilogue", replace(QWEN3, tokens=16)),
    ("lora_forward", "epilogue", replace(MIXTRAL, rank=64)),
    ("lora_forward", "fused", QWEN3),
    ("lora_input_grad", "epilogue", QWEN3),
    ("lora_weight_grad", "gram", QWEN3),
    ("lora_weight_grad", "gram", replace(QWEN3, dtype="float32")),
    ("lora_weight_grad", "recompute", QWEN3),
    ("expert_weight_grad", "gram", QWEN3),
)
PLAIN = (
    "routing",
    "group",
    "combine",
    "combine_grad",
    "expert_bias_grad",
    "glu_forward",
    "glu_backward",
    "dequantize_four_bit",
    "dequantize_scaled",
)
_SMALL = Shape(name="small", experts=4, k=64, n=64, top_k=2, tokens=24)
"""Of kernels that nothing but their entry says how to call; their operands are drawn."""
_MORE_RANKS = (4, 64, 128)
_ENTRY = "by entry"
_WITHOUT_RANK = ("scatter2scatter", "expert_weight_grad")
_MODELS = (
    QWEN3,
    Shape(name="qwen3-down", experts=128, k=768, n=2048, top_k=8),
    Shape(name="qwen3.5-down", experts=256, k=512, n=2048, top_k=8),
    Shape(name="olmoe-gate-up", experts=64, k=2048, n=2048, top_k=8),
    MIXTRAL,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One launch to compile: the `index`-th plan of an operation's path on a shape."""

    architecture: int
    operation: str
    path: str
    shape: Shape
    index: int = 0

    @property
    def key(self) -> str:
        """The job in words; stable from run to run."""
        words = [f"sm_{self.architecture}", self.operation, self.path, self.shape.label]
        return " ".join([*words, f"plan {self.index}"] if self.index else words)


def jobs(architectures: Iterable[int], *, full: bool) -> Iterator[Job]:
    """The shipped and heuristic plans; with `full` every candidate plan at every model shape."""
    lib = importlib.import_module(PACKAGE)
    for number in architectures:
        for operation, path, shape in _PLANNED:
            yield Job(architecture=number, operation=operation, path=path, shape=shape)
        for operation in PLAIN:
            yield Job(architecture=number, operation=operation, path="default", shape=QWEN3)
        listed = {*PLAIN, *(operation for operation, _, _ in _PLANNED)}
        for operation in BY_ENTRY:
            if operation not in listed:
                yield Job(architecture=number, operation=operation, path=_ENTRY, shape=_SMALL)
        if full:
            yield from _every_plan(lib, ARCHITECTURES[number])


def _every_plan(lib: ModuleType, architecture: Architecture) -> Iterator[Job]:
    known = set(_PLANNED)
    for model in _MODELS:
        shapes = [model, *(replace(model, rank=rank) for rank in _MORE_RANKS)]
        shapes += [replace(model, dtype="float32")] if model is QWEN3 else []
        for shape in shapes:
            for operation in lib.Operation:
                if shape.rank != model.rank and operation.value in _WITHOUT_RANK:
                    continue
                plans = _plans(lib, operation.value, "", shape, architecture)
                seen: dict[str, int] = {}
                for plan in plans:
                    path = plan.path.value
                    index = seen.get(path, 0)
                    seen[path] = index + 1
                    planned = (operation.value, path, shape) in known and index == 0
                    if path != "grouped_mm" and not planned:
                        yield Job(
                            architecture=architecture.number,
                            operation=operation.value,
                            path=path,
                            shape=shape,
                            index=index,
                        )


def call(lib: ModuleType, job: Job, architecture: Architecture, *, rich: bool = False) -> None:
    """Make the launches of a job; within `compiling` they are compiled."""
    if job.path == "default":
        _call_plain(lib, job)
        return
    if job.path == _ENTRY:
        _call_entry(lib, job, architecture)
        return
    plans = _plans(lib, job.operation, job.path, job.shape, architecture)
    _call_planned(lib, job, plans[job.index], rich=rich)


def _problem(lib: ModuleType, operation: str, shape: Shape) -> Any:
    backward = operation == "lora_input_grad"
    k, n = (shape.n, shape.k) if backward else (shape.k, shape.n)
    gradient = operation in ("lora_weight_grad", "expert_weight_grad")
    wide = operation == "shrink"
    return lib.Problem(
        operation=lib.Operation(operation),
        rows=shape.rows,
        experts=shape.experts,
        k=k,
        n=shape.rank if wide else n,
        rank=0 if operation in _WITHOUT_RANK else shape.rank,
        dtype=shape.torch_dtype,
        precision=lib.Precision.IEEE,
        w_map="" if gradient else "kn" if backward else "nk",
    )


def _plans(
    lib: ModuleType, operation: str, path: str, shape: Shape, architecture: Architecture
) -> tuple[Any, ...]:
    """Plans of a path, the one that would be used first; of all paths if `path` is empty."""
    module = importlib.import_module(f"{lib.__name__}.plan")
    problem, device = _problem(lib, operation, shape), architecture.device(lib)
    shipped = shipped_table(lib, device).lookup(problem)
    base = shipped or lib.choose(problem, device)
    plans = [base]
    if path:
        plans = [module.with_path(base, module.Path(path), problem, device)]
    plans += [plan for plan in lib.candidates(problem, device) if path in ("", plan.path.value)]
    return tuple(dict.fromkeys(plans))


def compile_job(job: Job) -> tuple[Compiled, ...]:
    """Every kernel that the job launches."""
    lib = importlib.import_module(PACKAGE)
    importlib.import_module(f"{PACKAGE}.quant")
    architecture = ARCHITECTURES[job.architecture]
    with compiling(lib, architecture) as found:
        call(lib, job, architecture)
    return tuple(found)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Storage that exists in the address space alone."""
    return torch.empty(shape, dtype=dtype)


def _routing(lib: ModuleType, shape: Shape) -> Any:
    rows = shape.rows
    return lib.Routing(
        slots=_empty(rows, dtype=torch.int64),
        expert_of_row=_empty(rows, dtype=torch.int32),
        offsets=_empty(shape.experts + 1, dtype=torch.int32),
        tiles=_empty(rows, 4, dtype=torch.int32),
        tokens=shape.tokens,
        top_k=shape.top_k,
        experts=shape.experts,
    )


def _call_planned(lib: ModuleType, job: Job, plan: Any, *, rich: bool = False) -> None:
    """rich: with bias and gates, and rows in the other orders."""
    ops, shape = importlib.import_module(f"{lib.__name__}.ops"), job.shape
    dtype, order = shape.torch_dtype, lib.RowOrder
    routing = _routing(lib, shape)
    weight = _empty(shape.experts, shape.n, shape.k, dtype=dtype).mT
    x = _empty(shape.tokens, shape.k, dtype=dtype)
    dy = _empty(shape.rows, shape.n, dtype=dtype)
    low = _empty(shape.rows, shape.rank, dtype=dtype)
    lora = lib.LoRAWeights(
        a=_empty(shape.experts, shape.rank, shape.k, dtype=dtype),
        b=_empty(shape.experts, shape.n, shape.rank, dtype=dtype),
        scaling=2.0,
    )
    forward = {"source": order.TOKEN, "target": order.EXPERT, "plan": plan}
    backward = {"source": order.EXPERT, "target": order.SLOT, "plan": plan}
    orders = {"x_order": order.TOKEN, "dy_order": order.EXPERT, "plan": plan}
    if rich:
        gates = _empty(shape.tokens, shape.top_k, dtype=torch.float32)
        bias = _empty(shape.experts, shape.n, dtype=dtype)
        x = _empty(shape.rows, shape.k, dtype=dtype)
        forward |= {"source": order.EXPERT, "target": order.SLOT, "bias": bias, "row_scale": gates}
        backward |= {"source": order.SLOT, "target": order.EXPERT, "row_scale": gates}
        orders |= {"x_order": order.EXPERT, "dy_order": order.SLOT, "row_scale": gates}
    calls: dict[str, Callable[[], object]] = {
        "scatter2scatter": lambda: ops.scatter2scatter(x, weight, routing, **forward),
        "shrink": lambda: ops.shrink(
            x, lora.a, routing, scaling=2.0, source=order.TOKEN, plan=plan
        ),
        "lora_forward": lambda: ops.lora_forward(x, weight, lora, routing, **forward),
        "lora_input_grad": lambda: ops.lora_input_grad(dy, weight, lora, routing, **backward),
        "lora_weight_grad": lambda: ops.lora_weight_grad(x, dy, low, low, lora, routing, **orders),
        "expert_weight_grad": lambda: ops.expert_weight_grad(x, dy, routing, **orders),
    }
    calls[job.operation]()


def _call_plain(lib: ModuleType, job: Job) -> None:
    ops, shape = importlib.import_module(f"{lib.__name__}.ops"), job.shape
    dtype, order = shape.torch_dtype, lib.RowOrder
    routing = _routing(lib, shape)
    rows, tokens = shape.rows, shape.tokens
    y = _empty(rows, shape.k, dtype=dtype)
    h = _empty(rows, shape.n, dtype=dtype)
    dact = _empty(rows, shape.n // 2, dtype=dtype)
    gates = _empty(tokens, shape.top_k, dtype=torch.float32)
    silu = ops.Activation()
    calls: dict[str, Callable[[], object]] = {
        "routing": lambda: _sorted(lib, shape),
        "group": lambda: ops.group(
            _empty(tokens, shape.k, dtype=dtype), routing, source=order.TOKEN
        ),
        "combine": lambda: ops.combine(y, routing, gates=gates),
        "combine_grad": lambda: ops.combine_grad(y, _empty(tokens, shape.k, dtype=dtype), routing),
        "expert_bias_grad": lambda: ops.expert_bias_grad(h, routing, dy_order=order.EXPERT),
        "glu_forward": lambda: ops.glu_forward(h, silu),
        "glu_backward": lambda: ops.glu_backward(h, dact, routing, silu, gates=gates),
        "dequantize_four_bit": lambda: _four_bit(lib, shape),
        "dequantize_scaled": lambda: _float8(lib, shape),
    }
    calls[job.operation]()


def _call_entry(lib: ModuleType, job: Job, architecture: Architecture) -> None:
    """The call that an entry makes; what it is given besides is not compiled with it."""
    spec, shape = BY_ENTRY[job.operation], job.shape
    case = sized(
        spec,
        tokens=shape.tokens,
        experts=shape.experts,
        top_k=shape.top_k,
        k_in=shape.k,
        n_out=shape.n,
        rank=shape.rank,
    )
    inputs = inputs_of(spec, case, dtype_of(spec), torch.device("cpu"))
    with stated(lib, architecture):
        with redirected(lib, lambda *launch: None):
            inputs = prepared(spec, lib, inputs)
        spec.run(lib, inputs, plan_of(spec, lib, inputs))


def _sorted(lib: ModuleType, shape: Shape) -> None:
    sort = importlib.import_module(f"{lib.__name__}._sort")
    tiles = importlib.import_module(f"{lib.__name__}._row_tiles")
    sort.sort_by_expert(_empty(shape.rows, dtype=torch.int64), shape.experts)
    offsets = _empty(shape.experts + 1, dtype=torch.int32)
    tiles.row_tiles(offsets, rows=shape.rows, experts=shape.experts)


def _four_bit(lib: ModuleType, shape: Shape) -> None:
    quant = importlib.import_module(f"{lib.__name__}.quant")
    elements = shape.experts * shape.k * shape.n
    blocks = elements // 64
    stored = quant.FourBit(
        packed=_empty(elements // 2, dtype=torch.uint8),
        absmax=_empty(blocks, dtype=torch.uint8),
        codebook=_empty(16, dtype=torch.float32),
        blocksize=64,
        experts=shape.experts,
        shape=(shape.n, shape.k),
        nested=quant.NestedScales(
            code=_empty(256, dtype=torch.float32),
            absmax=_empty(-(-blocks // 256), dtype=torch.float32),
            offset=_empty(1, dtype=torch.float32),
            blocksize=256,
        ),
    )
    plan = quant.DequantizePlan(block=4096, warps=4)
    stored.dense(None, dtype=shape.torch_dtype, plan=plan)


def _float8(lib: ModuleType, shape: Shape) -> None:
    quant = importlib.import_module(f"{lib.__name__}.quant")
    data = _empty(shape.experts, shape.n, shape.k, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scale = _empty(shape.experts, -(-shape.n // 128), -(-shape.k // 128), dtype=torch.float32)
    stored = quant.Float8(data=data, scale=scale, block=(128, 128))
    stored.dense(None, dtype=shape.torch_dtype, plan=quant.DequantizePlan(block=4096, warps=4))


def baseline_path(version: str = triton.__version__) -> Path:
    """The baseline of a Triton version; builds of one version share it."""
    return BASELINES / f"compile-{version.partition('+')[0]}.json"


def read_baseline(path: Path) -> Mapping[str, list[dict[str, Any]]]:
    """Kernels by job; empty if there is none."""
    return json.loads(path.read_text())["kernels"] if path.is_file() else {}


def job_from(text: Mapping[str, Any]) -> Job:
    """A job from plain values."""
    return Job(**{**text, "shape": Shape(**text["shape"])})


def job_values(job: Job) -> dict[str, Any]:
    """A job as plain values."""
    return asdict(job)
