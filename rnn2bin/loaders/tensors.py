"""Tensors and arrays as pickles describe them: first a description, checked against the bytes that are there; values only when asked for.

`CALLS` are this project's own stand-ins for the functions that PyTorch and NumPy name in their pickles (torch/_utils.py, numpy/core).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rnn2bin.loaders.inert import DamagedError, Record, Symbol

if TYPE_CHECKING:
    import torch

Buffer = bytearray | memoryview

# Element sizes of what torch.float32 and its like name; the storage classes of older files map to them.
WIDTHS = {
    **dict.fromkeys(("float64", "double", "int64", "long", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "float", "int32", "int", "uint32"), 4),
    **dict.fromkeys(("float16", "half", "bfloat16", "int16", "short", "uint16"), 2),
    **dict.fromkeys(("uint8", "int8", "bool"), 1),
    "complex128": 16,
}
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "LongStorage": "int64",
    "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "UntypedStorage": "uint8",
    "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "int8", "QUInt8Storage": "uint8", "QInt32Storage": "int32",
}  # fmt: skip
NUMBERS = re.compile(r"[<>=|]?(?:f[248]|[iu][1248]|b1)")
MOST_DIMENSIONS = 64
MOST_EMPTY = 2**40


@dataclass(eq=False, slots=True)
class Storage:
    """A run of numbers. `held`: how many bytes of it the file has, found apart from what its pickle claims; `fetch` gives them."""

    dtype: str
    size: int  # elements
    held: int = 0
    fetch: Callable[[], Buffer] | None = None
    swapped: bool = False
    _bytes: bytearray | None = field(default=None, repr=False)

    @property
    def claimed(self) -> int:
        return self.size * WIDTHS[self.dtype]

    def bytes(self) -> bytearray:
        """Read once; every tensor of the storage is a view of it."""
        if self._bytes is None:
            if self.fetch is None or self.held != self.claimed:
                raise DamagedError
            data = self.fetch()
            self._bytes = data if isinstance(data, bytearray) else bytearray(data)  # aligned, and nobody else's
            if self.swapped:
                self._bytes = _swap(self._bytes, WIDTHS[self.dtype.replace("complex64", "float32").replace("complex128", "float64")])
        return self._bytes


def _swap(data: bytearray, width: int) -> bytearray:
    import numpy as np

    return bytearray(np.frombuffer(data, dtype=f"u{width}").byteswap().tobytes()) if width > 1 else data


@dataclass(frozen=True, eq=False, slots=True)
class TensorRef:
    """A view of a storage; not yet read."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * WIDTHS[self.dtype]

    @property
    def floating(self) -> bool:
        return "float" in self.dtype or self.dtype in ("double", "half")

    def fault(self) -> str | None:
        """Why it cannot be what it says: reaches beyond its storage, or repeats it."""
        storage, count = self.storage, math.prod(self.shape)
        if storage.claimed != storage.held:
            return f"a storage of {storage.claimed} bytes, the file holds {storage.held}"
        if count == 0:
            return None if math.prod(n for n in self.shape if n) <= MOST_EMPTY else f"{self.shape}"
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        available = storage.claimed // WIDTHS[self.dtype]
        return f"{self.shape}, more than the file holds" if last >= available or count > available else None

    def tensor(self) -> torch.Tensor:
        """Only after `fault` said None."""
        import torch

        dtype = getattr(torch, self.dtype)
        if math.prod(self.shape) == 0:
            return torch.empty(self.shape, dtype=dtype)
        data = self.storage.bytes()
        return torch.frombuffer(data, dtype=dtype, count=len(data) // WIDTHS[self.dtype]).as_strided(self.shape, self.strides, self.offset)


@dataclass(frozen=True, eq=False, slots=True)
class UnreadTensor:
    """A tensor of a kind that is not read; refused by this name where it is needed."""

    kind: str


class DtypeRef:
    """NumPy's dtype while it is being described."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code if isinstance(code, str) else ""

    def build(self, state: Any) -> None:
        order = state[1]
        if order in ("<", ">"):
            self.code = order + self.code.lstrip("<>=|")
        if state[3] is not None or state[2] is not None:  # fields or a sub-array
            self.code = ""


class ArrayRef:
    """NumPy's ndarray while it is being described, and its values when asked for."""

    def __init__(self, *_: Any) -> None:
        self.shape: tuple[int, ...] = (0,)
        self.dtype = ""
        self.fortran = False
        self.raw: Buffer | bytes | str = b""

    def build(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.set(raw, dtype, shape, fortran=bool(fortran))

    def set(self, raw: Any, dtype: Any, shape: Any, *, fortran: bool) -> None:
        if not isinstance(dtype, DtypeRef):
            raise DamagedError
        self.shape, self.dtype, self.fortran = _sizes(shape), dtype.code, fortran
        # A list stands where the elements are Python objects; Python 2 wrote bytes as text.
        self.raw = b"" if isinstance(raw, list) else raw if isinstance(raw, str) else memoryview(raw)

    @property
    def nbytes(self) -> int:
        return len(self.raw)

    @property
    def floating(self) -> bool:
        return "f" in self.dtype

    @property
    def numbers(self) -> bool:
        return NUMBERS.fullmatch(self.dtype) is not None

    def fault(self) -> str | None:
        """As of a TensorRef."""
        count = math.prod(self.shape)
        if self.numbers and count * int(self.dtype[-1]) == len(self.raw) and (count or math.prod(n for n in self.shape if n) <= MOST_EMPTY):
            return None
        return f"{self.shape}, while the file holds {len(self.raw)} bytes of it"

    def tensor(self) -> torch.Tensor:
        """Only after `fault` said None."""
        import numpy as np
        import torch

        raw = self.raw.encode("latin-1") if isinstance(self.raw, str) else self.raw
        array = np.frombuffer(raw, dtype=np.dtype(self.dtype)).reshape(self.shape, order="F" if self.fortran else "C")
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))  # a copy: aligned, and nobody else's


