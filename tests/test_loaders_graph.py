"""What a graph file hands over becomes a network: layouts, readouts, chains and what stays a graph are found by running it."""

import dataclasses

import pytest
import torch
from torch import nn

from rnn2bin import spec as specs
from rnn2bin.cells.network import teacher_network
from rnn2bin.cells.ops import OPS
from rnn2bin.errors import UnsupportedError
from rnn2bin.loaders.graph import SINGLE, Direction, GraphBuilder, close

V, E, H, OUT = 11, 5, 7, 4


def directions(rnn: nn.LSTM | nn.GRU, layer: int = 0) -> list[Direction]:
    ways = ["", "_reverse"] if rnn.bidirectional else [""]
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [Direction(*(getattr(rnn, f"{name}_l{layer}{way}").detach() for name in names)) for way in ways]


def modules(kind=nn.LSTM, **options):
    torch.manual_seed(1)
    return nn.Embedding(V, E), kind(E, H, **options), nn.Linear(H * (2 if options.get("bidirectional") else 1), OUT)


def built(kind: str, rnn: nn.LSTM | nn.GRU, head: nn.Linear, table: nn.Embedding, *, readout: str, batch_first: bool = True):
    g = GraphBuilder()
    x = g.add("Transpose", "input", perm=[1, 0, 2]) if batch_first else "input"
    for layer in range(rnn.num_layers):
        x, h, _ = g.recurrent(kind, x, directions(rnn, layer))
    if readout == "all":
        y = g.add("Transpose", x, perm=[1, 0, 2]) if batch_first else x
    elif readout == "last":
        y = g.add("Gather", x, g.literal(-1), axis=0)
    else:
        y = g.add("Reshape", g.add("Transpose", h, perm=[1, 0, 2]), g.literal([0, -1]))
    y = g.add("Add", g.add("MatMul", y, g.constant(head.weight.detach().t())), g.constant(head.bias.detach()))
    return g.network(g.add("Softmax", y, axis=-1), input_shape=(), embedding=table.weight.detach(), batch_first=None)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("readout", ["all", "last"])
@pytest.mark.parametrize(("kind", "module"), [("lstm", nn.LSTM), ("gru", nn.GRU)])
def test_a_plain_chain_becomes_one(kind, module, readout, batch_first):
    table, rnn, head = modules(module, num_layers=2)
    made = built(kind, rnn, head, table, readout=readout, batch_first=batch_first)
    section = made.spec.main
    assert section.graph is None
    assert (section.readout, section.activation, len(section.head)) == (readout, "softmax", 1)
    tokens = torch.randint(V, (6, 2))
    y = head(rnn(table(tokens))[0])
    ours = teacher_network(made.spec, made.weights)(tokens).y
    torch.testing.assert_close(ours, (y if readout == "all" else y[-1]).softmax(-1).detach(), atol=1e-6, rtol=1e-5)


def test_the_final_states_of_both_directions_are_a_plain_chain():
    table, rnn, head = modules(bidirectional=True)
    made = built("lstm", rnn, head, table, readout="final")
    assert (made.spec.main.graph, made.spec.main.readout) == (None, "final")


def attention(*, steps: int | None = None):
    """concat[embedding, LSTM] -> attention over time -> linear: no plain chain."""
    table, rnn, _ = modules()
    query, head = nn.Linear(E + H, 1), nn.Linear(E + H, OUT)
    g = GraphBuilder()
    y, _, _ = g.recurrent("lstm", g.add("Transpose", "input", perm=[1, 0, 2]), directions(rnn))
    both = g.add("Concat", "input", g.add("Transpose", y, perm=[1, 0, 2]), axis=-1)
    score = g.add("Softmax", g.add("MatMul", both, g.constant(query.weight.detach().t())), axis=1)
    mean = g.add("ReduceSum", g.add("Mul", both, score), g.literal([1]), keepdims=0)
    out = g.add("Gemm", mean, g.constant(head.weight.detach()), g.constant(head.bias.detach()), transB=1)

    def reference(tokens):
        e = table(tokens)
        both = torch.cat([e, rnn(e)[0]], -1)
        weight = (both @ query.weight.t()).softmax(0)
        return head((both * weight).sum(0)).detach()

    return g.network(out, input_shape=(), embedding=table.weight.detach(), steps=steps), reference


