"""A packed directory -> a file that others' tools run: an ONNX graph, or a state dict for PyTorch's own layers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rnn2bin import runtime
from rnn2bin.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from rnn2bin.runtime import torch_backend

SUFFIXES = {"onnx": (".onnx",), "torch": (".pt", ".safetensors")}


def export(path: str | Path, *, to: str, out: str | Path | None = None) -> dict[str, Any]:
    """Write the packed directory `path` as `to` ("onnx" or "torch"); what was written: `file`, `bytes`, `meaning` (lines).

    `out` is a new file (default: the directory's name with the format's suffix, here). Raises UsageError where it exists or has another
    suffix, UnsupportedError with every reason why the format cannot hold the network.
    """
    if to not in SUFFIXES:
        raise UsageError(f"--to {to}: choose of {', '.join(SUFFIXES)}")
    target = Path(out) if out else Path(f"{Path(path).resolve().name}{SUFFIXES[to][0]}")
    if target.suffix not in SUFFIXES[to] or target.exists():
        raise UsageError(f"{target}: give a new file ending in {' or '.join(SUFFIXES[to])}")
    model = cast("torch_backend.Model", runtime.load(path, backend="torch"))
    if to == "onnx":
        from rnn2bin.export import onnx_file as writer
    else:
        from rnn2bin.export import torch_file as writer  # type: ignore[no-redef]
    content, meaning = writer.write(model.network, suffix=target.suffix)
    _save(target, content)
    return {"file": str(target), "bytes": len(content), "meaning": meaning}


def _save(target: Path, content: bytes) -> None:
    """Whole or not at all."""
    partial = target.with_name(target.name + ".partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(target)
    except OSError as error:
        raise ResourceError(f"{target}: cannot write ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)
