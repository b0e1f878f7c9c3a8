"""A packed directory -> a model that runs. Backends: native (C, skips what closed gates need not read), torch (the oracle's semantics on
fp16-rounded weights). Importing this imports neither torch nor numpy."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnn2bin.errors import UsageError

if TYPE_CHECKING:
    from rnn2bin.runtime import graph_backend, native_backend, torch_backend

    Native = native_backend.Model | graph_backend.Model

BACKENDS = ("native", "torch")
log = logging.getLogger("rnn2bin")


def load(
    path: str | Path, *, backend: str | None = None, device: str = "cpu", compute: str = "auto", threads: int = 1
) -> Native | torch_backend.Model:
    """Read a packed directory. `backend` None: native where it was built, `device` is the CPU and C runs such a network, else torch; why is
    said. `compute` and `threads` are the native backend's.

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
    if backend == "native":
        return load_native(Path(path), config, compute=compute, threads=threads)
    if backend is None and device == "cpu" and runs_natively(config):
        return load_native(Path(path), config, compute=compute, threads=threads)
    from rnn2bin.runtime import torch_backend

    return torch_backend.load(Path(path), device=device)


def load_native(path: Path, config: dict[str, Any], *, compute: str = "auto", threads: int = 1) -> Native:
    """The native backend of a packed directory with this config.json. Only a graph's imports torch."""
    if any(section.get("graph") for section in _sections(config)):
        from rnn2bin.runtime import graph_backend

        return graph_backend.load(path, compute=compute, threads=threads)
    from rnn2bin.runtime import native_backend

    return native_backend.load(path, compute=compute, threads=threads)


def runs_natively(config: dict[str, Any]) -> bool:
    """Whether the native backend was built and runs this network; where it was built and does not, a line says why."""
    from rnn2bin.runtime import library

    reason = not_native(config) if library.library() else None
    if reason is not None:
        log.warning("the network runs on the torch backend: %s", reason)
    return library.library() is not None and reason is None


def not_native(config: dict[str, Any]) -> str | None:
    """Why the native backend does not run this network and leaves it to torch; None where it does, or says itself what is wrong."""
    sections = _sections(config)
    layers = [layer for section in sections for layer in section.get("layers") or () if isinstance(layer, dict)]
    if len(sections) > 1 and any(section.get("graph") for section in sections):
        return "it is an encoder–decoder with operations around its layers"
    if others := sorted({str(layer["activation"]) for layer in layers if layer.get("activation", "tanh") != "tanh"}):
        return f"its cells have other activations than tanh: {', '.join(others)}"
    if any(layer.get("hard_sigmoid") for layer in layers) and _has_soft_gates(config):
        return "it has soft gates that are hard sigmoids"
    return None


def _sections(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that are objects; what is not is refused by whoever reads it."""
    spec = config.get("spec")
    sections = spec.get("sections") if isinstance(spec, dict) else None
    return [section for section in sections.values() if isinstance(section, dict)] if isinstance(sections, dict) else []


def _has_soft_gates(config: dict[str, Any]) -> bool:
    gates = config.get("gates")
    cells = [cell for cell in gates.values() if isinstance(cell, dict)] if isinstance(gates, dict) else []
    return any(kind != "binary" for cell in cells for kind in cell.values())