def test_what_is_no_chain_stays_a_graph_and_computes_the_same():
    made, reference = attention()
    section = made.spec.main
    assert section.graph is not None
    assert (section.per_step, section.output_size, section.windowed, section.graph.padded) == (False, OUT, False, False)
    tokens = torch.randint(V, (9, 3))
    torch.testing.assert_close(teacher_network(made.spec, made.weights)(tokens).y, reference(tokens), atol=1e-6, rtol=1e-5)


def test_a_graph_survives_its_config():
    made, _ = attention()
    import json

    again = specs.from_dict(json.loads(json.dumps(specs.to_dict(made.spec))))
    assert again == dataclasses.replace(made.spec)
    assert again.tensors() == {name: tuple(t.shape) for name, t in made.weights.items()}


def test_a_per_step_graph_may_be_cut_and_padded_when_it_is_causal():
    _, rnn, head = modules()
    g = GraphBuilder()
    y, _, _ = g.recurrent("lstm", "input", directions(rnn))
    y = g.add("Mul", y, y)  # no plain chain
    g_out = g.add("Add", g.add("MatMul", y, g.constant(head.weight.detach().t())), g.constant(head.bias.detach()))
    made = g.network(g_out, input_shape=(E,), batch_first=None)
    graph = made.spec.main.graph
    assert graph is not None
    assert (graph.batch_first, graph.per_step, graph.stepwise, graph.padded, graph.steps) == (False, True, True, True, None)


def test_one_value_a_step_gets_a_feature_axis():
    _, rnn, _ = modules()
    g = GraphBuilder()
    y, _, _ = g.recurrent("lstm", g.add("Transpose", "input", perm=[1, 0, 2]), directions(rnn))
    out = g.add("Transpose", g.add("ReduceSum", y, g.literal([2]), keepdims=0), perm=[1, 0])
    made = g.network(out, input_shape=(E,))
    assert (made.spec.main.output_size, made.spec.main.per_step) == (1, True)
    assert teacher_network(made.spec, made.weights)(torch.randn(6, 2, E)).y.shape == (6, 2, 1)


def test_a_convolution_that_shortens_the_sequence_is_measured_in_its_own_steps():
    _, rnn, head = modules()
    g = GraphBuilder()
    x = g.add("Conv", g.add("Transpose", "input", perm=[0, 2, 1]), g.constant(torch.randn(E, 3, 4)), strides=[2], hint="conv")
    y, _, _ = g.recurrent("lstm", g.add("Transpose", x, perm=[2, 0, 1]), directions(rnn))
    out = g.add("Transpose", g.add("MatMul", y, g.constant(head.weight.detach().t())), perm=[1, 0, 2])
    made = g.network(out, input_shape=(3,))
    network = teacher_network(made.spec, made.weights)
    x = torch.randn(20, 2, 3)
    assert network(x).y.shape == (9, 2, OUT)
    assert network.output_steps(x) == 9
    assert made.spec.main.windowed is False


def test_a_network_for_one_length_says_so():
    _, rnn, _ = modules()
    g = GraphBuilder()
    y, _, _ = g.recurrent("lstm", g.add("Transpose", "input", perm=[1, 0, 2]), directions(rnn))
    flat = g.add("Reshape", g.add("Transpose", y, perm=[1, 0, 2]), g.literal([-1, 12 * H]))
    out = g.add("MatMul", flat, g.constant(torch.randn(12 * H, OUT)))
    made = g.network(out, input_shape=(E,), steps=12)
    assert made.spec.main.graph is not None
    assert made.spec.main.graph.steps == 12
    assert made.spec.main.per_step is False


