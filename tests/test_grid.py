"""Eight-bit grids: what rounding may do, that it is what is packed, and that training goes through it."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rnn2bin import pack, recipe_yaml, student
from rnn2bin.cells.grid import LARGEST, rounded, scales
from rnn2bin.cells.network import Network
from rnn2bin.errors import RecipeError, UnsupportedError
from rnn2bin.packed import read_config
from rnn2bin.recipe import Gates, Recipe
from rnn2bin.spec import EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec


@st.composite
def matrices(draw) -> torch.Tensor:
    """Rows of very different sizes, with outliers and rows of zeros."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = torch.randn(draw(st.integers(1, 5)), draw(st.integers(1, 40)), generator=generator)
    rows = rows.sign() * rows.abs().pow(draw(st.sampled_from([1, 3, 0])))
    size = 2.0 ** torch.randint(-12, 3, (len(rows), 1), generator=generator)
    return rows * size * (torch.rand(len(rows), 1, generator=generator) > 0.2)


@given(matrices())
@settings(max_examples=300, deadline=None)
def test_rows_are_a_power_of_two_times_bytes(rows):
    (found,) = rounded(rows)
    scale = scales(rows)
    units = found / scale
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    assert torch.equal(units, units.round())
    assert float(units.abs().max()) <= LARGEST
    assert torch.equal(found, found.half().float())
    assert torch.equal(rounded(found)[0], found)  # on its grid already


@given(matrices())
@settings(max_examples=300, deadline=None)
def test_rounding_is_no_worse_than_the_whole_rows_grid(rows):
    """The nearest on the grid that holds the largest weight is at most half a unit away, a unit at most 1/63.5 of it."""
    error = (rounded(rows)[0] - rows).norm(dim=1)
    most = rows.abs().amax(1)
    bound = most / 63.5 / 2 * rows.shape[1] ** 0.5 + 2.0**-25 * rows.shape[1]
    assert bool((error <= bound * (1 + 1e-5)).all())


def test_the_gradient_goes_straight_through():
    weight = torch.randn(3, 7, requires_grad=True)
    down = torch.randn(3, 7)
    (rounded(weight)[0] * down).sum().backward()
    assert torch.equal(weight.grad, down)


def teacher() -> Network:
    torch.manual_seed(0)
    layers = (LayerSpec("lstm", 6, 8, 1, 5), LayerSpec("gru", 5, 8))
    network = Network(RnnSpec({"main": SectionSpec(layers, EmbeddingSpec(9, 6), (LinearSpec(8, 9),))}))
    with torch.no_grad():
        for p in network.parameters():
            p.normal_()
    return network


def test_what_is_packed_is_what_was_trained_with(tmp_path):
    network = student.student(teacher(), Gates(copies=1), weights="int8").eval()
    pack.write_model(network, tmp_path, provenance={}, task={"name": "match"})
    config = read_config(tmp_path)
    assert config["weights"] == "int8"
    read = pack.read_network(tmp_path, config).eval()
    assert read.weights == "int8"
    x = torch.randint(9, (7, 2))
    kept = network.state_dict()
    for name, weight in read.state_dict().items():
        inputs_of_tokens = name in ("main.layers.0.fwd.gates.weight_ih", "main.layers.0.fwd.candidate.weight_ih")
        matrix = ".layers." in name and weight.ndim == 2 and ".levels." not in name
        changed = not torch.equal(weight, kept[name].half().float())
        assert changed == (matrix and not inputs_of_tokens), name
    with torch.no_grad():
        for name, weight in network.state_dict().items():  # what is not on a grid is rounded to fp16 on the way
            weight.copy_(read.state_dict()[name] if weight.ndim == 1 or ".layers." not in name or "weight_ih" in name else weight)
    network.load_state_dict({**kept, **read.state_dict()})
    assert torch.equal(network(x).y, read(x).y)


def test_both_parts_of_a_row_share_a_grid():
    """The runtime adds a row's input and recurrent products up in one unit."""
    network = student.student(teacher(), Gates(copies=1), weights="int8")
    matrices = network.cells()["main.layers.1.fwd"].matrices()
    whole = torch.cat([matrices["gates.weight_ih"], matrices["gates.weight_hh"]], 1)
    assert torch.equal(rounded(whole)[0], whole)
    recurrent = network.cells()["main.layers.0.fwd"].matrices()["gates.weight_hh"]
    assert torch.equal(rounded(recurrent)[0], recurrent)


@pytest.mark.parametrize("value", ["int4", 8, None])
def test_other_weights_are_refused(value, tmp_path):
    pack.write_model(student.student(teacher(), Gates()), tmp_path, provenance={}, task={"name": "match"})
    config = json.loads((tmp_path / "config.json").read_text()) | {"weights": value}
    with pytest.raises(UnsupportedError, match="weights must be fp16 or int8"):
        pack.read_network(tmp_path, config)


def test_a_directory_of_before_has_fp16(tmp_path):
    pack.write_model(student.student(teacher(), Gates()), tmp_path, provenance={}, task={"name": "match"})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["weights"]
    assert pack.read_network(tmp_path, config).weights == "fp16"


def test_modules_are_told_that_they_have_none(tmp_path):
    import rnn2bin

    recipe = Recipe.model_validate({"task": "match", "pack": {"weights": "int8"}})
    with pytest.raises(RecipeError, match=r"pack\.weights"):
        rnn2bin.convert(torch.nn.GRU(2, 3), recipe=recipe, data=[torch.zeros(2, 4, 2)], out=tmp_path / "out")


def test_the_recipe_says_it(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("version: 1\npack: {weights: int8}\n")
    assert recipe_yaml.read(path).pack.weights == "int8"
    path.write_text("version: 1\npack: {weights: int7}\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:2:"):
        recipe_yaml.read(path)
