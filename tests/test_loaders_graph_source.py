"""Bare tensor files whose network the recipe writes down as a `graph`, against torch; everything that does not fit, at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tolerances import assert_close
from torch import Tensor, nn

from rnn2bin import cli, loaders, measure, recipe_yaml
from rnn2bin.cells.network import teacher_network
from rnn2bin.cells.ops import OPS
from rnn2bin.data import Part
from rnn2bin.errors import RecipeError, UnsupportedError
from rnn2bin.gates.estimators import FLOAT
from rnn2bin.recipe import GraphOp, Source

torch.set_num_threads(1)

B, T, V, E, H, A, OUT = 3, 7, 11, 5, 4, 6, 3


class Attentive(nn.Module):
    """Every step reads all steps, by additive attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.rnn = nn.Embedding(V, E), nn.LSTM(E, H, 2, bidirectional=True, batch_first=True)
        self.query, self.key, self.score = (nn.Linear(i, o, bias=b) for i, o, b in ((2 * H, A, True), (2 * H, A, False), (A, 1, False)))
        self.out = nn.Linear(2 * H, OUT)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.rnn(self.table(tokens))[0]
        scores = self.score(torch.tanh(self.query(h).unsqueeze(2) + self.key(h).unsqueeze(1))).squeeze(-1)
        found: Tensor = self.out(torch.softmax(scores, -1) @ h)
        return found


def layers_of(count: int, *, both: bool = False, name: str = "rnn") -> list[dict[str, Any]]:
    def one(index: int, tail: str = "") -> dict[str, Any]:
        return {f"{k}_{side}": f"{name}.{k}_{side}_l{index}{tail}" for k in ("weight", "bias") for side in ("ih", "hh")}

    return [one(k) | ({"reverse": one(k, "_reverse")} if both else {}) for k in range(count)]


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> dict[str, Any]:
    return {"op": op, "inputs": inputs.split(), "outputs": outputs.split(), "attributes": attributes}


ATTENTION = [
    node("Recurrent", "input", "h"),
    node("Linear", "h query.weight query.bias", "q"),
    node("Linear", "h key.weight", "k"),
    node("Unsqueeze", "q", "q2", axes=[2]),
    node("Unsqueeze", "k", "k2", axes=[1]),
    node("Add", "q2 k2", "sums"),
    node("Tanh", "sums", "both"),
    node("Linear", "both score.weight", "score4"),
    node("Squeeze", "score4", "scores", axes=[-1]),
    node("Softmax", "scores", "shares", axis=-1),
    node("MatMul", "shares h", "context"),
]
MASK = [
    node("Constant", "", "zero", value=0, dtype="int64"),
    node("Constant", "", "one", value=1, dtype="int64"),
    node("Constant", "", "never", value=-1e9, dtype="float32"),
    node("Shape", "tokens", "counts", start=1, end=2),
    node("Squeeze", "counts", "count"),
    node("Range", "zero count one", "places"),
    node("Unsqueeze", "lengths", "ends", axes=[1, 2]),
    node("Less", "places ends", "real"),
    node("Where", "real scores never", "seen"),
    node("Softmax", "seen", "shares", axis=-1),
]
MASKED = [*ATTENTION[:-2], *MASK, ATTENTION[-1]]


def attentive(tmp_path: Path) -> tuple[Path, Attentive]:
    torch.manual_seed(0)
    model = Attentive().eval()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    return tmp_path / "m.pt", model


def source(graph: list[dict[str, Any]], **section: Any) -> Source:
    whole = {"cell": "lstm", "embedding": "table.weight", "layers": layers_of(2, both=True), "graph": graph}
    return Source.model_validate({"main": {**whole, "head": [{"weight": "out.weight", "bias": "out.bias"}], **section}})


def network(path: Path, given: Source) -> Any:
    loaded = loaders.load(path, source=given)
    return teacher_network(loaded.spec, loaded.weights)


