"""The readers that scripts/fuzz.py runs: honest inputs to start from, and what one execution is. A new reader is one line in `TARGETS`."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import pickle
import random
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_mutate as mutate

GOLDENS = Path(__file__).parent.parent / "tests" / "goldens"


@dataclass(frozen=True)
class Target:
    """`seeds`: honest inputs. `read`: one execution, in a folder of its own kept for the whole run. `change`: mutates what bytes stand
    for, every other time. `share`: of the executions asked for, where one is slow. `crashes`: read in forked processes, which may crash
    or not end."""

    seeds: Callable[[], list[bytes]]
    read: Callable[[bytes, Path], Any]
    change: mutate.Mutation | None = None
    share: float = 1.0
    crashes: bool = False


# ---- honest inputs ----


@functools.cache
def tensors() -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in torch.nn.GRU(1, 2).state_dict().items()}


def torch_file(content: Any, *, new: bool = True) -> bytes:
    import torch

    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=new)
    return stream.getvalue()


@functools.cache
def script_file() -> bytes:
    import torch

    stream = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        made: Any = torch.jit.script(torch.nn.GRUCell(1, 2))
        torch.jit.save(made, stream)
    return stream.getvalue()


def legacy_files() -> list[bytes]:
    import torch

    return [torch_file(content, new=False) for content in (tensors(), torch.nn.GRU(1, 2), {"model": tensors(), "epoch": 1})]


def pickles() -> list[bytes]:
    import numpy as np

    values = {
        "w": np.ones((2, 3), np.float32),
        "f": np.asfortranarray(np.ones((2, 3))),
        "more": [1, -2.5, None, True, "ä", b"x", {1}, (2**70,)],
    }
    objects = {"args": argparse.Namespace(a=Path("x")), "kind": io.BytesIO, "o": random.Random(0), **tensors()}
    return [pickle.dumps(values, protocol) for protocol in range(6)] + [pickle.dumps(objects, 2)]


def arrays() -> list[bytes]:
    import numpy as np

    made = []
    for array in (
        np.ones((2, 3), np.float32),
        np.asfortranarray(np.ones((2, 3), ">f8")),
        np.array(1),
        np.array(["a"]),
        np.zeros((0, 4), bool),
    ):
        stream = io.BytesIO()
        np.save(stream, array)
        made.append(stream.getvalue())
    return made


def npz_files() -> list[bytes]:
    import numpy as np

    made = []
    for save in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        save(stream, **{name: tensor.numpy() for name, tensor in tensors().items()})
        made.append(stream.getvalue())
    return made


def safetensors_files() -> list[bytes]:
    from safetensors.torch import save

    return [save(tensors()), save({"a": tensors()["weight_ih_l0"].half()}, {"format": "pt"})]


def safetensors_headers() -> list[bytes]:
    return [data[8 : 8 + struct.unpack("<Q", data[:8])[0]] for data in safetensors_files()]


def indexes() -> list[bytes]:
    return [
        json.dumps({"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}).encode(),
        b'{"weight_map": {"a": "../x"}}',
    ]


@functools.cache
def packed() -> tuple[bytes, bytes]:
    """config.json and model.safetensors."""
    from rnn2bin import pack
    from rnn2bin.cells.network import Network
    from rnn2bin.spec import EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec

    spec = RnnSpec({"main": SectionSpec((LayerSpec("gru", 2, 2),), EmbeddingSpec(3, 2), (LinearSpec(2, 3),))})
    network = Network(spec, {name: (True, False) for name, _ in spec.cell_names()}, levels="learned").requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        pack.write_model(network, Path(folder), provenance={}, task={})
        return (Path(folder) / pack.CONFIG).read_bytes(), (Path(folder) / pack.WEIGHTS).read_bytes()


def recipes() -> list[bytes]:
    from rnn2bin import recipe_yaml

    short = [text for path in recipe_yaml.bundled() if len(text := path.read_bytes()) < 800]
    return [*short, b"a: &a [*a]\nb: !!python/object:os.system {}\n"]


# ---- executions ----


def stored(members: tuple[tuple[str, bytes], ...]) -> bytes:
    """A zip file without compression; zipfile takes longer to write one than a reader to read it."""
    body, directory = bytearray(), bytearray()
    for name, data in members:
        head = struct.pack("<5H3L2H", 20, 0, 0, 0, 33, zlib.crc32(data), len(data), len(data), len(name), 0)
        directory += b"PK\1\2\x14\0" + head + struct.pack("<3H2L", 0, 0, 0, 0, len(body)) + name.encode()
        body += b"PK\3\4" + head + name.encode() + data
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(members), len(members), len(directory), len(body), 0)
    return bytes(body + directory) + end


def read_file(name: str) -> Callable[[bytes, Path], Any]:
    """The whole of a file is mutated."""

    def read(data: bytes, folder: Path) -> Any:
        from rnn2bin import loaders

        path = folder / name
        path.write_bytes(data)
        return loaders.READERS[loaders.SUFFIXES[path.suffix]](path)

    return read


def read_member(name: str, member: str, whole: Callable[[], bytes] | None = None) -> Callable[[bytes, Path], Any]:
    """One member of an archive is mutated; the archive around it stays honest, or most inputs would end at its checksums."""

    @functools.cache
    def around() -> tuple[tuple[str, bytes], ...]:
        with zipfile.ZipFile(io.BytesIO(whole() if whole else b"PK\5\6" + bytes(18))) as archive:
            return tuple((info.filename, archive.read(info)) for info in archive.infolist() if not info.filename.endswith(member))

    def read(data: bytes, folder: Path) -> Any:
        from rnn2bin import loaders

        root = next((other.split("/")[0] + "/" for other, _ in around()), "")
        (folder / name).write_bytes(stored((*around(), (root + member, data))))
        return loaders.READERS[loaders.SUFFIXES[Path(name).suffix]](folder / name)

    return read


def member_of(whole: Callable[[], bytes], member: str) -> Callable[[], list[bytes]]:
    def seeds() -> list[bytes]:
        with zipfile.ZipFile(io.BytesIO(whole())) as archive:
            return [archive.read(info) for info in archive.infolist() if info.filename.endswith(member)]

    return seeds


def read_header(data: bytes, folder: Path) -> Any:
    return read_file("m.safetensors")(struct.pack("<Q", len(data)) + data + bytes(120), folder)


def read_index(data: bytes, folder: Path) -> Any:
    from rnn2bin.loaders import huggingface

    if not (folder / "1.safetensors").exists():
        from safetensors.torch import save

        for shard, name in (("1", "a"), ("2", "b")):
            (folder / f"{shard}.safetensors").write_bytes(save({name: tensors()["bias_ih_l0"]}))
    (folder / "model.safetensors.index.json").write_bytes(data)
    return huggingface.read(folder)


def read_packed(data: bytes, folder: Path) -> Any:
    from rnn2bin import pack
    from rnn2bin.packed import read_config

    if not (folder / pack.WEIGHTS).exists():
        (folder / pack.WEIGHTS).write_bytes(packed()[1])
    (folder / pack.CONFIG).write_bytes(data)
    return pack.read_network(folder, read_config(folder))


def read_recipe(data: bytes, folder: Path) -> Any:
    from rnn2bin import recipe_yaml

    (folder / "r.yaml").write_bytes(data)
    return recipe_yaml.read(folder / "r.yaml")


def zip_file() -> bytes:
    return torch_file(tensors())


# ---- packed directories ----


@functools.cache
def packed_text() -> tuple[bytes, bytes]:
    """Those of a small language model: config.json and model.safetensors."""
    config, weights = packed()
    task = {"kind": "sequence", "vocabulary": ["a", "b", "<unk>"]}
    return json.dumps({**json.loads(config), "task": task}).encode(), weights


def joined(config: bytes, weights: bytes) -> bytes:
    """Both files in one input, as tests/native/fuzz.c has them: the length of the first, the first, the second."""
    return struct.pack("<I", len(config)) + config + weights


def read_packed_files(data: bytes, folder: Path) -> Any:
    """What `rnn2bin run DIRECTORY --data TEXT` reads, on the torch backend, and one run of it."""
    from rnn2bin import pack, runtime
    from rnn2bin.runtime import files

    size = int.from_bytes(data[:4], "little") % (len(data) + 1)
    (folder / pack.CONFIG).write_bytes(data[4 : 4 + size])
    (folder / pack.WEIGHTS).write_bytes(data[4 + size :])
    (folder / "x.txt").write_text("abba")
    return files.run_file(runtime.load(folder, backend="torch"), folder / "x.txt", None)


@functools.cache
def packed_graph() -> tuple[bytes, bytes]:
    """The same of a network that is a graph: convolution, two layers with states and lengths between them, softmax."""
    from rnn2bin import pack
    from rnn2bin.cells.network import Network
    from rnn2bin.spec import EmbeddingSpec, GraphSpec, LayerSpec, Node, RnnSpec, SectionSpec

    nodes = (
        Node("Transpose", ("input",), ("x",), {"perm": [1, 2, 0]}),
        Node("Conv", ("x", "kernel"), ("conv",), {"pads": [1, 1]}),
        Node("Transpose", ("conv",), ("below",), {"perm": [2, 0, 1]}),
        Node("Recurrent", ("below", "", "", "lengths"), ("h", "last", "cell"), {"layer": 0}),
        Node("Constant", (), ("half",), {"value": [0.5], "dtype": "float32"}),
        Node("Mul", ("last", "half"), ("start",)),
        Node("Recurrent", ("h", "start"), ("both", "ends"), {"layer": 1}),
        Node("MatMul", ("both", "out"), ("y",)),
    )
    tensors = {"kernel": (2, 2, 3), "out": (3, 3)}
    graph = GraphSpec(nodes, "y", (), 3, per_step=True, batch_first=False, activation="softmax", tensors=tensors)
    spec = RnnSpec({"main": SectionSpec((LayerSpec("lstm", 2, 3, copies=2), LayerSpec("gru", 3, 3)), EmbeddingSpec(3, 2), graph=graph)})
    network = Network(spec, {"main.layers.0.fwd": (True,) * 3, "main.layers.1.fwd": (True, False)}, levels="learned").requires_grad_(False)
    task = {"kind": "sequence", "vocabulary": ["a", "b", "<unk>"]}
    with tempfile.TemporaryDirectory() as folder:
        pack.write_model(network, Path(folder), provenance={}, task=task)
        return (Path(folder) / pack.CONFIG).read_bytes(), (Path(folder) / pack.WEIGHTS).read_bytes()


def read_packed_graph(data: bytes, folder: Path) -> Any:
    """The same of a graph, on both backends where C was built; the torch backend decides."""
    from rnn2bin import pack, runtime
    from rnn2bin.cells import ops
    from rnn2bin.errors import Rnn2binError
    from rnn2bin.runtime import files, library

    size = int.from_bytes(data[:4], "little") % (len(data) + 1)
    (folder / pack.CONFIG).write_bytes(data[4 : 4 + size])
    (folder / pack.WEIGHTS).write_bytes(data[4 + size :])
    (folder / "x.txt").write_text("abba")
    limit = ops.MOST_ELEMENTS.set(2**16)
    try:
        if library.library():
            with contextlib.suppress(Rnn2binError):
                files.run_file(runtime.load(folder, backend="native"), folder / "x.txt", None)
        return files.run_file(runtime.load(folder, backend="torch"), folder / "x.txt", None)
    finally:
        ops.MOST_ELEMENTS.reset(limit)


def change_packed_files(seed: Callable[[], tuple[bytes, bytes]]) -> mutate.Mutation:
    """The config as JSON, or the weights' header as JSON."""

    def change(data: bytes, seeds: Any, dice: random.Random) -> bytes:
        size = int.from_bytes(data[:4], "little") % (len(data) + 1)
        config, weights = data[4 : 4 + size], data[4 + size :]
        if dice.random() < 0.6:
            return joined(mutate.of_json(config, (seed()[0],), dice), weights)
        length = int.from_bytes(weights[:8], "little") % (len(weights) + 1)
        header = mutate.of_json(weights[8 : 8 + length], (header_of(seed()[1]),), dice)
        return joined(config, struct.pack("<Q", len(header)) + header + weights[8 + length :])

    return change


