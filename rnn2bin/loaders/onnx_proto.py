"""An ONNX file -> plain frozen data: sizes and places are checked before anything is allocated, and no code of it is ever run."""

from __future__ import annotations

import math
import stat
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnn2bin.errors import UnsafeError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

MOST_BYTES = 2**31 - 1  # of the file itself; protobuf holds no more, larger models keep their tensors in files beside it
MOST_NODES = 100_000
OPSETS = range(7, 27)  # below 7 elementwise operations broadcast in another way
STANDARD = ("", "ai.onnx")

FLOATS = {1: "<f4", 10: "<f2", 11: "<f8"}  # TensorProto.DataType -> numpy; all are read as float32
INTEGERS = {2: "u1", 3: "i1", 4: "<u2", 5: "<i2", 6: "<i4", 7: "<i8", 9: "?", 12: "<u4", 13: "<u8"}
BFLOAT16 = 16
TYPED = {1: "float_data", 11: "double_data", 7: "int64_data", 12: "uint64_data", 13: "uint64_data"}  # else int32_data


@dataclass(frozen=True)
class Input:
    """A graph input: its axes (None where the file leaves a size open) and their symbols; `integer`: tokens, lengths, a sample rate."""

    name: str
    dims: tuple[int | None, ...]
    symbols: tuple[str, ...]
    integer: bool


@dataclass(frozen=True)
class Operation:
    """A node: attributes are numbers, strings, lists of them, tensors or (for `If`) graphs."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    tensors: dict[str, Tensor]
    nodes: tuple[Operation, ...]
    opset: int
    files: tuple[Path, ...] = ()  # beside the model, with tensors of it


def read_graph(path: Path) -> Graph:
    """Raises UsageError where the `onnx` package is missing, UnsupportedError for what is damaged or not understood, UnsafeError for
    tensors kept outside the file's own directory."""
    try:
        from onnx import ModelProto
    except ImportError:
        raise UsageError("reading .onnx files needs the onnx package: pip install rnn2bin[onnx]") from None
    if path.stat().st_size > MOST_BYTES:
        raise UnsupportedError(f"{path}: {path.stat().st_size} bytes; an ONNX file holds at most {MOST_BYTES}")
    try:
        model = ModelProto.FromString(path.read_bytes())
    except MemoryError:
        raise
    except Exception:  # protobuf's own error type depends on its build
        raise UnsupportedError(f"{path}: truncated, corrupt or not an ONNX file; copy or export it again") from None
    versions = [entry.version for entry in model.opset_import if entry.domain in STANDARD]
    if not model.HasField("graph") or not versions or versions[0] not in OPSETS:
        known = f"{OPSETS.start} to {OPSETS.stop - 1}"
        found = f"opset {versions[0]}" if versions else "no opset"
        raise UnsupportedError(f"{path}: {found}; ONNX models of opset {known} are read: export it again with opset_version=17")
    reader = _Reader(path.parent, versions[0])
    try:
        graph = reader.graph(model.graph)
        return replace(graph, files=tuple(dict.fromkeys(reader.files)))
    except (MemoryError, UnsafeError, UnsupportedError):
        raise
    except Exception as error:
        raise UnsupportedError(f"{path}: damaged ({type(error).__name__}: {error}); copy or export it again") from None


