"""Other runtimes on the float network of a packed directory's shape: the time of a dense network does not depend on its weights.

Each contender is a function that makes one call of `steps` steps and carries the state. What is not installed is left out.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rnn2bin.spec import RnnSpec, SectionSpec

Steps = Callable[[], int]
NAMES = {"torch": "torch", "ort": "onnxruntime", "openvino": "openvino"}


def contenders(spec: RnnSpec, against: tuple[str, ...], *, steps: int, batch: int = 1) -> dict[str, Steps]:
    """Name -> one call of `steps` steps of `batch` sequences.

    Networks that the ONNX cells do not describe (a projection, the other reset form) are run by torch alone; cells that torch has not
    (peepholes, coupled gates, clips) by no rival."""
    section = spec.entry
    found: dict[str, Steps] = {}
    installed = {name for name in against if importlib.util.find_spec(NAMES[name])}
    cells = {layer.cell for layer in section.layers}
    clipped = any(layer.clip or layer.cell_clip or layer.proj_clip for layer in section.layers)
    if "torch" in installed and cells <= {"lstm", "gru"} and not clipped:
        found |= _torch(section, steps, batch)
    plain = all(not y.proj_size and y.directions == 1 for y in section.layers) and cells in ({"lstm"}, {"gru"}) and not clipped
    if installed & {"ort", "openvino"} and plain and importlib.util.find_spec("onnx"):
        found |= _onnx(section, steps, batch, installed)
    return found


# ---------------------------------------------------------------------------------------------- torch


def _torch(section: SectionSpec, steps: int, batch: int) -> dict[str, Steps]:
    import torch

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantize_dynamic is on its way out, and a rival all the same
        module = _module(section)
        quantized = torch.ao.quantization.quantize_dynamic(module, {torch.nn.LSTM, torch.nn.GRU, torch.nn.Linear})
    lengths = (1, 16, 100, 1000)
    float32 = [_torch_call(module, section, n, batch, torch.float32) for n in lengths] + [_torch_cells(section, batch)]
    return {
        "torch fp32": _fastest(float32),
        "torch bf16": _fastest([_torch_call(_module(section).bfloat16(), section, n, batch, torch.bfloat16) for n in (1, 100)]),
        "torch int8": _torch_call(quantized, section, steps, batch, torch.float32),
    }


def _module(section: SectionSpec) -> Any:
    import torch

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            table = section.embedding
            self.embedding = torch.nn.Embedding(table.num_embeddings, table.embedding_dim) if table else None
            width = section.layers[0].input_size
            layers = []
            for y in section.layers:
                kind = torch.nn.LSTM if y.cell == "lstm" else torch.nn.GRU
                more = {"proj_size": y.proj_size} if y.proj_size else {}
                layers.append(kind(width, y.hidden_size, bidirectional=y.directions == 2, **more))
                width = y.output_size
            self.layers = torch.nn.ModuleList(layers)
            self.head = torch.nn.ModuleList(torch.nn.Linear(h.in_features, h.out_features) for h in section.head)

        def forward(self, x, states):
            x = self.embedding(x) if self.embedding else x
            after = []
            for layer, state in zip(self.layers, states, strict=True):
                x, state = layer(x, state)
                after.append(state)
            if section.readout != "all":
                x = x[-1]
            for linear in self.head:
                x = linear(x)
            return x, after

    return Network().eval()


def _torch_input(section: SectionSpec, steps: int, batch: int, dtype: Any) -> Any:
    import torch

    if section.embedding:
        return torch.randint(section.embedding.num_embeddings, (steps, batch))
    return torch.randn(steps, batch, section.layers[0].input_size).to(dtype)


def _torch_call(module: Any, section: SectionSpec, steps: int, batch: int, dtype: Any) -> Steps:
    import torch

    x, states = _torch_input(section, steps, batch, dtype), [[None] * len(section.layers)]

    def call() -> int:
        with torch.inference_mode():
            _, states[0] = module(x, states[0])
        return steps

    return call


def _torch_cells(section: SectionSpec, batch: int) -> Steps:
    """LSTMCell and GRUCell, step by step: quicker than a layer that is called with one step."""
    import torch

    if any(y.directions == 2 or y.proj_size for y in section.layers):
        return _torch_call(_module(section), section, 16, batch, torch.float32)
    width, cells = section.layers[0].input_size, []
    for y in section.layers:
        cells.append((torch.nn.LSTMCell if y.cell == "lstm" else torch.nn.GRUCell)(width, y.hidden_size))
        width = y.hidden_size
    x = torch.randn(batch, section.layers[0].input_size)
    states: list[Any] = [None] * len(cells)

    def call() -> int:
        with torch.inference_mode():
            below = x
            for k, cell in enumerate(cells):
                states[k] = cell(below, states[k])
                below = states[k][0] if isinstance(states[k], tuple) else states[k]
        return 1

    return call


def _fastest(forms: list[Steps], seconds: float = 0.05) -> Steps:
    def pace(form: Steps) -> float:
        form()
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            done += form()
        return (time.perf_counter() - began) / done

    return min(forms, key=pace)


# ---------------------------------------------------------------------------------------------- ONNX


def onnx_model(section: SectionSpec) -> bytes:
    """Embedding, cells and head as ONNX operators, states in and out."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    weights, nodes, inputs, outputs = [], [], [], []

    def weight(name: str, *shape: int) -> str:
        values = generator.uniform(-1, 1, shape).astype(np.float32) / np.sqrt(shape[-1])
        weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    if section.embedding:
        inputs.append(helper.make_tensor_value_info("x", TensorProto.INT64, ["T", "B"]))
        nodes.append(
            helper.make_node("Gather", [weight("table", section.embedding.num_embeddings, section.embedding.embedding_dim), "x"], ["x0"])
        )
    else:
        inputs.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "B", section.layers[0].input_size]))
        nodes.append(helper.make_node("Identity", ["x"], ["x0"]))
    weights.append(numpy_helper.from_array(np.array([1], np.int64), "axis"))
    for k, y in enumerate(section.layers):
        gates, n = (4 if y.cell == "lstm" else 3), y.hidden_size
        names = ["h", "c"] if y.cell == "lstm" else ["h"]
        for s in names:
            inputs.append(helper.make_tensor_value_info(f"{s}{k}", TensorProto.FLOAT, [1, "B", n]))
            outputs.append(helper.make_tensor_value_info(f"{s}{k}_after", TensorProto.FLOAT, [1, "B", n]))
        read = [
            f"x{k}",
            weight(f"W{k}", 1, gates * n, y.input_size),
            weight(f"R{k}", 1, gates * n, n),
            weight(f"B{k}", 1, 2 * gates * n),
            "",
        ]
        more: dict[str, Any] = {} if y.cell == "lstm" else {"linear_before_reset": 1}
        operator = "LSTM" if y.cell == "lstm" else "GRU"
        nodes.append(
            helper.make_node(
                operator, read + [f"{s}{k}" for s in names], [f"y{k}", *(f"{s}{k}_after" for s in names)], hidden_size=n, **more
            )
        )
        nodes.append(helper.make_node("Squeeze", [f"y{k}", "axis"], [f"x{k + 1}"]))
    last = f"x{len(section.layers)}"
    for k, h in enumerate(section.head):
        nodes.append(helper.make_node("MatMul", [last, weight(f"H{k}", h.in_features, h.out_features)], [f"head{k}"]))
        last = f"head{k}"
    outputs.insert(
        0,
        helper.make_tensor_value_info(
            last, TensorProto.FLOAT, ["T", "B", section.head[-1].out_features if section.head else section.layers[-1].hidden_size]
        ),
    )
    graph = helper.make_graph(nodes, "network", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    stream = io.BytesIO()
    onnx.save(model, stream)
    return stream.getvalue()


def _feed(section: SectionSpec, steps: int, batch: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    if section.embedding:
        feed = {"x": generator.integers(0, section.embedding.num_embeddings, (steps, batch))}
    else:
        feed = {"x": generator.normal(size=(steps, batch, section.layers[0].input_size)).astype(np.float32)}
    for k, y in enumerate(section.layers):
        for s in ("h", "c") if y.cell == "lstm" else ("h",):
            feed[f"{s}{k}"] = np.zeros((1, batch, y.hidden_size), np.float32)
    return feed


def _onnx(section: SectionSpec, steps: int, batch: int, installed: set[str]) -> dict[str, Steps]:
    found: dict[str, Steps] = {}
    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        plain.write_bytes(onnx_model(section))
        if "ort" in installed:
            found["ort fp32"] = _ort_call(plain, section, steps, batch)
            if all(y.cell == "lstm" for y in section.layers):  # there is no dynamically quantized GRU
                from onnxruntime.quantization import quantize_dynamic

                logging.disable(logging.WARNING)  # it asks for a step of preparation that changes nothing for these operators
                quantize_dynamic(plain, small)
                logging.disable(logging.NOTSET)
                found["ort int8"] = _ort_call(small, section, steps, batch)
        if "openvino" in installed:
            found["openvino bf16"] = _openvino_call(plain, section, steps, batch)
    return found


def _ort_call(path: Path, section: SectionSpec, steps: int, batch: int) -> Steps:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    feed = _feed(section, steps, batch)

    def call() -> int:
        after = session.run(None, feed)[1:]
        feed.update(zip(list(feed)[1:], after, strict=True))
        return steps

    return call


def _openvino_call(path: Path, section: SectionSpec, steps: int, batch: int) -> Steps:
    import openvino

    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    core = openvino.Core()
    request = core.compile_model(core.read_model(path.read_bytes()), "CPU", options).create_infer_request()
    feed = _feed(section, steps, batch)

    def call() -> int:
        result = list(request.infer(feed).values())[1:]
        feed.update(zip(list(feed)[1:], result, strict=True))
        return steps

    return call
