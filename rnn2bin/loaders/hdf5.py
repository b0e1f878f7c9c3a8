"""HDF5 -> texts and arrays as plain data, read in a process of its own (`hdf5_child`): a damaged file may crash the HDF5 library."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rnn2bin.errors import UnsafeError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from numpy import ndarray

MAGIC, PLACES = b"\x89HDF\r\n\x1a\n", (0, 512, 1024, 2048)  # a user block may stand before it
# Weights hardly compress: all arrays together may take so much beside the file's own size.
EXPANSION = 2
FREE_BYTES = 64 * 2**20
TIMEOUT = 300  # seconds; the reading process ends itself long before, unless the machine stands still


@dataclass(frozen=True)
class Contents:
    """`attributes`: path of a group ("" is the root) -> name -> text or texts; `tensors`: path -> array, as stored."""

    attributes: dict[str, dict[str, Any]]
    tensors: dict[str, ndarray]


def read(stream: IO[bytes], size: int, *, where: str) -> Contents:
    """What an HDF5 file of `size` bytes holds.

    Raises UsageError (h5py is missing), UnsupportedError (damaged, or not plain numbers) and UnsafeError (links, virtual datasets, numbers
    in other files, shapes beyond the file's size).
    """
    if importlib.util.find_spec("h5py") is None:
        raise UsageError(f"{where}: reading Keras files needs h5py: pip install 'rnn2bin[keras]'")
    data = stream.read()
    if not any(data.startswith(MAGIC, at) for at in PLACES):
        raise UnsupportedError(f"{where}: not an HDF5 (Keras) file, or its first bytes are damaged")
    command = [sys.executable, "-P", str(Path(__file__).with_name("hdf5_child.py")), str(EXPANSION * size + FREE_BYTES)]
    # No thread pools, whose stacks count as memory; no filter plugins, which are code.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HDF5_PLUGIN_PRELOAD": "::"}
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=TIMEOUT, env=environment, check=False)
    except subprocess.TimeoutExpired:
        raise UnsafeError(f"{where}: reading it does not end; refused") from None
    if done.returncode:
        raise UnsupportedError(f"{where}: the HDF5 library failed on it (exit {done.returncode}); truncated or corrupt, copy it again")
    return parsed(done.stdout, where)


def parsed(data: bytes, where: str) -> Contents:
    """The answer of the reading process. Raises what it says."""
    import numpy as np

    at = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:at])
    if "error" in header:
        kind, message = header["error"]
        raise (UnsafeError if kind == "unsafe" else UnsupportedError)(f"{where}: {message}")
    tensors = {}
    for path, dtype, shape in header["tensors"]:
        count = math.prod(shape)
        tensors[path] = np.frombuffer(data, np.dtype(dtype), count, at).reshape(shape)
        at += count * np.dtype(dtype).itemsize
    return Contents(header["attributes"], tensors)
