"""TensorFlow 1 frozen graphs: what TensorFlow wrote and computed (scripts/write_tensorflow1_goldens.py), and files that attack."""

import io
import itertools
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from rnn2bin import loaders
from rnn2bin.cells.network import teacher_network, valid_steps
from rnn2bin.errors import UnsafeError, UnsupportedError
from rnn2bin.loaders import graphdef
from rnn2bin.recipe import Source

BUNDLE = Path(__file__).parent / "goldens" / "tensorflow1.zip"
REFUSED = ("lstm_other_activation",)
GRAPHS = ("attention", "convolution", "first_state", "residual", "rows_of_an_image", "two_layers_each_way")
NAMES = sorted(name[:-3] for name in zipfile.ZipFile(BUNDLE).namelist() if name.endswith(".pb"))


def case(name, tmp_path):
    with zipfile.ZipFile(BUNDLE) as archive:
        path = tmp_path / f"{name}.pb"
        path.write_bytes(archive.read(f"{name}.pb"))
        return path, {k: torch.from_numpy(v) for k, v in np.load(io.BytesIO(archive.read(f"{name}.npz"))).items()}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_the_network_computes_what_tensorflow_computes(name, tmp_path):
    path, arrays = case(name, tmp_path)
    loaded = loaders.load(path)
    main = loaded.spec.main
    assert (main.graph is not None) == (name in GRAPHS)
    turn = (lambda t: t) if "time_major" in name else (lambda t: t.transpose(0, 1) if t.ndim > 2 or not t.is_floating_point() else t)
    inputs = arrays["inputs"].long() if main.embedding else arrays["inputs"]
    inputs = inputs.t() if inputs.ndim == 2 else turn(inputs)
    lengths = arrays["lengths"].long() if "lengths" in arrays else None
    ours, theirs = teacher_network(loaded.spec, loaded.weights)(inputs, lengths=lengths).y, turn(arrays["outputs"])
    if lengths is not None and main.per_step:  # what stands at pads is nobody's output
        real = valid_steps(lengths, len(ours))
        ours, theirs = ours * real, theirs * real
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)


def test_cells_are_what_they_were(tmp_path):
    layers = lambda name: [
        (one.cell, one.directions, one.activation, one.proj_size) for one in loaders.load(case(name, tmp_path)[0]).spec.main.layers
    ]
    assert layers("gru") == [("gru_reset_before", 1, "tanh", 0)]
    assert layers("basic_lstm_relu") == [("lstm", 1, "relu", 0)]
    assert layers("lstm_projected") == [("lstm", 1, "tanh", 3)]
    assert layers("lstm_peepholes") == [("lstm_peephole", 1, "tanh", 0)]
    assert layers("lstm_peepholes_both_ways_lengths") == [("lstm_peephole", 2, "tanh", 0)]
    assert layers("both_ways_stacked") == [("gru_reset_before", 2, "tanh", 0)] * 2
    assert layers("unrolled_two_layers") == [("gru_reset_before", 1, "tanh", 0)] * 2


@pytest.mark.parametrize(
    ("name", "kind", "cell_clip", "proj_clip"),
    [
        ("lstm_clipped", "lstm", 3.0, 0.0),
        ("lstm_peepholes_clipped", "lstm_peephole", 0.4, 0.2),
        ("lstm_peepholes_unrolled", "lstm_peephole", 0.4, 0.0),
        ("block_lstm", "lstm", 0.0, 0.0),
        ("block_lstm_peepholes", "lstm_peephole", 0.4, 0.0),
        ("lstm_block_cell_peepholes", "lstm_peephole", 0.4, 0.0),
    ],
)
def test_what_clips_a_cell_is_carried(name, kind, cell_clip, proj_clip, tmp_path):
    (layer,) = loaders.load(case(name, tmp_path)[0]).spec.main.layers
    assert (layer.cell, layer.cell_clip, layer.proj_clip) == (kind, pytest.approx(cell_clip), pytest.approx(proj_clip))
    assert ("cells clipped to ±" in loaders.inspect(case(name, tmp_path)[0]).render()) == bool(cell_clip)


def test_a_clip_that_is_not_symmetric_is_refused(tmp_path):
    """Its lower bound is cut at another number: the cell computes something else then, and no random input may hide it."""
    path, _ = case("lstm_clipped", tmp_path)
    content = path.read_bytes()
    low, lower = struct.pack("<f", -3.0), struct.pack("<f", -300.0)
    assert content.count(low) == 1
    path.write_bytes(content.replace(low, lower))
    with pytest.raises(UnsupportedError, match="looks like an LSTM cell"):
        loaders.load(path)


