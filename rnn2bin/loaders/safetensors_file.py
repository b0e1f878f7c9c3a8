"""Reader of .safetensors: a header of names, shapes and offsets, then raw numbers. Nothing in it can run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rnn2bin.errors import UnsupportedError

if TYPE_CHECKING:
    import torch


def read(path: Path, *, ignore: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Name -> tensor as stored. Raises UnsupportedError when the file is damaged."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118  (not a dict)
    except MemoryError:
        raise
    except Exception as error:
        raise UnsupportedError(f"{path}: not a readable safetensors file, or truncated ({_line(error)})") from None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
