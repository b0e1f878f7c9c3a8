"""Students whose units take several decisions for each gate: the same function before training, thresholds apart after calibration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rnn2bin
from rnn2bin import student
from rnn2bin.cells.network import Network, teacher_network
from rnn2bin.cells.weights import Cell
from rnn2bin.distill import calibrate
from rnn2bin.distill.window import run_cell
from rnn2bin.errors import RecipeError
from rnn2bin.gates.estimators import BINARY, FLOAT, Discretize
from rnn2bin.recipe import Gates, Recipe
from rnn2bin.spec import DecodeSpec, EmbeddingSpec, GraphSpec, LayerSpec, LinearSpec, Node, RnnSpec, SectionSpec

SOFT = Discretize("sigmoid")  # temperature and slope 1, levels 0 and 1: the teacher's own gates


def section(*layers: LayerSpec, tokens: int | None = None, readout="all", outputs: int = 3) -> SectionSpec:
    embedding = EmbeddingSpec(tokens, layers[0].input_size) if tokens else None
    return SectionSpec(layers, embedding, (LinearSpec(layers[-1].output_size, outputs),), readout=readout)


FINAL = "final"
SPECS = {
    "lstm": RnnSpec({"main": section(LayerSpec("lstm", 4, 5), LayerSpec("lstm", 5, 6))}),
    "gru": RnnSpec({"main": section(LayerSpec("gru", 4, 5))}),
    "gru_reset_before": RnnSpec({"main": section(LayerSpec("gru_reset_before", 4, 5), LayerSpec("gru", 5, 3))}),
    "peephole": RnnSpec({"main": section(LayerSpec("lstm_peephole", 4, 5), LayerSpec("lstm_peephole", 5, 6, cell_clip=0.5))}),
    "coupled": RnnSpec({"main": section(LayerSpec("lstm_coupled", 4, 5), LayerSpec("lstm_coupled_peephole", 5, 6, proj_size=3))}),
    "projection": RnnSpec({"main": section(LayerSpec("lstm", 4, 6, proj_size=3), LayerSpec("lstm", 3, 5, proj_size=2))}),
    "bidirectional": RnnSpec({"main": section(LayerSpec("gru", 4, 3, directions=2), LayerSpec("lstm", 6, 3, directions=2), readout=FINAL)}),
    "tokens": RnnSpec({"main": section(LayerSpec("lstm", 4, 5), tokens=7, readout="mean")}),
    "encoder-decoder": RnnSpec(
        {"encoder": SectionSpec((LayerSpec("gru", 4, 5),), EmbeddingSpec(7, 4)), "decoder": section(LayerSpec("gru", 4, 5), tokens=7)},
        decode=DecodeSpec(start=1, end=2, max_length=4),
    ),
}


def teacher_of(name: str) -> Network:
    torch.manual_seed(0)
    spec = SPECS[name]
    return teacher_network(spec, {key: torch.randn_like(t) * 0.5 for key, t in Network(spec).state_dict().items()})


def inputs(name: str) -> dict:
    tokens = torch.randint(7, (6, 3), generator=torch.Generator().manual_seed(1))
    if name == "encoder-decoder":
        return {"x": tokens, "decoder_input": tokens[:4]}
    return {"x": tokens if name == "tokens" else torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("name", SPECS)
def test_copies_compute_what_the_teacher_does(name, copies):
    teacher = teacher_of(name)
    wide = student.student(teacher, Gates(copies=copies))
    given_inputs = inputs(name) | {"lengths": torch.tensor([6, 2, 4])}
    theirs, ours = teacher(**given_inputs, mode=FLOAT), wide(**given_inputs, mode=SOFT)
    torch.testing.assert_close(ours.y, theirs.y, rtol=1e-4, atol=1e-5)
    for a, b in zip(ours.hidden, theirs.hidden, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert wide.spec == student.with_copies(teacher.spec, copies)
    for name, t in wide.state_dict().items():
        if "bias" not in name and "levels" not in name:
            assert t.shape == teacher.state_dict()[name].shape  # one row of weights for all copies


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("name", ["gru", "gru_reset_before", "bidirectional", "encoder-decoder"])
def test_a_new_output_gate_changes_no_bit(name, copies):
    """As bits it is open wherever the teacher's data may lead; only GRUs that reset after the product get one."""
    teacher, gates = teacher_of(name), Gates(copies=copies)
    plain, gated = student.student(teacher, gates), student.student(teacher, gates, output=True)
    kinds = [[layer.cell for _, layer in network.spec.cell_names()] for network in (plain, gated)]
    assert [{"gru": "gru_output"}.get(cell, cell) for cell in kinds[0]] == kinds[1] != kinds[0]
    given_inputs = inputs(name) | {"lengths": torch.tensor([6, 2, 4])}
    theirs, ours = plain(**given_inputs, mode=BINARY), gated(**given_inputs, mode=BINARY)
    torch.testing.assert_close(ours.y, theirs.y)
    assert gated.spec.floating == plain.spec.floating == teacher.spec


