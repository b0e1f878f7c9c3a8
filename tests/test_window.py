"""The training kernels against the oracle's autograd: values and gradients, every cell, every estimator, in float64."""

from typing import get_args

import pytest
import torch
from tolerances import assert_close

from rnn2bin.cells import network
from rnn2bin.cells.weights import Cell
from rnn2bin.distill import window
from rnn2bin.gates import estimators
from rnn2bin.gates.estimators import Discretize
from rnn2bin.kinds import CELLS
from rnn2bin.spec import EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec

T, B, I, H = 5, 3, 4, 6  # noqa: E741
LAYERS = {
    "lstm": LayerSpec("lstm", I, H),
    "lstm-projection": LayerSpec("lstm", I, H, proj_size=4),
    "gru": LayerSpec("gru", I, H),
    "gru_reset_before": LayerSpec("gru_reset_before", I, H),
    "lstm-copies": LayerSpec("lstm", I, H, copies=3),
    "lstm-projection-copies": LayerSpec("lstm", I, H, proj_size=4, copies=2),
    "gru-copies": LayerSpec("gru", I, H, copies=3),
    "gru_reset_before-copies": LayerSpec("gru_reset_before", I, H, copies=2),
    "lstm-clips": LayerSpec("lstm", I, H, proj_size=4, copies=2, clip=1.1, cell_clip=0.4, proj_clip=0.3),
    "gru_output": LayerSpec("gru_output", I, H),
    "gru_output-clip-copies": LayerSpec("gru_output", I, H, copies=3, clip=0.8),
    "gru-clip": LayerSpec("gru", I, H, copies=2, clip=0.8),
    "gru_reset_before-clip": LayerSpec("gru_reset_before", I, H, copies=2, clip=0.8),
    **{
        f"{cell}{name}": LayerSpec(cell, I, H, **options)
        for cell in ("lstm_peephole", "lstm_coupled", "lstm_coupled_peephole")
        for name, options in {
            "": {},
            "-copies": {"copies": 3},
            "-clips": {"copies": 2, "proj_size": 4, "clip": 1.1, "cell_clip": 0.4, "proj_clip": 0.3},
        }.items()
    },
    **{
        f"{cell}{name}": LayerSpec(cell, I, H, depth=depth, **options)
        for cell in network.EQUATIONS
        if cell != "highway"
        for depth in ((1, 3) if CELLS[cell].deep else (1,))
        for name, options in {
            f"-{depth}": {},
            f"-{depth}-copies": {"copies": 3},
            f"-{depth}-softsign": {"copies": 2, "activation": "softsign"},
        }.items()
        if not options.get("copies") or CELLS[cell].gates
    },
    "highway": LayerSpec("highway", H, H),
    "highway-copies": LayerSpec("highway", H, H, copies=3, hard_sigmoid=0.4),
}


def asked(layer: LayerSpec) -> list[int]:
    """The gates of a step in the order in which its equations ask for them."""
    gates, units, depth = len(layer.kind.gates), layer.kind.unit_gates, layer.depth
    if layer.cell in ("pseudo_2", "pseudo_23"):
        return [2, 0, 1]
    if layer.kind.deep != "stack":
        return list(range(gates))
    own = units // depth
    return [g for k in range(depth) for g in (*range(units + k * depth, units + (k + 1) * depth), *range(k * own, (k + 1) * own))]


def make_cell(layer: LayerSpec, binary: tuple[bool, ...], *, levels: str = "learned", seed: int = 0) -> Cell:
    torch.manual_seed(seed)
    cell = Cell(layer, binary, levels=levels).double()
    with torch.no_grad():
        for name, p in cell.named_parameters():
            p.copy_(torch.rand_like(p) * 0.5 + 0.25 if "levels" in name else torch.randn_like(p) * 0.7)
    return cell


