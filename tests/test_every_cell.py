"""Every cell that declares its equations (`cells.network.EQUATIONS`), and full peepholes: the oracle against a NumPy loop of its equations,
gradients, both backends step by step and running free, and what a step reads. Odd sizes, two layers, non-zero biases everywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy_cells import MEMORIES, REFERENCES, Reference, sigmoid
from test_runtime_native import both, built, filled, flat, translator
from tolerances import assert_close
from torch.nn.utils.stateless import _reparametrize_module

from rnn2bin import runtime, tasks
from rnn2bin.cells.network import EQUATIONS, STEPS, Network, walk, zero_state
from rnn2bin.cells.weights import Cell
from rnn2bin.data import Batch, Part
from rnn2bin.distill.window import WINDOWS, run_cell
from rnn2bin.evaluation.density import DensityCounter
from rnn2bin.evaluation.parity import parity
from rnn2bin.gates.estimators import BINARY, FLOAT, Discretize
from rnn2bin.kinds import CELLS
from rnn2bin.runtime import native_backend
from rnn2bin.spec import EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec, check

T, B, I, H, V = 9, 3, 5, 37, 7  # noqa: E741
NEW = [name for name in CELLS if name in EQUATIONS or CELLS[name].peepholes == "full"]
ROWS = [(name, depth) for name in NEW for depth in ((1, 3) if CELLS[name].deep else (1,))]
every = pytest.mark.parametrize(("name", "depth"), ROWS)
gated = pytest.mark.parametrize(("name", "depth"), [row for row in ROWS if CELLS[row[0]].gates or CELLS[row[0]].links])


def layer_of(name: str, *, width: int = I, hidden: int = H, depth: int = 1, copies: int = 1, directions: int = 1) -> LayerSpec:
    units = width if not CELLS[name].recurrent else hidden
    return LayerSpec(name, width, units, directions, copies=copies if CELLS[name].at(depth).unit_gates else 1, depth=depth)


def network_of(
    name: str, *, depth: int = 1, copies: int = 1, tokens: bool = False, directions: int = 1, head: bool = True, **options: Any
) -> Network:
    """Two layers of the cell behind one that makes the width odd where it carries its input, and two linear ones."""
    first = layer_of(name, depth=depth, copies=copies, directions=directions)
    second = layer_of(name, width=first.output_size, depth=depth, copies=copies, directions=directions)
    linears = (LinearSpec(second.output_size, 9, activation="tanh"), LinearSpec(9, 6)) if head else ()
    spec = RnnSpec({"main": SectionSpec((first, second), EmbeddingSpec(V, I) if tokens else None, linears)})
    check(spec)
    return filled(spec, **options)


def scale_of(depth: int) -> float:
    """Of random weights, so small that a step contracts: what grows from step to step makes any two orders of a sum part."""
    return 0.25 if depth == 1 else 0.1


def inputs_of(network: Network, *, steps: int = T, batch: int = B) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if network.spec.entry.embedding:
        return torch.randint(V, (steps, batch), generator=generator)
    return torch.randn(steps, batch, I, generator=generator)


def make_cell(layer: LayerSpec, *, binary: bool, seed: int = 0) -> Cell:
    generator = torch.Generator().manual_seed(seed)
    cell = Cell(layer, (binary,) * len(layer.kind.gates), levels="strict").double()
    with torch.no_grad():
        for name, p in cell.named_parameters():
            if "levels" not in name:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.6)
    return cell


# ------------------------------------------------------------------------------------------------ the equations


def reference_of(cell: Cell) -> Reference:
    return REFERENCES[cell.layer.cell]({name: p.detach().numpy() for name, p in cell.named_parameters()}, cell.layer.hidden_size)


@pytest.mark.parametrize("binary", [False, True], ids=["float", "binary"])
@every
def test_the_oracle_equals_a_numpy_loop(name, depth, binary):
    layer = layer_of(name, hidden=7, depth=depth)
    cell = make_cell(layer, binary=binary and bool(layer.kind.gates))
    step = reference_of(cell)
    x = torch.randn(T, 1, I, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted, state = [], [np.zeros(n) for n in layer.state_sizes]
    for x_t in x[:, 0].numpy():
        state = step(x_t, state, (lambda pre: (pre > 0).astype(float)) if binary else sigmoid)
        wanted.append(state)
    found = walk(cell, x, zero_state(layer, 1, x), BINARY if binary else FLOAT)
    for k, values in enumerate(found.states):
        assert_close(values[:, 0].detach(), torch.tensor(np.array([s[k] for s in wanted])), name=layer.kind.states[k])


@every
def test_gradients_in_float64(name, depth):
    """Of the soft gates, numerically: by x, the states, every weight and every learned level.

    Of a sum of all that comes out, each number with a weight of its own: one backward for all of them, held to a hundredth of the usual
    tolerance, in which no error of a single one hides.
    """
    layer = LayerSpec(name, 3, 3 if not CELLS[name].recurrent else 2, depth=depth)  # two runs a weight
    cell = make_cell(layer, binary=bool(layer.kind.gates))
    names = [n for n, p in cell.named_parameters() if p.requires_grad]
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    state = tuple(torch.randn_like(s) for s in zero_state(layer, 2, x))

    def run(x, *rest):
        own = dict(zip(names, rest[len(state) :], strict=True))
        with _reparametrize_module(cell, own):
            trace = run_cell(cell, x, rest[: len(state)], Discretize("sigmoid", temperature=0.7))
        generator = torch.Generator().manual_seed(0)
        return sum((out * torch.randn(out.shape, dtype=out.dtype, generator=generator)).sum() for out in (*trace.states, trace.pre))

    given = [t.detach().clone().requires_grad_() for t in (x, *state, *(cell.get_parameter(n) for n in names))]
    assert torch.autograd.gradcheck(run, given, rtol=1e-5, atol=1e-7)


@gated
def test_straight_through_reaches_every_weight(name, depth):
    layer = layer_of(name, hidden=7, depth=depth, copies=2)
    cell = make_cell(layer, binary=True)
    x = torch.randn(T, B, I, dtype=torch.float64)
    trace = run_cell(cell, x, zero_state(layer, B, x), Discretize("straight-through", backward="sigmoid"))
    names = [n for n, p in cell.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(sum(s.sin().sum() for s in trace.states), [cell.get_parameter(n) for n in names])
    assert [n for n, g in zip(names, found, strict=True) if not (bool(torch.isfinite(g).all()) and bool(g.abs().sum() > 0))] == []


@gated
def test_copies_of_one_threshold_are_one_unit(name, depth):
    """Soft gates of three copies alike compute what one computes: where a student starts from."""
    one, three = layer_of(name, hidden=7, depth=depth), layer_of(name, hidden=7, depth=depth, copies=3)
    cell, wide = make_cell(one, binary=False), make_cell(three, binary=False)
    state = cell.state_dict()
    if "gates.bias" in state:
        state["gates.bias"] = state["gates.bias"].view(-1, 1, 7 if one.kind.recurrent else I).repeat(1, three.copies, 1).flatten()
    wide.load_state_dict(state)
    x = torch.randn(T, B, I, dtype=torch.float64)
    h, many = (walk(c, x, zero_state(c.layer, B, x), FLOAT).states[0] for c in (cell, wide))
    if h.shape != many.shape:
        layers = one.depth if one.kind.deep == "stack" else 1
        many = many.unflatten(-1, (layers, 3, -1)).mean(-2).flatten(2)
    assert_close(many, h)


# ------------------------------------------------------------------------------------------------ both backends

MORE: list[dict[str, Any]] = [
    {},
    {"copies": 3},
    {"copies": 2, "directions": 2},
    {"tokens": True, "levels": "strict"},
    {"tokens": True, "copies": 2, "weights": "int8"},
    {"soft": ("i", "f", "t")},
    {"soft": ("o", "g", "r", "z"), "copies": 2},
    {"weights": "int8"},
]
options = pytest.mark.parametrize("more", MORE, ids=lambda more: "-".join(f"{k}={v}" for k, v in more.items()) or "plain")


def with_soft(name: str, depth: int, more: dict[str, Any]) -> dict[str, Any]:
    """`soft` names letters; `filled` wants the gates' names."""
    gates = CELLS[name].at(depth).gates
    return {**more, "soft": tuple(g.name for g in gates if g.letter in more.get("soft", ()))}


