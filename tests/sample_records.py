"""Small records of every kind, as the commands write them."""

from typing import Any

KERNELS = ("scatter2scatter", "lora_forward", "lora_weight_grad")
MACHINE = {
    "python": "3.12.3", "torch": "2.11.0+cu130", "triton": "3.6.0", "cuda": "13.0",
    "driver": "580.1", "device": "NVIDIA H100 80GB HBM3", "capability": "9.0",
    "interpreted": False,
}  # fmt: skip
HOSTILE = "<script>document.title = 'taken'</script> | `x` & \"y\""


def head(command: str, day: int = 1, **more: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "command": command,
        "environment": MACHINE,
        "seed": 0,
        "started": f"2026-11-{day:02d}T10:00:00+00:00",
        "seconds": 12.5,
        "fingerprint": dict.fromkeys(KERNELS, "0123456789abcdef"),
        **more,
    }


def outcome(kernel: str, dtype: str, status: str = "passed", **more: Any) -> dict[str, Any]:
    return {
        "kernel": kernel, "path": "tiles", "plan": "tiles:[64x64]", "case": "plain",
        "dtype": dtype, "mode": "balanced", "status": status, "ratio": 0.7, "measure": "row",
        "where": {}, "reason": "", "ratios": {}, **more,
    }  # fmt: skip


def check() -> dict[str, Any]:
    dtypes = ("float32", "float16", "bfloat16")
    outcomes = [outcome(kernel, dtype) for kernel in KERNELS for dtype in dtypes]
    outcomes.append(outcome("lora_forward", "float16", "failed", ratio=3.2, reason=HOSTILE))
    counts = {"passed": 9, "failed": 1, "errors": 0, "unavailable": 0, "total": 10}
    return head("check", summary=counts | {"complete": True}, outcomes=outcomes)


def mutants() -> dict[str, Any]:
    scores = {k: {"killed": 9, "total": 10, "equivalent": 1, "invalid": 0} for k in KERNELS}
    entry = {"id": "m1", "kernel": KERNELS[0], "what": "mask dropped", "status": "survived"}
    entry["diff"] = "-    mask=stored\n+    mask=None"
    counts = {"killed": 27, "survived": 3, "equivalent": 3, "invalid": 0, "total": 30}
    return head("mutants", summary=counts, scores=scores, mutants=[entry])


def bench(day: int, slower: float = 1.0) -> dict[str, Any]:
    entries = [
        {
            "name": f"{kind}.{model}.t{tokens}.r16", "kind": kind, "model": model, "T": tokens,
            "R": 16, "routing": "balanced", "path": "epilogue", "ms": ms * slower,
            "floor_ms": floor, "wall_ms": ms, "first_call_s": 2.0, "peak_bytes": 190_000_000,
            "launches": 9,
            "peers": {
                "torch._grouped_mm": {"ms": 2.1 * ms, "peak_bytes": 446_000_000},
                "transformers + PEFT": {"ms": 6.0 * ms, "peak_bytes": None},
            },
            "detail": {"tflops": flops / ms, "gb_per_s": size / ms},
        }
        for kind, model, tokens, ms, floor, flops, size in (
            ("kernel", "qwen3", 2048, 0.36, 0.29, 103.0, 870.0),
            ("kernel", "mixtral", 2048, 1.77, 1.24, 961.0, 2300.0),
            ("layer", "qwen3", 2048, 1.6, 1.0, 463.0, 2900.0),
            ("layer", "qwen3", 8192, 3.0, 1.8, 1852.0, 3600.0),
        )
    ]  # fmt: skip
    return head("bench", day, summary={"measured": 4, "failed": 0}, benchmarks=entries, failures=[])


def gate() -> dict[str, Any]:
    entries = [
        {"name": "kernel.qwen3", "decision": "same", "ratio": 1.002, "reason": ""},
        {"name": "layer.qwen3", "decision": "regression", "ratio": 1.07, "reason": "5 of 5 pairs"},
    ]
    return head("gate", summary={"regression": 1, "same": 1}, benchmarks=entries)


def fuzz() -> dict[str, Any]:
    columns = ("launches", "plan", "boundary", "tail", "routing", "layout", "form")
    paths = {"scatter2scatter [tiles]": dict.fromkeys(columns, 12)}
    finding = {
        "kind": "crash", "times": 3, "file": "crash-scatter2scatter-0a1b2c3d.json",
        "draw": {
            "kernel": "scatter2scatter", "path": "tiles", "label": "tiles:[64x64]",
            "dtype": "bfloat16", "mode": "exact",
        },
        "outcome": {"reason": "the process was ended by SIGSEGV " + HOSTILE},
    }  # fmt: skip
    counts = {"cases": 6000, "cases_per_second": 7.5, "findings": 1, "complete": True}
    return head("fuzz", summary=counts, paths=paths, findings=[finding])


def sanitize() -> dict[str, Any]:
    outcomes = [outcome(kernel, "bfloat16", mode="memcheck") for kernel in KERNELS]
    counts = {"passed": 3, "failed": 0, "errors": 0, "unavailable": 0, "total": 3}
    return head("sanitize", summary=counts, outcomes=outcomes)


def calibrate() -> dict[str, Any]:
    return head("calibrate", summary={"groups": 100_000, "alarms": 0, "complete": True})


def every() -> dict[str, dict[str, Any]]:
    """File name -> record."""
    return {
        "check.json": check(),
        "mutants.json": mutants(),
        "bench.json": bench(9),
        "older/bench.json": bench(2, slower=1.2),
        "gate.json": gate(),
        "fuzz.json": fuzz(),
        "sanitize.json": sanitize(),
        "calibrate.json": calibrate(),
    }
