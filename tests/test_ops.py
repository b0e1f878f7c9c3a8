"""Every operation around the layers, run as the reader runs it, against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tolerances import assert_close

from rnn2bin.cells import ops
from rnn2bin.errors import UnsupportedError
from rnn2bin.loaders import onnx_recurrent  # noqa: F401  its operations are known then
from rnn2bin.loaders.graph import GraphBuilder
from rnn2bin.loaders.onnx_proto import read_graph
from rnn2bin.loaders.onnx_trace import SPECIAL, Tracer, Value

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

random = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return random.normal(size=shape).astype(np.float32)


def whole(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


X = floats(2, 3, 5)
UNIT = np.tanh(X)
MASK = X > 0
ELEMENTWISE = (
    "Relu Exp Neg Abs Sign Floor Ceil Round Erf Sin Cos Tan Atan Sinh Cosh Asinh Softplus Softsign HardSwish Sigmoid Tanh Identity"
)
# op, inputs, attributes, outputs (1 where not said), opset (17 where not said)
CASES: list[tuple[Any, ...]] = [
    *((op, [X], {}) for op in ELEMENTWISE.split()),
    *((op, [np.abs(X) + 0.1], {}) for op in ("Log", "Sqrt", "Reciprocal")),
    *((op, [UNIT], {}) for op in ("Asin", "Acos", "Atanh")),
    ("Mish", [X], {}, 1, 18),
    ("Acosh", [np.abs(X) + 1], {}),
    *((op, [MASK], {}) for op in ("Not",)),
    *((op, [np.array([0.0, np.nan, np.inf, -np.inf], np.float32)], {}) for op in ("IsNaN", "IsInf")),
    *((op, [X, floats(3, 1)], {}) for op in ("Add", "Sub", "Mul", "Div", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")),
    *((op, [MASK, floats(5) > 0], {}) for op in ("And", "Or", "Xor")),
    ("Div", [whole(-7, 7, 9), whole(2, -2, 3)], {}),
    ("Mod", [whole(-7, 7, 9), whole(3, -3, 4)], {}),
    ("Mod", [X, floats(5)], {"fmod": 1}),
    ("Pow", [np.abs(X), np.array(1.7, np.float32)], {}),
    ("Pow", [whole(2, 3), whole(3, 2)], {}),
    ("Equal", [whole(1, 2, 3), whole(1, 5, 3)], {}),
    *((op, [X, floats(5), floats(3, 5)], {}) for op in ("Max", "Min", "Sum", "Mean")),
    ("Where", [MASK, X, floats(5)], {}),
    ("Clip", [X, np.array(-0.3, np.float32), np.array(0.5, np.float32)], {}),
    ("Clip", [whole(1, 5, 9), np.array(2), np.array(6)], {}),
    ("Clip", [X], {"min": -0.5, "max": 0.1}, 1, 10),
    ("LeakyRelu", [X], {"alpha": 0.2}),
    ("Elu", [X], {"alpha": 0.7}),
    ("Selu", [X], {}),
    ("Celu", [X], {"alpha": 0.6}),
    ("ThresholdedRelu", [X], {"alpha": 0.3}),
    ("Gelu", [X], {}, 1, 20),
    ("Gelu", [X], {"approximate": "tanh"}, 1, 20),
    ("PRelu", [X, floats(3, 1)], {}),
    ("HardSigmoid", [X], {"alpha": 0.3, "beta": 0.4}),
    ("Softmax", [X], {"axis": 1}),
    ("Softmax", [X], {"axis": 1}, 1, 11),
    ("Softmax", [X], {}, 1, 9),
    ("LogSoftmax", [X], {"axis": -1}),
    ("LogSoftmax", [X], {"axis": 0}, 1, 11),
    ("Cast", [X * 10], {"to": 7}),
    ("Cast", [MASK], {"to": 1}),
    ("Cast", [whole(0, 3)], {"to": 9}),
    ("CastLike", [whole(1, 2), X], {}),
    ("CumSum", [X, np.array(1)], {}),
    ("CumSum", [X, np.array(-1)], {"exclusive": 1, "reverse": 1}),
    ("Dropout", [X], {}),
    ("MatMul", [X, floats(5, 4)], {}),
    ("MatMul", [X, floats(2, 5, 4)], {}),
    ("MatMul", [floats(5), floats(5, 4)], {}),
    ("Einsum", [X, floats(2, 5, 4)], {"equation": "bij,bjk->bik"}),
    ("Gemm", [floats(3, 4), floats(5, 4), floats(5)], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", [floats(4, 3), floats(4, 5)], {"transA": 1}),
    ("Conv", [X, floats(4, 3, 2), floats(4)], {"strides": [2], "pads": [1, 0]}),
    ("Conv", [floats(1, 4, 9), floats(4, 2, 3)], {"group": 2, "dilations": [2]}),
    ("Conv", [floats(1, 2, 9), floats(3, 2, 4)], {"auto_pad": "SAME_UPPER"}),
    ("Conv", [floats(1, 2, 9), floats(3, 2, 4)], {"auto_pad": "SAME_LOWER"}),
    ("Conv", [floats(1, 2, 9), floats(3, 2, 4)], {"auto_pad": "VALID", "strides": [2]}),
    ("Conv", [floats(1, 2, 6, 7), floats(3, 2, 3, 2)], {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
    ("MaxPool", [X], {"kernel_shape": [2], "strides": [2], "pads": [0, 1]}),
    ("MaxPool", [floats(1, 2, 6, 7)], {"kernel_shape": [2, 3]}),
    ("MaxPool", [floats(1, 2, 6, 8)], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    ("AveragePool", [X], {"kernel_shape": [3], "pads": [1, 1]}),
    ("AveragePool", [X], {"kernel_shape": [3], "pads": [1, 1], "count_include_pad": 1}),
    ("GlobalAveragePool", [X], {}),
    ("GlobalMaxPool", [X], {}),
    ("Shape", [X], {}),
    ("Shape", [X], {"start": 1, "end": -1}),
    ("Size", [X], {}),
    ("Reshape", [X, whole(0, -1)], {}),
    ("Flatten", [X], {"axis": 2}),
    ("Flatten", [X], {"axis": 0}),
    ("Transpose", [X], {"perm": [2, 0, 1]}),
    ("Transpose", [X], {}),
    ("Squeeze", [floats(1, 3, 1)], {}),
    ("Squeeze", [floats(1, 3, 1), whole(-1)], {}),
    ("Squeeze", [floats(1, 3, 1)], {"axes": [0]}, 1, 11),
    ("Unsqueeze", [X, whole(0, -1)], {}),
    ("Unsqueeze", [X], {"axes": [1]}, 1, 11),
    ("Concat", [X, floats(2, 1, 5)], {"axis": -2}),
    ("Split", [X, whole(1, 4)], {"axis": -1}, 2),
    ("Split", [floats(4, 6)], {"axis": 1}, 3),
    ("Split", [X], {"axis": 2, "num_outputs": 2}, 2, 18),
    ("Split", [X], {"axis": 1, "split": [2, 1]}, 2, 11),
    ("Slice", [X, whole(1), whole(2**62), whole(2)], {}),
    ("Slice", [X, whole(-1), whole(-(2**62)), whole(2), whole(-2)], {}),
    ("Slice", [X], {"starts": [0, 1], "ends": [1, -1], "axes": [0, 2]}, 1, 9),
    ("Gather", [X, np.array(-1)], {"axis": 1}),
    ("Gather", [X, np.array([[0, 2], [1, -1]])], {"axis": 2}),
    ("Gather", [whole(4, 5), np.array(1)], {}),
    ("GatherElements", [X, np.array([[[0, -1]], [[1, 2]]])], {"axis": 2}),
    ("GatherND", [X, np.array([[0, 1], [1, 2]])], {}),
    ("GatherND", [X, np.array([[2], [0]])], {"batch_dims": 1}),
    ("ScatterND", [X, np.array([[0, 1], [1, 2]]), floats(2, 5)], {}),
    ("ScatterElements", [X, np.array([[[0, -1]], [[1, 2]]]), floats(2, 1, 2)], {"axis": 2}),
    ("ScatterElements", [whole(1, 2, 3), whole(2, 2), whole(5, 6)], {"reduction": "add"}),
    ("ReverseSequence", [floats(4, 3, 2), whole(4, 1, 3)], {}),
    ("ReverseSequence", [floats(3, 4, 2), whole(4, 1, 3)], {"time_axis": 1, "batch_axis": 0}),
    ("Trilu", [floats(4, 4), np.array(1)], {}),
    ("Trilu", [floats(4, 4)], {"upper": 0}),
    ("TopK", [X, whole(2)], {"axis": 2}, 2),
    ("Expand", [floats(3, 1), whole(2, 1, 5)], {}),
    ("Tile", [X, whole(1, 2, 3)], {}),
    ("Pad", [X, whole(0, 1, 2, 0, 0, 3), np.array(0.5, np.float32)], {}),
    ("Pad", [X, whole(0, 0, 2, 0, 0, 3)], {"mode": "reflect"}),
    ("Pad", [X, whole(0, 0, 2, 0, 0, 3)], {"mode": "edge"}),
    ("Pad", [X], {"pads": [0, 1, 0, 0, 0, 2], "value": 1.5}, 1, 10),
    ("ConstantOfShape", [whole(2, 3)], {}),
    ("Range", [np.array(2), np.array(9), np.array(3)], {}),
    ("OneHot", [np.array([[0, 2], [1, -1]]), np.array(3), np.array([0.0, 2.0], np.float32)], {"axis": 1}),
    *(
        (op, [X], {"axes": [1], "keepdims": 0})
        for op in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare")
    ),
    *((op, [np.abs(X)], {"axes": [0, 2]}) for op in ("ReduceProd", "ReduceLogSum", "ReduceLogSumExp")),
    ("ReduceSum", [X, whole(0, -1)], {"keepdims": 0}),
    ("ReduceSum", [X], {}),
    ("ReduceMean", [X], {"keepdims": 0}),
    ("ReduceProd", [X], {"keepdims": 0}),
    ("ArgMax", [X], {"axis": 1}),
    ("ArgMin", [X], {"axis": -1, "keepdims": 0}),
    ("LayerNormalization", [X, floats(5), floats(5)], {"axis": -1}),
    ("LayerNormalization", [X, floats(3, 5)], {"axis": 1}),
    ("LpNormalization", [X], {"axis": 1}),
    ("LpNormalization", [X], {"axis": -1, "p": 1}),
    ("InstanceNormalization", [X, floats(3), floats(3)], {"epsilon": 1e-3}),
    ("GroupNormalization", [floats(2, 4, 5), floats(4), floats(4)], {"num_groups": 2}, 1, 21),
    ("BatchNormalization", [X, floats(3), floats(3), floats(3), np.abs(floats(3)) + 0.1], {"epsilon": 1e-3}),
]
UNTESTED = {
    "Constant",  # what a file holds comes as one
    "Compact", "Spread", "PlainRnn",  # not ONNX's; tests of their own
    "Swish", "RMSNormalization",  # of opsets that onnxruntime does not run; against onnx's own reference below
}  # fmt: skip


def model(op: str, inputs: list[np.ndarray], attributes: dict[str, Any], outputs: int = 1, opset: int = 17, constants: int = 0) -> Any:
    """A model of one node; the last `constants` inputs are initializers."""
    names = [f"x{k}" for k in range(len(inputs))]
    types = [onnx.helper.np_dtype_to_tensor_dtype(one.dtype) for one in inputs]
    values = [onnx.helper.make_tensor_value_info(n, t, one.shape) for n, t, one in zip(names, types, inputs, strict=True)]
    made = [onnx.helper.make_empty_tensor_value_info(f"y{k}") for k in range(outputs)]
    node = onnx.helper.make_node(op, names, [one.name for one in made], **attributes)
    fixed = len(inputs) - constants
    tensors = [onnx.numpy_helper.from_array(one, name) for one, name in zip(inputs[fixed:], names[fixed:], strict=True)]
    graph = onnx.helper.make_graph([node], "one", values[:fixed], made, tensors)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)


def traced(proto: Any, inputs: list[np.ndarray], path: Any) -> list[torch.Tensor]:
    path.write_bytes(proto.SerializeToString())
    feeds = {one.name: Value((torch.from_numpy(x),), "input") for one, x in zip(proto.graph.input, inputs, strict=False)}
    made = Tracer(GraphBuilder()).run(read_graph(path), feeds)
    assert not [problem for one in made for problem in one.problems]
    return [one.data[0] for one in made]


def same(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within the table for floats; whole numbers and bits exactly."""
    if wanted.is_floating_point():
        return assert_close(ours, wanted)
    assert ours.dtype == wanted.dtype
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_an_operation_is_onnxruntimes(case, tmp_path):
    op, inputs, *rest = case
    proto = model(op, inputs, *rest, constants=4 if op == "BatchNormalization" else 0)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = session.run(None, {one.name: x for one, x in zip(session.get_inputs(), inputs, strict=False)})
    for a, b in zip(traced(proto, inputs, tmp_path / "m.onnx"), wanted, strict=True):
        same(a, torch.from_numpy(np.asarray(b)))


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "opset"),
    [("Swish", [X], {"alpha": 0.7}, 24), ("RMSNormalization", [X, floats(5)], {"epsilon": 1e-3}, 23)],
)
def test_an_operation_is_the_references(op, inputs, attributes, opset, tmp_path):
    from onnx.reference import ReferenceEvaluator

    proto = model(op, inputs, attributes, 1, opset)
    (wanted,) = ReferenceEvaluator(proto).run(None, {f"x{k}": x for k, x in enumerate(inputs)})
    assert_close(traced(proto, inputs, tmp_path / "m.onnx")[0], torch.from_numpy(wanted))


