"""A packed directory -> a model that runs. Backends: torch (the oracle's semantics on fp16-rounded weights)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rnn2bin.errors import UsageError

if TYPE_CHECKING:
    from rnn2bin.runtime.torch_backend import Model

BACKENDS = ("torch",)


def load(path: str | Path, *, backend: str = "torch", device: str = "cpu") -> Model:
    """Read a packed directory. Raises UsageError for an unknown backend and for what was made from an nn.Module (its code is not packed),
    UnsupportedError for a directory that is not whole."""
    if backend not in BACKENDS:
        raise UsageError(f"backend {backend!r} is not built in this version; choose of {', '.join(BACKENDS)}")
    from rnn2bin import pack
    from rnn2bin.runtime import torch_backend

    if pack.read_config(Path(path)).get("kind") == "module":
        raise UsageError(f"{path}: made from an nn.Module, whose code is not packed; in Python: rnn2bin.load({str(path)!r}, module=…)")
    return torch_backend.load(Path(path), device=device)