def header_of(weights: bytes) -> bytes:
    return weights[8 : 8 + struct.unpack("<Q", weights[:8])[0]]


# ---- data files ----


def data_headers() -> list[bytes]:
    """Of safetensors files whose body is DATA_BODY."""
    made = []
    for arrays in (
        {"inputs": ("F32", [5, 4, 2]), "lengths": ("I64", [5]), "targets": ("I64", [5, 4])},
        {"inputs": ("I64", [5, 4]), "targets": ("F16", [5, 3]), "target_lengths": ("I32", [5])},
    ):
        header, at = {}, 0
        for name, (kind, shape) in arrays.items():
            size = functools.reduce(lambda a, b: a * b, shape, int(kind[1:]) // 8)
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
            at += size
        made.append(json.dumps(header).encode())
    return made


DATA_BODY = struct.pack("<40f", *range(40)) + struct.pack("<25q", *([1, 2, 3, 4] * 6 + [1]))


@functools.cache
def networks() -> list[Any]:
    """Specs of a network that reads tokens and of one that reads floats."""
    from rnn2bin.spec import EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec

    layer = LayerSpec("gru", 2, 2)
    return [RnnSpec({"main": SectionSpec((layer,), table, (LinearSpec(2, 3),))}) for table in (EmbeddingSpec(5, 2), None)]


def load_data(path: Path) -> Any:
    """`--data`, for both networks; the last one decides."""
    from rnn2bin import data
    from rnn2bin.errors import Rnn2binError
    from rnn2bin.recipe import Recipe

    parts = []
    for spec in networks():
        try:
            parts.append(data.load_parts(path, Recipe(), spec, vocabulary=["a", "b", "<unk>"]))
        except Rnn2binError as error:
            refused = error
    if not parts:
        raise refused
    return data.digest(parts[0])


def read_data(data: bytes, folder: Path) -> Any:
    body = (DATA_BODY * 2)[: _end_of(data)]
    (folder / "d.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + body)
    return load_data(folder / "d.safetensors")


def _end_of(header: bytes) -> int:
    """Where a header says that the body ends: most would end at that check."""
    try:
        return min(len(DATA_BODY) * 2, int(max(entry["data_offsets"][1] for entry in json.loads(header).values())))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError):
        return len(DATA_BODY)


def data_arrays() -> list[bytes]:
    import numpy as np

    made = []
    for array in (np.ones((6, 3, 2), np.float32), np.ones((6, 3), np.int64), np.asfortranarray(np.ones((6, 3, 2), ">f8"))):
        stream = io.BytesIO()
        np.save(stream, array)
        made.append(stream.getvalue())
    return made


def read_data_array(data: bytes, folder: Path) -> Any:
    (folder / "d.npz").write_bytes(stored((("inputs.npy", data),)))
    return load_data(folder / "d.npz")


def texts() -> list[bytes]:
    return [b"ab" * 350, "ab ä".encode() * 200, b"a <unk> " * 90]


def read_text(data: bytes, folder: Path) -> Any:
    """A text as data, and as what is run."""
    from rnn2bin.runtime import files

    (folder / "d.txt").write_bytes(data)
    (folder / "x.txt").write_bytes(data[:9])
    load_data(folder / "d.txt")
    return files.run_file(text_model(), folder / "x.txt", None)


@functools.cache
def text_model() -> Any:
    from rnn2bin import pack, runtime

    with tempfile.TemporaryDirectory() as made:
        for name, data in zip((pack.CONFIG, pack.WEIGHTS), packed_text(), strict=True):
            (Path(made) / name).write_bytes(data)
        return runtime.load(made, backend="torch")


def read_vocabulary(data: bytes, folder: Path) -> Any:
    """`data.vocabulary`: one token a line."""
    from rnn2bin import data as files
    from rnn2bin.recipe import Recipe

    (folder / "d.txt").write_bytes(b"abba " * 400)
    (folder / "v.txt").write_bytes(data)
    recipe = Recipe.model_validate({"data": {"vocabulary": str(folder / "v.txt")}})
    return files.load_parts(folder / "d.txt", recipe, networks()[0])


# ---- reports and checkpoints ----


def reports() -> list[bytes]:
    """What `rnn2bin reproduce` needs of a report.json."""
    from rnn2bin import machine
    from rnn2bin.recipe import Recipe

    recipe = Recipe()
    provenance = {
        "command": {"model": "m.pt", "data": ["d.npz"]},
        **dict.fromkeys(("model_sha256", "source_sha256", "data_sha256"), "0" * 64),
        "recipe": recipe.model_dump(mode="json"),
        "machine": machine.computing(recipe.train.precision),
        "versions": machine.versions(),
    }
    return [json.dumps({"provenance": provenance, "drop": {"value": 0.1}}).encode()]


@functools.cache
def known_versions() -> dict[str, str | None]:
    from rnn2bin import machine

    return machine.versions()


def read_report(data: bytes, folder: Path) -> Any:
    """`rnn2bin reproduce` up to where it reads the source file: there is none. To look the packages' versions up takes longer than that."""
    from rnn2bin import machine, reproduce
    from rnn2bin.errors import UsageError

    kept, found = machine.versions, known_versions()
    machine.versions = lambda: found
    (folder / "report.json").write_bytes(data)
    try:
        recorded = reproduce.read(folder)
        reproduce.surroundings(recorded, reproduce.quiet_recipe(recorded))
        reproduce.reproduce(folder)
    except UsageError as error:
        if "no such file" not in str(error):
            raise
    finally:
        machine.versions = kept


def manifests() -> list[bytes]:
    return [json.dumps({"files": {"a": {"size": 3, "sha256": "0" * 64}, "b/c": {"size": 0, "sha256": ""}}}).encode()]


def read_manifest(data: bytes, folder: Path) -> Any:
    """A checkpoint's: not whole is not read."""
    from rnn2bin import storage
    from rnn2bin.errors import UnsupportedError

    (folder / "a").write_bytes(b"abc")
    (folder / storage.MANIFEST).write_bytes(data)
    flaw = storage.flaw(folder)
    if flaw is not None and flaw != "a is damaged":
        raise UnsupportedError(flaw)
    return flaw


# ---- graph files ----


class CollectedError(Exception):
    """A graph reader has handed over all it read."""


@contextmanager
def unsettled() -> Iterator[None]:
    """Readers stop where the graph is collected: what comes after runs the network, ten times a second. Probes are short."""
    from rnn2bin.loaders import graph, onnx_file

    def stop(*_: Any, **__: Any) -> Any:
        raise CollectedError

    kept = graph.settle, onnx_file.LENGTHS
    graph.settle, onnx_file.LENGTHS = stop, ((3, 2),)
    try:
        yield
    except CollectedError:
        pass
    finally:
        graph.settle, onnx_file.LENGTHS = kept


def complete(assembly: Any) -> Any:
    """A reader may also hand back why it has made no network."""
    from rnn2bin.errors import UnsupportedError

    if assembly.reasons:
        raise UnsupportedError(*assembly.reasons)
    return assembly


def read_collected(name: str) -> Callable[[bytes, Path], Any]:
    """The whole of a graph reader: bytes, structures, nodes and layers handed over; but for the settling of the network."""

    def read(data: bytes, folder: Path) -> Any:
        from rnn2bin import loaders
        from rnn2bin.recipe import Source

        (folder / name).write_bytes(data)
        with unsettled():
            complete(loaders.GRAPH_READERS[loaders.SUFFIXES[Path(name).suffix]](folder / name, Source()))

    return read


def read_settled(name: str) -> Callable[[bytes, Path], Any]:
    """All of it, as `rnn2bin convert` does."""

    def read(data: bytes, folder: Path) -> Any:
        from rnn2bin import loaders

        (folder / name).write_bytes(data)
        return loaders.load(folder / name)

    return read


def read_onnx_bytes(data: bytes, folder: Path) -> Any:
    from rnn2bin.loaders import onnx_proto

    (folder / "t.bin").write_bytes(bytes(64))
    (folder / "m.onnx").write_bytes(data)
    return onnx_proto.read_graph(folder / "m.onnx")


def onnx_files() -> list[bytes]:
    """One step a call with a state; tokens through a bidirectional GRU with lengths; frames through a convolution and a branch."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    F, INT = TensorProto.FLOAT, TensorProto.INT64
    random_ = np.random.default_rng(0)

    def model(nodes: list[Any], inputs: dict[str, tuple[int, list[Any]]], outputs: list[str], arrays: dict[str, Any]) -> bytes:
        values = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
        made = [helper.make_empty_tensor_value_info(name) for name in outputs]
        kept = [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()]
        graph = helper.make_graph(nodes, "g", values, made, kept)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()

    def w(*shape: int) -> Any:
        return random_.normal(size=shape).astype(np.float32)

    node = helper.make_node
    stepped = model(
        [
            node("Gather", ["s", "zero"], ["h0"], axis=0),
            node("Gather", ["s", "one"], ["c0"], axis=0),
            node("Unsqueeze", ["x", "zero"], ["x1"]),
            node("LSTM", ["x1", "w", "r", "b", "", "h0", "c0"], ["y", "h", "c"], hidden_size=2),
            node("Squeeze", ["y", "two"], ["y1"]),
            node("Gemm", ["y1", "m", "n"], ["out"], transB=1),
            node("Concat", ["h", "c"], ["s1"], axis=0),
        ],
        {"x": (F, ["N", 2]), "s": (F, [2, "N", 2])},
        ["out", "s1"],
        {"zero": [0], "one": [1], "two": [0, 1], "w": w(1, 8, 2), "r": w(1, 8, 2), "b": w(1, 16), "m": w(3, 2), "n": w(3)},
    )
    tokens = model(
        [
            node("Gather", ["e", "t"], ["x"]),
            node("Transpose", ["x"], ["x1"], perm=[1, 0, 2]),
            node("GRU", ["x1", "w", "r", "b", "l"], ["y", "h"], hidden_size=2, direction="bidirectional", linear_before_reset=1),
            node("Transpose", ["y"], ["y1"], perm=[2, 0, 1, 3]),
            node("Reshape", ["y1", "shape"], ["y2"]),
            node("MatMul", ["y2", "m"], ["y3"]),
            node("Softmax", ["y3"], ["out"], axis=-1),
        ],
        {"t": (INT, ["B", "T"]), "l": (TensorProto.INT32, ["B"])},
        ["out"],
        {"e": w(5, 2), "w": w(2, 6, 2), "r": w(2, 6, 2), "b": w(2, 12), "shape": [0, 0, 4], "m": w(4, 3)},
    )
    branch = [
        helper.make_graph([node(op, ["y1"], [f"i{op}"])], op, [], [helper.make_empty_tensor_value_info(f"i{op}")])
        for op in ("Tanh", "Relu")
    ]
    frames = model(
        [
            node("Transpose", ["x"], ["x1"], perm=[0, 2, 1]),
            node("Conv", ["x1", "k", "kb"], ["x2"], pads=[1, 1], kernel_shape=[3]),
            node("Clip", ["x2", "low", ""], ["x3"]),
            node("Transpose", ["x3"], ["x4"], perm=[2, 0, 1]),
            node("GRU", ["x4", "w", "r"], ["y", "h"], hidden_size=2, activations=["Sigmoid", "Tanh"]),
            node("Squeeze", ["h", "zero"], ["y1"]),
            node("If", ["yes"], ["out"], then_branch=branch[0], else_branch=branch[1]),
        ],
        {"x": (F, ["B", "T", 2])},
        ["out"],
        {"k": w(2, 2, 3), "kb": w(2), "low": np.float32(-1), "w": w(1, 6, 2), "r": w(1, 6, 2), "zero": [0], "yes": np.array([True])},
    )
    return [stepped, tokens, frames]


def onnx_tensors() -> list[bytes]:
    """Beside them one whose tensor lies in another file, and typed data."""
    from onnx import ModelProto, TensorProto

    outside = ModelProto.FromString(onnx_files()[1])
    moved = outside.graph.initializer[0]
    moved.ClearField("raw_data")
    moved.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "t.bin", "offset": "8", "length": "40"}.items():
        moved.external_data.add(key=key, value=value)
    typed = ModelProto.FromString(onnx_files()[0])
    for tensor, kind in zip(typed.graph.initializer, (TensorProto.INT32, TensorProto.FLOAT16, TensorProto.BFLOAT16), strict=False):
        tensor.ClearField("raw_data")
        tensor.data_type = kind
        tensor.int32_data.extend(range(len(tensor.dims) and tensor.dims[0]))
    return [*onnx_files(), outside.SerializeToString(), typed.SerializeToString()]


def tensorflow_files(*names: str) -> list[bytes]:
    """Those that TensorFlow wrote, with short names and without what nobody reads."""
    with zipfile.ZipFile(GOLDENS / "tensorflow1.zip") as archive:
        return [_short_names(archive.read(f"{name}.pb")) for name in names]


def _short_names(data: bytes) -> bytes:
    from rnn2bin.loaders import graphdef

    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "m.pb").write_bytes(data)
        names = {name: f"n{k}" for k, name in enumerate(graphdef.read(path))}

    def change(field: mutate.Field) -> mutate.Field | None:
        if isinstance(field.value, tuple):
            return None if field.value and field.value[0].value in (b"_output_shapes", b"_class") else field
        if not isinstance(field.value, bytes) or not field.value.isascii():
            return field
        base, mark, number = (text := field.value.decode()).partition(":")
        control, base = ("^", base[1:]) if base.startswith("^") else ("", base)
        return mutate.field(field.number, f"{control}{names[base]}{mark}{number}".encode()) if text and base in names else field

    return mutate.rewritten(data, change)


def tensorflow_parts() -> list[bytes]:
    """A few nodes of each: any number of nodes is a GraphDef."""
    made = []
    for data in tensorflow_files("block_lstm", "gru_block_cell", "language_model", "lstm_lengths"):
        nodes = mutate.message(data)
        made += [b"".join(node.raw for node in nodes[at : at + 12]) for at in range(0, len(nodes), 36)]
    return made


def read_graphdef(data: bytes, folder: Path) -> Any:
    """Nodes and every constant."""
    from rnn2bin.loaders import graphdef

    (folder / "m.pb").write_bytes(data)
    nodes = graphdef.read(folder / "m.pb")
    for node in nodes.values():
        if isinstance(value := node.attributes.get("value"), graphdef.Stored):
            graphdef.tensor(value)
    return nodes


# ---- Keras ----


def keras_models() -> list[bytes]:
    """What the process that reads HDF5 hands over, as JSON: texts, arrays by shape; the config beside them, and the recipe's `source`."""
    gates = {"recurrent_activation": "sigmoid", "activation": "tanh", "units": 2}
    legacy = {
        "version": "2.4.0",
        "config": {
            "class_name": "Functional",
            "config": {
                "name": "model",
                "layers": [
                    {"class_name": "InputLayer", "name": "x", "config": {"batch_input_shape": [None, None]}, "inbound_nodes": []},
                    {
                        "class_name": "Embedding",
                        "name": "e",
                        "config": {"input_dim": 5, "output_dim": 2, "mask_zero": True},
                        "inbound_nodes": [[["x", 0, 0, {}]]],
                    },
                    {
                        "class_name": "Bidirectional",
                        "name": "b",
                        "config": {
                            "name": "b",
                            "merge_mode": "concat",
                            "layer": {"class_name": "LSTM", "config": {"name": "l", **gates, "return_sequences": True}},
                        },
                        "inbound_nodes": [[["e", 0, 0, {}]]],
                    },
                    {
                        "class_name": "TimeDistributed",
                        "name": "d",
                        "config": {
                            "name": "d",
                            "layer": {"class_name": "Dense", "config": {"name": "i", "units": 3, "activation": "softmax"}},
                        },
                        "inbound_nodes": [[["b", 0, 0, {}]]],
                    },
                ],
                "input_layers": [["x", 0, 0]],
                "output_layers": [["d", 0, 0]],
            },
        },
        "attributes": {
            "model_weights": {"layer_names": ["x", "e", "b", "d"], "backend": "tensorflow"},
            "model_weights/e": {"weight_names": ["e"]},
            "model_weights/b": {"weight_names": [f"{way}{part}" for way in "fb" for part in "kru"]},
            "model_weights/d": {"weight_names": ["k", "b"]},
        },
        "tensors": [
            ["model_weights/e/e", "<f4", [5, 2]],
            *[[f"model_weights/b/{way}{part}", "<f4", shape] for way in "fb" for part, shape in (("k", [2, 8]), ("r", [2, 8]), ("u", [8]))],
            ["model_weights/d/k", "<f4", [4, 3]],
            ["model_weights/d/b", "<f4", [3]],
        ],
    }
    sequential = {
        "version": "3.4.1",
        "config": {
            "class_name": "Sequential",
            "config": {
                "name": "s",
                "layers": [
                    {"class_name": "InputLayer", "config": {"batch_shape": [None, None, 2], "name": "x"}},
                    {
                        "class_name": "Conv1D",
                        "config": {
                            "name": "conv1d",
                            "filters": 3,
                            "kernel_size": [3],
                            "strides": [1],
                            "padding": "causal",
                            "activation": "relu",
                        },
                    },
                    {"class_name": "GRU", "config": {"name": "gru", **gates, "reset_after": True, "return_sequences": False}},
                    {"class_name": "LeakyReLU", "config": {"name": "leaky", "negative_slope": 0.1}},
                    {"class_name": "Dense", "config": {"name": "dense", "units": 2, "activation": "linear", "use_bias": False}},
                ],
            },
        },
        "attributes": {},
        "tensors": [
            ["layers/conv1d/vars/0", "<f4", [3, 2, 3]],
            ["layers/conv1d/vars/1", "<f4", [3]],
            ["layers/gru/cell/vars/0", "<f4", [3, 6]],
            ["layers/gru/cell/vars/1", "<f4", [2, 6]],
            ["layers/gru/cell/vars/2", "<f4", [2, 6]],
            ["layers/dense/vars/0", "<f2", [2, 2]],
        ],
    }
    weights = {
        "version": "2.2.4",
        "attributes": {
            "": {"layer_names": ["in", "lstm", "dense"], "keras_version": "2.2.4"},
            "lstm": {"weight_names": ["k", "r", "b"]},
            "dense": {"weight_names": ["k", "b"]},
        },
        "tensors": [
            ["lstm/k", "<f4", [2, 8]],
            ["lstm/r", "<f4", [2, 8]],
            ["lstm/b", "<f4", [8]],
            ["dense/k", "<f4", [2, 1]],
            ["dense/b", "<f4", [1]],
        ],
    }
    declared = {"keras": [{"name": "in", "kind": "Input"}, {"name": "lstm", "kind": "LSTM", "recurrent_activation": "hard_sigmoid"}]}
    declared["keras"].append({"name": "dense", "kind": "Dense", "activation": "tanh"})
    return [json.dumps(one).encode() for one in (legacy, sequential, weights, {**weights, "source": declared})]


def keras_file_of(data: bytes) -> tuple[Any, Any]:
    """The KerasFile and the Source that such JSON stands for; what the reading process would never hand over is left out."""
    import numpy as np

    from rnn2bin.errors import UnsupportedError
    from rnn2bin.files import json_object
    from rnn2bin.loaders import hdf5, keras_container
    from rnn2bin.recipe import Source

    given = json_object(data, where="m.h5")
    tensors_: dict[str, Any] = {}
    try:
        for path, dtype, shape in given["tensors"]:
            if isinstance(path, str) and dtype in ("<f2", "<f4", "<f8", "<i4", "<i8", "|u1") and all(type(n) is int for n in shape):
                size = functools.reduce(lambda a, b: a * b, shape, 1)
                if 0 <= size < 5000 and min([0, *shape]) == 0:
                    tensors_[path] = (np.arange(size) % 7 / 7).astype(dtype).reshape(shape)
        attributes = {path: {k: v for k, v in found.items() if _texts(v)} for path, found in given["attributes"].items()}
        source = Source.model_validate(given.get("source") or {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnsupportedError(str(error)) from None
    config = keras_container._json(json.dumps(given["config"]).encode(), "config") if "config" in given else None
    return keras_container._file(hdf5.Contents(attributes, tensors_), config, str(given.get("version", ""))), source


def _texts(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def read_keras(*, settled: bool) -> Callable[[bytes, Path], Any]:
    """The reader of Keras files behind its container."""

    def read(data: bytes, folder: Path) -> Any:
        from rnn2bin.loaders import keras_container, keras_file

        file, source = keras_file_of(data)
        kept = keras_container.read
        keras_container.read = lambda _: file
        try:
            if settled:
                return complete(keras_file.read(Path("m.h5"), source))
            with unsettled():
                found = keras_file.read(Path("m.h5"), source)
                return found if found.draft else complete(found)
        finally:
            keras_container.read = kept

    return read


def hdf5_files() -> list[bytes]:
    """A model of Keras 2, and weights of Keras 3 (with chunks, as h5py writes what is compressed)."""
    import h5py
    import numpy as np

    made = []
    for legacy in (True, False):
        with h5py.File("m", "w", driver="core", backing_store=False, libver="earliest" if legacy else "latest") as file:
            if legacy:
                file.attrs["model_config"] = json.dumps(json.loads(keras_models()[1])["config"])
                file.attrs["keras_version"] = "2.4.0"
                group = file.create_group("model_weights")
                group.attrs["layer_names"] = [b"lstm"]
                group.create_group("lstm").attrs["weight_names"] = [b"k", b"r"]
                group["lstm/k"], group["lstm/r"] = np.ones((2, 8), np.float32), np.ones((2, 8), np.float32)
            else:
                file.create_dataset("layers/lstm/cell/vars/0", data=np.ones((4, 8), np.float32), compression="gzip", chunks=(2, 8))
                file.create_dataset("layers/lstm/cell/vars/1", data=np.ones((2, 8)), fletcher32=True)
                file["layers/dense/vars/0"] = np.ones(3, ">f2")
            file.flush()
            made.append(file.id.get_file_image())
    return made


def read_hdf5(data: bytes, folder: Path) -> Any:
    """What the reading process does with the bytes, and what is made of its answer."""
    import h5py
    import numpy

    from rnn2bin.errors import UnsupportedError
    from rnn2bin.loaders import hdf5, hdf5_child, keras_container, keras_file

    out = io.BytesIO()
    hdf5_child.answer(h5py, numpy, data, hdf5.EXPANSION * len(data) + hdf5.FREE_BYTES, out)
    file = keras_container.file_of(hdf5.parsed(out.getvalue(), "m.h5"), "m.h5")
    if not file.tensors:
        raise UnsupportedError("m.h5: holds no weights")
    return keras_file.draft(file.groups, file.tensors)


def keras_zips() -> list[bytes]:
    one = json.loads(keras_models()[1])
    parts = (("metadata.json", b'{"keras_version": "3.4.1"}'), ("config.json", json.dumps(one["config"]).encode()))
    return [stored((*parts, ("model.weights.h5", b"\x89HDF\r\n\x1a\n")))]


def read_keras_zip(data: bytes, folder: Path) -> Any:
    """The zip file around; the HDF5 inside is honest."""
    from rnn2bin.loaders import hdf5, keras_file
    from rnn2bin.recipe import Source

    (folder / "m.keras").write_bytes(data)
    kept = hdf5.read
    hdf5.read = lambda stream, size, where: hdf5.Contents({}, keras_file_of(keras_models()[1])[0].tensors)
    try:
        with unsettled():
            return complete(keras_file.read(folder / "m.keras", Source()))
    finally:
        hdf5.read = kept


TARGETS: dict[str, Target] = {
    "pickle": Target(pickles, read_file("m.pkl")),
    "torch-legacy": Target(legacy_files, read_file("m.pt")),
    "torch-zip": Target(lambda: [zip_file()], read_file("m.pt")),
    "torch-zip-pickle": Target(member_of(zip_file, "data.pkl"), read_member("m.pt", "data.pkl", zip_file)),
    "torchscript-pickle": Target(member_of(script_file, "data.pkl"), read_member("m.jit", "data.pkl", script_file)),
    "npz": Target(npz_files, read_file("m.npz")),
    "npz-array": Target(arrays, read_member("m.npz", "a.npy")),
    "safetensors": Target(safetensors_files, read_file("m.safetensors")),
    "safetensors-header": Target(safetensors_headers, read_header, mutate.of_json),
    "huggingface-index": Target(indexes, read_index, mutate.of_json),
    "recipe": Target(recipes, read_recipe),
    "packed-config": Target(lambda: [packed()[0]], read_packed, mutate.of_json),
    "packed-files": Target(lambda: [joined(*packed_text())], read_packed_files, change_packed_files(packed_text)),
    "packed-graph": Target(lambda: [joined(*packed_graph())], read_packed_graph, change_packed_files(packed_graph), share=0.2),
    "data": Target(data_headers, read_data, mutate.of_json),
    "data-array": Target(data_arrays, read_data_array),
    "data-text": Target(texts, read_text),
    "data-vocabulary": Target(lambda: [b"a\nb\n<unk>\nd\n ", b"a\nb\nc\nd\n<unk>\n"], read_vocabulary),
    "report": Target(reports, read_report, mutate.of_json),
    "manifest": Target(manifests, read_manifest, mutate.of_json),
    "onnx-bytes": Target(onnx_tensors, read_onnx_bytes, mutate.of_protobuf),
    "onnx": Target(onnx_files, read_collected("m.onnx"), mutate.of_protobuf),
    "tensorflow-bytes": Target(tensorflow_parts, read_graphdef, mutate.of_protobuf),
    "tensorflow": Target(
        lambda: tensorflow_files("block_lstm", "gru_block_cell", "language_model"), read_collected("m.pb"), mutate.of_protobuf
    ),
    "keras": Target(keras_models, read_keras(settled=False), mutate.of_json),
    "keras-zip": Target(keras_zips, read_keras_zip),
    "keras-hdf5": Target(hdf5_files, read_hdf5, crashes=True),
    "onnx-settled": Target(onnx_files, read_settled("m.onnx"), mutate.of_protobuf, share=0.002),
    "tensorflow-settled": Target(
        lambda: tensorflow_files("block_lstm", "language_model"), read_settled("m.pb"), mutate.of_protobuf, share=0.002
    ),
    "keras-settled": Target(keras_models, read_keras(settled=True), mutate.of_json, share=0.005),
}
