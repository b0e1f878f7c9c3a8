"""TensorFlow's GraphDef (.pb) as plain data: nodes, attributes, constants. Protocol-buffer wire format, read with an own reader.

Nothing of a file is run, and no size that a file claims is allocated before it was compared with the bytes that are there.
Field numbers: tensorflow/core/framework/{graph,node_def,attr_value,tensor,tensor_shape,types}.proto.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnn2bin.errors import UnsafeError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

# What a graph may hold for its size: constants may be given as one number for all.
EXPANSION = 100
FREE_BYTES = 256 * 2**20
MOST_NODES = 200_000
MOST_AXES = 16
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

# DataType -> NumPy's name of how its numbers lie in `tensor_content`, and the field of TensorProto that may hold them instead.
DTYPES = {
    1: ("<f4", 5),
    2: ("<f8", 6),
    3: ("<i4", 7),
    4: ("u1", 7),
    5: ("<i2", 7),
    6: ("i1", 7),
    9: ("<i8", 10),
    10: ("?", 11),
    14: ("bfloat16", 13),
    17: ("<u2", 7),
    19: ("<f2", 13),
}
FLOATS, WHOLE, BOOL = frozenset({1, 2, 14, 19}), frozenset({3, 4, 5, 6, 9, 17}), 10


@dataclass(frozen=True)
class Stored:
    """A constant as it lies in the file. `shape` is what the file claims; `read` compares."""

    dtype: int
    shape: tuple[int, ...]
    content: bytes
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class GraphNode:
    """`inputs`: (node, output number), control dependencies left out. `attributes`: numbers, bools, bytes, shapes (tuples, −1 unknown, None
    where even the rank is), `Stored`, lists of these."""

    name: str
    op: str
    inputs: tuple[tuple[str, int], ...]
    attributes: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> dict[str, GraphNode]:
    """Name -> node. Raises UnsupportedError where the file is no GraphDef or damaged, UnsafeError where it would exhaust the memory."""
    if path.name == "saved_model.pb":
        raise UnsupportedError(f"{path}: a SavedModel, whose weights lie beside it; freeze it to one graph, or export it as ONNX (tf2onnx)")
    data = memoryview(path.read_bytes())
    found: dict[str, GraphNode] = {}
    try:
        for number, value in fields(data):
            if number == 1:
                node = _node(value)
                if node.name in found:
                    raise ValueError(f"two nodes are named {node.name!r}")
                found[node.name] = node
            if len(found) > MOST_NODES:
                raise UnsafeError(f"{path}: more than {MOST_NODES} nodes; refused, it would exhaust the memory")
    except (ValueError, IndexError, TypeError, struct.error, UnicodeDecodeError, OverflowError) as error:
        raise UnsupportedError(f"{path}: not a frozen TensorFlow graph (GraphDef), or truncated ({error})") from None
    if not found:
        raise UnsupportedError(f"{path}: not a frozen TensorFlow graph (GraphDef): it holds no nodes")
    _within_memory(path, found)
    _without_circles(path, found)
    return found


def _within_memory(path: Path, nodes: dict[str, GraphNode]) -> None:
    """One number may stand for a whole tensor of them: all together must not unpack to far more than the file."""
    constants = (node.attributes.get("value") for node in nodes.values())
    total = 8 * sum(math.prod(one.shape) for one in constants if isinstance(one, Stored))
    size = path.stat().st_size
    if total > max(EXPANSION * size, FREE_BYTES):
        raise UnsafeError(f"{path}: {size} bytes whose constants unpack to {total}; refused, it would exhaust the memory")


def _without_circles(path: Path, nodes: dict[str, GraphNode]) -> None:
    """Only a loop's next value may lead back to its start: whoever follows inputs comes to an end."""
    inputs = {name: {one for one, _ in node.inputs if one in nodes} for name, node in nodes.items() if node.op != "NextIteration"}
    waiting = {name: len(of) for name, of in inputs.items()}
    readers: dict[str, list[str]] = {}
    for name, of in inputs.items():
        for one in of:
            readers.setdefault(one, []).append(name)
    front = [name for name in nodes if not waiting.get(name)]
    for name in front:
        for reader in readers.get(name, []):
            waiting[reader] -= 1
            if not waiting[reader]:
                front.append(reader)
    if len(front) < len(nodes):
        raise UnsupportedError(f"{path}: not a frozen TensorFlow graph: nodes read each other in a circle")


# --- the wire format -----------------------------------------------------------------------------------------------------------


def fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one message: an int for numbers, the bytes for everything else. ValueError where it is none."""
    at = 0
    while at < len(data):
        key, at = (data[at], at + 1) if data[at] < 128 else _varint(data, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise ValueError("field number 0")
        if kind == VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == BYTES:
            size, at = _varint(data, at)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(data):
            raise ValueError("a field is longer than the file")
        yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it ends inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number of more than 10 bytes")


def _signed(value: int) -> int:
    """int32 and int64 are written as 64-bit two's complement."""
    return value - 2**64 if value >= 2**63 else value


def _bytes(value: Any) -> bytes:
    """A field that should be bytes: of a number, Python would make that many zeros."""
    if isinstance(value, int):
        raise ValueError("a number where bytes are due")
    return bytes(value)


def _text(value: Any) -> str:
    return _bytes(value).decode()


# --- messages ------------------------------------------------------------------------------------------------------------------


