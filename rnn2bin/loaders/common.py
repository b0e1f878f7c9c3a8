"""What every reader needs: checks on the file before anything is allocated, and its fingerprint. No torch here."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

from rnn2bin.errors import UnsafeError, UnsupportedError, UsageError

READ_NOW = (
    "formats read now: PyTorch state dict (.pt .pth .bin .ckpt), .safetensors, .npz, TensorFlow 1 frozen graph (.pb), "
    "Hugging Face directory (config.json with model.safetensors or pytorch_model.bin)"
)

# A trained network's tensors hardly compress; an archive that unpacks to far more than itself is made to fill the memory.
EXPANSION = 100
FREE_BYTES = 256 * 2**20


def regular_file(path: Path) -> None:
    """Refuse what is not a file with bytes in it: UsageError when it is missing, UnsupportedError when it is empty."""
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    if not path.is_file():
        raise UsageError(f"{path}: not a regular file")
    if path.stat().st_size == 0:
        raise UnsupportedError(f"{path}: the file is empty")


def members(path: Path) -> list[zipfile.ZipInfo]:
    """The entries of a zip file; UnsupportedError when its directory cannot be read, UnsafeError for a decompression bomb."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except Exception:
        raise UnsupportedError(f"{path}: truncated or corrupt archive; copy or download it again") from None
    size, total = path.stat().st_size, sum(info.file_size for info in infos)
    if total > max(EXPANSION * size, FREE_BYTES):
        raise UnsafeError(f"{path}: {size} bytes that unpack to {total}; refused, it would exhaust the memory")
    return infos


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
