"""What every reader needs: checks on the file before anything is allocated, and its fingerprint. No torch here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rnn2bin.errors import UnsafeError, UnsupportedError, UsageError

READ_NOW = (
    "formats read now: PyTorch state dict, checkpoint or module (.pt .pth .bin .ckpt .pkl), TorchScript (.pt .jit .ts), "
    ".safetensors, .npz, .onnx, Keras (.h5 .hdf5 .keras), TensorFlow 1 frozen graph (.pb), "
    "Hugging Face directory (config.json with model.safetensors or pytorch_model.bin, whole or in shards)"
)

JSON_BYTES = 8 * 2**20  # some 100,000 names; what JSON costs in memory is about 25 times that


def regular_file(path: Path) -> None:
    """Refuse what is not a file with bytes in it: UsageError when it is missing, UnsupportedError when it is empty."""
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    if not path.is_file():
        raise UsageError(f"{path}: not a regular file")
    if path.stat().st_size == 0:
        raise UnsupportedError(f"{path}: the file is empty")


def whole(path: Path) -> memoryview:
    """All bytes of a file, in memory that is ours to hand on."""
    data = bytearray(path.stat().st_size)
    with path.open("rb", buffering=0) as stream:
        got = 0
        while more := stream.readinto(memoryview(data)[got:]):
            got += more
    return memoryview(data)[:got]


def json_file(path: Path) -> dict[str, Any]:
    """The object in a JSON file. UnsafeError when it is larger than any; else as `json_object`."""
    regular_file(path)
    if path.stat().st_size > JSON_BYTES:
        raise UnsafeError(f"{path}: {path.stat().st_size} bytes is no {path.name}")
    return json_object(path.read_bytes(), where=str(path))


def json_object(text: bytes, *, where: str) -> dict[str, Any]:
    """A JSON object. UnsafeError for a key given twice: readers would see different contents; UnsupportedError for everything else."""
    try:
        data = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
    except _TwiceError as error:
        raise UnsafeError(f"{where}: {error} is given twice; readers would see different contents") from None
    except (ValueError, RecursionError) as error:
        raise UnsupportedError(f"{where}: not readable JSON ({_short(str(error))})") from None
    if not isinstance(data, dict):
        raise UnsupportedError(f"{where}: not a JSON object")
    return data


class _TwiceError(Exception):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        raise _TwiceError(_short(repr(next(name for name, _ in pairs if name in seen or seen.add(name)))))  # type: ignore[func-returns-value]
    return found


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:99] + "…"


def fingerprint(files: list[Path]) -> dict[str, Any]:
    """`sha256`, `bytes` and `files` of a source; for several files the digest is over their `sha256sum` lines."""
    entries = []
    for path in files:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        entries.append({"name": path.name, "sha256": digest, "bytes": path.stat().st_size})
    if len(entries) == 1:
        whole = entries[0]["sha256"]
    else:
        whole = hashlib.sha256("".join(f"{e['sha256']}  {e['name']}\n" for e in entries).encode()).hexdigest()
    return {"sha256": whole, "bytes": sum(path.stat().st_size for path in files), "files": entries}
