"""Reader of NumPy's .npz: plain arrays only. Arrays of Python objects are pickles inside, and are refused."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rnn2bin.errors import UnsafeError, UnsupportedError
from rnn2bin.loaders.common import members

if TYPE_CHECKING:
    import torch


def read(path: Path, *, ignore: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Name -> tensor as stored. Raises UnsupportedError when the file is damaged, UnsafeError for pickled objects or false sizes."""
    import numpy as np
    import torch

    for info in members(path):
        _check_member(path, info)
    tensors = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                array = np.asarray(arrays[name])
                tensors[name] = torch.from_numpy(np.array(array.astype(array.dtype.newbyteorder("="), copy=False), order="C"))
    except MemoryError:
        raise
    except TypeError as error:  # text, structured and other arrays that are not numbers
        raise UnsupportedError(f"{path}: array {name!r} does not hold numbers ({error})") from None
    except Exception as error:
        raise UnsupportedError(f"{path}: not a readable npz file, or truncated ({type(error).__name__})") from None
    return tensors


def _check_member(path: Path, info: zipfile.ZipInfo) -> None:
    """Compare what an array's header claims with the bytes that are there, before numpy allocates the claim."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(info) as stream:
            shape, dtype = _header(stream)
            begins = stream.tell()
    except Exception:
        raise UnsupportedError(f"{path}: {info.filename!r} is not a NumPy array, or it is damaged") from None
    if dtype.hasobject:
        raise UnsafeError(
            f"{path}: {info.filename!r} holds pickled Python objects, which can run code; save plain arrays: np.savez(file, **arrays)"
        )
    if math.prod(shape) * dtype.itemsize != info.file_size - begins:
        raise UnsupportedError(
            f"{path}: {info.filename!r} claims shape {shape} but holds {info.file_size - begins} bytes: truncated or corrupt"
        )


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], Any]:
    from numpy.lib import format as npy

    version = npy.read_magic(stream)
    shape, _, dtype = npy.read_array_header_1_0(stream) if version == (1, 0) else npy.read_array_header_2_0(stream)
    return shape, dtype