def reasons(path: Path, given: Source) -> list[str]:
    with pytest.raises(UnsupportedError) as caught:
        loaders.load(path, source=given)
    assert loaders.inspect(path, source=given).recognised is None
    return list(caught.value.reasons)


def test_the_recipes_operations_are_those_that_run():
    assert set(get_args(GraphOp)) == OPS.keys() | {"Recurrent", "Linear"}


def test_attention_between_bare_tensors(tmp_path):
    path, model = attentive(tmp_path)
    made = network(path, source(ATTENTION))
    tokens = torch.randint(V, (T, B))
    with torch.no_grad():
        assert_close(made(tokens).y, model(tokens.t()).transpose(0, 1))
    graph = made.spec.main.graph
    assert (graph.per_step, graph.padded, graph.stepwise, made.spec.main.output_size) == (True, False, False, OUT)
    assert graph.tensors.keys() >= {"query_weight", "key_weight", "out_weight"}


def test_a_mask_by_lengths_lets_sequences_be_padded(tmp_path):
    path, model = attentive(tmp_path)
    made = network(path, source(MASKED))
    assert made.spec.main.graph.padded
    tokens, lengths = torch.randint(V, (T, B)), torch.tensor([T, 4, 1])
    y = made(tokens, lengths=lengths).y
    for k, n in enumerate(lengths.tolist()):
        with torch.no_grad():
            assert_close(y[:n, k], model(tokens[:n, k][None])[0])


def test_layers_apart_and_first_states(tmp_path):
    """A layer over floats, another that starts from what a linear layer makes of its last state."""
    torch.manual_seed(1)
    first, second, start, out = nn.GRU(E, H), nn.GRU(H, H), nn.Linear(H, H), nn.Linear(H, OUT)
    named = {"a": first, "b": second, "start": start, "out": out}
    torch.save(nn.ModuleDict(named).state_dict(), tmp_path / "m.pt")
    graph = [
        node("Recurrent", "input", "y h", layers=[0]),
        node("Linear", "h start.weight start.bias", "made"),
        node("Tanh", "made", "h0"),
        node("Relu", "y", "x"),
        node("Recurrent", "x h0", "z", layers=[1]),
        node("Concat", "z y", "both", axis=-1),
        node("Slice", "both", "part", starts=[0], ends=[H], axes=[-1]),
    ]
    layers = [*layers_of(1, name="a"), *layers_of(1, name="b")]
    given = source(graph, cell="gru", layers=layers, embedding=None)
    x = torch.randn(T, B, E)
    with torch.no_grad():
        y, h = first(x)
        wanted = out(second(torch.relu(y), torch.tanh(start(h)))[0])
    assert_close(network(tmp_path / "m.pt", given)(x).y, wanted)


def test_a_convolution_in_front_of_a_step_of_its_own_shape(tmp_path):
    torch.manual_seed(2)
    conv, rnn, out = nn.Conv1d(1, 2, 4, stride=4), nn.LSTM(6, H), nn.Linear(H, OUT)
    torch.save(nn.ModuleDict({"conv": conv, "rnn": rnn, "out": out}).state_dict(), tmp_path / "m.pt")
    graph = [
        node("Constant", "", "rows", value=[-1, 1, 12], dtype="int64"),
        node("Reshape", "input rows", "x"),
        node("Conv", "x conv.weight conv.bias", "c", strides=[4]),
        node("Shape", "input", "counts", start=0, end=2),
        node("Constant", "", "width", value=[6], dtype="int64"),
        node("Concat", "counts width", "shape", axis=0),
        node("Reshape", "c shape", "features"),
        node("Recurrent", "features", "y"),
    ]
    section = source(graph, layers=layers_of(1), embedding=None).model_dump(exclude_unset=True)
    given = Source.model_validate({**section, "input_shape": [12]})
    x = torch.randn(T, B, 12)
    with torch.no_grad():
        wanted = out(rnn(conv(x.reshape(-1, 1, 12)).reshape(T, B, -1))[0])
    made = network(tmp_path / "m.pt", given)
    assert_close(made(x).y, wanted)
    assert made.spec.main.windowed
    assert made.spec.main.input_shape == (12,)
    assert "Reshape (x) does not run" in "".join(reasons(tmp_path / "m.pt", Source.model_validate(section)))  # 6, as the layer reads


