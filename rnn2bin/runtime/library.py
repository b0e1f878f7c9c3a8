"""The native runtime's shared library, bound through ctypes: a call costs about half a microsecond and lets go of the GIL.

`native/rnn2bin.h` is the contract; this file is its mirror and nothing else (docs/decisions/008-native-runtime.md says why not nanobind).
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import warnings
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_uint64, c_void_p
from typing import Any

ABI = 3
COMPUTE = {"auto": 2, "fp16": 0, "int8": 1}


class Info(ctypes.Structure):
    """What a model reads and writes."""

    _fields_ = (
        *((name, c_int32) for name in ("tokens", "per_sequence", "streams", "decoder", "graph")),
        *((name, c_int64) for name in ("input_size", "output_size", "max_length", "layers")),
    )


class Counters(ctypes.Structure):
    """What a state has touched so far."""

    _fields_ = tuple((name, c_uint64) for name in ("steps", "weights", "bytes", "rows", "uncertain"))

    def to_dict(self) -> dict[str, int]:
        return {field[0]: getattr(self, field[0]) for field in self._fields_}


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "r2b_abi": (c_int32, ()),
    "r2b_isa": (c_char_p, ()),
    "r2b_last_error": (c_char_p, ()),
    "r2b_open": (c_void_p, (c_char_p, c_int32)),
    "r2b_close": (None, (c_void_p,)),
    "r2b_describe": (None, (c_void_p, POINTER(Info))),
    "r2b_describe_layer": (c_int32, (c_void_p, c_int64, POINTER(Info))),
    "r2b_new_state": (c_void_p, (c_void_p, c_int64, c_int64)),
    "r2b_new_layer_state": (c_void_p, (c_void_p, c_int64, c_int64, c_int64)),
    "r2b_free_state": (None, (c_void_p,)),
    "r2b_reset": (None, (c_void_p,)),
    "r2b_step": (c_int32, (c_void_p, c_void_p, c_void_p)),
    "r2b_run": (c_int32, (c_void_p, c_void_p, c_int64, c_void_p, c_void_p)),
    "r2b_decode": (c_int32, (c_void_p, c_void_p, c_int64, c_void_p, c_void_p)),
    "r2b_generate": (c_int32, (c_void_p, c_void_p, POINTER(c_int64))),
    "r2b_leave_logits": (None, (c_void_p,)),
    "r2b_state_size": (c_int64, (c_void_p, c_int64, c_int64, c_int64)),
    "r2b_get_state": (c_int32, (c_void_p, c_int64, c_int64, c_int64, c_void_p)),
    "r2b_set_state": (c_int32, (c_void_p, c_int64, c_int64, c_int64, c_void_p)),
    "r2b_get_gates": (c_int32, (c_void_p, c_int64, c_int64, c_void_p)),
    "r2b_read": (c_uint64, (c_void_p, c_uint64, c_uint64)),
    "r2b_count": (None, (c_void_p, POINTER(Counters))),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled runtime; None where the package was installed without a C compiler."""
    found = importlib.util.find_spec("rnn2bin.runtime._native")
    if found is None or not found.origin:
        return None
    native = ctypes.CDLL(found.origin)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(native, name)
        function.restype, function.argtypes = result, arguments
    return native if native.r2b_abi() == ABI else None


@functools.cache
def warn_missing() -> None:
    """Said once a process."""
    warnings.warn("rnn2bin was installed without its C kernels: models run in torch, slower and without skipping", stacklevel=3)


def isa() -> str | None:
    """The instruction set that the runtime uses here, None where it was not built."""
    native = library()
    return native.r2b_isa().decode() if native else None


def last_error() -> str:
    native = library()
    assert native is not None
    return native.r2b_last_error().decode(errors="replace")