@dataclass
class _Reader:
    folder: Path
    opset: int
    nodes: int = 0
    files: list[Path] = field(default_factory=list)

    def graph(self, proto: Any, *, depth: int = 0) -> Graph:
        self.nodes += len(proto.node)
        if self.nodes > MOST_NODES or depth > 32:
            raise UnsupportedError(f"more than {MOST_NODES} nodes, or branches nested more than 32 deep")
        if len(proto.sparse_initializer):
            raise UnsupportedError("sparse tensors, which rnn2bin does not read")
        tensors: dict[str, Tensor] = {}
        for tensor in proto.initializer:
            if tensor.name in tensors:
                raise UnsupportedError(f"tensor {tensor.name!r} is there twice")
            tensors[tensor.name] = self.tensor(tensor)
        inputs = tuple(self.input(value) for value in proto.input if value.name not in tensors)
        nodes = tuple(self.node(node, depth) for node in proto.node)
        return Graph(inputs, tuple(value.name for value in proto.output), tensors, nodes, self.opset)

    def input(self, value: Any) -> Input:
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
            raise UnsupportedError(f"input {value.name!r}: no tensor of known rank; export the model with the shapes of its inputs")
        if kind.elem_type not in {*FLOATS, *INTEGERS, BFLOAT16}:
            raise UnsupportedError(f"input {value.name!r}: holds neither floats nor whole numbers")
        dims = tuple(d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim)
        return Input(value.name, dims, tuple(d.dim_param for d in kind.shape.dim), kind.elem_type in INTEGERS)

    def node(self, node: Any, depth: int) -> Operation:
        attributes = {one.name: self.attribute(one, depth) for one in node.attribute}
        return Operation(node.op_type, node.domain, node.name, tuple(node.input), tuple(node.output), attributes)

    def attribute(self, one: Any, depth: int) -> Any:
        match one.type:
            case 1:
                return float(one.f)
            case 2:
                return int(one.i)
            case 3:
                return one.s.decode("utf-8", "replace")
            case 4:
                return self.tensor(one.t)
            case 5:
                return self.graph(one.g, depth=depth + 1)
            case 6:
                return [float(n) for n in one.floats]
            case 7:
                return [int(n) for n in one.ints]
            case 8:
                return [s.decode("utf-8", "replace") for s in one.strings]
        return None

    def tensor(self, proto: Any) -> Tensor:
        """As float32, int64 or bool. The bytes must be there before the shape that is claimed is believed."""
        import numpy as np
        import torch

        kind, shape, name = proto.data_type, tuple(proto.dims), proto.name
        if kind not in {*FLOATS, *INTEGERS, BFLOAT16}:
            raise UnsupportedError(f"tensor {name!r}: element type {kind}, which rnn2bin does not read")
        dtype = np.dtype("<u2" if kind == BFLOAT16 else FLOATS.get(kind) or INTEGERS[kind])
        count = math.prod(shape)
        if any(n < 0 for n in shape):
            raise UnsupportedError(f"tensor {name!r}: negative size in {shape}")
        raw = self.external(proto, count * dtype.itemsize) if proto.data_location == 1 else proto.raw_data
        typed = () if raw else getattr(proto, TYPED.get(kind, "int32_data"))
        if len(raw) != count * dtype.itemsize and len(typed) != count:
            raise UnsupportedError(
                f"tensor {name!r}: claims shape {shape} but holds {len(raw) or len(typed)} {'bytes' if raw else 'values'}"
            )
        if raw:
            values = np.frombuffer(raw, dtype)
        elif kind in (10, BFLOAT16):  # halves stand in int32_data bit by bit
            values = np.array(typed, "<i4").astype("<u2").view(dtype)
        else:
            values = np.array(typed, dtype)
        if kind == BFLOAT16:
            values = (values.astype("<u4") << 16).view("<f4")
        wide = np.bool_ if kind == 9 else np.float32 if kind in FLOATS or kind == BFLOAT16 else np.int64
        with np.errstate(over="ignore"):
            return torch.from_numpy(values.astype(wide).reshape(shape))

    def external(self, proto: Any, size: int) -> bytes:
        """`size` bytes of a file beside the model. A place outside its directory is never opened."""
        where = {entry.key: entry.value for entry in proto.external_data}
        place, label = where.get("location", ""), f"tensor {proto.name!r}: kept in {where.get('location', '')!r}"
        if not place or "\0" in place or Path(place).is_absolute() or "\\" in place or ":" in place or ".." in Path(place).parts:
            raise UnsafeError(f"{label}, which is no place inside the model's own directory; refused")
        file = self.folder / place
        if not file.resolve().is_relative_to(self.folder.resolve()):
            raise UnsafeError(f"{label}, a link that leads out of the model's directory; refused")
        if not file.is_file() or not stat.S_ISREG(file.stat().st_mode):
            raise UnsupportedError(f"{label}, which is not there; keep it beside the .onnx file")
        try:
            offset, length = int(where.get("offset", 0)), int(where.get("length", size))
        except ValueError:
            raise UnsupportedError(f"{label}: offset or length is no number") from None
        if offset < 0 or length != size or offset + size > file.stat().st_size:
            raise UnsupportedError(
                f"{label}: {size} bytes from {offset} on are not in it ({file.stat().st_size} bytes): truncated or corrupt"
            )
        self.files.append(file)
        with file.open("rb") as stream:
            stream.seek(offset)
            return stream.read(size)