def test_a_graph_that_is_a_plain_chain_becomes_one(tmp_path):
    path, _ = attentive(tmp_path)
    given = source([node("Recurrent", "input", "h"), node("Identity", "h", "same")])
    given = given.model_copy(update={"ignore": ["query.*", "key.*", "score.*"]})
    main = loaders.load(path, source=given).spec.main
    assert main.graph is None
    assert (len(main.layers), main.readout, main.head[0].out_features) == (2, "all", OUT)


def test_everything_that_does_not_fit_is_said_at_once(tmp_path):
    path, _ = attentive(tmp_path)
    graph = [
        node("Recurrent", "input", "h", layers=[0, 2], speed=3),
        node("Linear", "h query.wight", "q"),
        node("Linear", "q query.bias", "p"),
        node("Relu", "h", "key.weight"),
        node("Tanh", "h", "unread"),
        node("Add", "q h", "tokens"),
    ]
    found = "\n".join(reasons(path, source(graph, head=[{"weight": "out.wait"}])))
    for part in (
        "graph.0 (Recurrent): layers [0, 2]: wanted positions in the section's 2 layers",
        "graph.0 (Recurrent): takes the attribute layers only, not speed",
        "graph.1 (Linear): query.wight: no such tensor in the file; did you mean query.weight?",
        "graph.2 (Linear): shapes [(6,)]; wanted (out, in)",
        "graph.3 (Relu): gives 'key.weight', which is the name of a tensor of the file",
        "graph.4 (Tanh): nothing reads what it gives (unread)",
        "graph.5 (Add): gives 'tokens', which is the name of a value before it",
        "main.head.0: out.wait: no such tensor in the file",
        "score.weight (1, 6): no part of what was recognised",
    ):
        assert part in found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({9: node("Softmax", "scores", "shares", axes=-1)}, "source.main.graph.9 (Softmax): the attribute axes has no effect there"),
        ({10: node("MatMul", "shares q", "context")}, "does not run on"),
        ({0: node("Recurrent", "input", "h", layers=[1])}, "source.main.graph: runs the layers [1]; wanted each of 2 once"),
        ({0: node("Recurrent", "input input input input", "h")}, "reads x, h0 and c0"),
        ({10: node("Range", "shares h h", "context")}, "Range (context) does not run"),
    ],
)
def test_what_running_it_tells(tmp_path, change, said):
    path, _ = attentive(tmp_path)
    assert said in "\n".join(reasons(path, source([change.get(k, one) for k, one in enumerate(ATTENTION)])))


def test_the_recipe_tells_what_is_wrong_and_where():
    text = """\
source:
  main:
    cell: lstm
    layers: [{weight_ih: a, weight_hh: b}]
    graph:
    - {op: Recurent, inputs: [input], outputs: [h]}
    - {op: Relu, inputs: h, outputs: []}
    - {op: Relu, inputs: [h], outputs: [y], axis: 1}
    - {op: Softmax, inputs: [h], outputs: [y], attributes: {axis: {a: 1}}}
"""
    with pytest.raises(RecipeError) as caught:
        recipe_yaml.validate_text(text, name="r.yaml")
    lines = caught.value.reasons
    assert lines == (
        "r.yaml:6:12: source.main.graph.0.op: Recurent is unknown here; did you mean Recurrent?",
        "r.yaml:7:26: source.main.graph.1.inputs: must be a list, such as [a, b]; given h",
        "r.yaml:7:29: source.main.graph.1.outputs: must have at least 1 entry; given an empty list",
        "r.yaml:8:45: source.main.graph.2.axis: unknown key; keys here: op, inputs, outputs, attributes",
        "r.yaml:9:61: source.main.graph.3.attributes.axis: must be a number, a text, true, false, or a list of numbers",
    )


