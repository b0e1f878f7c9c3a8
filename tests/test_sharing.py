"""Units that share rows of gates: clusters of lines, students made of them, and that they train, ship and run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import rnn2bin
from rnn2bin import sharing, student
from rnn2bin.cells.network import Network, teacher_network, walk
from rnn2bin.distill.window import run_cell
from rnn2bin.errors import RecipeError, UnsupportedError
from rnn2bin.gates.estimators import Discretize
from rnn2bin.recipe import Budget, Gates, Loss, Recipe
from rnn2bin.spec import EmbeddingSpec, GraphSpec, LayerSpec, LinearSpec, Node, RnnSpec, SectionSpec, check

CELLS = ("lstm", "gru", "gru_reset_before", "lstm_peephole", "lstm_coupled")


def network_of(*layers: LayerSpec, tokens: int | None = None) -> RnnSpec:
    embedding = EmbeddingSpec(tokens, layers[0].input_size) if tokens else None
    return RnnSpec({"main": SectionSpec(layers, embedding, (LinearSpec(layers[-1].output_size, 3),))})


def teacher_of(spec: RnnSpec) -> Network:
    torch.manual_seed(0)
    return teacher_network(spec, {name: torch.randn_like(t) * 0.5 for name, t in Network(spec).state_dict().items()})


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_lines_keep_every_rows_length(units, width, count, seed):
    count = min(count, units)
    rows = torch.randn(units, width, generator=torch.Generator().manual_seed(seed))
    centres, row, scale = sharing.lines(rows, count)
    assert centres.shape == (count, width)
    assert ((row >= 0) & (row < count) & (row == row.round())).all()
    assert torch.allclose((centres[row.long()] * scale[:, None]).norm(dim=1), rows.norm(dim=1), rtol=1e-4, atol=1e-6)


def test_lines_find_what_is_there():
    """Rows that are multiples of a few directions, negative ones too, come back as they were."""
    directions = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    times = torch.linspace(-2, 2, 24)
    rows = directions.repeat(8, 1) * times[:, None]
    centres, row, scale = sharing.lines(rows, 3)
    assert torch.allclose(centres[row.long()] * scale[:, None], rows, atol=1e-5)


def test_rows_of_zero_are_dealt_out():
    centres, row, scale = sharing.lines(torch.zeros(6, 4), 3)
    assert row.tolist() == [0, 0, 1, 1, 2, 2]
    assert scale.tolist() == [1] * 6
    assert not centres.any()


def test_rows_alone_on_their_lines_are_exact():
    rows = torch.randn(12, 7, generator=torch.Generator().manual_seed(2))
    centres, row, scale = sharing.lines(rows, 8)
    alone = torch.bincount(row.long(), minlength=8)[row.long()] == 1
    assert alone.any()
    assert not alone.all()
    assert torch.allclose((centres[row.long()] * scale[:, None])[alone], rows[alone], atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("tokens", [None, 7])
def test_students_read_fewer_rows(cell, tokens):
    teacher = teacher_of(network_of(LayerSpec(cell, 4, 10), LayerSpec(cell, 10, 10), tokens=tokens))
    made = student.student(teacher, Gates(), share=4)
    gates = len(made.spec.main.layers[0].kind.gates)
    first, second = (made.cells()[f"main.layers.{k}.fwd"] for k in (0, 1))
    assert first.tensor("gates.weight_ih").shape == (gates * (10 if tokens else 3), 4)
    assert second.tensor("gates.weight_ih").shape == second.tensor("gates.weight_hh").shape == (gates * 3, 10)
    assert second.weights().gates_hh.shape == (gates * 10, 10)
    x = torch.randint(7, (5, 2)) if tokens else torch.randn(5, 2, 4)
    for mode in (Discretize("sigmoid"), made.natural_mode):
        torch.testing.assert_close(made(x, mode=mode, walk=run_cell).y, made(x, mode=mode, walk=walk).y, atol=1e-5, rtol=1e-5)


def test_a_shared_row_gets_the_gradient_of_all_its_units():
    made = student.student(teacher_of(network_of(LayerSpec("lstm", 4, 10))), Gates(estimator="sigmoid"), share=5).double()
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    made.requires_grad_(True)
    loss = lambda: made(x, mode=Discretize("sigmoid")).y.square().sum()
    value = lambda: float(loss().detach())
    loss().backward()
    for name in ("gates.weight_hh", "gates.weight_ih", "gates.scale"):
        weight = made.cells()["main.layers.0.fwd"].tensor(name)
        flat, at, step = weight.data.view(-1), 3, 1e-6
        kept = float(flat[at])
        flat[at] = kept + step
        above = value()
        flat[at] = kept - step
        below = value()
        flat[at] = kept
        assert float(weight.grad.view(-1)[at]) == pytest.approx((above - below) / (2 * step), rel=1e-5)


def test_which_row_a_unit_reads_is_not_trained():
    made = student.student(teacher_of(network_of(LayerSpec("lstm", 4, 10))), Gates(), share=5)
    assert not any(name.endswith("gates.row") for name, _ in made.named_parameters())
    assert any(name.endswith("gates.row") for name in made.state_dict())


def test_by_itself_in_encoder_decoders_with_a_budget_and_not_in_small_layers():
    assert Recipe().share() == 1
    assert Recipe(budget=Budget(density=0.2)).share("transduce") == "auto"
    assert Recipe(budget=Budget(density=0.2)).share("next-token") == 1
    assert Recipe(gates=Gates(share=2)).share("match") == 2
    assert Recipe(budget=Budget(density=0.2), loss=Loss(hidden=5.0)).share("transduce") == 1  # each unit is
    units = lambda hidden, share="auto": sharing.units_of(LayerSpec("lstm", 4, hidden), share)
    assert [units(hidden) for hidden in (8, 16, 31, 32, 64, 128, 512)] == [1, 1, 1, 2, 4, 8, 8]
    assert units(4, 8) == 4  # all units of a layer at most
    assert units(2**16) == 32  # so many rows a gate that their numbers are exact in fp16
    assert sharing.units_of(LayerSpec("rnn_minimal", 4, 64), "auto") == 1


def test_cells_that_cannot_share():
    teacher = teacher_of(network_of(LayerSpec("rnn_minimal", 4, 6)))
    with pytest.raises(RecipeError, match=r"gates\.share"):
        student.student(teacher, Gates(), share=2)
    assert student.student(teacher, Gates(), share="auto").spec.main.layers[0].shared == 1


def test_a_module_keeps_its_rows():
    with pytest.raises(RecipeError, match=r"gates\.share"):
        rnn2bin.binarize(nn.LSTM(4, 6), recipe=Recipe(gates=Gates(share=2)))


@pytest.mark.parametrize(
    "layer", [{"cell": "rnn", "shared": 2}, {"cell": "lstm", "shared": 4, "shared_inputs": 2}, {"cell": "lstm", "shared_inputs": 2}]
)
def test_specs_that_do_not_share(layer):
    with pytest.raises(UnsupportedError, match="share"):
        check(network_of(LayerSpec(input_size=4, hidden_size=6, **layer)))


def test_tokens_keep_a_row_for_every_unit():
    spec = RnnSpec({"main": SectionSpec((LayerSpec("lstm", 4, 6, shared=2, shared_inputs=2),), EmbeddingSpec(7, 4))})
    with pytest.raises(UnsupportedError, match="tokens"):
        check(spec)
    nodes = (Node("Recurrent", ("tokens",), ("h", "", ""), {"layer": 0}),)
    graph = GraphSpec(nodes, "h", (), 6, per_step=True, batch_first=False, token_layers=(0,))
    teacher = teacher_of(RnnSpec({"main": SectionSpec((LayerSpec("lstm", 4, 6),), EmbeddingSpec(7, 4), graph=graph)}))
    assert student.student(teacher, Gates(), share=2).spec.main.layers[0].shared_inputs == 1


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_converts_with_a_budget_and_runs_everywhere(cell, tmp_path):
    torch.manual_seed(0)
    module = nn.ModuleDict({"rnn": getattr(nn, cell)(6, 32, 2), "head": nn.Linear(32, 4)})
    torch.save(module.state_dict(), tmp_path / "model.pt")
    x = np.random.default_rng(0).standard_normal((48, 12, 6)).astype(np.float32)
    np.savez(tmp_path / "data.npz", inputs=x)
    recipe = Recipe.model_validate(
        {
            "task": "match",
            "gates": {"share": 4},
            "budget": {"density": 0.6},
            "pack": {"weights": "int8"},
            "train": {"steps": 30, "max_steps": 30, "batch_size": 16, "evaluate_every": 10},
        }
    )
    result = rnn2bin.convert(tmp_path / "model.pt", recipe=recipe, data=tmp_path / "data.npz", out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["spec"]["sections"]["main"]["layers"][0]["shared"] == 4
    assert result.report["parity"]["flips_outside"] == 0
    torch_model, native_model = (rnn2bin.load(tmp_path / "out", backend=backend) for backend in ("torch", "native"))
    theirs, ours = torch_model(torch.from_numpy(x[:3].swapaxes(0, 1)))[0], native_model(torch.from_numpy(x[:3].swapaxes(0, 1)))[0]
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=1e-4)
    plain = rnn2bin.convert(  # by itself, with a task that the data decide: no targets, so units are held to the teacher's
        tmp_path / "model.pt",
        recipe=recipe.model_copy(update={"gates": Gates(), "task": "auto"}),
        data=tmp_path / "data.npz",
        out=tmp_path / "plain",
    )
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["spec"]["sections"]["main"]["layers"][0].get("shared", 1) == 1
    assert result.report["size"]["packed_bytes"] < plain.report["size"]["packed_bytes"]