@built
@options
@every
def test_both_backends_agree(name, depth, more, tmp_path):
    network = network_of(name, depth=depth, scale=scale_of(depth), **with_soft(name, depth, more))
    theirs, ours = both(network, tmp_path)
    x = inputs_of(network)
    # Free running, sequences of their own lengths, and on from the state where they ended.
    for lengths in (None, torch.tensor([9, 0, 5])):
        (y, state), (mine, my_state) = theirs(x, lengths=lengths), ours(x, lengths=lengths)
        assert_close(mine, y)
        (y, state), (mine, my_state) = theirs(x, state, lengths=lengths), ours(x, my_state, lengths=lengths)
        assert_close(mine, y)
        for a, b in zip(flat(my_state), flat(state), strict=True):
            assert_close(a, b)
    for compute in native_backend.COMPUTE:
        ours = runtime.load(tmp_path, backend="native", compute=compute)
        found = parity(network, ours, Part(x.transpose(0, 1)))
        assert found["flips_outside"] == 0
        assert found["steps"] == T * B
        assert found["max_abs"] < 1e-5


@built
@pytest.mark.parametrize("name", [n for n in NEW if CELLS[n].recurrent and CELLS[n].at(1).unit_gates])
def test_an_encoders_states_start_its_decoder(name, tmp_path):
    network = translator(name, 2)
    theirs, ours = both(network, tmp_path)
    x, given = (torch.randint(V, (steps, B), generator=torch.Generator().manual_seed(steps)) for steps in (T, 6))
    assert torch.equal(ours(x)[0], theirs(x)[0])
    (y, _), (mine, my_state) = theirs(x, decoder_input=given), ours(x, decoder_input=given)
    assert_close(mine, y)
    assert [len(s) for layer in my_state for s in layer] == [len(CELLS[name].states)]
    assert parity(network, ours, Part(x.t()))["flips_outside"] == 0