def test_a_state_that_a_graph_makes_gets_no_output_gate():
    nodes = (
        Node("Recurrent", ("input",), ("a",), {"layer": 0}),
        Node("Recurrent", ("a", "h0"), ("b",), {"layer": 1}),
        Node("Recurrent", ("b",), ("c", "last"), {"layer": 2}),
    )
    graph = GraphSpec(nodes, "c", (5,), 5, True, tensors={"h0": (1, 3, 5)})
    spec = RnnSpec({"main": SectionSpec((LayerSpec("gru", 5, 5),) * 3, graph=graph)})
    assert [layer.cell for layer in student.with_outputs(spec).main.layers] == ["gru_output", "gru", "gru"]


@pytest.mark.parametrize(("given", "wanted"), [({}, False), ({"density": 0.3}, True), ({"price": 1.0}, True)])
def test_output_gates_come_with_a_price_on_weights(given, wanted):
    recipe = Recipe(budget=given)
    assert recipe.output_gate is wanted
    assert Recipe(budget=given, gates={"output": True}).output_gate
    assert not Recipe(budget=given, gates={"output": False}).output_gate


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, 16),
        ({"budget": {"density": 0.3}}, 4),
        ({"budget": {"price": 1.0}}, 4),
        ({"gates": {"levels": "strict"}}, 1),
        ({"gates": {"copies": 3}, "budget": {"density": 0.3}}, 3),
    ],
)
def test_how_many_decisions_a_unit_takes_by_itself(given, wanted):
    assert {layer.copies for _, layer in student.of_recipe(teacher_of("lstm"), Recipe(**given)).spec.cell_names()} == {wanted}


@pytest.mark.parametrize("name", SPECS)
def test_kernels_and_oracle_agree_on_copies(name):
    """Bits, calibrated apart; the state walks on from a first half to a second."""
    network = student.student(teacher_of(name), Gates(copies=2))
    with torch.no_grad():
        for cell in network.cells().values():
            calibrate.fit(
                cell, torch.rand(len(cell.binary), cell.layer.hidden_size, calibrate.BINS, generator=torch.Generator().manual_seed(0))
            )
    given_inputs = inputs(name)
    oracle, kernels = network(**given_inputs, mode=BINARY), network(**given_inputs, mode=BINARY, walk=run_cell)
    torch.testing.assert_close(kernels.y, oracle.y, rtol=1e-4, atol=1e-5)
    if name in ("lstm", "gru", "gru_reset_before", "projection", "peephole", "coupled"):
        x = given_inputs["x"]
        first = network(x[:2], mode=BINARY)
        second = network(x[2:], first.state, mode=BINARY)
        torch.testing.assert_close(torch.cat([first.y, second.y]), oracle.y)


@pytest.mark.parametrize("levels", ["learned", "strict"])
@pytest.mark.parametrize("kind", ["lstm", "gru", "lstm_coupled", "lstm_peephole"])
def test_calibration_sets_the_copies_thresholds_apart(kind, levels):
    """Copies that open together would stay equal for ever: their gradients are the same."""
    layer = LayerSpec(kind, 2, 4, copies=2)
    cell = Cell(layer, (True,) * len(layer.kind.gates), levels=levels)
    mass = torch.rand(len(cell.binary), 4, calibrate.BINS, generator=torch.Generator().manual_seed(0)) + 0.1
    with torch.no_grad():
        calibrate.fit(cell, mass)
    shift = -cell.part("gates").bias.detach().view(len(cell.binary), 2, 4)
    assert (shift[:, 1] > shift[:, 0] + 0.1).all()
    lo, hi = cell.level_values()
    assert (lo >= 0).all()
    for k, gate in enumerate(layer.kind.gates):
        assert levels == "learned" or (torch.equal(lo[k], torch.zeros(8)) and torch.equal(hi[k], torch.ones(8)))
        assert "lo" in gate.learns or not lo[k].any()
        assert "hi" in gate.learns or (hi[k] == 1).all()


@given(st.integers(2, 5), st.booleans(), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_quantizer_laws(levels, free_lowest, free_highest, seed):
    """Values ascend within [0, 1] with thresholds between them; what is fixed stays; no worse than evenly spaced values."""
    mass = torch.rand(5, calibrate.BINS, generator=torch.Generator().manual_seed(seed)).pow(4)
    values, thresholds = calibrate.quantizer(mass, levels, free_lowest=free_lowest, free_highest=free_highest)
    assert (values.diff(dim=0) >= -1e-6).all()
    assert (values >= 0).all()
    assert (values <= 1).all()
    assert free_lowest or not values[0].any()
    assert free_highest or (values[-1] == 1).all()
    assert ((thresholds >= values[:-1] - 0.021) & (thresholds <= values[1:] + 0.021)).all()  # kept off the edges by 0.02
    even = torch.linspace(0, 1, levels)[:, None].repeat(1, 5)
    assert (_error(mass, values) <= _error(mass, even) * (1 + 1e-4) + 1e-6).all()


def _error(mass: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Squared error of each unit's mass (H,BINS) rounded to the nearest of its values (levels,H)."""
    centres = (torch.arange(calibrate.BINS) + 0.5) / calibrate.BINS
    return (mass * (centres - values[..., None]).square().amin(0)).sum(-1)


def test_modules_take_no_copies():
    with pytest.raises(RecipeError, match=r"gates\.copies"):
        rnn2bin.binarize(torch.nn.LSTM(2, 3), recipe=Recipe(gates=Gates(copies=2)))
