"""Networks that are graphs, from their file to the report and back: every command, on each of them, and both backends on every shape."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_runtime_native import both, built, edit_config, filled, flat, packed
from tolerances import assert_close
from torch import nn

import rnn2bin
from rnn2bin import bench, cli, cost, graph_paths, loaders, pipeline, runtime
from rnn2bin import spec as specs
from rnn2bin.cells.network import Lookup, Network, teacher_network, walk
from rnn2bin.data import Part
from rnn2bin.distill.window import run_cell
from rnn2bin.errors import UnsupportedError, UsageError
from rnn2bin.evaluation.parity import parity
from rnn2bin.gates.estimators import BINARY, Discretize, Sample
from rnn2bin.loaders.graph import Direction, GraphBuilder
from rnn2bin.loaders.token_layers import with_token_layers
from rnn2bin.runtime import graph_backend, library, native_backend
from rnn2bin.spec import EmbeddingSpec, GraphSpec, LayerSpec, Node, RnnSpec, SectionSpec

V, E, H, OUT, WIDTH, STEPS, N = 11, 5, 7, 4, 3, 12, 40
FAST = ["--recipe", "smoke.yaml", "--set", "train.steps=4", "--set", "train.max_steps=4", "--set", "train.evaluate_every=2"]


# ---------------------------------------------------------------------------------------------- the networks


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) * 0.5


def directions(kind: str, reads: int, *, ways: int = 1) -> list[Direction]:
    rnn = (nn.LSTM if kind == "lstm" else nn.GRU)(reads, H, bidirectional=ways == 2)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [Direction(*(getattr(rnn, f"{name}_l0{way}").detach() for name in names)) for way in ("", "_reverse")[:ways]]


def linear(g: GraphBuilder, x: str, reads: int, gives: int) -> str:
    return g.add("Add", g.add("MatMul", x, g.constant(weights(reads, gives), "kernel")), g.constant(weights(gives), "bias"))


def time_first(g: GraphBuilder, x: str) -> str:
    return g.add("Transpose", x, perm=[1, 0, 2])


def attention(g: GraphBuilder):
    """Tokens -> concat[embedding, LSTM] -> attention over time -> linear -> softmax: a class a sequence."""
    y, _, _ = g.recurrent("lstm", time_first(g, "input"), directions("lstm", E))
    both = g.add("Concat", "input", time_first(g, y), axis=-1)
    score = g.add("Softmax", linear(g, both, E + H, 1), axis=1)
    mean = g.add("ReduceSum", g.add("Mul", both, score), g.literal([1]), keepdims=0)
    return g.network(g.add("Softmax", linear(g, mean, E + H, OUT), axis=-1), input_shape=(), embedding=weights(V, E))


def convolution(g: GraphBuilder):
    """Floats -> convolution of stride 2 -> GRU -> linear -> softmax: a class every second step."""
    x = g.add("Conv", g.add("Transpose", "input", perm=[0, 2, 1]), g.constant(weights(E, WIDTH, 3)), strides=[2], pads=[1, 1], hint="conv")
    y, _, _ = g.recurrent("gru", g.add("Transpose", g.add("Relu", x), perm=[2, 0, 1]), directions("gru", E))
    return g.network(g.add("Softmax", linear(g, time_first(g, y), H, OUT), axis=-1), input_shape=(WIDTH,))


def both_ways(g: GraphBuilder):
    """Floats -> linear -> bidirectional LSTM, with what it read added -> linear: values at every step."""
    x = linear(g, "input", WIDTH, 2 * H)
    y, _, _ = g.recurrent("lstm", time_first(g, x), directions("lstm", 2 * H, ways=2))
    return g.network(linear(g, g.add("Add", time_first(g, y), x), 2 * H, OUT), input_shape=(WIDTH,))


def flattened(g: GraphBuilder):
    """Floats of STEPS steps -> LSTM -> all its outputs in one row -> linear: values a sequence."""
    y, _, _ = g.recurrent("lstm", time_first(g, "input"), directions("lstm", WIDTH))
    row = g.add("Reshape", time_first(g, y), g.literal([-1, STEPS * H]))
    return g.network(linear(g, row, STEPS * H, OUT), input_shape=(WIDTH,), steps=STEPS)


def residual(g: GraphBuilder):
    """Tokens -> GRU, with what it read added -> GRU -> linear -> softmax: the next token; may be cut anywhere."""
    y, _, _ = g.recurrent("gru_reset_before", time_first(g, "input"), directions("gru", E))
    x = g.add("Concat", "input", time_first(g, y), axis=-1)
    y, _, _ = g.recurrent("gru_reset_before", time_first(g, x), directions("gru", E + H))
    return g.network(g.add("Softmax", linear(g, time_first(g, y), H, V), axis=-1), input_shape=(), embedding=weights(V, E))


def pooled(g: GraphBuilder):
    """Floats -> maximum of every two steps -> LSTM that starts from a given state -> sigmoid of the last: yes or no."""
    x = g.add("MaxPool", g.add("Transpose", "input", perm=[0, 2, 1]), kernel_shape=[2], strides=[2])
    x = g.add("Transpose", x, perm=[2, 0, 1])
    batch = g.add("Shape", x, start=1, end=2)
    first = g.add("Expand", g.constant(weights(1, 1, H + 10)), g.add("Concat", g.literal([1]), batch, g.literal([H + 10]), axis=0))
    first = g.add("Slice", first, g.literal([0]), g.literal([H]), g.literal([2]))
    y, _, _ = g.recurrent("lstm", x, directions("lstm", WIDTH), h0=first, c0=first)
    return g.network(g.add("Sigmoid", linear(g, g.add("Gather", y, g.literal(-1), axis=0), H, 1)), input_shape=(WIDTH,))


def started(g: GraphBuilder):
    """Floats -> LSTM from a given state, its output squared -> linear: a class at every step; may be cut anywhere."""
    batch = g.add("Shape", "input", start=0, end=1)
    first = g.add(
        "Expand", g.constant(weights(3, 1, H)[:1].repeat(1, 1, 1)), g.add("Concat", g.literal([1]), batch, g.literal([H]), axis=0)
    )
    y, _, _ = g.recurrent("lstm", time_first(g, "input"), directions("lstm", WIDTH), h0=first)
    return g.network(linear(g, time_first(g, g.add("Mul", y, y)), H, OUT), input_shape=(WIDTH,))


def picture(g: GraphBuilder):
    """Floats (T,4,3) -> a convolution in two dimensions -> GRU -> its mean, its maximum and its last output -> linear: a class."""
    x = g.add("Conv", g.add("Unsqueeze", "input", axes=[1]), g.constant(weights(2, 1, 1, 2, 3)), hint="conv")
    x = g.add("Reshape", g.add("Transpose", x, perm=[2, 0, 1, 3, 4]), g.literal([0, 0, -1]))
    y, h, _ = g.recurrent("gru", x, directions("gru", 6))
    parts = [g.add("ReduceMean", y, axes=[0], keepdims=0), g.add("ReduceMax", y, axes=[0], keepdims=0), g.add("Squeeze", h, axes=[0])]
    return g.network(linear(g, g.add("Concat", *parts, axis=-1), 3 * H, OUT), input_shape=(4, WIDTH))


def masked(g: GraphBuilder):
    """Tokens, of which 0 is none -> LSTM over the others -> its last output -> linear: a class. Finds the lengths itself."""
    mask = g.add("Greater", "tokens", g.literal(0))
    x, lengths, places = g.add_many("Compact", (time_first(g, "input"), mask), [g.name("x"), g.name("lengths"), g.name("places")])
    y, _, _ = g.recurrent("lstm", x, directions("lstm", E), lengths=lengths)
    last = g.add("Gather", g.add("Spread", y, places), g.literal(-1), axis=0)
    return g.network(linear(g, last, H, OUT), input_shape=(), embedding=weights(V, E))


NETWORKS = {f.__name__: f for f in (attention, convolution, both_ways, flattened, residual, pooled, started, picture)}


def assembled(name: str):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {**NETWORKS, "masked": masked}[name](GraphBuilder())


@pytest.fixture
def save_graph(tmp_path, monkeypatch):
    """A "file" that holds such a network; the reader of its suffix is this test's."""
    monkeypatch.setitem(loaders.GRAPH_READERS, "test", lambda path, source: assembled(path.read_text()))
    monkeypatch.setitem(loaders.SUFFIXES, ".graph", "test")

    def save(name: str) -> Path:
        (tmp_path / "model.graph").write_text(name)
        return tmp_path / "model.graph"

    return save