@built
@every
def test_a_stream_agrees_exactly_with_a_call(name, depth, tmp_path):
    network = network_of(name, depth=depth, copies=2, scale=scale_of(depth))
    x = inputs_of(network, steps=70, batch=1)
    for backend in both(network, tmp_path):
        stream = backend.stream()
        assert torch.equal(torch.stack([stream.step(x_t[0]) for x_t in x]), backend(x)[0][:, 0])


@built
@pytest.mark.parametrize("more", [{}, {"tokens": True}, {"copies": 3}, {"soft": ("o", "z", "f", "g", "t")}], ids=str)
@every
def test_weights_touched_are_what_density_counts(name, depth, more, tmp_path):
    """From states without a zero, as densities count the first step as whole. An LSTM's columns are counted by o: learned levels keep c
    from 0."""
    levels = "learned" if CELLS[name].is_lstm else "strict"
    network = network_of(name, depth=depth, head=False, levels=levels, scale=scale_of(depth), **with_soft(name, depth, more))
    network.spec = RnnSpec(network.spec.sections)
    _, ours = both(network, tmp_path, compute="fp16")
    x = inputs_of(network, batch=1)
    nonzero = lambda n, k: torch.rand(1, n, generator=torch.Generator().manual_seed(k)) + 0.5
    state = [[tuple(nonzero(n, k) for k, n in enumerate(layer.state_sizes))] for layer in network.spec.main.layers]
    out = network(x, state)
    counter = DensityCounter(network)
    task = tasks.Task("match", "cosine", network.spec)
    counter.add(tasks.prepare(task, Batch(x, None, None, None, first=False), network), out)
    handle = native_backend.Handle(ours, 1)
    handle.write([[tuple(s.numpy() for s in both_) for both_ in layer] for layer in state])
    for x_t in x:
        handle.run(np.ascontiguousarray(x_t.unsqueeze(0).numpy()), None, None)
    total, dense = (sum(float(getattr(c, f)) for c in counter.cells.values()) for f in ("touched", "dense"))
    assert handle.counters().weights == total
    weights = {n: s for n, s in network.spec.tensors().items() if len(s) == 2 and "embedding" not in n}
    if more.get("tokens"):  # a table stands for the first layer's
        weights = {n: s for n, s in weights.items() if not ("layers.0" in n and n.endswith("weight_ih"))}
    assert dense == T * sum(a * b for a, b in weights.values())
    if network.spec.main.layers[0].kind.gates and "soft" not in more:
        assert total < dense


@pytest.mark.parametrize("mode", [FLOAT, BINARY], ids=["float", "binary"])
def test_all_three_differences_are_the_lstm(mode):
    cell, lstm = (make_cell(layer_of(name, hidden=7), binary=mode is BINARY) for name in ("pseudo_123", "lstm"))
    x = torch.randn(T, B, I, dtype=torch.float64)
    for ours, theirs in zip(*(walk(c, x, zero_state(c.layer, B, x), mode).states for c in (cell, lstm)), strict=True):
        assert_close(ours, theirs)


def test_each_set_of_differences_is_a_cell_of_its_own():
    x = torch.randn(T, B, I, dtype=torch.float64)
    outs = [
        walk(c, x, zero_state(c.layer, B, x), FLOAT).states[0] for c in (make_cell(layer_of(n, hidden=7), binary=False) for n in MEMORIES)
    ]
    assert all((a - b).abs().max() > 1e-3 for k, a in enumerate(outs) for b in outs[:k])


