"""A packed directory -> a model that runs. Backends: native (C, skips what closed gates need not read), torch (the oracle's semantics on
fp16-rounded weights). Importing this imports neither torch nor numpy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnn2bin.errors import UsageError

if TYPE_CHECKING:
    from rnn2bin.runtime import native_backend, torch_backend

BACKENDS = ("native", "torch")


def load(
    path: str | Path, *, backend: str | None = None, device: str = "cpu", compute: str = "auto", threads: int = 1
) -> native_backend.Model | torch_backend.Model:
    """Read a packed directory. `backend` None: native where it was built and `device` is the CPU, else torch, said once. `compute` and
    `threads` are the native backend's.

    Raises UsageError for a backend that is not there and for what was made from an nn.Module (its code is not packed), UnsupportedError for
    a directory that is not whole.
    """
    from rnn2bin import packed
    from rnn2bin.runtime import library

    if backend not in (None, *BACKENDS):
        raise UsageError(f"backend {backend!r} is unknown; choose of {', '.join(BACKENDS)}")
    config = packed.read_config(Path(path))
    if config.get("kind") == "module":
        raise UsageError(f"{path}: made from an nn.Module, whose code is not packed; in Python: rnn2bin.load({str(path)!r}, module=…)")
    if backend is None and device == "cpu" and not library.library():
        library.warn_missing()
    if backend == "native" and not library.library():
        raise UsageError("backend native: rnn2bin was installed without a C compiler; install one and reinstall, or use backend torch")
    if backend == "native" and device != "cpu":
        raise UsageError(f"backend native: runs on the CPU, not on {device!r}; use backend torch")
    if backend == "native" or (backend is None and device == "cpu" and library.library() and native_runs(config)):
        from rnn2bin.runtime import native_backend

        return native_backend.load(Path(path), compute=compute, threads=threads)
    from rnn2bin.runtime import torch_backend

    return torch_backend.load(Path(path), device=device)


def native_runs(config: dict[str, Any]) -> bool:
    """Whether the native backend runs this network: plain chains of cells with tanh. Others are left to torch."""
    try:
        sections = config["spec"]["sections"].items()
        return all(not section.get("graph") and all(map(_plain, section["layers"])) for _, section in sections) and (
            not any(layer.get("hard_sigmoid") for _, section in sections for layer in section["layers"])
            or all(kind == "binary" for gates in config["gates"].values() for kind in gates.values())
        )
    except (KeyError, TypeError, AttributeError):
        return True  # it says itself what is wrong


def _plain(layer: dict[str, Any]) -> bool:
    return layer.get("activation", "tanh") == "tanh"