# ---------------------------------------------------------------------------------------------- data

RANDOM = np.random.default_rng(1)
TOKENS = RANDOM.integers(0, V, (N, STEPS))
FLOATS = RANDOM.normal(size=(N, STEPS, WIDTH)).astype(np.float32)
LENGTHS = RANDOM.integers(3, STEPS + 1, N)
INPUTS = {
    "attention": TOKENS,
    "residual": TOKENS,
    "masked": TOKENS,
    "picture": RANDOM.normal(size=(N, STEPS, 4, WIDTH)).astype(np.float32),
    **dict.fromkeys(("convolution", "both_ways", "flattened", "pooled", "started"), FLOATS),
}
labels = lambda *shape, classes=OUT: RANDOM.integers(0, classes, shape)
values = lambda *shape: RANDOM.normal(size=shape).astype(np.float32)
LABELS = labels(N)
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "attention classifies": ("attention", {"targets": labels(N)}, "classify"),
    "attention matches": ("attention", {}, "match"),
    "convolution tags": ("convolution", {"targets": labels(N, STEPS // 2)}, "tag"),
    "convolution regresses": ("convolution", {"targets": values(N, STEPS // 2, OUT)}, "regress"),
    "convolution matches": ("convolution", {}, "match"),
    "both ways regress": ("both_ways", {"targets": values(N, STEPS, OUT)}, "regress"),
    "both ways tag with lengths": ("both_ways", {"targets": labels(N, STEPS), "lengths": LENGTHS}, "tag"),
    "both ways match with lengths": ("both_ways", {"lengths": LENGTHS}, "match"),
    "flattened regresses": ("flattened", {"targets": values(N, OUT)}, "regress"),
    "flattened classifies": ("flattened", {"targets": labels(N)}, "classify"),
    "residual predicts": ("residual", {}, "next-token"),
    "residual predicts with lengths": ("residual", {"lengths": LENGTHS}, "next-token"),
    "residual tags": ("residual", {"targets": labels(N, STEPS, classes=V)}, "tag"),
    "pooled says yes or no": ("pooled", {"targets": labels(N, classes=2)}, "classify"),
    "started tags": ("started", {"targets": labels(N, STEPS), "lengths": LENGTHS}, "tag"),
    "picture classifies": ("picture", {"targets": labels(N)}, "classify"),
}


def save_arrays(folder: Path, network: str, arrays: dict[str, Any], name: str = "data.npz") -> Path:
    np.savez(folder / name, inputs=INPUTS[network], **arrays)
    return folder / name


def call(*args: Any, code: int = 0):
    result = CliRunner().invoke(cli.main, [str(a) for a in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


# ---------------------------------------------------------------------------------------------- the whole way


@pytest.mark.parametrize("case", CASES)
def test_from_file_to_report_and_back(case, tmp_path, save_graph):
    network, arrays, task = CASES[case]
    model, data, out = save_graph(network), save_arrays(tmp_path, network, arrays), tmp_path / "OUT"
    short = ["--set", "train.window=5", "--set", "loss.gate=0.1", "--set", "loss.hidden=0.5", "--set", "report.controls=true"]
    found = json.loads(call("convert", model, *FAST, *short, "--data", data, "--out", out, "--json").stdout)
    assert found["task"] == task
    assert 0 <= found["density"]["weights_touched"] <= 1
    assert set(found["controls"]) == {"threshold_only", "sharpened_sigmoid", "random_gates"}
    assert all(0 <= gate["open_rate"] <= 1 for gate in found["gates"])
    page = (out / "report.html").read_text()
    assert "Weights around the layers, read whole" in page
    assert found["density"]["around"] == sum(t.numel() for name, t in assembled(network).weights.items() if ".graph." in name)

    ours, oracle = rnn2bin.load(out), runtime.load(out, backend="torch")
    assert isinstance(ours, graph_backend.Model) == bool(library.library())
    teacher = assembled(network)
    assert ours.spec.main.graph == oracle.spec.main.graph == teacher.spec.main.graph
    x = torch.from_numpy(INPUTS[network]).transpose(0, 1)
    lengths = torch.from_numpy(arrays["lengths"]) if "lengths" in arrays else None
    y, _ = oracle(x, lengths=lengths)
    kernels = oracle.network(x, lengths=lengths, walk=run_cell).y
    torch.testing.assert_close(kernels, y, atol=1e-5, rtol=1e-5)
    native, _ = ours(x, lengths=lengths)
    assert_close(native, y)
    if library.library():
        assert found["native"]["metric"] == pytest.approx(found["binary"]["metric"], abs=1e-5)
        assert found["parity"]["steps"] > 0
        assert found["parity"]["flips_outside"] == 0

    again = json.loads(call("eval", model, out, "--data", data, "--json").stdout)
    assert again["binary"] == found["binary"]
    assert again["drop"] == found["drop"]
    assert again["native"] == found["native"]

    plain = save_arrays(tmp_path, network, {k: v for k, v in arrays.items() if k == "lengths"}, "inputs.npz")
    call("run", out, "--data", plain, "--out", tmp_path / "y.npz")
    written = torch.from_numpy(np.load(tmp_path / "y.npz")["outputs"])
    torch.testing.assert_close(written, native.transpose(0, 1) if y.ndim == 3 else native)
    hub(out, x, lengths, y)


def hub(out: Path, x: torch.Tensor, lengths: torch.Tensor | None, y: torch.Tensor) -> None:
    """The same outputs through transformers' Auto classes."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(out).eval()
    name = "inputs" if x.is_floating_point() else "input_ids"
    with torch.no_grad():
        theirs = model(**{name: x.transpose(0, 1)}, lengths=lengths).logits
    torch.testing.assert_close(theirs, y.transpose(0, 1) if y.ndim == 3 else y)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_plan_shows_what_stands_around(network, tmp_path, save_graph):
    arrays = next(arrays for name, arrays, _ in CASES.values() if name == network)
    plan = call(
        "convert", save_graph(network), *FAST, "--data", save_arrays(tmp_path, network, arrays), "--out", tmp_path / "OUT", "--plan"
    )
    assert "around the layers: " in plan.output
    assert "reads out" not in plan.output
    assert not (tmp_path / "OUT").exists()


@pytest.mark.parametrize("network", NETWORKS)
def test_an_interrupted_conversion_goes_on_to_the_same_weights(network, tmp_path, save_graph, monkeypatch):
    arrays = next(arrays for name, arrays, _ in CASES.values() if name == network)
    model, data = save_graph(network), save_arrays(tmp_path, network, arrays)
    call("convert", model, *FAST, "--set", "train.window=5", "--data", data, "--out", tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(now: dict[str, Any]) -> None:
        if now["step"] == 3:
            raise Stop

    knobs = [word for word in FAST[2:] if word != "--set"] + ["train.window=5"]
    with pytest.raises(Stop):
        pipeline.convert(model, recipe="smoke.yaml", data=data, out=tmp_path / "OUT", overrides=knobs, progress=stop)
    call("convert", model, *FAST, "--set", "train.window=5", "--data", data, "--out", tmp_path / "OUT", "--resume")
    assert digest(tmp_path / "OUT") == digest(tmp_path / "whole")


@pytest.mark.parametrize("network", ["residual", "started"])
def test_a_graph_that_may_be_cut_streams_bit_for_bit(network, tmp_path, save_graph, monkeypatch):
    monkeypatch.setattr("test_graph_networks.H", 64)  # small products round alike whatever their shape
    arrays = next(arrays for name, arrays, _ in CASES.values() if name == network)
    out = tmp_path / "OUT"
    call("convert", save_graph(network), *FAST, "--data", save_arrays(tmp_path, network, arrays), "--out", out)
    oracle = runtime.load(out, backend="torch")
    x = torch.from_numpy(INPUTS[network][0])
    whole, _ = oracle(x[:, None])
    stream = oracle.stream()
    assert torch.equal(torch.stack([stream.step(x_t) for x_t in x]), whole[:, 0])


def test_a_token_graph_converts_without_data(tmp_path, save_graph):
    found = json.loads(call("convert", save_graph("residual"), *FAST, "--out", tmp_path / "OUT", "--json").stdout)
    assert found["provenance"]["data_free"]
    assert found["task"] == "next-token"
    call("convert", save_graph("attention"), *FAST, "--out", tmp_path / "NO", code=2)


def test_text_is_read_by_a_token_graph(tmp_path, save_graph):
    (tmp_path / "text.txt").write_text("abcdefghijk" * 80)
    found = json.loads(
        call("convert", save_graph("residual"), *FAST, "--data", tmp_path / "text.txt", "--out", tmp_path / "OUT", "--json").stdout
    )
    assert found["task"] == "next-token"
    call("run", tmp_path / "OUT", "--data", tmp_path / "text.txt", "--out", tmp_path / "y.npz")


@pytest.mark.parametrize("network", NETWORKS)
def test_a_student_starts_as_its_teacher_with_any_number_of_copies(network):
    from rnn2bin import student
    from rnn2bin.gates.estimators import Discretize
    from rnn2bin.recipe import Gates

    made = assembled(network)
    teacher = teacher_network(made.spec, made.weights)
    x = torch.from_numpy(INPUTS[network][:5]).transpose(0, 1)
    for copies in (1, 3):
        started_student = student.student(teacher, Gates(copies=copies, levels="learned"))
        torch.testing.assert_close(started_student(x, mode=Discretize("sigmoid")).y, teacher(x).y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("network", "arrays", "words"),
    [
        ("convolution", {"targets": labels(N, STEPS)}, "the network gives 6"),
        ("attention", {"targets": labels(N), "lengths": LENGTHS}, "lengths do not help"),
        ("attention", {"targets": labels(N, STEPS)}, "one output for a whole sequence"),
    ],
)
def test_data_that_do_not_fit_are_refused_in_one_line(network, arrays, words, tmp_path, save_graph):
    result = call(
        "convert", save_graph(network), *FAST, "--data", save_arrays(tmp_path, network, arrays), "--out", tmp_path / "OUT", code=2
    )
    assert words in result.stderr
    assert not (tmp_path / "OUT").exists()


def test_a_fixed_length_is_kept(tmp_path, save_graph):
    np.savez(tmp_path / "short.npz", inputs=FLOATS[:, :9], targets=labels(N))
    result = call("convert", save_graph("flattened"), *FAST, "--data", tmp_path / "short.npz", "--out", tmp_path / "OUT", code=2)
    assert "sequences of 12 steps" in result.stderr


def test_weights_beyond_fp16_are_refused_when_the_file_is_read(tmp_path, save_graph, monkeypatch):
    made = assembled("attention")
    name = next(name for name in made.weights if ".graph." in name)
    made.weights[name][0] = 70_000
    monkeypatch.setitem(loaders.GRAPH_READERS, "test", lambda path, source: made)
    result = call("convert", save_graph("attention"), *FAST, "--out", tmp_path / "OUT", code=3)
    assert f"{name}: holds 7e+04, but weights are packed as fp16" in result.stderr


def test_a_layer_with_lengths_of_its_own_counts_its_own_steps(tmp_path, save_graph, monkeypatch):
    """A graph that finds the pads itself (token 0, in front): what its layer does not see is in no figure."""
    torch.manual_seed(0)
    made = masked(GraphBuilder())
    monkeypatch.setitem(loaders.GRAPH_READERS, "test", lambda path, source: made)
    tokens = TOKENS.copy()
    short = {"whole": tokens[:, 6:], "padded": np.concatenate([np.zeros((N, 6), int), tokens[:, 6:]], 1)}
    found = {}
    for name, inputs in short.items():
        np.savez(tmp_path / f"{name}.npz", inputs=inputs, targets=LABELS)
        call(
            "convert",
            save_graph("masked"),
            *FAST,
            "--set",
            "train.batch_size=32",
            "--data",
            tmp_path / f"{name}.npz",
            "--out",
            tmp_path / name,
        )
        found[name] = json.loads((tmp_path / name / "report.json").read_text())
    for name in ("weights_touched", "columns", "candidate_rows", "bytes_per_step"):
        assert found["padded"]["density"][name] == pytest.approx(found["whole"]["density"][name], rel=1e-3)
    assert [g["open_rate"] for g in found["padded"]["gates"]] == pytest.approx([g["open_rate"] for g in found["whole"]["gates"]], rel=1e-3)


# ---------------------------------------------------------------------------------------------- the native backend


def variant(network: str, *, soft: tuple[str, ...] = (), **changes: Any) -> Network:
    """Random weights in the graph, its layers changed so."""
    main = assembled(network).spec.main
    return filled(RnnSpec({"main": replace(main, layers=tuple(replace(y, **changes) for y in main.layers))}), soft=soft)


VARIANTS: list[dict[str, Any]] = [
    *({"network": name, "copies": copies} for name in (*NETWORKS, "masked") for copies in (1, 3)),
    {"network": "attention", "soft": ("o",)},
    {"network": "convolution", "soft": ("z",), "copies": 2},
    {"network": "both_ways", "cell": "lstm_coupled_peephole", "copies": 2},
    {"network": "started", "cell": "lstm_peephole", "clip": 0.7, "cell_clip": 0.5},
    {"network": "residual", "cell": "gru", "copies": 2},
]
every = pytest.mark.parametrize("case", VARIANTS, ids=lambda case: "-".join(str(v) for v in case.values()))


def input_of(network: Network, name: str, *, batch: int = 6) -> torch.Tensor:
    """(T,B,…)."""
    return torch.from_numpy(INPUTS[name][:batch]).transpose(0, 1)


@built
@every
def test_native_is_as_the_oracle(case, tmp_path):
    network = variant(**case)
    theirs, ours = both(network, tmp_path)
    x, section = input_of(network, case["network"]), network.spec.main
    takes = section.graph.padded or section.windowed
    for lengths in (None, torch.tensor([STEPS, 1, 0, 5, 9, STEPS])) if takes else (None,):
        (y, state), (mine, my_state) = theirs(x, lengths=lengths), ours(x, lengths=lengths)
        assert_close(mine, y)
        (y, state), (mine, my_state) = theirs(x, state, lengths=lengths), ours(x, my_state, lengths=lengths)
        assert_close(mine, y)
        assert y.std() > 1e-3
        for a, b in zip(flat(my_state), flat(state), strict=True):
            assert_close(a, b)
    assert_close(ours.call(x, logits=True)[0], network(x, logits=True).y)


@pytest.mark.parametrize("name", ["attention", "residual", "masked"])
def test_a_layer_that_reads_nothing_but_rows_gets_the_tokens(name, monkeypatch):
    made = assembled(name)
    monkeypatch.setattr("rnn2bin.loaders.graph.with_token_layers", lambda section: section)
    before = assembled(name)
    graph = made.spec.main.graph
    assert (graph.token_layers, before.spec.main.graph.token_layers) == ((0,), ())
    assert [n.op for n in graph.nodes if "input" in n.inputs] == ([] if name == "masked" else ["Concat"])
    assert specs.from_dict(json.loads(json.dumps(specs.to_dict(made.spec)))) == made.spec
    x = input_of(teacher_network(made.spec, made.weights), name)
    new, old = (teacher_network(one.spec, one.weights)(x) for one in (made, before))
    assert torch.equal(new.y, old.y)
    assert isinstance(new.inputs[0], Lookup)
    student, rows = filled(made.spec), filled(before.spec)
    for walked in (walk, run_cell):
        assert_close(student(x, walk=walked).y, rows(x, walk=walked).y)


def stacked(g: GraphBuilder, between: str):
    """Tokens -> LSTM -> what stands between -> LSTM -> linear of both outputs."""
    first, _, _ = g.recurrent("lstm", time_first(g, "input"), directions("lstm", E))
    x = first if between == "nothing" else g.add("Relu", first) if between == "Relu" else time_first(g, time_first(g, first))
    second, _, _ = g.recurrent("lstm", x, directions("lstm", H))
    both = g.add("Add", time_first(g, first), time_first(g, second))
    return g.network(linear(g, both, H, V), input_shape=(), embedding=weights(V, E))


@pytest.mark.parametrize(("between", "below"), [("nothing", {1: 0}), ("twice turned", {1: 0}), ("Relu", {})])
def test_what_a_layer_lets_through_to_the_next_is_counted_and_has_a_price(between, below):
    """Both with a gradient and while gates are soft, when no value is 0 and the next layer would seem to read all."""
    made = stacked(GraphBuilder(), between)
    assert graph_paths.layers_below(made.spec.main.graph) == below
    main = made.spec.main
    network = filled(RnnSpec({"main": replace(main, layers=tuple(replace(layer, copies=2) for layer in main.layers))})).requires_grad_()
    x = torch.from_numpy(INPUTS["attention"]).transpose(0, 1)
    bit = lambda pre: Sample.apply(pre, None, Discretize("straight-through", backward="sigmoid"))
    for mode in (BINARY, Discretize("sigmoid")):
        prepared = SimpleNamespace(batch=SimpleNamespace(first=True))
        first, second = cost.cells(network, prepared, network(x, mode=mode, walk=run_cell), bit=bit)
        if below:
            assert second.inputs.requires_grad
            opened = first.units(cost.bits, opened=2)
            zeros = int((opened - second.inputs.detach()).sum())  # open, but the memory behind it is still 0
            assert (zeros > 0) == (mode is BINARY)
            assert bool((second.inputs <= opened).all())
        else:
            assert not second.inputs.requires_grad


def test_a_layer_that_walks_over_the_batch_of_another_reads_none_of_its_steps():
    turned = Node("Transpose", ("y",), ("x",), {"perm": [1, 0, 2]})
    nodes = (Node("Recurrent", ("input",), ("y",), {"layer": 0}), turned, Node("Recurrent", ("x",), ("z",), {"layer": 1}))
    assert graph_paths.layers_below(GraphSpec(nodes, "z", (), H, per_step=True)) == {}


def test_rows_that_are_changed_or_turned_on_their_side_are_no_tokens():
    table = EmbeddingSpec(V, E)
    layer = LayerSpec("lstm", E, H)
    for batch_first, before, wanted in (
        (False, [], (0,)),
        (True, [], ()),  # the layer walks over the batch
        (False, [Node("Identity", ("input",), ("x",))], (0,)),
        (False, [Node("Relu", ("input",), ("x",))], ()),
        (True, [Node("Transpose", ("input",), ("x",), {"perm": [1, 0, 2]})], (0,)),
        (True, [Node("Transpose", ("input",), ("x",), {"perm": [1, 2, 0]})], ()),
        (True, [Node("Transpose", ("input",), ("x",), {})], ()),  # ONNX: all axes reversed
    ):
        nodes = (*before, Node("Recurrent", ("x" if before else "input",), ("y",), {"layer": 0}))
        graph = GraphSpec(nodes, "y", (), H, per_step=True, batch_first=batch_first)
        found = with_token_layers(SectionSpec((layer,), table, graph=graph))
        assert found.token_layers == wanted, (batch_first, before)
        if wanted:
            assert "input" not in {name for node in found.graph.nodes for name in node.inputs}


@built
@every
def test_native_step_by_step(case, tmp_path):
    network = variant(**case)
    x = input_of(network, case["network"])
    for compute in native_backend.COMPUTE:
        _, ours = both(network, tmp_path, compute=compute)
        found = parity(network, ours, Part(x.transpose(0, 1)))
        assert found["flips_outside"] == 0
        assert found["steps"] >= len(x) // 2 * x.shape[1] * (0.8 if case["network"] == "masked" else 1)
        assert found["max_abs"] < 1e-5


@built
def test_parity_sees_a_layer_that_differs(tmp_path):
    """On each layer, in both directions, behind the first step too."""
    for name, prefix in (("both_ways", "main.layers.0.bwd"), ("residual", "main.layers.1.fwd")):
        network = variant(name)
        _, ours = both(network, tmp_path / name)
        with torch.no_grad():
            network.cells()[prefix].part("gates").weight_hh.add_(0.3)
        assert parity(network, ours, Part(input_of(network, name).transpose(0, 1)))["flips_outside"] > 0


@built
@pytest.mark.parametrize(
    "case", [c for c in VARIANTS if c["network"] in ("residual", "started")], ids=lambda c: "-".join(map(str, c.values()))
)
def test_native_in_pieces_is_native_whole(case, tmp_path, monkeypatch):
    monkeypatch.setattr(graph_backend, "WINDOW", 15)  # two steps of six sequences
    network = variant(**case)
    _, ours = both(network, tmp_path)
    x = input_of(network, case["network"])
    for lengths in (None, torch.tensor([STEPS, 1, 0, 5, 9, 7])):
        y, state = ours(x, lengths=lengths)
        at, parts, carried = 0, [], None
        for size in (1, 4, 7):
            left = None if lengths is None else (lengths - at).clamp(0, size)
            piece, carried = ours(x[at : at + size], carried, lengths=left)
            parts.append(piece)
            at += size
        assert_close(torch.cat(parts), y)
        for a, b in zip(flat(carried), flat(state), strict=True):
            assert_close(a, b)
    stream = ours.stream()
    y, _ = ours(x)
    for _ in range(2):
        assert_close(torch.stack([stream.step(x_t[0]) for x_t in x]), y[:, 0])
        stream.reset()
    assert isinstance(stream.step(x[0, 0].numpy()), np.ndarray)


@built
def test_native_streams_only_what_may_be_cut(tmp_path):
    for name in ("both_ways", "attention"):
        with pytest.raises(UnsupportedError, match="whole sequence"):
            both(variant(name), tmp_path / name)[1].stream()


@built
@pytest.mark.parametrize("name", ["both_ways", "residual", "masked"])
def test_threads_and_numpy_in_a_graph(name, tmp_path):
    path = packed(variant(name, copies=2), tmp_path)
    alone, shared = runtime.load(path, backend="native"), runtime.load(path, backend="native", threads=4)
    x = torch.from_numpy(INPUTS[name][:7]).transpose(0, 1)
    (y, state), (mine, my_state) = alone(x), shared(x.numpy())
    assert isinstance(mine, np.ndarray)
    assert torch.equal(y, torch.from_numpy(mine))
    assert all(torch.equal(a, torch.from_numpy(b)) for a, b in zip(flat(state), flat(my_state), strict=True))
    (y, _), (mine, _) = alone(x, state), shared(x.numpy(), my_state)
    assert torch.equal(y, torch.from_numpy(mine))


@built
@pytest.mark.parametrize("name", ["residual", "both_ways", "flattened"])
def test_bench_of_a_graph(name, tmp_path):
    path = packed(variant(name), tmp_path)
    np.savez(tmp_path / "data.npz", inputs=INPUTS[name])
    data = bench.Inputs.read(tmp_path / "data.npz", variant(name).spec, None)
    rows = bench.rows_of(path, "fp16", data, bench.Settings(against=("torch",), blocks=2, steps=24))
    assert [row["call"] for row in rows] == (["sequence", "stream"] if name == "residual" else ["sequence"])
    for row in rows:
        assert row["steps_per_call"] == (1 if row["call"] == "stream" else STEPS)
        assert 0 < row["density"] <= 1
        assert row["bytes_touched_per_step"] > 0
        assert set(row["rivals"]) == (set() if name == "residual" else {"torch fp32"})  # torch has no GRU with the reset before


@built
def test_what_c_does_not_run_is_left_to_torch_with_a_line(tmp_path, caplog):
    path = packed(variant("attention", activation="relu"), tmp_path)
    with caplog.at_level(logging.WARNING, logger="rnn2bin"):
        assert runtime.load(path).network
    assert caplog.messages == ["the network runs on the torch backend: its cells have other activations than tanh: relu"]
    with pytest.raises(UnsupportedError, match="another activation than tanh run on the torch backend"):
        runtime.load(path, backend="native")


@built
def test_a_graph_refuses_what_does_not_fit(tmp_path):
    _, ours = both(variant("started"), tmp_path)
    x = input_of(ours, "started")
    _, state = ours(x)
    for bad in (x[..., :2], x.long(), x[:0]):
        with pytest.raises(UsageError, match="input"):
            ours(bad)
    for bad in ([], state * 2, [[(state[0][0][0],)]], [[tuple(s[:3] for s in state[0][0])]]):
        with pytest.raises(UsageError, match="state"):
            ours(x, bad)
    with pytest.raises(UsageError, match="lengths"):
        ours(x, lengths=torch.ones(6))
    with pytest.raises(UsageError, match="input"):
        ours.stream().step(torch.zeros(2))


def change_nodes(op: str, **changes: Any):
    """Sets fields of every node of an operation."""

    def edit(config: dict[str, Any]) -> None:
        for node in config["spec"]["sections"]["main"]["graph"]["nodes"]:
            if node["op"] == op:
                node.update(changes)

    return edit_config(edit)


BAD_NODES = {
    "a layer that reads another width": change_nodes("Transpose", attributes={"perm": [2, 1, 0]}),
    "a layer that reads a matrix": change_nodes("Recurrent", inputs=["lengths"]),
    "a layer that reads nothing": change_nodes("Recurrent", inputs=[]),
    "states of another shape": change_nodes("Recurrent", inputs=["Transpose", "input"]),
    "lengths that are none": change_nodes("Recurrent", inputs=["Transpose", "", "", "input"]),
}


@built
@pytest.mark.parametrize("name", BAD_NODES)
def test_bad_nodes_are_refused_by_name(name, tmp_path):
    path = packed(variant("started"), tmp_path)
    BAD_NODES[name](path)
    x = input_of(None, "started")
    for backend in ("torch", "native"):
        with pytest.raises(UnsupportedError, match="Recurrent"):
            runtime.load(path, backend=backend)(x)


@built
def test_a_name_that_stands_for_two_values(tmp_path):
    path = packed(variant("started"), tmp_path)

    def edit(config: dict[str, Any]) -> None:
        nodes = config["spec"]["sections"]["main"]["graph"]["nodes"]
        nodes.insert(
            0, {"op": "Constant", "inputs": [], "outputs": ["Transpose"], "attributes": {"value": [[[1.0] * WIDTH]], "dtype": "float32"}}
        )

    edit_config(edit)(path)
    x = input_of(None, "started")
    assert_close(runtime.load(path, backend="native")(x)[0], runtime.load(path, backend="torch")(x)[0])


@built
@pytest.mark.parametrize(("op", "read"), [("Mul", "second"), ("Identity", "")])
def test_outputs_that_an_operation_does_not_give(op, read, tmp_path):
    """Read by a node behind it, or as the network's output."""
    path = packed(variant("started"), tmp_path)

    def edit(config: dict[str, Any]) -> None:
        graph = config["spec"]["sections"]["main"]["graph"]
        graph["nodes"].append(
            {"op": op, "inputs": [graph["output"]] * (2 if op == "Mul" else 1), "outputs": ["first", "second"], "attributes": {}}
        )
        if read:
            graph["nodes"].append({"op": "Identity", "inputs": [read], "outputs": ["third"], "attributes": {}})
        graph["output"] = "third" if read else "second"

    edit_config(edit)(path)
    for backend in ("torch", "native"):
        with pytest.raises(UnsupportedError, match="'second' is read, but its operation gives fewer outputs"):
            runtime.load(path, backend=backend)(input_of(None, "started"))


@built
def test_constants_that_are_not_finite_are_read(tmp_path):
    """Masks hold infinities; JSON, as Python writes it, says so."""
    path = packed(variant("started"), tmp_path)
    value = [float("inf"), float("-inf"), float("nan")]
    edit_config(
        lambda c: c["spec"]["sections"]["main"]["graph"]["nodes"].insert(
            0, {"op": "Constant", "inputs": [], "outputs": ["bounds"], "attributes": {"value": value, "dtype": "float32"}}
        )
    )(path)
    assert re.search("-Infinity", (path / "config.json").read_text())
    x = input_of(None, "started")
    assert_close(runtime.load(path, backend="native")(x)[0], runtime.load(path, backend="torch")(x)[0])