def test_a_graph_stands_in_main_and_says_itself_what_is_read_out():
    for section, said in (
        ({"main": {"cell": "lstm", "layers": layers_of(1), "graph": ATTENTION, "readout": "last"}}, "`readout` is for plain chains"),
        (
            {
                "encoder": {"cell": "lstm", "layers": layers_of(1), "graph": ATTENTION},
                "decoder": {"cell": "lstm", "layers": layers_of(1)},
                "decode": {"start": 0, "end": 1, "max_length": 3},
            },
            "`graph` belongs to a network of one section",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            Source.model_validate(section)


def test_inspect_prints_what_is_left_over_to_be_filled_in(tmp_path):
    tensors = {**Attentive().state_dict(), "line\nbreak": torch.zeros(2)}
    torch.save(tensors, tmp_path / "m.pt")
    shown = loaders.inspect(tmp_path / "m.pt").source
    assert '#  ignore: ["query.weight", "query.bias", "key.weight", "score.weight", "out.weight", "out.bias", "line\\nbreak"]\n' in shown
    assert '#    - {op: unknown, inputs: [y, "key.weight"], outputs: [unknown]}\n' in shown
    graph = "".join(line[1:] + "\n" for line in shown.splitlines() if line.startswith("#    "))
    main = "".join(line + "\n" for line in shown.splitlines() if not line.startswith("#"))
    with pytest.raises(RecipeError) as caught:
        recipe_yaml.validate_text(main + graph, name="r.yaml")
    assert len(caught.value.reasons) == 7  # an operation for each tensor that is left over
    assert all("graph" in line and "given unknown" in line for line in caught.value.reasons)


def test_it_converts_through_the_command_line_and_goes_on_to_onnx(tmp_path):
    path, _ = attentive(tmp_path)
    recipe = recipe_yaml.dump(recipe_yaml.read("smoke").model_copy(update={"source": source(MASKED)}))
    (tmp_path / "recipe.yaml").write_text(recipe)
    random = np.random.default_rng(0)
    np.savez(
        tmp_path / "d.npz",
        inputs=random.integers(V, size=(20, T)),
        lengths=random.integers(2, T + 1, 20),
        targets=random.integers(OUT, size=(20, T)),
    )
    call = lambda *args: CliRunner().invoke(cli.main, [str(a) for a in args])
    knobs = ["--set", "train.steps=4", "--set", "train.max_steps=4", "--set", "data.test=0.25", "--set", "gates.copies=1"]
    made = call(
        "convert", path, "--recipe", tmp_path / "recipe.yaml", "--data", tmp_path / "d.npz", "--out", tmp_path / "OUT", *knobs, "--json"
    )
    assert made.exit_code == 0, made.output
    report = json.loads(made.stdout)
    assert report["binary"]["n"] == 5
    assert all(gate["binary"] for gate in report["gates"])
    exported = call("export", tmp_path / "OUT", "--to", "onnx", "--out", tmp_path / "m.onnx")
    assert exported.exit_code == 0, exported.output
    assert (tmp_path / "m.onnx").stat().st_size


def test_sequences_run_at_once_follow_what_a_graph_makes(tmp_path):
    path, _ = attentive(tmp_path)
    made, part = network(path, source(ATTENTION)), Part(torch.randint(V, (8, 40)))
    rows = lambda steps: measure.rows_at_once(measure.Candidate(made, FLOAT), Part(part.inputs[:, :steps]), 256, "cpu")
    largest = 40 * 40 * A
    assert rows(4) == 256
    assert rows(40) == 256
    measured, measure.MOST_NUMBERS = measure.MOST_NUMBERS, largest * 5
    try:
        assert rows(40) == 5
    finally:
        measure.MOST_NUMBERS = measured
