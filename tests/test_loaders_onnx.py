"""ONNX files against onnxruntime; what cannot be read is refused by name, what attacks is refused before it can."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tolerances import assert_close
from torch import nn

from rnn2bin import loaders
from rnn2bin.cells.network import teacher_network
from rnn2bin.cli import main
from rnn2bin.errors import Rnn2binError, UnsafeError, UnsupportedError, UsageError
from rnn2bin.loaders.onnx_open import Widths, widths
from rnn2bin.recipe import Source

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

B, T, WIDTH, HIDDEN, OUT = 3, 6, 5, 7, 4
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
ROOT = Path(__file__).parent


class Net:
    """A model in the making: nodes and tensors with random values; `op` and `cell` give the name of their (first) output."""

    def __init__(self, *, opset: int = 17, seed: int = 0) -> None:
        self.random, self.opset = np.random.default_rng(seed), opset
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []

    def tensor(self, values: Any) -> str:
        name = f"t{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def weight(self, *shape: int) -> str:
        return self.tensor(self.random.normal(size=shape, scale=0.4).astype(np.float32))

    def ops(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        names = [f"v{len(self.nodes)}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        return names

    def op(self, op: str, *inputs: str, **attributes: Any) -> str:
        return self.ops(op, *inputs, **attributes)[0]

    def cell(
        self, op: str, x: str, width: int = WIDTH, *, lengths: str = "", h0: str = "", c0: str = "", p: str = "", **attributes: Any
    ) -> list[str]:
        """Y, Y_h and an LSTM's Y_c of a recurrent node over x (T,B,width)."""
        ways = 2 if attributes.get("direction") == "bidirectional" else 1
        w, r = self.weight(ways, GATES[op] * HIDDEN, width), self.weight(ways, GATES[op] * HIDDEN, HIDDEN)
        inputs = [x, w, r, self.weight(ways, 2 * GATES[op] * HIDDEN), lengths, h0, *([c0, p] if op == "LSTM" else [])]
        return self.ops(op, *inputs, outputs=3 if op == "LSTM" else 2, hidden_size=HIDDEN, **attributes)

    def flat(self, y: str, ways: int = 1) -> str:
        """Y (T,D,B,H) -> (T,B,D·H)."""
        return self.op("Reshape", self.op("Transpose", y, perm=[0, 2, 1, 3]), self.tensor(np.array([0, 0, ways * HIDDEN])))

    def head(self, y: str, width: int) -> str:
        return self.op("Add", self.op("MatMul", y, self.weight(width, OUT)), self.weight(OUT))

    def model(self, inputs: dict[str, tuple[int, list[Any]]], *outputs: str) -> Any:
        values = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
        made = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", values, made, self.tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)

    def save(self, path: Path, *outputs: str, x: list[Any] | None = None, **others: tuple[int, list[Any]]) -> Path:
        proto = self.model({"x": (TensorProto.FLOAT, x or ["T", "B", WIDTH]), **others}, *outputs)
        path.write_bytes(proto.SerializeToString())
        return path


def theirs(path: Path, **feeds: Any) -> list[torch.Tensor]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(np.array(y)) for y in session.run(None, {k: np.asarray(v) for k, v in feeds.items()})]


def network(path: Path, **source: Any) -> Any:
    loaded = loaders.load(path, source=Source(**source))
    return teacher_network(loaded.spec, loaded.weights)


def floats(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reasons(path: Path, **source: Any) -> str:
    with pytest.raises(UnsupportedError) as caught:
        loaders.load(path, source=Source(**source))
    return "\n".join(caught.value.reasons)


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("LSTM", {"input_forget": 1}),
    ("LSTM", {"activations": ["Sigmoid", "Relu", "Relu"]}),
    ("LSTM", {"activations": ["HardSigmoid", "Softsign", "Softsign"], "activation_alpha": [0.3]}),
    ("GRU", {"linear_before_reset": 0}),
    ("GRU", {"linear_before_reset": 1}),
    ("GRU", {"linear_before_reset": 1, "activations": ["Sigmoid", "Relu"]}),
    ("GRU", {"linear_before_reset": 0, "activations": ["HardSigmoid", "Tanh"]}),
]


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(("op", "attributes"), VARIANTS, ids=lambda v: str(v))
def test_two_layers_of_every_kind_are_onnxruntimes(op, attributes, direction, tmp_path):
    ways = 2 if direction == "bidirectional" else 1
    attributes = dict(attributes)
    if ways == 2 and "activations" in attributes:
        attributes["activations"] = attributes["activations"] * 2
        attributes |= {"activation_alpha": attributes["activation_alpha"] * 2} if "activation_alpha" in attributes else {}
    net = Net()
    y = net.flat(net.cell(op, "x", direction=direction, **attributes)[0], ways)
    y = net.flat(net.cell(op, y, ways * HIDDEN, direction=direction, **attributes)[0], ways)
    path = net.save(tmp_path / "m.onnx", net.head(y, ways * HIDDEN))
    x = floats(T, B, WIDTH)
    made = network(path)
    assert_close(made(x).y, theirs(path, x=x)[0])
    layer = made.spec.main.layers[0]
    assert (len(made.spec.main.layers), layer.directions, layer.cell) == (
        2,
        ways,
        "lstm_coupled"
        if "input_forget" in attributes
        else {"LSTM": "lstm"}.get(op) or ("gru" if attributes["linear_before_reset"] else "gru_reset_before"),
    )
    assert (made.spec.main.graph is None) == (direction != "reverse")


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("coupled", [0, 1])
@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("peepholes", [False, True])
def test_peepholes_clips_and_coupled_gates_are_onnxruntimes(peepholes, clip, coupled, direction, tmp_path):
    """In all combinations, with lengths, first states and activations; what the file says must make a difference."""
    ways = 2 if direction == "bidirectional" else 1

    def built(path: Path, *, plain: bool) -> Path:
        net, y, width = Net(), "x", WIDTH
        for _ in range(2):
            functions = ["HardSigmoid", "Softsign", "Softsign"] if coupled else ["Sigmoid", "Tanh", "Tanh"]
            attributes: dict[str, Any] = {"direction": direction, "activations": functions * ways}
            h0, c0, p = (net.weight(ways, 1, n * HIDDEN) for n in (1, 1, 3))
            p = net.op("Mul", net.op("Squeeze", p, net.tensor(np.array([1]))), net.tensor(np.float32(3)))
            starts = [net.op("Expand", s, net.tensor(np.array([ways, B, HIDDEN]))) for s in (h0, c0)]
            if not plain:
                attributes |= ({"clip": clip} if clip else {}) | ({"input_forget": 1} if coupled else {}) | ({"p": p} if peepholes else {})
            y = net.flat(net.cell("LSTM", y, width, lengths="n", h0=starts[0], c0=starts[1], **attributes)[0], ways)
            width = ways * HIDDEN
        return net.save(path, net.op("ReduceMax", net.head(y, width), axes=[0], keepdims=0), n=(TensorProto.INT32, ["B"]))

    path = built(tmp_path / "m.onnx", plain=False)
    x, n = 2 * floats(T, B, WIDTH), torch.tensor([6, 2, 4])
    made, wanted = network(path), theirs(path, x=x, n=n.int())[0]
    assert_close(made(x, lengths=n).y, wanted)
    kind = f"lstm{'_coupled' if coupled else ''}{'_peephole' if peepholes else ''}"
    assert [(one.cell, one.clip) for one in made.spec.main.layers] == [(kind, pytest.approx(clip or 0.0))] * 2
    if peepholes or clip or coupled:
        assert (wanted - theirs(built(tmp_path / "plain.onnx", plain=True), x=x, n=n.int())[0]).abs().max() > 0.01


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("reset", [0, 1])
def test_clipped_grus_are_onnxruntimes(reset, direction, tmp_path):
    ways, net = 2 if direction == "bidirectional" else 1, Net()
    y = net.flat(net.cell("GRU", "x", direction=direction, clip=0.4, linear_before_reset=reset)[0], ways)
    path = net.save(tmp_path / "m.onnx", net.head(y, ways * HIDDEN))
    x = 2 * floats(T, B, WIDTH)
    assert_close(network(path)(x).y, theirs(path, x=x)[0])