def outputs_and_gradients(walk, cell, x, state, mode, noise, monkeypatch):
    units = cell.layer.kind.unit_gates
    whole = lambda shape, *_: noise[:, :, :units] if shape[2] == units and shape[3] > 1 else noise[:, :, units:, :1]
    monkeypatch.setattr(window, "logistic_noise", whole)
    gates = iter([step[:, k] for step in noise for k in asked(cell.layer)])  # the oracle draws each when it asks for it
    monkeypatch.setattr(
        "rnn2bin.cells.weights.logistic_noise", lambda shape, *_: torch.stack([next(gates)[:, : shape[2]] for _ in range(shape[1])], 1)
    )
    inputs = [t.clone().requires_grad_() for t in (x, *state)]
    trace = walk(cell, inputs[0], tuple(inputs[1:]), mode)
    outs = [*trace.states, trace.pre]
    torch.manual_seed(9)
    loss = sum((o * torch.randn_like(o)).sum() for o in outs)
    wanted = [*inputs, *(p for p in cell.parameters() if p.requires_grad)]
    return outs, torch.autograd.grad(loss, wanted, allow_unused=True)


@pytest.mark.parametrize("estimator", get_args(estimators.Name))
@pytest.mark.parametrize("name", LAYERS)
def test_window_equals_oracle(name, estimator, monkeypatch):
    layer = LAYERS[name]
    gates = len(layer.kind.gates)
    cell = make_cell(layer, (True,) * (gates - 1) + (False,) * bool(gates) if estimator == "gumbel" else (True,) * gates)
    x = torch.randn(T, B, layer.input_size, dtype=torch.float64)
    state = tuple(torch.randn_like(s) for s in network.zero_state(layer, B, x))
    noise = torch.randn(T, B, gates, layer.width, dtype=torch.float64)
    mode = Discretize(estimator, temperature=0.7, slope=1.3, backward="sigmoid")
    monkeypatch.setattr(window, "oracle_walk", None)  # each has a window
    ours, got = outputs_and_gradients(window.run_cell, cell, x, state, mode, noise, monkeypatch)
    oracle, wanted = outputs_and_gradients(network.walk, cell, x, state, mode, noise, monkeypatch)
    for a, b in zip(ours, oracle, strict=True):
        torch.testing.assert_close(a, b)
    names = ["x", *layer.kind.states, *(n for n, p in cell.named_parameters() if p.requires_grad)]
    for which, a, b in zip(names, got, wanted, strict=True):
        if b is None:
            assert a is None or not a.any(), which
        else:
            assert a is not None, which
            torch.testing.assert_close(a, b, msg=lambda m, which=which: f"{which}: {m}")
    assert all(
        g is not None and g.abs().sum() > 0 for n, g in zip(names, got, strict=True) if n.startswith(("gates", "candidate", "global"))
    )


@pytest.mark.parametrize("backward", ["sigmoid", "hard-sigmoid", "identity"])
@pytest.mark.parametrize("estimator", sorted(set(get_args(estimators.Name)) - {"float", "binary", "sigmoid", *estimators.SCORE}))
def test_derivative_moves_with_slope_and_temperature(estimator, backward):
    """An annealed value that never reached the training graph is a known trap: the derivative must see it."""
    pre, noise = torch.tensor([0.05, -0.1, 0.3]), torch.tensor([0.1, 0.0, -0.2])
    seen = []
    for slope, temperature in ((1.0, 1.0), (2.0, 0.5)):
        mode = Discretize(estimator, temperature=temperature, slope=slope, backward=backward)
        seen.append(estimators.derivative(mode, pre, estimators.sample(mode, pre, noise), noise))
    fixed = backward == "identity" and estimator in ("straight-through", "stochastic")
    assert torch.equal(*seen) if fixed else not torch.allclose(*seen)


DECLARED = [
    pytest.param(name, depth, id=f"{name}-{depth}") for name in network.EQUATIONS for depth in ((1, 3) if CELLS[name].deep else (1,))
]