Held = TensorRef | ArrayRef | UnreadTensor


def storage_class(value: Any) -> str:
    """The dtype that a storage's class stands for."""
    if isinstance(value, Symbol) and value.module in ("torch", "torch.cuda", "torch.storage") and value.name in STORAGES:
        return STORAGES[value.name]
    raise DamagedError


def _sizes(value: Any) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value,)
    if not isinstance(value, tuple | list) or len(value) > MOST_DIMENSIONS or any(type(n) is not int or not 0 <= n < 2**63 for n in value):
        raise DamagedError
    return tuple(value)


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TensorRef:
    return _view(storage, offset, shape, strides, storage.dtype)


def _rebuild_typed(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> TensorRef | UnreadTensor:
    if not isinstance(dtype, Symbol) or dtype.module != "torch":
        raise DamagedError
    return _view(storage, offset, shape, strides, dtype.name) if dtype.name in WIDTHS else UnreadTensor(f"of {dtype.name} values")


def _view(storage: Any, offset: Any, shape: Any, strides: Any, dtype: str) -> TensorRef:
    if not isinstance(storage, Storage):
        raise DamagedError
    (start,), shape, strides = _sizes((offset,)), _sizes(shape), _sizes(strides)
    if len(shape) != len(strides):
        raise DamagedError
    return TensorRef(storage, dtype, start, shape, strides)


def _from_type(function: Any, *rest: Any) -> Any:
    """A tensor subclass: read as the plain tensor below it."""
    _, arguments, *_ = rest
    rebuild = REBUILDERS.get(str(function)) if isinstance(function, Symbol) else None
    return rebuild(*arguments) if rebuild else Record(function, arguments)


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> ArrayRef:
    array = ArrayRef()
    array.set(raw, dtype, shape, fortran=order == "F")
    return array


def _encode(text: Any, coding: Any = "utf-8", *_: Any) -> bytes:
    """How protocol 2 writes bytes."""
    if coding not in ("latin1", "latin-1", "utf-8", "utf8"):
        raise DamagedError
    return bytes(_text(text), coding)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise DamagedError
    return value


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    """OrderedDict(); Python 2 gave it a list of [key, value]."""
    return {key: value for key, value in pairs if isinstance(key, str | int)}


def _same(value: Any = (), *_: Any) -> Any:
    return value


def _bytes(value: Any = b"", *_: Any) -> Any:
    """Of bytes, or of how protocols 0 to 2 write them: nothing, a list of numbers, text with its coding."""
    return _encode(value, *_) if isinstance(value, str) else bytes(value) if isinstance(value, list) else value


def _unread(kind: str) -> Callable[..., UnreadTensor]:
    return lambda *_: UnreadTensor(kind)


REBUILDERS: Mapping[str, Callable[..., Any]] = {
    **{f"torch._utils._rebuild_{name}": _rebuild for name in ("tensor", "tensor_v2")},
    "torch._utils._rebuild_tensor_v3": _rebuild_typed,
    **{f"torch._utils._rebuild_{name}": _same for name in ("parameter", "parameter_with_state")},
    **{
        f"torch._utils._rebuild_{name}": _unread(kind)
        for name, kind in {
            "qtensor": "quantized",
            "sparse_tensor": "sparse",
            "sparse_csr_tensor": "sparse",
            "nested_tensor": "nested",
            "meta_tensor_no_storage": "without data",
            "wrapper_subclass": "without data",
            "xla_tensor": "of another device",
            "device_tensor_from_numpy": "of another device",
            "device_tensor_from_cpu_tensor": "of another device",
        }.items()
    },
}
CALLS: Mapping[str, Callable[..., Any]] = {
    **REBUILDERS,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch._tensor._rebuild_from_type": _from_type,
    "torch.Size": _same,
    **{f"torch.jit._pickle.{name}": _same for name in ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")},
    "torch.jit._pickle.restore_type_tag": _same,
    "collections.OrderedDict": _ordered,
    **{f"builtins.{kind}": _same for kind in ("list", "tuple", "set", "frozenset")},
    **{f"builtins.{kind}": _bytes for kind in ("bytes", "bytearray")},
    "builtins.dict": _ordered,
    "_codecs.encode": _encode,
    "numpy.core.multiarray._reconstruct": ArrayRef,
    "numpy.core.numeric._frombuffer": _frombuffer,
    "numpy.dtype": DtypeRef,
}