def test_the_bias_of_a_coupled_forget_gate_is_not_read(tmp_path):
    """f = 1 − i whatever the file has as its weights: onnxruntime reads them no more than we do."""
    outputs = []
    for scale in (1.0, 50.0):
        net = Net()
        w, r, b = net.weight(1, 4 * HIDDEN, WIDTH), net.weight(1, 4 * HIDDEN, HIDDEN), net.random.normal(size=(1, 8 * HIDDEN))
        b[:, 2 * HIDDEN : 3 * HIDDEN] *= scale
        y = net.ops("LSTM", "x", w, r, net.tensor(b.astype(np.float32)), outputs=3, hidden_size=HIDDEN, input_forget=1)[0]
        path = net.save(tmp_path / f"{scale}.onnx", net.head(net.flat(y), HIDDEN))
        x = floats(T, B, WIDTH)
        outputs.append(network(path)(x).y)
        assert_close(outputs[-1], theirs(path, x=x)[0])
    assert torch.equal(*outputs)


@pytest.mark.parametrize("activation", ["Tanh", "Relu"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_layers_without_gates_are_carried(direction, activation, tmp_path):
    ways = 2 if direction == "bidirectional" else 1
    net = Net()
    start = net.weight(ways, 1, HIDDEN)
    start = net.op(
        "Expand", start, net.op("Concat", net.tensor([ways]), net.op("Shape", "x", start=1, end=2), net.tensor([HIDDEN]), axis=0)
    )
    y = net.flat(net.cell("RNN", "x", direction=direction, activations=[activation] * ways, h0=start)[0], ways)
    _, h, _ = net.cell("LSTM", y, ways * HIDDEN)
    path = net.save(tmp_path / "m.onnx", net.op("Squeeze", h, net.tensor([0])))
    x = floats(T, B, WIDTH)
    assert_close(network(path)(x).y, theirs(path, x=x)[0])


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
@pytest.mark.parametrize("kind", ["constant", "computed"])
def test_first_states(op, kind, tmp_path):
    net = Net()
    if kind == "constant":
        starts = [net.weight(1, 1, HIDDEN) for _ in range(2)]
        size = net.op("Concat", net.tensor([1]), net.op("Shape", "x", start=1, end=2), net.tensor([HIDDEN]), axis=0)
        starts = [net.op("Expand", one, size) for one in starts]
    else:
        first = net.op("Slice", "x", net.tensor([0]), net.tensor([1]), net.tensor([0]))
        starts = [net.op("Tanh", net.op("MatMul", first, net.weight(WIDTH, HIDDEN))) for _ in range(2)]
    y, *_ = net.cell(op, "x", h0=starts[0], **({"c0": starts[1]} if op == "LSTM" else {}))
    path = net.save(tmp_path / "m.onnx", net.head(net.flat(y), HIDDEN))
    x = floats(T, B, WIDTH)
    assert_close(network(path)(x).y, theirs(path, x=x)[0])


def test_states_that_go_in_and_out_are_carried_by_the_layers(tmp_path):
    net = Net()
    y, h, c = net.cell("LSTM", "x", h0="h0", c0="c0")
    path = net.save(tmp_path / "m.onnx", h, net.head(net.flat(y), HIDDEN), c, h0=(1, [1, "B", HIDDEN]), c0=(1, [1, "B", HIDDEN]))
    x = floats(T, B, WIDTH)
    zero = np.zeros((1, B, HIDDEN), np.float32)
    h1, first, c1 = theirs(path, x=x[:2], h0=zero, c0=zero)
    _, second, _ = theirs(path, x=x[2:], h0=h1, c0=c1)
    made = network(path)
    assert_close(made(x).y, torch.cat([first, second]))
    again = made(x[:2])
    assert_close(made(x[2:], again.state).y, second)
    assert "carried states h0, c0" in "\n".join(loaders.inspect(path, source=Source()).parts)


def test_lengths_that_come_in_are_the_sequences_lengths(tmp_path):
    net = Net()
    y, *_ = net.cell("LSTM", "x", lengths="n", direction="bidirectional")
    y = net.flat(y, 2)
    total = net.op("ReduceSum", y, net.tensor([0]), keepdims=0)
    count = net.op("Unsqueeze", net.op("Cast", "n", to=1), net.tensor([1]))
    path = net.save(tmp_path / "m.onnx", net.head(net.op("Div", total, count), 2 * HIDDEN), n=(TensorProto.INT32, ["B"]))
    x, n = floats(T, B, WIDTH), torch.tensor([6, 2, 4])
    made = network(path)
    wanted = theirs(path, x=x, n=n.int())[0]
    assert_close(made(x, lengths=n).y, wanted)
    assert made.spec.main.readout == "mean"


def test_tokens_and_two_tables(tmp_path):
    net = Net()
    table, other = net.weight(11, WIDTH), net.weight(11, 2)
    both = net.op("Concat", net.op("Gather", table, "tokens"), net.op("Gather", other, "tokens"), axis=2)
    y, *_ = net.cell("GRU", net.op("Transpose", both, perm=[1, 0, 2]), WIDTH + 2, linear_before_reset=1)
    out = net.op("Softmax", net.head(net.op("Transpose", net.flat(y), perm=[1, 0, 2]), HIDDEN), axis=-1)
    proto = net.model({"tokens": (TensorProto.INT64, ["B", "T"])}, out)
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    tokens = torch.randint(11, (T, B), generator=torch.Generator().manual_seed(0))
    made = network(path)
    assert_close(made(tokens).y, theirs(path, tokens=tokens.t())[0].transpose(0, 1))
    assert (made.spec.main.embedding.num_embeddings, made.spec.main.activation) == (11, "softmax")


def test_one_hot_tokens(tmp_path):
    net = Net()
    hot = net.op("OneHot", "tokens", net.tensor(9), net.tensor(np.array([0, 1], np.float32)))
    y, *_ = net.cell("LSTM", hot, 9)
    path = tmp_path / "m.onnx"
    path.write_bytes(net.model({"tokens": (TensorProto.INT64, ["T", "B"])}, net.head(net.flat(y), HIDDEN)).SerializeToString())
    tokens = torch.randint(9, (T, B), generator=torch.Generator().manual_seed(0))
    made = network(path)
    assert_close(made(tokens).y, theirs(path, tokens=tokens)[0])
    assert made.spec.main.embedding.one_hot
    assert made.spec.main.graph is None


def test_frames_of_features_before_time_and_a_batch_norm(tmp_path):
    """(B,F,T), as speech networks take it."""
    net = Net()
    scale, bias, mean = (net.weight(WIDTH) for _ in range(3))
    x = net.op("BatchNormalization", "x", scale, bias, mean, net.tensor(np.full(WIDTH, 0.7, np.float32)), epsilon=1e-3)
    x = net.op("Conv", x, net.weight(WIDTH, WIDTH, 3), net.weight(WIDTH), pads=[1, 1])
    y, *_ = net.cell("LSTM", net.op("Transpose", x, perm=[2, 0, 1]))
    path = net.save(tmp_path / "m.onnx", net.head(net.flat(y), HIDDEN), x=["B", WIDTH, "T"])
    x = floats(T, B, WIDTH)
    assert_close(network(path)(x).y, theirs(path, x=x.permute(1, 2, 0))[0])


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_weights_of_other_floats(dtype, tmp_path):
    net = Net()
    y, *_ = net.cell("LSTM", "x")
    proto = net.model({"x": (TensorProto.FLOAT, ["T", "B", WIDTH])}, y)
    path, wanted = tmp_path / "m.onnx", {}
    for tensor in proto.graph.initializer:
        values = torch.from_numpy(numpy_helper.to_array(tensor).copy()).to(getattr(torch, dtype))
        wanted[tensor.name] = values.float()
        kind = getattr(TensorProto, {"float64": "DOUBLE"}.get(dtype, dtype.upper()))
        raw = values.view(torch.int16).numpy() if dtype == "bfloat16" else values.numpy()
        tensor.CopyFrom(helper.make_tensor(tensor.name, kind, tensor.dims, raw.tobytes(), raw=True))
    path.write_bytes(proto.SerializeToString())
    loaded = loaders.load(path)
    i, o, f, g = wanted["t0"][0].split(HIDDEN)
    assert torch.equal(loaded.weights["main.layers.0.fwd.gates.weight_ih"], torch.cat([i, f, o]))
    assert torch.equal(loaded.weights["main.layers.0.fwd.candidate.weight_ih"], g)


@pytest.mark.parametrize("kind", ["typed", "raw"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int32, np.int64, np.uint8, np.bool_])
def test_tensors_in_both_encodings(dtype, kind, tmp_path):
    from rnn2bin.loaders.onnx_proto import read_graph

    values = np.arange(6).reshape(2, 3).astype(dtype)
    number = helper.np_dtype_to_tensor_dtype(values.dtype)
    tensor = numpy_helper.from_array(values, "t") if kind == "raw" else helper.make_tensor("t", number, (2, 3), values.flatten())
    proto = helper.make_model(helper.make_graph([], "g", [], [], [tensor]), opset_imports=[helper.make_opsetid("", 17)])
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    found = read_graph(tmp_path / "m.onnx").tensors["t"]
    assert found.dtype in (torch.float32, torch.int64, torch.bool)
    assert np.array_equal(found.numpy(), values.astype(found.numpy().dtype))


def test_a_file_made_for_one_sequence_is_freed(tmp_path):
    net = Net()
    y, *_ = net.cell("LSTM", net.op("Transpose", "x", perm=[1, 0, 2]), h0=net.tensor(np.zeros((1, 1, HIDDEN), np.float32)))
    y = net.op("Reshape", net.op("Transpose", y, perm=[2, 0, 1, 3]), net.tensor([1, -1, HIDDEN]))
    path = net.save(tmp_path / "m.onnx", net.head(y, HIDDEN), x=[1, 9, WIDTH])
    made = network(path)
    x = floats(9, B, WIDTH)
    for row in range(B):
        assert_close(made(x).y[:, row], theirs(path, x=x[:, row][None])[0][0])


def test_a_file_that_mixes_the_sequences_wants_a_free_batch(tmp_path):
    net = Net()
    y, *_ = net.cell("LSTM", net.op("Reshape", "x", net.tensor([9, 1, WIDTH])))  # no transposition: right for one sequence only
    y = net.op("Reshape", y, net.tensor([3, 3, HIDDEN]))
    path = net.save(tmp_path / "m.onnx", net.head(y, HIDDEN), x=[1, 9, WIDTH])
    assert reasons(path)


def stepper(net: Net, path: Path, *, broken: bool = False) -> Path:
    """One step a call: x (N,WIDTH), state (2,N,HIDDEN) -> y (N,OUT), the state after it."""
    parts = [net.op("Gather", "state", net.tensor(np.array([k])), axis=0) for k in (0, 1)]
    y, h, c = net.cell("LSTM", net.op("Unsqueeze", net.op("Tanh", "x"), net.tensor([0])), h0=parts[0], c0=parts[1])
    out = net.head(net.op("Squeeze", y, net.tensor([0, 1])), HIDDEN)
    after = net.op("Concat", h, net.op("Mul", c, net.tensor(np.float32(0.5))) if broken else c, axis=0)
    return net.save(path, net.op("Sigmoid", out), after, x=["N", WIDTH], state=(1, [2, "N", HIDDEN]))


def test_one_step_a_call_becomes_a_sequence_network(tmp_path):
    path = stepper(Net(), tmp_path / "m.onnx")
    x, state, wanted = floats(T, B, WIDTH), np.zeros((2, B, HIDDEN), np.float32), []
    for x_t in x:
        y, state = theirs(path, x=x_t, state=state)
        wanted.append(y)
    made = network(path)
    assert_close(made(x).y, torch.stack(wanted))
    section = made.spec.main
    assert (section.activation, section.windowed, section.per_step, section.output_size) == ("sigmoid", True, True, OUT)


def test_one_step_a_call_wants_the_width_of_a_step_where_the_file_does_not_say_it(tmp_path):
    net = Net()
    parts = [net.op("Gather", "state", net.tensor(np.array([k])), axis=0) for k in (0, 1)]
    mean = net.op("ReduceMean", "x", axes=[1], keepdims=1)  # a front end that takes any width
    y, h, c = net.cell("LSTM", net.op("Unsqueeze", net.op("MatMul", mean, net.weight(1, WIDTH)), net.tensor([0])), h0=parts[0], c0=parts[1])
    out = net.head(net.op("Squeeze", y, net.tensor([0, 1])), HIDDEN)
    path = net.save(tmp_path / "m.onnx", out, net.op("Concat", h, c, axis=0), x=["N", "W"], state=(1, [2, "N", HIDDEN]))
    assert reasons(path).startswith(
        "m.onnx: its layers take one step a call, and the input 'x' (N, W) does not say how wide that is; say it"
    )
    x, state, wanted = floats(T, B, 8), np.zeros((2, B, HIDDEN), np.float32), []
    for x_t in x:
        y, state = theirs(path, x=x_t, state=state)
        wanted.append(y)
    assert_close(network(path, input_shape=[8])(x).y, torch.stack(wanted))


def test_the_width_of_a_step_that_the_layers_alone_fit_is_found(tmp_path):
    """Every axis is open, and the file holds no size but those of its tensors."""
    net = Net()
    path = net.save(tmp_path / "m.onnx", net.head(net.flat(net.cell("GRU", "x", linear_before_reset=1)[0]), HIDDEN), x=["T", "B", "W"])
    x = floats(T, B, WIDTH)
    assert_close(network(path)(x).y, theirs(path, x=x)[0])
    assert f"file: one step of x is {WIDTH} wide, the only width that fits" in loaders.inspect(path).parts


def test_widths_that_fit_are_told_with_the_one_that_convolutions_read_whole(tmp_path):
    """Windows of 6 every 3 along a step, then two layers that want exactly 3 of them: 12 to 14 run, 12 is read to its end."""
    net = Net()
    parts = [net.op("Gather", "state", net.tensor(np.array([k])), axis=0) for k in (0, 1)]
    rows = net.op("Conv", net.op("Unsqueeze", "x", net.tensor(np.array([1]))), net.weight(2, 1, 6), strides=[3])
    flat = net.op("Reshape", rows, net.tensor(np.array([0, -1])))
    y, h, c = net.cell("LSTM", net.op("Unsqueeze", flat, net.tensor(np.array([0]))), 6, h0=parts[0], c0=parts[1])
    out = net.head(net.op("Squeeze", y, net.tensor(np.array([0, 1]))), HIDDEN)
    path = net.save(tmp_path / "m.onnx", out, net.op("Concat", h, c, axis=0), x=["N", "W"], state=(1, [2, "N", HIDDEN]))
    assert "12 to 14 run, and 12 is the least that its convolutions read as often as the most" in reasons(path)
    assert "--set source.input_shape=[12]" in reasons(path)
    shown = loaders.inspect(path)
    assert shown.recognised is None
    assert shown.source.endswith("source:\n  input_shape: [12]\n")
    assert network(path, input_shape=[12]).spec.main.input_shape == (12,)


@pytest.mark.parametrize(
    ("fits", "found"),
    [
        (lambda n: n == 37, Widths(37, 37, 37)),
        (lambda n: 192 <= n <= 703, Widths(192, 703, 576)),
        (lambda n: n >= 5, None),  # nothing ends it
        (lambda n: n % 3 == 0, None),  # no neighbours
        (lambda n: False, None),
    ],
)
def test_widths(fits, found):
    assert widths(lambda n: ((1, (n - 192) // 128),) if fits(n) else None, [37, 9999, 0]) == found


def test_widths_between_which_no_window_decides():
    assert widths(lambda n: () if 3 <= n <= 9 else None, []) is None


def test_batch_before_time_in_the_operation_itself(tmp_path):
    """Layout 1, which onnxruntime's CPU does not run: against the same network with layout 0 and transpositions."""
    x = floats(B, T, WIDTH)
    for op, more in (("LSTM", {}), ("GRU", {}), ("LSTM", {"input_forget": 1, "clip": 0.6, "p": True})):
        net, same = Net(), Net()
        attributes = [{**more, "p": one.weight(2, 3 * HIDDEN)} if more else {} for one in (net, same)]
        y, h, *_ = net.cell(op, "x", layout=1, direction="bidirectional", **attributes[0])
        path = net.save(tmp_path / f"{op}.onnx", net.op("Reshape", y, net.tensor([0, 0, 2 * HIDDEN])), h, x=["B", "T", WIDTH])
        y, h, *_ = same.cell(op, same.op("Transpose", "x", perm=[1, 0, 2]), direction="bidirectional", **attributes[1])
        again = same.save(tmp_path / f"{op}0.onnx", same.op("Transpose", same.flat(y, 2), perm=[1, 0, 2]), h, x=["B", "T", WIDTH])
        assert_close(network(path)(x.transpose(0, 1)).y, theirs(again, x=x)[0].transpose(0, 1))


def test_a_state_that_is_changed_between_calls_is_refused(tmp_path):
    assert "called step by step" in reasons(stepper(Net(), tmp_path / "m.onnx", broken=True))


def test_a_branch_by_an_input_that_the_recipe_fixes(tmp_path):
    net = Net()
    low, high = Net(seed=1), Net(seed=2)
    graphs = {}
    for name, inner in (("then_branch", low), ("else_branch", high)):
        inner.nodes.append(helper.make_node("Mul", ["x", inner.tensor(np.float32(2 if inner is low else 3))], [f"y_{name}"]))
        for tensor in inner.tensors:
            tensor.name = f"{name}_{tensor.name}"
        inner.nodes[0].input[1] = f"{name}_t0"
        graphs[name] = helper.make_graph(inner.nodes, name, [], [helper.make_empty_tensor_value_info(f"y_{name}")], inner.tensors)
    scaled = net.op("If", net.op("Equal", "sr", net.tensor(16000)), **graphs)
    path = net.save(tmp_path / "m.onnx", net.head(net.flat(net.cell("LSTM", scaled)[0]), HIDDEN), sr=(TensorProto.INT64, []))
    x = floats(T, B, WIDTH)
    for rate in (16000, 8000):
        assert_close(network(path, inputs={"sr": rate})(x).y, theirs(path, x=x, sr=np.array(rate))[0])
    assert "the file compares with 16000; where that is its value, give --set source.inputs.sr=16000" in reasons(path)
    assert "source:\n  inputs: {sr: 16000}\n" in loaders.inspect(path).source
    assert "no input 'rate'" in reasons(path, inputs={"rate": 1})


def test_the_output_that_the_recipe_names(tmp_path):
    net = Net()
    y, h, _ = net.cell("LSTM", "x")
    path = net.save(tmp_path / "m.onnx", net.op("Relu", "x"), net.head(net.flat(y), HIDDEN), net.op("Squeeze", h, net.tensor([0])))
    x = floats(T, B, WIDTH)
    wanted = theirs(path, x=x)
    names = [o.name for o in onnx.load(path).graph.output]
    assert_close(network(path)(x).y, wanted[1])
    assert_close(network(path, output=names[2])(x).y, wanted[2])
    assert "leads to the output" in reasons(path, output=names[0])
    assert f"output {names[1]} (of {', '.join(names)})" in "\n".join(loaders.inspect(path).parts)


@pytest.mark.parametrize("cast", [False, True])
def test_a_choice_at_the_end_gives_the_scores_it_chooses_from(tmp_path, cast):
    net = Net()
    y, *_ = net.cell("LSTM", "x")
    scored = net.head(net.flat(y), HIDDEN)
    chosen = net.op("ArgMax", scored, axis=2, keepdims=0)
    path = net.save(tmp_path / "m.onnx", net.op("Cast", chosen, to=TensorProto.INT32) if cast else chosen)
    x = floats(T, B, WIDTH)
    found = network(path)(x).y
    assert found.shape == (T, B, OUT)
    assert torch.equal(found.argmax(-1), theirs(path, x=x)[0].long())
    assert "the place of the largest value" in "\n".join(loaders.inspect(path).parts)


@pytest.mark.parametrize("keep", [0, 1])
def test_a_choice_whose_axes_are_then_exchanged(tmp_path, keep):
    net = Net()
    y, *_ = net.cell("LSTM", "x")
    chosen = net.op("ArgMax", net.head(net.flat(y), HIDDEN), axis=2, keepdims=keep)
    path = net.save(tmp_path / "m.onnx", net.op("Transpose", chosen, perm=[1, 0, 2][: 2 + keep]))
    x = floats(T, B, WIDTH)
    wanted = theirs(path, x=x)[0].reshape(B, T).t()
    assert torch.equal(network(path)(x).y.reshape(T, B, OUT).argmax(-1), wanted)


def test_a_choice_that_the_network_itself_reads_stays_one(tmp_path):
    net = Net()
    y, *_ = net.cell("LSTM", "x")
    chosen = net.op("ArgMax", net.flat(y), axis=2, keepdims=1)
    path = net.save(tmp_path / "m.onnx", net.op("Mul", net.flat(y), net.op("Cast", chosen, to=TensorProto.FLOAT)), chosen)
    assert "largest value" not in "\n".join(loaders.inspect(path).parts)


# --- what is refused, by name -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "match"),
    [
        ({"clip": -3.0}, "clips its pre-activations at -3.0"),
        ({"p": True}, "peepholes of shape (1, 14)"),
        ({"activations": ["Sigmoid", "Tanh", "Relu"]}, "two activations, relu and tanh"),
        ({"activations": ["Tanh", "Tanh", "Tanh"]}, "gates with activation tanh"),
        ({"activations": ["HardSigmoid", "Tanh", "Tanh"], "activation_beta": [0.4]}, "HardSigmoid with beta 0.5"),
        ({"activations": ["Sigmoid", "LeakyRelu", "LeakyRelu"]}, "activation leakyrelu"),
        (
            {"direction": "bidirectional", "activations": [*["Sigmoid", "Tanh", "Tanh"], *["Sigmoid", "Relu", "Relu"]]},
            "same for each direction",
        ),
        ({"direction": "sideways"}, "sideways"),
    ],
)
def test_cells_that_are_not_ours_are_named(attributes, match, tmp_path):
    net = Net()
    if attributes.get("p"):
        attributes = {"p": net.weight(1, 2 * HIDDEN)}
    y, *_ = net.cell("LSTM", "x", **attributes)
    assert match in reasons(net.save(tmp_path / "m.onnx", net.flat(y)))


def test_every_operation_that_is_not_run_is_named_at_once(tmp_path):
    net = Net()
    a, b = net.op("Det", "x"), net.op("StringNormalizer", "x")
    y, *_ = net.cell("LSTM", net.op("Add", net.op("Add", "x", a), b))
    net.nodes.append(helper.make_node("Fused", [y], ["z"], domain="com.example"))
    text = reasons(net.save(tmp_path / "m.onnx", "z"))
    assert "Det (v0_0)" in text
    assert "StringNormalizer (v1_0)" in text


def test_quantised_weights_are_named_alone(tmp_path):
    net = Net()
    x = net.op("DequantizeLinear", net.tensor(np.zeros((3, 2), np.uint8)), net.tensor(np.float32(0.5)))
    y, *_ = net.cell("LSTM", net.op("Add", "x", x))
    text = reasons(net.save(tmp_path / "m.onnx", net.flat(y)))
    assert text == "m.onnx: its weights are quantised (DequantizeLinear): convert the float file that it was made from"


def test_cells_that_an_exporter_took_apart_are_said_to_be(tmp_path):
    text = reasons(exported(Unrolled(), tmp_path / "m.onnx", dynamo=False, free=False))
    assert "no LSTM or GRU operation, but 27 Sigmoid and 18 Tanh" in text  # nine steps
    assert "\n" not in text


class Unrolled(nn.Module):
    """nn.LSTMCell in a Python loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = c = x.new_zeros(x.shape[0], HIDDEN)
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
        return h


def test_operations_of_other_domains_are_refused(tmp_path):
    net = Net()
    y, *_ = net.cell("LSTM", "x")
    net.nodes.append(helper.make_node("Relu", [y], ["z"], domain="com.example"))
    assert "does not run this operation" in reasons(net.save(tmp_path / "m.onnx", "z"))


def test_a_second_real_input_is_named(tmp_path):
    net = Net()
    y, *_ = net.cell("LSTM", net.op("Add", "x", "other"))
    path = net.save(tmp_path / "m.onnx", net.flat(y), other=(1, ["B", WIDTH]))
    assert "more than one real input (other)" in reasons(path)


@pytest.mark.parametrize("kind", ["cycle", "twice", "opset", "nothing"])
def test_graphs_that_are_none(kind, tmp_path):
    net = Net(opset=5 if kind == "opset" else 17)
    y, *_ = net.cell("LSTM", "x")
    if kind == "cycle":
        net.nodes[0].input[0] = "loop"
        net.nodes.append(helper.make_node("Reshape", [y, net.tensor([-1, B, WIDTH])], ["loop"]))
    if kind == "twice":
        net.nodes.append(helper.make_node("Relu", ["x"], [y]))
    path = net.save(tmp_path / "m.onnx", "x" if kind == "nothing" else y)
    wanted = {"cycle": "has a cycle", "twice": "there already", "opset": "opset 5", "nothing": "no LSTM or GRU layer"}
    assert wanted[kind] in reasons(path)


def test_what_the_source_says_must_belong_to_the_file(tmp_path):
    net = Net()
    path = net.save(tmp_path / "m.onnx", net.cell("LSTM", "x")[0])
    with pytest.raises(UsageError, match="readout: an ONNX file says itself"):
        loaders.load(path, source=Source(readout="last"))
    torch.save(nn.LSTM(3, 4).state_dict(), tmp_path / "m.pt")
    with pytest.raises(UsageError, match="output: for files that hold a graph"):
        loaders.load(tmp_path / "m.pt", source=Source(output="y"))
    assert "does not fit the input" in reasons(path, input_shape=[WIDTH + 1])
    assert "no output 'z'" in reasons(path, output="z")


def test_without_the_package_the_line_says_what_to_install(tmp_path, monkeypatch):
    import builtins

    net = Net()
    path = net.save(tmp_path / "m.onnx", net.cell("LSTM", "x")[0])
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "onnx":
            raise ImportError
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"pip install rnn2bin\[onnx\]"):
        loaders.load(path)


# --- attacks ------------------------------------------------------------------------------------------------------------------------------


def external(
    path: Path, place: str, *, offset: str = "0", length: str | None = None, dims: tuple[int, ...] = (1, 4 * HIDDEN, WIDTH)
) -> Path:
    net = Net()
    y, *_ = net.cell("LSTM", "x")
    proto = net.model({"x": (TensorProto.FLOAT, ["T", "B", WIDTH])}, y)
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.ClearField("dims")
    tensor.dims.extend(dims)
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": place, "offset": offset, **({"length": length} if length is not None else {})}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())
    return path


SIZE = 4 * 4 * HIDDEN * WIDTH


def test_tensors_beside_the_file_are_read(tmp_path):
    values = np.random.default_rng(3).normal(size=SIZE // 4).astype(np.float32)
    (tmp_path / "w.bin").write_bytes(b"1234" + values.tobytes())
    path = external(tmp_path / "m.onnx", "w.bin", offset="4", length=str(SIZE))
    assert [one["name"] for one in loaders.load(path).provenance["files"]] == ["m.onnx", "w.bin"]
    x = floats(T, B, WIDTH)
    assert_close(network(path)(x).y, theirs(path, x=x)[0][:, 0])


@pytest.mark.parametrize(
    "place", ["../w.bin", "/etc/passwd", "sub/../../w.bin", "..\\w.bin", "C:w.bin", "", "link.bin", "dir/w.bin", "w\0.bin"]
)
def test_tensors_elsewhere_are_not_opened(place, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(SIZE))
    os.symlink(tmp_path / "w.bin", folder / "link.bin")
    os.symlink(tmp_path, folder / "dir")
    path = external(folder / "m.onnx", place)
    with pytest.raises(UnsafeError, match="refused"):
        loaders.load(path)
    assert CliRunner().invoke(main, ["inspect", str(path)]).exit_code == 4


@pytest.mark.parametrize(
    "options",
    [
        {"offset": "-4"},
        {"offset": "8"},
        {"length": "3"},
        {"length": str(2**70)},
        {"offset": "x"},
        {"dims": (1, 2**40, 2**40)},
        {"dims": (1, -1, WIDTH)},
        {"place": "gone.bin"},
        {"place": "."},
    ],
)
def test_places_that_are_not_in_the_file(options, tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(SIZE))
    path = external(tmp_path / "m.onnx", options.pop("place", "w.bin"), **options)
    assert reasons(path)
    assert CliRunner().invoke(main, ["inspect", str(path)]).exit_code == 3


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "w.bin")
    assert "not there" in reasons(external(tmp_path / "m.onnx", "w.bin"))


def test_shapes_are_not_believed(tmp_path):
    net = Net()
    y, *_ = net.cell("LSTM", "x")
    proto = net.model({"x": (TensorProto.FLOAT, ["T", "B", WIDTH])}, y)
    proto.graph.initializer[0].dims[1] = 2**50
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    assert "claims shape" in reasons(tmp_path / "m.onnx")


@pytest.mark.parametrize("op", ["ConstantOfShape", "Expand", "Tile", "Concat"])
def test_a_short_file_cannot_fill_the_memory(op, tmp_path):
    net = Net()
    if op == "Concat":
        big = net.tensor(np.zeros(1024, np.float32))
        for _ in range(40):
            big = net.op("Concat", big, big, axis=0)
    elif op == "ConstantOfShape":
        big = net.op(op, net.tensor([2**20, 2**20]))
    else:
        big = net.op(op, net.tensor(np.zeros(1, np.float32)), net.tensor([2**40]))
    y, *_ = net.cell("LSTM", net.op("Add", "x", net.op("ReduceSum", big, keepdims=0)))
    assert "exhaust the memory" in reasons(net.save(tmp_path / "m.onnx", y))


@pytest.mark.parametrize("kept", [False, True])
def test_values_that_add_up_are_refused_and_those_let_go_are_not(kept, tmp_path):
    """Twenty values of 16 MB in a file of a few kB: one after the other, or all wanted at the end."""
    net = Net()
    values = [net.op("Expand", net.tensor(np.zeros(1, np.float32)), net.tensor([2**22]))]
    for _ in range(20):
        values.append(net.op("Neg", values[-1]))
    total = net.op("ReduceSum", net.op("Sum", *values) if kept else values[-1], keepdims=0)
    y, *_ = net.cell("LSTM", net.op("Add", "x", total))
    path = net.save(tmp_path / "m.onnx", net.flat(y))
    assert ("exhaust the memory" in reasons(path)) if kept else network(path)


def test_an_input_without_axes_is_refused(tmp_path):
    net = Net()
    y, *_ = net.cell("LSTM", net.op("Reshape", "x", net.tensor([1, 1, WIDTH])))
    proto = net.model({"x": (TensorProto.FLOAT, [])}, y)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    assert "no sequence to read" in reasons(tmp_path / "m.onnx")


def test_deep_nesting_is_refused(tmp_path):
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [], [helper.make_empty_tensor_value_info("y")])
    for _ in range(30):
        node = helper.make_node("If", ["x"], ["y"], then_branch=graph)
        graph = helper.make_graph([node], "g", [], [helper.make_empty_tensor_value_info("y")])
    graph.input.append(helper.make_tensor_value_info("x", 1, ["T", "B", WIDTH]))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    assert reasons(tmp_path / "m.onnx")


def tiny(tmp_path: Path) -> bytes:
    return stepper(Net(), tmp_path / "seed.onnx").read_bytes()


def test_truncated_files_are_refused(tmp_path):
    whole = tiny(tmp_path)
    path = tmp_path / "m.onnx"
    for size in range(1, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:size])
        with pytest.raises(Rnn2binError):
            loaders.load(path)


# scripts/fuzz.py changes files in the same ways and more of them.
changes = pytest.mark.parametrize("times", [30, pytest.param(150, marks=pytest.mark.slow)])


@changes
def test_mutated_files_raise_nothing_but_our_errors(times, tmp_path):
    whole, path, draw = tiny(tmp_path), tmp_path / "m.onnx", random.Random(0)
    structure = [k for k in range(len(whole)) if whole[k : k + 1].isascii()]
    refused = 0
    for _ in range(times):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            match draw.randint(0, 2):
                case 0:
                    data[draw.choice(structure) % len(data)] = draw.randint(0, 255)
                case 1:
                    at = draw.randrange(len(data))
                    del data[at : at + draw.randint(1, 8)]
                case _:
                    at = draw.randrange(len(data))
                    data[at:at] = data[draw.randrange(len(data)) :][: draw.randint(1, 40)]
        path.write_bytes(bytes(data))
        try:
            loaders.load(path)
        except Rnn2binError:
            refused += 1
    assert refused > times / 7


@changes
def test_changed_nodes_raise_nothing_but_our_errors(times, tmp_path):
    """Mutations that protobuf cannot see: operations, operands, attributes and sizes exchanged."""
    path, draw = tmp_path / "m.onnx", random.Random(1)
    seed = onnx.load_from_string(tiny(tmp_path))
    for _ in range(times):
        proto = onnx.ModelProto()
        proto.CopyFrom(seed)
        nodes = proto.graph.node
        for _ in range(draw.randint(1, 3)):
            node, other = draw.choice(nodes), draw.choice(nodes)
            match draw.randint(0, 5):
                case 0:
                    node.op_type = other.op_type
                case 1 if node.input:
                    node.input[draw.randrange(len(node.input))] = draw.choice([*other.input, *other.output, "x", "state", ""])
                case 2:
                    node.attribute.extend(other.attribute)
                case 3:
                    node.attribute.append(
                        helper.make_attribute(
                            draw.choice(["axis", "axes", "hidden_size", "perm", "to"]),
                            draw.choice([-(2**62), 0, 2**31, 7, 0.5, "x", [0, 0]]),
                        )
                    )
                case 4:
                    tensor = draw.choice(proto.graph.initializer)
                    if tensor.data_type == TensorProto.INT64:
                        tensor.raw_data = np.array(draw.choice([-(2**63), 2**62, 0, 5]), np.int64).tobytes() * max(
                            1, len(tensor.raw_data) // 8
                        )
                case _:
                    shape = draw.choice(proto.graph.input).type.tensor_type.shape
                    shape.dim[draw.randrange(len(shape.dim))].dim_value = draw.choice([0, 1, 3, 2**40])
        path.write_bytes(proto.SerializeToString())
        try:
            loaders.load(path)
        except Rnn2binError:
            continue


# --- networks as PyTorch exports them --------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Embedding, two layers in both directions, attention over time."""

    def __init__(self):
        super().__init__()
        self.table, self.rnn = nn.Embedding(11, WIDTH), nn.LSTM(WIDTH, HIDDEN, 2, batch_first=True, bidirectional=True)
        self.query, self.head = nn.Linear(2 * HIDDEN, 1), nn.Linear(2 * HIDDEN, OUT)

    def forward(self, tokens):
        y, _ = self.rnn(self.table(tokens))
        return self.head((y * self.query(torch.tanh(y)).softmax(1)).sum(1))


class Convolved(nn.Module):
    """A convolution with its batch norm before the layer, a linear layer for every step behind it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(WIDTH, 6, 3, padding=1), nn.BatchNorm1d(6)
        self.rnn, self.head = nn.GRU(6, HIDDEN, batch_first=True), nn.Linear(HIDDEN, OUT)
        nn.init.uniform_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x.transpose(1, 2)))).transpose(1, 2)
        return self.head(self.rnn(x)[0]).log_softmax(-1)


class LastState(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(WIDTH, HIDDEN, bidirectional=True, batch_first=True), nn.Linear(2 * HIDDEN, 1)

    def forward(self, x):
        _, (h, _) = self.rnn(x)
        return torch.sigmoid(self.head(torch.cat([h[-2], h[-1]], -1)))


class Residual(nn.Module):
    """Projected layers with a skip and a layer norm."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.GRU(WIDTH, HIDDEN, batch_first=True), nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, OUT)

    def forward(self, x):
        a, _ = self.first(x)
        b, _ = self.second(a)
        return self.head(self.norm(a + b))


class Padded(nn.Module):
    """A padded batch with lengths: packed before the layer, the mean over real steps behind it."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(WIDTH, HIDDEN, bidirectional=True), nn.Linear(2 * HIDDEN, OUT)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0])
        return self.head(y.sum(0) / lengths[:, None])


def test_packed_sequences_as_pytorch_exports_them(tmp_path):
    import warnings

    torch.manual_seed(6)
    module, path = Padded().eval().requires_grad_(False), tmp_path / "m.onnx"
    axes = {"x": {0: "T", 1: "B"}, "lengths": {0: "B"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = (torch.randn(T, B, WIDTH), torch.tensor([6, 4, 2]))
        torch.onnx.export(module, example, path, input_names=["x", "lengths"], dynamic_axes=axes, dynamo=False)
    x, lengths = floats(T, B, WIDTH), torch.tensor([2, 6, 4])
    assert_close(network(path)(x, lengths=lengths).y, module(x, lengths))


MODULES = [Attention, Convolved, LastState, Residual]


def exported(module: nn.Module, path: Path, *, dynamo: bool, free: bool = True) -> Path:
    example = torch.randint(11, (2, 9)) if isinstance(module, Attention) else torch.randn(2, 9, WIDTH)
    names = {"input_names": ["x"], "output_names": ["y"], "dynamo": dynamo}
    if free:
        names |= (
            {"dynamic_shapes": {next(iter(module.forward.__code__.co_varnames[1:2])): {0: "B", 1: "T"}}}
            if dynamo
            else {"dynamic_axes": {"x": {0: "B", 1: "T"}}}
        )
    if dynamo:
        pytest.importorskip("onnxscript")
        names["verbose"] = False
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (example,), path, **names)
    return path


@pytest.mark.parametrize("exporter", ["script", "dynamo", "fixed"])
@pytest.mark.parametrize("kind", MODULES, ids=lambda m: m.__name__)
def test_what_pytorch_exports_is_the_module(kind, exporter, tmp_path):
    torch.manual_seed(2)
    module = kind().eval().requires_grad_(False)
    path = exported(module, tmp_path / "m.onnx", dynamo=exporter == "dynamo", free=exporter != "fixed")
    made = network(path)
    x = torch.randint(11, (9, B)) if kind is Attention else torch.randn(9, B, WIDTH)
    wanted, ours = module(x.transpose(0, 1)), made(x).y
    assert_close(ours, wanted.transpose(0, 1) if ours.ndim == 3 else wanted)
    if exporter != "fixed":
        assert made.spec.main.graph is None or made.spec.main.graph.steps is None


@pytest.mark.parametrize("attributes", [{"p": True}, {"p": True, "input_forget": 1, "clip": 0.9}], ids=["peepholes", "all"])
def test_a_file_with_peepholes_converts_through_the_command_line(attributes, tmp_path):
    """Convert, evaluate, run on both backends, export: the file that it started from is the teacher, onnxruntime the judge."""
    net = Net()
    attributes = {**attributes, "p": net.weight(1, 3 * HIDDEN)}
    path = net.save(tmp_path / "m.onnx", net.head(net.flat(net.cell("LSTM", "x", **attributes)[0]), HIDDEN))
    x = floats(8, 12, WIDTH)
    np.savez(tmp_path / "d.npz", inputs=x.numpy())
    steps = ["train.steps=6", "train.batch_size=4", "train.window=6", "train.evaluate_every=3", "gates.copies=2", "report.controls=true"]
    out, data = tmp_path / "out", str(tmp_path / "d.npz")
    convert = ["convert", str(path), "--data", data, "--out", str(out), *(part for step in steps for part in ("--set", step))]
    for command in (
        convert,
        ["eval", str(path), str(out), "--data", data],
        ["export", str(out), "--to", "onnx", "--out", str(tmp_path / "b.onnx")],
    ):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
    import json

    from rnn2bin import runtime

    report = json.loads((out / "report.json").read_text())
    gates = ["i", "o"] if "input_forget" in attributes else ["i", "f", "o"]
    assert [one["gate"] for one in report["gates"]] == gates
    assert report["parity"]["flips_outside"] == 0
    assert 0 < report["density"]["weights_touched"] < 1
    y, _ = runtime.load(out, backend="torch")(x.transpose(0, 1))
    assert_close(runtime.load(out, backend="native")(x.transpose(0, 1))[0], y)
    assert_close(theirs(tmp_path / "b.onnx", x=x.transpose(0, 1))[0], y)


def test_an_exported_network_converts_through_the_command_line(tmp_path):
    torch.manual_seed(3)
    module = Convolved().eval().requires_grad_(False)
    path = exported(module, tmp_path / "m.onnx", dynamo=False)
    x = floats(40, 12, WIDTH)
    np.savez(tmp_path / "d.npz", inputs=x.numpy(), targets=module(x).argmax(-1).numpy())
    steps = ["train.steps=3", "train.batch_size=4", "train.window=6", "train.evaluate_every=2", "report.controls=false"]
    options = [part for step in steps for part in ("--set", step)]
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["convert", str(path), "--data", str(tmp_path / "d.npz"), "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    from rnn2bin import runtime

    y, _ = runtime.load(out)(x.transpose(0, 1))
    assert y.shape == (12, 40, OUT)
    assert runtime.load(out).spec.main.graph is not None