def _node(data: memoryview) -> GraphNode:
    name, op, inputs, attributes = "", "", [], {}
    for number, value in fields(data):
        if number == 1:
            name = _text(value)
        elif number == 2:
            op = _text(value)
        elif number == 3:
            inputs.append(_text(value))
        elif number == 5:
            entry = dict(fields(value))
            attributes[_text(entry[1]) if 1 in entry else ""] = _attribute(entry.get(2, memoryview(b"")))
    if not name or not op:
        raise ValueError("a node without a name or an operation")
    return GraphNode(name, op, tuple(_reference(one) for one in inputs if not one.startswith("^")), attributes)


def _reference(text: str) -> tuple[str, int]:
    name, _, number = text.rpartition(":")
    return (name, int(number)) if name and number.isdecimal() else (text, 0)


def _attribute(data: memoryview) -> Any:
    for number, value in fields(data):
        if number == 1:
            return _list(value)
        return _value(number, value)
    return None


def _value(number: int, value: Any) -> Any:
    """One member of AttrValue (its list has the same numbers). Functions and placeholders are not read."""
    floats: Callable[[memoryview], float] = lambda v: struct.unpack("<f", v)[0]
    readers: dict[int, Callable[[Any], Any]] = {2: _bytes, 3: _signed, 4: floats, 5: bool, 6: int, 7: _shape, 8: _tensor}
    return readers[number](value) if number in readers else None


def _list(data: memoryview) -> list[Any]:
    found: list[Any] = []
    for number, value in fields(data):
        if number in (3, 5, 6) and not isinstance(value, int):
            found += [_value(number, one) for one in _packed(value)]
        elif number == 4:
            found += struct.unpack(f"<{len(value) // 4}f", value)
        else:
            found.append(_value(number, value))
    return found


def _packed(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _shape(data: memoryview) -> tuple[int, ...] | None:
    axes = []
    for number, value in fields(data):
        if number == 3 and value:
            return None
        if number == 2:
            axes.append(_signed(dict(fields(value)).get(1, 0)))
    if len(axes) > MOST_AXES:
        raise ValueError(f"a tensor of {len(axes)} axes")
    return tuple(axes)


def _tensor(data: memoryview) -> Stored:
    dtype, content = 0, b""
    shape: tuple[int, ...] = ()
    given: list[tuple[int, Any]] = []
    for number, value in fields(data):
        if number == 1:
            dtype = value
        elif number == 2:
            shape = _shape(value) or ()
        elif number == 4:
            content = _bytes(value)
        else:
            given.append((number, value))
    if any(n < 0 for n in shape):
        raise ValueError(f"a constant of shape {shape}")
    if dtype not in DTYPES:
        return Stored(dtype, shape, b"")
    return Stored(dtype, shape, content, tuple(_numbers(dtype, [v for n, v in given if n == DTYPES[dtype][1]])))


def _numbers(dtype: int, given: list[Any]) -> Iterator[float]:
    """The repeated field that holds a small constant's values: packed, or one by one."""
    for value in given:
        if dtype in (1, 2):
            yield from struct.unpack(f"<{len(value) // (4 * dtype)}{'f' if dtype == 1 else 'd'}", value)
        else:
            yield from map(_signed, [value] if isinstance(value, int) else _packed(value))


# --- constants -----------------------------------------------------------------------------------------------------------------


def tensor(stored: Stored) -> Tensor:
    """As float32, int64 or bool. One value (the last) stands for all that are left out, as TensorFlow writes zeros and the like.

    UnsupportedError where bytes and shape do not fit, or the values are no numbers.
    """
    try:
        return _read_tensor(stored)
    except (ValueError, TypeError, OverflowError) as error:
        raise UnsupportedError(f"a constant of shape {stored.shape} is damaged ({error})") from None


def _read_tensor(stored: Stored) -> Tensor:
    import numpy as np
    import torch

    if stored.dtype not in DTYPES:
        raise UnsupportedError(f"a constant holds values of TensorFlow's type {stored.dtype}; rnn2bin reads numbers")
    kind, count = DTYPES[stored.dtype][0], math.prod(stored.shape)
    bits = kind == "bfloat16" or (stored.dtype == 19 and not stored.content)
    if stored.content:
        raw = np.frombuffer(stored.content, "<u2" if kind == "bfloat16" else kind) if _fits(stored, kind) else None
    else:
        raw = np.array(stored.values, "<u2" if bits else kind)
    if raw is None or len(raw) > count or (count and not len(raw)):
        held = f"{len(stored.content)} bytes" if stored.content else f"{len(stored.values)} values"
        raise UnsupportedError(f"a constant of shape {stored.shape} holds {held}: truncated or corrupt")
    if kind == "bfloat16":
        raw = (raw.astype("<u4") << 16).view("<f4")
    elif bits:
        raw = raw.view("<f2")
    if len(raw) < count:
        raw = np.concatenate([raw, np.broadcast_to(raw[-1:], (count - len(raw),))])
    wide = np.float32 if stored.dtype in FLOATS else np.bool_ if stored.dtype == BOOL else np.int64
    return torch.from_numpy(raw.astype(wide)).reshape(stored.shape)


def _fits(stored: Stored, kind: str) -> bool:
    import numpy as np

    size = 2 if kind == "bfloat16" else np.dtype(kind).itemsize
    return len(stored.content) == size * math.prod(stored.shape)
