"""What this machine computes with: where the same recipe may give other bits."""

from __future__ import annotations

import os
import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rnn2bin import processes

PACKAGES = ("rnn2bin", "torch", "transformers", "accelerate", "safetensors", "numpy")
# What kernels are chosen by; everything else the CPU can do does not matter here.
FLAGS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "neon", "asimdhp", "fphp", "bf16", "sve", "sve2"),
)

Findings = dict[str, Any]


def versions() -> dict[str, str | None]:
    def of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {"python": platform.python_version(), **{name: of(name) for name in PACKAGES}}


def cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Findings:
    """Model and the flags that matter; where there is no /proc/cpuinfo, what the platform module knows."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        text = ""
    fields = {name.strip().lower(): value.strip() for line in text.splitlines() for name, _, value in (line.partition(":"),)}
    flags = set(fields.get("flags", fields.get("features", "")).split())
    model = fields.get("model name") or platform.processor() or "unknown"
    return {"model": model, "machine": platform.machine(), "cores": os.cpu_count(), "isa": [flag for flag in FLAGS if flag in flags]}


def threads() -> dict[str, int]:
    import torch

    return {"torch": torch.get_num_threads()}


def kernels() -> Findings:
    """Instruction set of the compiled training kernels, None where the package has none, and whether bfloat16 products run there."""
    from rnn2bin.distill import native

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said by whoever trains
        return {"isa": native.isa(), "bfloat16": native.has_bfloat16()}


def computing(precision: str) -> Findings:
    """What a training run's bits depend on beside its recipe. `precision`: the recipe's; what is found is the one that runs here."""
    chip, found = cpu(), kernels()
    return {
        "platform": platform.platform(),
        "cpu": chip["model"],
        "isa": chip["isa"],
        "kernels": found["isa"],
        "precision": "bfloat16" if precision != "float32" and found["bfloat16"] else "float32",
        "threads": threads()["torch"],
        "processes": processes.count(),
    }
