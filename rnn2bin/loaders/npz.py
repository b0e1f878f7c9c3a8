"""Reader of NumPy's .npz: plain arrays only. Arrays of Python objects are pickles inside, and are refused."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnn2bin.errors import UnsafeError, UnsupportedError
from rnn2bin.loaders.archive import Archive

if TYPE_CHECKING:
    import torch

SUFFIX = ".npy"
MOST_DIMENSIONS = 32
MOST_EMPTY = 2**40  # an array without elements may claim any other sizes: torch multiplies them


def read(path: Path, *, ignore: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Name -> tensor as stored. Raises UnsupportedError when the file is damaged, UnsafeError for pickled objects or false sizes."""
    archive = Archive(path)
    tensors: dict[str, torch.Tensor] = {}
    for member in archive.members:
        name = member.removesuffix(SUFFIX)  # as np.load names them
        if name in tensors:
            raise UnsafeError(f"{path}: two arrays named {name!r}; readers would see different contents")
        tensors[name] = _array(path, member, archive.read(member))
    return tensors


def _array(path: Path, member: str, data: bytearray) -> torch.Tensor:
    """One array. Its shape is held against the bytes that are there before numpy sees it."""
    import numpy as np
    import torch

    try:
        shape, fortran, dtype, begins = _header(data)
    except Exception:
        raise UnsupportedError(f"{path}: {member!r} is not a NumPy array, or it is damaged") from None
    if dtype.hasobject:
        raise UnsafeError(
            f"{path}: {member!r} holds pickled Python objects, which can run code; save plain arrays: np.savez(file, **arrays)"
        )
    size = math.prod(shape) * dtype.itemsize
    huge = size == 0 and math.prod(n for n in shape if n) > MOST_EMPTY
    if size != len(data) - begins or huge or len(shape) > MOST_DIMENSIONS or dtype.subdtype:
        raise UnsupportedError(f"{path}: {member!r} claims shape {shape} but holds {len(data) - begins} bytes: truncated or corrupt")
    array = np.frombuffer(memoryview(data)[begins:], dtype=dtype) if size else np.zeros(shape, dtype)
    array = array.reshape(shape, order="F" if fortran else "C")
    try:
        return torch.from_numpy(np.require(array.astype(dtype.newbyteorder("="), copy=False), requirements=["C", "A", "W"]))
    except TypeError as error:  # text, structured and other arrays that are not numbers
        raise UnsupportedError(f"{path}: array {member.removesuffix(SUFFIX)!r} does not hold numbers ({error})") from None


def _header(data: bytearray) -> tuple[tuple[int, ...], bool, Any, int]:
    """Shape, Fortran order, dtype, and where the numbers begin."""
    from numpy.lib import format as npy

    stream = io.BytesIO(memoryview(data)[: 2**17])  # numpy reads headers of 10,000 characters, no longer ones
    version = npy.read_magic(stream)
    shape, fortran, dtype = npy.read_array_header_1_0(stream) if version == (1, 0) else npy.read_array_header_2_0(stream)
    if any(n < 0 for n in shape):
        raise ValueError
    return shape, fortran, dtype, stream.tell()