@pytest.mark.parametrize(("name", "depth"), DECLARED)
def test_both_directions_each_sequence_within_its_own_length(name, depth):
    """Two layers over tokens: outputs, states behind the last real step, and every gradient, as the oracle has them."""
    layer = LayerSpec(name, H if name == "highway" else I, H, directions=2, depth=depth)
    layers = (layer, LayerSpec(name, layer.output_size, layer.output_size if name == "highway" else H, directions=2, depth=depth))
    spec = RnnSpec({"main": SectionSpec(layers, EmbeddingSpec(7, layer.input_size), (LinearSpec(layers[1].output_size, 3),))})
    torch.manual_seed(0)
    net = network.Network(spec, {n: (True,) * len(one.kind.gates) for n, one in spec.cell_names()}).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * 0.4)
    x, lengths, found = torch.randint(7, (T, B)), torch.tensor([5, 1, 3]), []
    for walk in (window.run_cell, network.walk):
        out = net(x, lengths=lengths, mode=Discretize("sigmoid", temperature=0.7), walk=walk)
        ends = [s for one in out.state for direction in one for s in direction]
        loss = sum((o * torch.arange(o.numel(), dtype=o.dtype).cos().view_as(o)).sum() for o in (out.y, *ends))
        wanted = [p for p in net.parameters() if p.requires_grad]
        found.append([out.y, *ends, *torch.autograd.grad(loss, wanted, allow_unused=True)])
    for a, b in zip(*found, strict=True):
        if a is not None and b is not None:
            assert_close(a, b)
        else:
            assert all(g is None or not g.any() for g in (a, b))


@pytest.mark.parametrize(("name", "depth"), DECLARED)
def test_gradients_cross_from_window_to_window(name, depth):
    """Two windows, the second of one step, that hand their state on are one."""
    layer = LayerSpec(name, H if name == "highway" else I, H, depth=depth, copies=2 if CELLS[name].gates else 1)
    cell = make_cell(layer, (True,) * len(layer.kind.gates))
    x, mode = torch.randn(T, B, layer.input_size, dtype=torch.float64), Discretize("straight-through", backward="sigmoid")
    state = tuple(torch.randn_like(s).requires_grad_() for s in network.zero_state(layer, B, x))
    found = []
    for cuts in ([x], [x[:-1], x[-1:]]):
        last = state
        for part in cuts:
            trace = window.run_cell(cell, part, last, mode)
            last = tuple(s[-1] for s in trace.states)
        wanted = [*state, *(p for p in cell.parameters() if p.requires_grad)]
        found.append([*last, *torch.autograd.grad(sum(s.sin().sum() for s in last), wanted, allow_unused=True)])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b)


@pytest.mark.parametrize(("name", "depth"), DECLARED)
def test_an_input_that_needs_no_gradient_and_outputs_nobody_uses(name, depth):
    """Each output alone, as a loss on h, or on gates, has it."""
    layer = LayerSpec(name, H if name == "highway" else I, H, depth=depth)
    cell = make_cell(layer, (True,) * len(layer.kind.gates))
    x, mode = torch.randn(T, B, layer.input_size, dtype=torch.float64), Discretize("sigmoid")
    state = tuple(torch.randn_like(s) for s in network.zero_state(layer, B, x))
    for k in range(len(layer.kind.states) + bool(layer.kind.gates)):
        found = []
        for walk in (window.run_cell, network.walk):
            trace = walk(cell, x, state, mode)
            loss = [*trace.states, trace.pre][k].sin().sum()
            found.append(torch.autograd.grad(loss, [p for p in cell.parameters() if p.requires_grad], allow_unused=True))
        for a, b in zip(*found, strict=True):
            zero = lambda g: g is None or not g.any()
            if not (zero(a) and zero(b)):
                assert_close(a, b)


@pytest.mark.parametrize(("name", "depth"), DECLARED)
def test_what_was_drawn_is_kept_for_credit(name, depth):
    """Once for a gate that decides for all units; float32 draws as the native kernels do."""
    layer = LayerSpec(name, H if name == "highway" else I, H, depth=depth)
    gates, units = len(layer.kind.gates), layer.kind.unit_gates
    if not gates:
        return
    cell = make_cell(layer, (True,) * gates).float()
    x = torch.randn(T, B, layer.input_size)
    mode = Discretize("reinforce", generator=torch.Generator().manual_seed(0))
    trace = window.run_cell(cell, x, network.zero_state(layer, B, x), mode)
    assert trace.noise is not None
    assert trace.noise.shape == trace.pre.shape
    drawn = trace.noise != 0
    assert drawn[:, :, :units].all()
    assert drawn[:, :, units:, 0].all()
    assert not drawn[:, :, units:, 1:].any()