def test_states_that_a_network_forgets_are_not_dropped():
    """After a few steps the outputs are those of a network that began from zero: only short sequences tell."""
    table, rnn, head = modules()
    with torch.no_grad():
        rnn.weight_hh_l0 *= 0.1
        rnn.bias_hh_l0[H : 2 * H] = -4.0  # the forget gate
    g = GraphBuilder()
    start = g.constant(3 * torch.ones(1, 1, H))
    y, _, _ = g.recurrent("lstm", g.add("Transpose", "input", perm=[1, 0, 2]), directions(rnn), h0=start, c0=start)
    last = g.add("Gather", y, g.literal(-1), axis=0)
    out = g.add("Gemm", last, g.constant(head.weight.detach()), g.constant(head.bias.detach()), transB=1)
    made = g.network(out, input_shape=(), embedding=table.weight.detach())
    tokens, state = torch.randint(V, (2, 3)), 3 * torch.ones(1, 3, H)
    wanted = head(rnn(table(tokens), (state, state))[0][-1]).detach()
    torch.testing.assert_close(teacher_network(made.spec, made.weights)(tokens).y, wanted, atol=1e-6, rtol=1e-5)


def test_sequences_that_touch_each_other_are_refused():
    _, rnn, _ = modules()
    g = GraphBuilder()
    y, _, _ = g.recurrent("lstm", g.add("Transpose", "input", perm=[1, 0, 2]), directions(rnn))
    out = g.add("Sub", y, g.add("ReduceMean", y, g.literal([1]), keepdims=1))
    with pytest.raises(UnsupportedError, match="change each other"):
        g.network(g.add("Transpose", out, perm=[1, 0, 2]), input_shape=(E,))


def test_an_operation_that_does_not_fit_is_named_with_its_shapes():
    _, rnn, _ = modules()
    g = GraphBuilder()
    y, _, _ = g.recurrent("lstm", g.add("Transpose", "input", perm=[1, 0, 2]), directions(rnn))
    out = g.add("MatMul", y, g.constant(torch.randn(H + 1, OUT)))
    with pytest.raises(UnsupportedError, match=r"MatMul \(MatMul\) does not run on \(\(29, 3, 7\), \(8, 4\)\)"):
        g.network(out, input_shape=(E,))


def test_without_a_recurrent_layer_there_is_nothing_to_convert():
    g = GraphBuilder()
    with pytest.raises(UnsupportedError, match="no LSTM or GRU"):
        g.network(g.add("Relu", "input"), input_shape=(E,))


@pytest.mark.parametrize("activation", specs.CELL_ACTIVATIONS)
@pytest.mark.parametrize("kind", ["lstm", "gru", "gru_reset_before"])
def test_every_activation_is_the_same_in_the_oracle_and_the_kernels_with_its_gradient(kind, activation):
    from rnn2bin.cells.network import Network
    from rnn2bin.distill.window import run_cell
    from rnn2bin.gates.estimators import FLOAT

    torch.manual_seed(3)
    layer = specs.LayerSpec(kind, E, H, activation=activation, hard_sigmoid=0.4)
    network = Network(specs.RnnSpec({"main": specs.SectionSpec((layer,))})).double()
    for p in network.parameters():
        nn.init.normal_(p, std=0.4)
    x = torch.randn(6, 2, E, dtype=torch.float64)
    grads = []
    for walk in (None, run_cell):
        network.zero_grad()
        y = network(x, mode=FLOAT, **({"walk": walk} if walk else {})).y
        y.square().sum().backward()
        grads.append([y.detach(), *(p.grad.clone() for p in network.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_what_ran_in_float32_is_compared_as_float32():
    """A file's own steps run in float32, a settled graph in float64: one tolerance for both refused a network for its rounding."""
    a = torch.linspace(0.1, 1, 7)
    b = a * (1 + 5e-6)
    assert close(a, a)
    assert not close(a, b)
    assert close(a, b, tolerance=SINGLE)
    assert not close(a, a * 1.01, tolerance=SINGLE)


def test_a_constant_without_numbers_takes_no_memory():
    """Found by fuzzing: 2^40 empty lists of a tensor of shape (2^40, 0), from a file of 700 bytes."""
    g = GraphBuilder()
    g.literal(torch.zeros((2**40, 0), dtype=torch.int64))
    node = g.nodes[-1]
    assert node.attributes["value"] == []
    assert OPS["Constant"]([], node.attributes).shape == (2**40, 0)
