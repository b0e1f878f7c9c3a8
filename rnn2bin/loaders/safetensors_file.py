"""Reader of .safetensors: a header of names, shapes and offsets, then raw numbers. Nothing in it can run.

The header is checked here, whatever the library's version does: https://huggingface.co/docs/safetensors (format).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from rnn2bin.errors import UnsafeError, UnsupportedError
from rnn2bin.files import JSON_BYTES, json_object

if TYPE_CHECKING:
    import torch

WIDTHS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
MOST_EMPTY = 2**40
SPEC = "rnn2bin"  # of a header's metadata: the network's spec as JSON


def read(path: Path, *, ignore: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Name -> tensor as stored. Raises UnsupportedError when the file is damaged, UnsafeError for a header made to deceive."""
    from safetensors import safe_open

    names = header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            return {name: stream.get_tensor(name) for name in names}
    except MemoryError:
        raise
    except Exception as error:
        raise UnsupportedError(f"{path}: not a readable safetensors file, or truncated ({_line(error)})") from None


def spec_text(path: Path) -> str | None:
    """What rnn2bin's own float networks say of themselves in the header (`cells.module`), None of another file's."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        first = stream.read(8)
        (length,) = struct.unpack("<Q", first) if len(first) == 8 else (size,)
        if length > min(size - 8, JSON_BYTES):  # `header` says what is wrong
            return None
        found = json_object(stream.read(length), where=f"{path}: header").get("__metadata__")
    text = found.get(SPEC) if isinstance(found, dict) else None
    return text if isinstance(text, str) else None


def header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype and shape, sorted by name (the file's own order says nothing), before anything is allocated.

    Raises UnsupportedError (not whole, not the format) and UnsafeError (an oversized header, names given twice, overlapping tensors).
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        first = stream.read(8)
        (length,) = struct.unpack("<Q", first) if len(first) == 8 else (size,)
        if length > size - 8:
            raise UnsupportedError(f"{path}: not a readable safetensors file, or truncated (header of {length} bytes in a file of {size})")
        if length > JSON_BYTES:
            raise UnsafeError(f"{path}: a header of {length} bytes; refused, no network has that many tensors")
        text = stream.read(length)
    entries = json_object(text, where=f"{path}: header")
    entries.pop("__metadata__", None)
    spans = [(*_span(path, name, entry), name) for name, entry in entries.items()]
    at = 0
    for begins, ends, name in sorted(spans):
        if begins < at:
            raise UnsafeError(f"{path}: tensor {name!r} overlaps another; refused")
        if begins > at:
            raise UnsupportedError(f"{path}: bytes {at} to {begins} belong to no tensor: corrupt")
        at = ends
    if at != size - 8 - length:
        raise UnsupportedError(f"{path}: tensors of {at} bytes in a file that holds {size - 8 - length}: truncated or corrupt")
    return {name: (entries[name]["dtype"], tuple(entries[name]["shape"])) for name in sorted(entries)}


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where the tensor's numbers begin and end; the shape must fill exactly that."""
    given = entry if isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"} else {}
    dtype, shape, offsets = given.get("dtype"), given.get("shape"), given.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in WIDTHS or not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise UnsupportedError(f"{path}: tensor {name!r} is not described by dtype, shape and data_offsets")
    count, (begins, ends) = math.prod(shape), offsets
    if count * WIDTHS[dtype] != ends - begins or (count == 0 and math.prod(n for n in shape if n) > MOST_EMPTY):
        raise UnsafeError(f"{path}: tensor {name!r} claims {dtype} {shape} in {ends - begins} bytes; refused")
    return begins, ends


def _naturals(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and len(values) <= 64 and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