@pytest.mark.parametrize("name", list(CELLS))
def test_a_bit_is_the_sign_of_the_pre_activation(name):
    """A threshold of 0.25 (`soft > 0.5 - soft`), a trap of reference code, is seen by every gate of every cell."""
    layer = layer_of(name, hidden=7, depth=2 if CELLS[name].deep else 1)
    if not layer.kind.gates:
        return
    cell = make_cell(layer, binary=True)
    rows = 40  # a cell of global gates alone takes few decisions a row: of two rows none may fall between both thresholds
    x = torch.randn(rows, I, dtype=torch.float64)
    step, weights = STEPS[name], cell.weights()
    state = tuple(torch.randn_like(s) for s in zero_state(layer, rows, x))
    sign = lambda pre, *, first=0: cell.gate(BINARY)(pre, first=first)
    trap = lambda pre, *, first=0: (lambda soft: (soft > 0.5 - soft).double().expand(-1, -1, layer.width))(torch.sigmoid(pre))
    plain = lambda pre, *, first=0: (pre > 0).double().expand(-1, -1, layer.width)
    ours, wanted, wrong = (step(x, state, weights, gate)[0] for gate in (sign, plain, trap))
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(ours, wrong, strict=True))


@gated
def test_noise_is_drawn_anew_at_every_call_and_by_its_generator_alone(name, depth):
    """Noise kept on a module between calls is a trap of reference code."""
    layer = layer_of(name, hidden=7, depth=depth)
    cell = make_cell(layer, binary=True)
    x = torch.randn(T, B, I, dtype=torch.float64)

    def run(seed: int, times: int = 1) -> list[torch.Tensor]:
        mode = Discretize("gumbel-hard", generator=torch.Generator().manual_seed(seed))
        return [run_cell(cell, x, zero_state(layer, B, x), mode).states[0] for _ in range(times)]

    first, second = run(0, 2)
    assert not torch.equal(first, second)
    assert torch.equal(first, run(0)[0])
    assert not torch.equal(first, run(1)[0])


def test_merging_the_biases_of_a_stack_or_forgetting_its_sigmoid_shows():
    """A TensorFlow port leaves σ off the global gates, another adds all layers' h into unit gates: both are other networks."""
    layer = layer_of("gf_lstm", hidden=7, depth=3)
    cell = make_cell(layer, binary=False)
    x = torch.randn(T, B, I, dtype=torch.float64)
    state = tuple(torch.randn_like(s) for s in zero_state(layer, B, x))
    units = layer.kind.unit_gates
    right = lambda pre, *, first=0: cell.gate(FLOAT)(pre, first=first)
    bare = lambda pre, *, first=0: pre.expand(-1, -1, layer.width) if first >= units else right(pre, first=first)
    outs = [STEPS["gf_lstm"](x[0], state, cell.weights(), gate)[0][0] for gate in (right, bare)]
    assert (outs[0] - outs[1]).abs().max() > 1e-2


def test_every_cell_has_a_window_or_says_so():
    assert set(CELLS) - set(WINDOWS) == {"lstm_peephole_full"}
    assert set(NEW) == set(REFERENCES)


def test_what_does_not_fit_a_cell_is_refused():
    from rnn2bin.errors import UnsupportedError

    for bad, why in (
        (LayerSpec("rnn", I, H, copies=2), "copies"),
        (LayerSpec("rnn", I, H, proj_size=3), "projects"),
        (LayerSpec("rnn_minimal", I, H, clip=1.0), "clips"),
        (LayerSpec("rnn_minimal", I, H, depth=2), "depth"),
        (LayerSpec("lstm", I, H, depth=10**9), "depth"),
        (LayerSpec("highway", I, H), "carries its input"),
    ):
        with pytest.raises(UnsupportedError, match=why):
            check(RnnSpec({"main": SectionSpec((bad,))}))


@built
def test_a_relu_rnn_runs_natively(tmp_path):
    """What it writes is zero where it is not positive, and so are columns."""
    network = network_of("rnn", scale=0.25)
    layers = tuple(replace(layer, activation="relu") for layer in network.spec.main.layers)
    relu = filled(RnnSpec({"main": replace(network.spec.main, layers=layers)}), scale=0.25)
    theirs, ours = both(relu, tmp_path)
    x = inputs_of(relu)
    assert_close(ours(x)[0], theirs(x)[0])
    assert (ours(x)[0] - both(network, tmp_path / "tanh")[1](x)[0]).abs().max() > 1e-2