@pytest.mark.parametrize("name", REFUSED)
def test_a_cell_that_computes_something_else_is_named(name, tmp_path):
    with pytest.raises(UnsupportedError, match=r"net/rnn/while/lstm_cell/MatMul: looks like an LSTM cell.*layer normalisation, other"):
        loaders.load(case(name, tmp_path)[0])


def test_inspect_shows_the_network(tmp_path):
    text = loaders.inspect(case("attention", tmp_path)[0]).render()
    assert text.startswith("tensorflow: ")
    assert "around the layers" in text
    assert "can be converted as it is" in text


# --- files of our own ------------------------------------------------------------------------------------------------------------


def varint(value):
    value &= 2**64 - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def shape(*axes):
    return b"".join(field(2, field(1, n)) for n in axes)


def node(name, op, *inputs, **attributes):
    entries = b"".join(field(5, field(1, key.encode()) + field(2, value)) for key, value in attributes.items())
    return field(1, field(1, name.encode()) + field(2, op.encode()) + b"".join(field(3, one.encode()) for one in inputs) + entries)


def const(name, values, *, axes=None, content=None):
    values = np.asarray(values)
    dtype = {"f": 1, "i": 3}[values.dtype.kind]
    data = values.astype("<f4" if dtype == 1 else "<i4").tobytes() if content is None else content
    tensor = field(1, dtype) + field(2, shape(*(values.shape if axes is None else axes))) + field(4, data)
    return node(name, "Const", value=field(8, tensor))


def filled(name, value, *axes):
    tensor = field(1, 1) + field(2, shape(*axes)) + varint(5 << 3 | 5) + struct.pack("<f", value)
    return node(name, "Const", value=field(8, tensor))


def placeholder(name="x", dtype=1, axes=(-1, -1, 3)):
    return node(name, "Placeholder", dtype=field(6, dtype), shape=field(7, shape(*axes)))


def saved(tmp_path, *parts):
    path = tmp_path / "graph.pb"
    path.write_bytes(b"".join(parts))
    return path


def test_constants_of_every_form(tmp_path):
    double = field(1, 2) + field(2, shape(2)) + field(6, struct.pack("<2d", 1.5, -2.0))
    half = field(1, 19) + field(2, shape(2)) + field(13, varint(0x3C00) + varint(0xC000))
    bfloat = field(1, 14) + field(2, shape(2)) + field(4, struct.pack("<2H", 0x3F80, 0xC000))
    whole = field(1, 9) + field(2, shape(3)) + field(10, -1) + field(10, 7)
    parts = {"double": double, "half": half, "bfloat": bfloat, "whole": whole}
    nodes = graphdef.read(
        saved(tmp_path, *(node(name, "Const", value=field(8, tensor)) for name, tensor in parts.items()), filled("f", 2.5, 2, 2))
    )
    read = {name: graphdef.tensor(one.attributes["value"]).tolist() for name, one in nodes.items()}
    wanted = {"double": [1.5, -2.0], "half": [1.0, -2.0], "bfloat": [1.0, -2.0], "whole": [-1, 7, 7], "f": [[2.5, 2.5], [2.5, 2.5]]}
    assert read == wanted


def refused(path, match=None, kind=UnsupportedError):
    with pytest.raises(kind, match=match):
        loaders.load(path)


def test_what_is_no_graph_is_refused(tmp_path):
    refused(saved(tmp_path, b"\x80\x04\x95 not a graph"), "not a frozen TensorFlow graph")
    refused(saved(tmp_path, field(2, b"")), "holds no nodes")
    refused(saved(tmp_path, placeholder(), node("y", "Relu", "x")), "no LSTM or GRU cell")
    refused(saved(tmp_path, placeholder(), placeholder()), "two nodes are named 'x'")
    refused(saved(tmp_path, node("rnn", "CudnnRNNV2", "x")), r"CudnnRNNV2 \(rnn\): its weights are one opaque buffer")
    (tmp_path / "saved_model.pb").write_bytes(field(1, 1))
    refused(tmp_path / "saved_model.pb", "a SavedModel, whose weights lie beside it")
    refused(saved(tmp_path, node("loop", "StatelessWhile", "x")), r"StatelessWhile \(loop\): TensorFlow 2 control flow")


def test_a_graph_cut_short_is_refused(tmp_path):
    """Inside a node; between two, what is left is a smaller graph, and nothing in the format tells."""
    whole = case("gru", tmp_path)[0].read_bytes()
    at, ends = 0, []
    while at < len(whole):
        size, begins = graphdef._varint(memoryview(whole), at + 1)
        at = begins + size
        ends.append(at)
    for end in ends[::3]:
        refused(saved(tmp_path, whole[: end - 1]), "not a frozen TensorFlow graph")