def test_every_operation_is_in_the_table():
    assert set(ops.OPS) - {case[0] for case in CASES} == UNTESTED
    assert {"Constant", "If", "LSTM", "GRU", "RNN"} <= set(SPECIAL)  # tests/test_loaders_onnx.py


@pytest.mark.parametrize(
    ("op", "operands", "attributes"),
    [
        ("Expand", [torch.zeros(1), torch.tensor([2**20, 2**20])], {}),
        ("ConstantOfShape", [torch.tensor([2**20, 2**20])], {}),
        ("Add", [torch.zeros(2**16, 1), torch.zeros(1, 2**16)], {}),
        ("MatMul", [torch.zeros(2**16, 1), torch.zeros(1, 2**16)], {}),
        ("Einsum", [torch.zeros(2**16), torch.zeros(2**16)], {"equation": "i,j->ij"}),
        ("Tile", [torch.zeros(2), torch.tensor([2**40])], {}),
        ("Range", [torch.tensor(0), torch.tensor(2**40), torch.tensor(1)], {}),
        ("OneHot", [torch.zeros(2), torch.tensor(2**40), torch.zeros(2)], {}),
        ("Gather", [torch.zeros(1).expand(1, 2**24), torch.zeros(2**12)], {}),
        ("Concat", [torch.zeros(2**20)] * 4096, {"axis": 0}),
    ],
)
def test_what_would_fill_the_memory_is_refused_before_it_is_made(op, operands, attributes):
    with pytest.raises(UnsupportedError, match="exhaust the memory"):
        ops.OPS[op](operands, attributes)