def test_a_number_where_bytes_are_due_is_refused(tmp_path):
    """Python makes as many zeros of a number; terabytes of them here."""
    tensor = field(1, 1) + field(2, shape(1)) + field(4, 2**40)
    for part in (
        field(1, field(1, b"x") + field(2, 2**40)),
        node("x", "Const", value=field(8, tensor)),
        node("x", "Relu", s=field(2, 2**40)),
    ):
        refused(saved(tmp_path, part), "not a frozen TensorFlow graph.*a number where bytes are due")


def test_nodes_that_are_not_as_tensorflow_writes_them(tmp_path):
    gru = case("gru", tmp_path)[0].read_bytes()
    default = node("d", "PlaceholderWithDefault")  # of nothing
    refused(saved(tmp_path, gru, default, node("out", "Mul", "net/add", "d")), "a node is not as TensorFlow writes it")
    product = [const("c", np.float32(2)), const("axes", np.array([0], np.int32)), node("p", "Prod", "c", "axes")]  # along no axis
    refused(saved(tmp_path, gru, *product, node("out", "Mul", "net/add", "p")), "ReduceProd does not run|is not as TensorFlow writes it")
    beyond = node("h", "Const", value=field(8, field(1, 4) + field(2, shape(1)) + field(7, 2**40)))
    refused(saved(tmp_path, gru, beyond, node("out", "Mul", "net/add", "h")), "a constant of shape")


def test_sizes_are_compared_before_anything_is_allocated(tmp_path):
    gru = case("gru", tmp_path)[0].read_bytes()
    refused(saved(tmp_path, gru, filled("bomb", 0.0, 2**20, 2**20)), "exhaust the memory", UnsafeError)
    wide = [filled("tall", 0.0, 2**16, 1), filled("wide", 0.0, 1, 2**16), node("big", "MatMul", "tall", "wide")]
    refused(saved(tmp_path, gru, *wide, node("end", "Add", "big", "net/add")), "compute to more than", UnsafeError)
    short = const("c", np.zeros(2, np.float32), axes=(3, 3))
    refused(saved(tmp_path, gru, short, node("end", "Add", "c", "net/add")), r"shape \(3, 3\) holds 8 bytes")
    refused(saved(tmp_path, varint(1 << 3 | 2) + varint(2**40)), "longer than the file")


def test_circles_and_depth_come_to_an_end(tmp_path):
    refused(saved(tmp_path, node("a", "Identity", "b"), node("b", "Identity", "a")), "in a circle")
    gru = case("gru", tmp_path)[0].read_bytes()
    names = ["net/add", *(f"deep{k}" for k in range(30_000))]
    chain = [node(name, "Relu", before) for before, name in itertools.pairwise(names)]
    refused(saved(tmp_path, gru, *chain), "too deep")


def test_one_of_several_outputs_is_chosen_by_ignoring_the_others(tmp_path):
    gru = case("gru", tmp_path)[0].read_bytes()
    path = saved(tmp_path, gru, node("other", "Relu", "net/Tensordot"))
    refused(path, r"2 outputs that a recurrent layer leads to \(.*other.*\)")
    assert loaders.load(path, source=Source(ignore=["other"])).spec == loaders.load(case("gru", tmp_path)[0]).spec


KEPT = {
    "fed": placeholder("keep", axes=()),
    "left on": const("keep", np.float32(0.5)),
    "by default": node("keep", "PlaceholderWithDefault", "half"),
}


@pytest.mark.parametrize("kept", KEPT)
def test_dropout_drops_nothing(kept, tmp_path):
    """As tf.nn.dropout wrote it: x / keep · ⌊keep + uniform⌋, with what is kept fed, constant or a default."""
    parts = [
        const("half", np.float32(0.5)),
        KEPT[kept],
        node("noise/shape", "Shape", "net/add"),
        node("noise", "RandomUniform", "noise/shape"),
        node("shifted", "Add", "keep", "noise"),
        node("mask", "Floor", "shifted"),
        node("scaled", "RealDiv", "net/add", "keep"),
        node("dropped", "Mul", "scaled", "mask"),
        const("two", np.float32(2)),
        node("doubled", "Mul", "dropped", "two"),  # what was dropped from is no mask
    ]
    gru = case("gru", tmp_path)[0].read_bytes()
    found, wanted = loaders.load(saved(tmp_path, gru, *parts)), loaders.load(case("gru", tmp_path)[0])
    x = torch.randn(6, 2, 5)
    ours, theirs = (teacher_network(one.spec, one.weights)(x).y for one in (found, wanted))
    torch.testing.assert_close(ours, 2 * theirs)
