"""Keras files of every generation -> the same network: against NumPy equations, and against Keras itself where it is installed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import assert_close

from rnn2bin import cli
from rnn2bin.cells.network import teacher_network
from rnn2bin.errors import Rnn2binError, UnsafeError, UnsupportedError, UsageError
from rnn2bin.loaders import inspect, keras_container, keras_file, load
from rnn2bin.recipe import Source
from rnn2bin.spec import LayerSpec

h5py = pytest.importorskip("h5py")

from keras_files import RANDOM, functional, gru, hard, hard_3, legacy, lstm, numbers, sigmoid, to_cudnn  # noqa: E402

B, T, I, U, OUT, V = 3, 7, 5, 4, 3, 11  # noqa: E741
X = RANDOM.normal(size=(B, T, I)).astype(np.float32)
BEFORE = RANDOM.integers(1, V, (B, T))  # padded in front, differently for each sequence
BEFORE[0, :3] = BEFORE[1, :1] = 0
BEHIND = RANDOM.integers(1, V, (B, T))  # padded behind, and once in the middle
BEHIND[0, 4:] = BEHIND[1, 6:] = BEHIND[2, 2] = 0


def source(*layers: dict[str, Any], **rest: Any) -> Source:
    return Source.model_validate({**({"keras": list(layers)} if layers else {}), **rest})


def ours(path: Path, x: np.ndarray, given: Source | None = None) -> np.ndarray:
    """What the loaded network gives, batch first."""
    loaded = load(path, source=given)
    y = teacher_network(loaded.spec, loaded.weights)(torch.tensor(x).transpose(0, 1)).y
    return (y.transpose(0, 1) if loaded.spec.main.per_step else y).numpy()


def same(found: np.ndarray, wanted: np.ndarray) -> None:
    assert_close(torch.tensor(found), torch.tensor(wanted, dtype=torch.float32))


def refused(path: Path, given: Source | None = None) -> str:
    with pytest.raises(UnsupportedError) as caught:
        load(path, source=given)
    return "\n".join(caught.value.reasons)


INPUT = {"batch_input_shape": [None, None, I]}
SIGMOID = {"activation": "tanh", "recurrent_activation": "sigmoid"}


def lstm_weights(inputs: int = I, units: int = U) -> list[np.ndarray]:
    return [numbers(inputs, 4 * units), numbers(units, 4 * units), numbers(4 * units)]


def gru_weights(inputs: int = I, units: int = U, *, reset_after: bool = False) -> list[np.ndarray]:
    return [numbers(inputs, 3 * units), numbers(units, 3 * units), numbers(2, 3 * units) if reset_after else numbers(3 * units)]


# --- layouts of Keras 1 and 2, against the equations -----------------------------------------------------


@pytest.mark.parametrize("listed", [False, True])
def test_two_lstm_layers_and_a_linear_one_become_a_plain_chain(tmp_path: Path, listed: bool) -> None:
    first, second, head = lstm_weights(), lstm_weights(U, 6), [numbers(6, OUT), numbers(OUT)]
    path = legacy(
        tmp_path / "m.h5",
        [
            ("LSTM", {**INPUT, **SIGMOID, "units": U, "return_sequences": True}, first),
            ("Dropout", {"rate": 0.5}, []),
            ("LSTM", {**SIGMOID, "units": 6}, second),
            ("Dense", {"units": OUT, "activation": "softmax"}, head),
        ],
        listed=listed,
    )
    section = load(path).spec.main
    assert (section.graph, section.readout, section.activation, len(section.layers)) == (None, "last", "softmax", 2)
    z = np.exp(lstm(lstm(X, first), second)[:, -1] @ head[0] + head[1])
    same(ours(path, X), z / z.sum(-1, keepdims=True))


@pytest.mark.parametrize(
    ("version", "gate", "slope"), [("2.2.4", hard, 0.4), ("1.2.2", hard, 0.4), (None, hard, 0.4), ("3.1.0", hard_3, 1 / 3)]
)
def test_hard_sigmoid_means_what_it_meant_in_the_version_that_wrote_the_file(
    tmp_path: Path, version: str | None, gate: Any, slope: float
) -> None:
    weights = lstm_weights()
    options = {**INPUT, "units": U, "activation": "tanh", "recurrent_activation": "hard_sigmoid", "return_sequences": True}
    path = legacy(tmp_path / "m.h5", [("LSTM", options, weights)], version=version)
    assert load(path).spec.main.layers[0].hard_sigmoid == slope
    same(ours(path, X), lstm(X, weights, gate=gate))


@pytest.mark.parametrize("reset_after", [False, True])
def test_both_forms_of_the_reset_gate(tmp_path: Path, reset_after: bool) -> None:
    weights = gru_weights(reset_after=reset_after)
    options = {**INPUT, **SIGMOID, "units": U, "return_sequences": True, "reset_after": reset_after}
    path = legacy(tmp_path / "m.h5", [("GRU", options, weights)])
    assert load(path).spec.main.layers[0].cell == ("gru" if reset_after else "gru_reset_before")
    same(ours(path, X), gru(X, weights, reset_after=reset_after))


@pytest.mark.parametrize("kind", ["CuDNNLSTM", "LSTM"])  # an LSTM may have been given the weights of a CuDNNLSTM
def test_cudnn_layout_of_an_lstm(tmp_path: Path, kind: str) -> None:
    kernel, recurrent, bias = lstm_weights()
    other = numbers(4 * U)
    path = legacy(
        tmp_path / "m.h5",
        [
            (
                kind,
                {**INPUT, **SIGMOID, "units": U, "return_sequences": True},
                [*to_cudnn(kernel, recurrent, 4), np.concatenate([bias, other])],
            )
        ],
    )
    same(ours(path, X), lstm(X, [kernel, recurrent, bias + other]))


def test_cudnn_layout_of_a_gru_in_both_directions(tmp_path: Path) -> None:
    ways = [gru_weights(reset_after=True) for _ in range(2)]
    arrays = [each for k, r, b in ways for each in (*to_cudnn(k, r, 3), b.reshape(-1))]
    inner = {"class_name": "CuDNNGRU", "config": {"name": "gru", "units": U, "return_sequences": True}}
    path = legacy(tmp_path / "m.h5", [("Bidirectional", {**INPUT, "merge_mode": "concat", "layer": inner}, arrays)])
    backward = gru(X[:, ::-1], ways[1], reset_after=True)[:, ::-1]
    same(ours(path, X), np.concatenate([gru(X, ways[0], reset_after=True), backward], -1))


def test_gates_kept_apart_by_keras_1(tmp_path: Path) -> None:
    kernel, recurrent, bias = lstm_weights()
    i, f, c, o = zip(*(np.split(each, 4, -1) for each in (kernel, recurrent, bias)), strict=True)
    z = gru_weights(U)
    old = [part for gate in (i, c, f, o) for part in gate]
    gates = [part for gate in zip(*(np.split(each, 3, -1) for each in z), strict=True) for part in gate]
    options = {"output_dim": U, "activation": "tanh", "inner_activation": "hard_sigmoid"}
    path = legacy(
        tmp_path / "m.h5",
        [("LSTM", {**INPUT, **options, "return_sequences": True}, old), ("GRU", {**options, "return_sequences": True}, gates)],
        version=None,
        listed=True,
    )
    same(ours(path, X), gru(lstm(X, [kernel, recurrent, bias], gate=hard), z, gate=hard))


@pytest.mark.parametrize("backend", ["tensorflow", "theano"])
def test_theano_runs_kernels_backwards(tmp_path: Path, backend: str) -> None:
    kernel, bias, weights = numbers(3, I, 6), numbers(6), lstm_weights(6)
    options = {**INPUT, "filters": 6, "kernel_size": [3], "padding": "valid", "activation": "linear"}
    layers = [("Conv1D", options, [kernel, bias]), ("LSTM", {**SIGMOID, "units": U}, weights)]
    path = legacy(tmp_path / "m.h5", layers, version="2.1.0", backend=backend)
    turned = kernel[::-1] if backend == "theano" else kernel
    steps = sum(X[:, k : T - 2 + k] @ turned[k] for k in range(3)) + bias
    same(ours(path, X), lstm(steps, weights)[:, -1])


def test_average_pooling_leaves_its_padding_out(tmp_path: Path) -> None:
    """As TensorFlow and JAX do; Keras on torch repeats the last step instead where the padding is uneven."""
    weights = lstm_weights()
    pool = ("AveragePooling1D", {**INPUT, "pool_size": [2], "strides": [2], "padding": "same"}, [])
    path = legacy(tmp_path / "m.h5", [pool, ("LSTM", {**SIGMOID, "units": U}, weights)])
    steps = np.stack([X[:, t : t + 2].mean(1) for t in range(0, T, 2)], 1)
    same(ours(path, X), lstm(steps, weights)[:, -1])


@pytest.mark.parametrize("version", ["2.3.1", "2.4.0"])
@pytest.mark.parametrize("tokens", [BEFORE, BEHIND])
def test_masked_steps_of_both_directions(tmp_path: Path, version: str, tokens: np.ndarray) -> None:
    """Until Keras 2.3 each direction repeats its own step before; from 2.4 on both are zero there."""
    table, ways = numbers(V, I), [lstm_weights() for _ in range(2)]
    inner = {"class_name": "LSTM", "config": {**SIGMOID, "name": "lstm", "units": U, "return_sequences": True}}
    layers = [
        ("Embedding", {"mask_zero": True}, [table]),
        ("Bidirectional", {"merge_mode": "concat", "layer": inner}, [*ways[0], *ways[1]]),
    ]
    path = legacy(tmp_path / "m.h5", layers, version=version)
    mask, x = tokens != 0, table[tokens]
    parts = [lstm(x, ways[0], mask=mask), lstm(x[:, ::-1], ways[1], mask=mask[:, ::-1])[:, ::-1]]
    y = np.concatenate(parts, -1)
    same(ours(path, tokens), np.where(mask[..., None], y, 0) if version == "2.4.0" else y)


def test_a_large_vocabulary_does_not_hide_the_mask(tmp_path: Path) -> None:
    """Random tokens rarely hold the padding: a network that skips it must not be taken for one that does not."""
    table, weights = numbers(5000, I), lstm_weights()
    layers = [("Embedding", {"mask_zero": True}, [table]), ("LSTM", {**SIGMOID, "units": U}, weights)]
    path = legacy(tmp_path / "m.h5", layers)
    assert load(path).spec.main.graph is not None
    same(ours(path, BEFORE), lstm(table[BEFORE], weights, mask=BEFORE != 0)[:, -1])
    name = "embedding_0"
    unmasked = ours(path, BEFORE, source({"name": name, "mask_zero": False}))
    same(unmasked, lstm(table[BEFORE], weights)[:, -1])


def test_one_hot_floats_may_be_given_as_tokens(tmp_path: Path) -> None:
    weights, head = lstm_weights(V), [numbers(U, V), numbers(V)]
    layers = [
        ("InputLayer", {"name": "entry", "batch_input_shape": [None, None, V]}, []),
        ("LSTM", {**SIGMOID, "units": U, "return_sequences": True}, weights),
        ("Dense", {"units": V}, head),
    ]
    path = legacy(tmp_path / "m.h5", layers, version="2.4.0")
    given = source({"name": "entry", "one_hot": True})
    embedding = load(path, source=given).spec.main.embedding
    assert embedding is not None
    assert (embedding.num_embeddings, embedding.one_hot) == (V, True)
    same(ours(path, BEFORE, given), lstm(np.eye(V)[BEFORE], weights) @ head[0] + head[1])


# --- files that hold weights only ------------------------------------------------------------------------


def weights_only(path: Path) -> tuple[Path, dict[str, list[np.ndarray]]]:
    arrays = {
        "table": [numbers(V, I)],
        "first": lstm_weights(),
        "both": [],
        "pool": [numbers(I + U, 1)],
        "out": [numbers(I + U, OUT), numbers(OUT)],
    }
    layers = [("any", {"name": name}, found) for name, found in arrays.items()]
    return legacy(path, layers, config=False, version="2.2.0"), arrays


def test_a_file_of_weights_converts_with_a_list_of_its_layers(tmp_path: Path) -> None:
    path, arrays = weights_only(tmp_path / "w.h5")
    given = source(
        {"name": "table", "kind": "Embedding"},
        {"name": "first", "kind": "LSTM", "recurrent_activation": "hard_sigmoid", "return_sequences": True},
        {"name": "both", "kind": "Concatenate", "inputs": ["table", "first"]},
        {"name": "pool", "kind": "WeightedAverage"},
        {"name": "out", "kind": "Dense", "activation": "sigmoid"},
    )
    e = arrays["table"][0][BEFORE].astype(np.float64)
    both = np.concatenate([e, lstm(e, arrays["first"], gate=hard)], -1)
    power = np.exp(both @ arrays["pool"][0])
    mean = (both * power / power.sum(1, keepdims=True)).sum(1)
    same(ours(path, BEFORE, given), sigmoid(mean @ arrays["out"][0] + arrays["out"][1]))


def test_inspect_drafts_the_list_and_says_what_is_open(tmp_path: Path) -> None:
    path, _ = weights_only(tmp_path / "w.h5")
    found = inspect(path)
    assert found.recognised is None
    assert "- {name: first, kind: LSTM, activation: tanh, recurrent_activation: unknown, return_sequences: unknown}" in found.source
    assert "- {name: both, kind: unknown}" in found.source
    assert any("weights only" in reason for reason in found.reasons)
    assert "first/first/w0:0" in found.render()
    assert "weights only" in refused(path)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([{"name": "table", "kind": "Embedding"}], "'first' is in the file, but not in the list"),
        ([{"name": "table"}, {"name": "first", "kind": "LSTM"}], "'table' has no kind"),
        ([{"name": "table", "kind": "Embedding"}] * 2, "two layers of one name"),
    ],
)
def test_a_list_that_does_not_fit_the_file(tmp_path: Path, layers: list[dict[str, Any]], says: str) -> None:
    path, _ = weights_only(tmp_path / "w.h5")
    assert says in refused(path, source(*layers))


def test_the_gates_activation_is_never_guessed(tmp_path: Path) -> None:
    path = legacy(tmp_path / "w.h5", [("any", {"name": "rnn"}, lstm_weights())], config=False)
    assert "recurrent activation 'not given'" in refused(path, source({"name": "rnn", "kind": "LSTM"}))


def test_conversion_by_the_command_line_from_weights_alone(tmp_path: Path) -> None:
    path = legacy(tmp_path / "w.h5", [("any", {"name": "rnn"}, lstm_weights())], config=False)
    np.savez(tmp_path / "d.npz", inputs=RANDOM.normal(size=(30, T, I)).astype(np.float32))
    knobs = ["train.steps=4", "train.max_steps=4", "train.evaluate_every=2"]
    layer = "source={keras: [{name: rnn, kind: LSTM, recurrent_activation: sigmoid, return_sequences: true}]}"
    options = [each for knob in (*knobs, layer) for each in ("--set", knob)]
    command = ["convert", str(path), "--recipe", "smoke", "--data", str(tmp_path / "d.npz"), "--out", str(tmp_path / "OUT"), *options]
    result = CliRunner().invoke(cli.main, command)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "OUT" / "report.json").read_text())
    assert report["provenance"]["source"] == "w.h5"
    assert report["teacher"]["metric"] > report["binary"]["metric"] > 0
    assert all(gate["binary"] for gate in report["gates"])


# --- what is refused -------------------------------------------------------------------------------------


def test_every_layer_that_is_not_read_is_named_at_once(tmp_path: Path) -> None:
    layers = [
        ("LSTM", {**INPUT, **SIGMOID, "units": U, "return_sequences": True}, lstm_weights()),
        ("Lambda", {"name": "trick", "function": ["4wEAAAAAAAAAAQ==", None, None]}, []),
        ("AttentionWeightedAverage", {"name": "attention"}, [numbers(U, 1)]),
    ]
    path = legacy(tmp_path / "m.h5", layers)
    reasons = refused(path)
    assert "layer 'trick' (Lambda)" in reasons
    assert "never run" in reasons
    assert "layer 'attention' (AttentionWeightedAverage)" in reasons
    assert "source: {keras: [{name: attention, kind: …}]}" in reasons


def test_a_recipe_may_say_what_a_custom_layer_computes(tmp_path: Path) -> None:
    weights, kernel = lstm_weights(), numbers(U, 1)
    layers = [
        ("LSTM", {**INPUT, **SIGMOID, "units": U, "return_sequences": True}, weights),
        ("AttentionWeightedAverage", {"name": "attention", "return_attention": False}, [kernel]),
    ]
    path = legacy(tmp_path / "m.h5", layers)
    h = lstm(X, weights)
    power = np.exp(h @ kernel)
    same(ours(path, X, source({"name": "attention", "kind": "WeightedAverage"})), (h * power / power.sum(1, keepdims=True)).sum(1))


def test_somebody_elses_class_of_a_known_name_is_not_keras(tmp_path: Path) -> None:
    entry = {"class_name": "LSTM", "config": {**SIGMOID, "units": U}, "registered_name": "mine>LSTM", "module": "mine.layers"}
    config = {
        "class_name": "Sequential",
        "config": {"layers": [{"class_name": "InputLayer", "config": {"batch_shape": [None, None, I]}}, entry]},
    }
    path = keras_zip(tmp_path / "m.keras", config, {"layers/lstm/cell/vars/0": numbers(I, 4 * U)})
    assert "(mine>LSTM)" in refused(path)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"recurrent_activation": "swish"}, "recurrent activation 'swish'"),
        ({"activation": "gelu"}, "activation 'gelu'"),
        ({"units": U + 1}, "not those of 5 units"),
        ({"return_sequences": 3}, "return_sequences is 3"),
        ({"activation": {"class_name": "function", "config": "mine", "registered_name": "mine"}}, "activation is 'function'"),
    ],
)
def test_options_of_a_cell_that_cannot_be_said(tmp_path: Path, option: dict[str, Any], says: str) -> None:
    path = legacy(tmp_path / "m.h5", [("LSTM", {**INPUT, **SIGMOID, "units": U, **option}, lstm_weights())])
    assert says in refused(path)


def test_no_merge_of_the_directions_is_refused(tmp_path: Path) -> None:
    inner = {"class_name": "LSTM", "config": {**SIGMOID, "name": "lstm", "units": U}}
    path = legacy(tmp_path / "m.h5", [("Bidirectional", {**INPUT, "merge_mode": None, "layer": inner}, [*lstm_weights(), *lstm_weights()])])
    assert "merge mode None" in refused(path)


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("Normalization", {"mean": [0.1] * I, "variance": [-1.0] * I}, "negative"),
        ("Normalization", {"mean": [float("inf")] * I, "variance": [1.0] * I}, "not finite"),
        ("Normalization", {"mean": [0.1] * 2, "variance": [1.0] * 2}, f"not of {I} values"),
        ("Normalization", {"mean": [0.1] * I, "variance": [1.0] * I, "invert": True}, "inverted"),
        ("Normalization", {"axis": 1, "mean": 0.0, "variance": 1.0}, "axis 1"),
        ("UnitNormalization", {"axis": 1}, "axis 1"),
        ("LayerNormalization", {"axis": 1}, "axis 1"),
        ("BatchNormalization", {"axis": 1}, "axis 1"),
    ],
)
def test_normalisations_that_are_not_read_say_why(tmp_path: Path, kind: str, options: dict[str, Any], says: str) -> None:
    weights = {"LayerNormalization": 2, "BatchNormalization": 4}.get(kind, 0)
    layers = [(kind, {**INPUT, **options}, [numbers(I) for _ in range(weights)]), ("LSTM", {**SIGMOID, "units": U}, lstm_weights())]
    assert says in refused(legacy(tmp_path / "m.h5", layers))


def branched(path: Path) -> Path:
    layers = [
        ("InputLayer", {"name": "x", "batch_input_shape": [None, None, I]}, []),
        ("LSTM", {"name": "rnn", **SIGMOID, "units": U}, lstm_weights()),
        ("Dense", {"name": "spare", "units": 2}, [numbers(U, 2), numbers(2)]),
        ("Dense", {"name": "out", "units": OUT}, [numbers(U, OUT), numbers(OUT)]),
    ]
    return functional(path, layers, {"rnn": ["x"], "spare": ["rnn"], "out": ["rnn"]})


def test_layers_that_lead_nowhere_are_an_error_until_they_are_ignored(tmp_path: Path) -> None:
    path = branched(tmp_path / "m.h5")
    assert "layer 'spare' (Dense): does not lead to the output 'out'" in refused(path)
    assert load(path, source=source(ignore=["spare"])).spec.main.output_size == OUT
    assert load(path, source=source(ignore=["out"], output="spare")).spec.main.output_size == 2
    assert "no layer 'what'" in refused(path, source(output="what"))


def test_an_ignored_layer_may_be_of_any_class(tmp_path: Path) -> None:
    path = branched(tmp_path / "m.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = file.attrs["model_config"].replace('{"class_name": "Dense"', '{"class_name": "Mine"', 1)
    assert load(path, source=source(ignore=["spare"])).spec.main.output_size == OUT


def test_arrays_that_nobody_uses_and_arrays_that_are_missing(tmp_path: Path) -> None:
    path = legacy(tmp_path / "m.h5", [("LSTM", {**INPUT, **SIGMOID, "units": U}, lstm_weights())])
    with h5py.File(path, "r+") as file:
        file["model_weights/stranger"] = numbers(2)
    assert "model_weights/stranger: an array that no layer of the model uses" in refused(path)
    with h5py.File(path, "r+") as file:
        del file["model_weights/stranger"], file["model_weights/lstm_0/lstm_0/w1:0"]
    assert "w1:0 is not in the file" in refused(path)


def test_optimizer_states_are_left_out(tmp_path: Path) -> None:
    path = legacy(tmp_path / "m.h5", [("LSTM", {**INPUT, **SIGMOID, "units": U}, lstm_weights())])
    with h5py.File(path, "r+") as file:
        file["optimizer_weights/Adam/m"] = numbers(9)
    assert load(path).spec.main.layers == (LayerSpec("lstm", I, U),)


def test_source_keras_is_for_keras_files(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "m.pt")
    with pytest.raises(UsageError, match="keras: for files that hold a graph"):
        load(tmp_path / "m.pt", source=source({"name": "a"}))
    path = legacy(tmp_path / "m.h5", [("LSTM", {**INPUT, **SIGMOID, "units": U}, lstm_weights())])
    assert "'a' is no layer of the file" in refused(path, source({"name": "a"}))
    main = {"main": {"cell": "lstm", "layers": [{"weight_ih": "a", "weight_hh": "b"}]}}
    assert "says itself" in refused(path, Source.model_validate(main))


def test_without_h5py_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = legacy(tmp_path / "m.h5", [("LSTM", {**INPUT, **SIGMOID, "units": U}, lstm_weights())])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'rnn2bin\[keras\]'"):
        load(path)


# --- files that attack -----------------------------------------------------------------------------------


def unsafe(path: Path) -> str:
    with pytest.raises(UnsafeError) as caught:
        load(path)
    assert caught.value.exit_code == 4
    return "\n".join(caught.value.reasons)


def model_file(tmp_path: Path) -> Path:
    return legacy(tmp_path / "m.h5", [("LSTM", {**INPUT, **SIGMOID, "units": U}, lstm_weights())])


KERNEL = "model_weights/lstm_0/lstm_0/w0:0"


def replaced(tmp_path: Path, make: Callable[[Any], None]) -> Path:
    """The model with its kernel taken out and something else made in its place."""
    path = model_file(tmp_path)
    with h5py.File(path, "r+", libver="latest") as file:
        del file[KERNEL]
        make(file)
    return path


def secret(tmp_path: Path) -> Path:
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["data"] = numbers(I, 4 * U)
    return tmp_path / "secret.h5"


def test_an_external_link_is_not_followed(tmp_path: Path) -> None:
    other = secret(tmp_path)
    path = replaced(tmp_path, lambda file: file.__setitem__(KERNEL, h5py.ExternalLink(str(other), "data")))
    assert "a link into another file" in unsafe(path)


def test_a_soft_link_is_not_followed(tmp_path: Path) -> None:
    assert "a soft link" in unsafe(replaced(tmp_path, lambda file: file.__setitem__(KERNEL, h5py.SoftLink("/model_weights"))))


def test_a_loop_of_groups_ends(tmp_path: Path) -> None:
    assert "under two names" in unsafe(replaced(tmp_path, lambda file: file.__setitem__("model_weights/again", file["model_weights"])))


def test_a_virtual_dataset_is_not_read(tmp_path: Path) -> None:
    layout = h5py.VirtualLayout((I, 4 * U), np.float32)
    layout[:] = h5py.VirtualSource(secret(tmp_path), "data", (I, 4 * U))
    assert "a virtual dataset" in unsafe(replaced(tmp_path, lambda file: file.create_virtual_dataset(KERNEL, layout)))


def test_numbers_in_another_file_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "passwords").write_bytes(b"s" * 400)
    external = [(str(tmp_path / "passwords"), 0, 4 * I * 4 * U)]
    path = replaced(tmp_path, lambda file: file.create_dataset(KERNEL, (I, 4 * U), np.float32, external=external))
    assert "stand in another file" in unsafe(path)


def test_the_reading_process_may_open_no_file(tmp_path: Path) -> None:
    """Should a check miss a link, nothing can be opened any more."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import hdf5_child; hdf5_child._limit(0, 0); open(sys.argv[2])"
    child = Path(__file__).parent.parent / "rnn2bin" / "loaders"
    done = subprocess.run([sys.executable, "-c", code, str(child), str(secret(tmp_path))], capture_output=True, check=False)
    assert b"Too many open files" in done.stderr


@pytest.mark.parametrize("chunks", [None, (1, 1024)])
def test_a_shape_beyond_the_file_is_refused_before_it_is_allocated(tmp_path: Path, chunks: Any) -> None:
    path = replaced(tmp_path, lambda file: file.create_dataset(KERNEL, (2**20, 2**20), np.float32, chunks=chunks))
    assert "more than the file's" in unsafe(path)


def test_zeros_that_unpack_to_too_much_are_refused(tmp_path: Path) -> None:
    data = np.zeros((2**15, 2**10), np.float32)  # 128 MB in some hundred kilobytes
    path = replaced(tmp_path, lambda file: file.create_dataset(KERNEL, data=data, compression="gzip", chunks=(2**10, 2**10)))
    assert path.stat().st_size < 2**20
    assert "more than the file's" in unsafe(path)


def test_references_are_not_numbers(tmp_path: Path) -> None:
    path = replaced(tmp_path, lambda file: file.create_dataset(KERNEL, data=np.array([file.ref], dtype=h5py.ref_dtype)))
    assert "not plain numbers" in refused(path)


def test_groups_nested_deep_are_refused(tmp_path: Path) -> None:
    assert "nested more than" in unsafe(replaced(tmp_path, lambda file: file.create_group("/".join(["a"] * 200))))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[1, 2", '"text"', "{}", '{"class_name": "Sequential", "config": {"layers": 1}}']
)
def test_configs_that_are_none(tmp_path: Path, text: str) -> None:
    path = model_file(tmp_path)
    with h5py.File(path, "r+", libver="latest") as file:
        del file.attrs["model_config"]
        file.attrs.create("model_config", text, dtype=h5py.string_dtype())
    assert refused(path)


def test_text_that_is_none_is_refused(tmp_path: Path) -> None:
    path = model_file(tmp_path)
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = np.bytes_(b'{"class_name": "\x80"}')
    assert "not a readable HDF5" in refused(path)


def test_names_of_the_file_reach_a_message_in_one_printable_line(tmp_path: Path) -> None:
    path = legacy(
        tmp_path / "m.h5", [("Evil\x1b[31m\nlayer", {**INPUT, "name": "a\nb"}, []), ("LSTM", {**SIGMOID, "units": U}, lstm_weights())]
    )
    reasons = refused(path)
    assert "\x1b" not in reasons
    assert len(reasons.splitlines()) == 1


def test_an_input_too_long_to_try_is_refused(tmp_path: Path) -> None:
    options = {**SIGMOID, "units": U, "batch_input_shape": [None, 2**30, I]}
    assert "values in a sequence" in refused(legacy(tmp_path / "m.h5", [("LSTM", options, lstm_weights())]))


def test_a_model_within_itself_ends(tmp_path: Path) -> None:
    config: dict[str, Any] = {"class_name": "LSTM", "config": {**SIGMOID, "units": U}}
    for _ in range(50):
        config = {"class_name": "Sequential", "config": {"layers": [config]}}
    assert "nested more than" in refused(keras_zip(tmp_path / "m.keras", config, {"layers/lstm/cell/vars/0": numbers(I, 4 * U)}))


@pytest.mark.parametrize("inputs", [[["x", 0, 0]], []])
def test_a_model_inside_whose_input_is_no_layer(tmp_path: Path, inputs: list[Any]) -> None:
    """Found by fuzzing: KeyError."""
    lstm = {"class_name": "LSTM", "name": "l", "config": {**SIGMOID, "name": "l", "units": U}, "inbound_nodes": [[["x", 0, 0, {}]]]}
    inner = {"name": "m", "layers": [lstm], "input_layers": inputs, "output_layers": [["l", 0, 0]]}
    config = {"class_name": "Sequential", "config": {"layers": [{"class_name": "Functional", "config": inner}]}}
    reasons = refused(keras_zip(tmp_path / "m.keras", config, {"layers/lstm/cell/vars/0": numbers(I, 4 * U)}))
    assert "is none of its layers" in reasons


def keras_zip(path: Path, config: Any, tensors: dict[str, np.ndarray], **extra: bytes) -> Path:
    with h5py.File(path.with_suffix(".inner"), "w") as file:
        for name, values in tensors.items():
            file[name] = values
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.9.0"}))
        archive.write(path.with_suffix(".inner"), "model.weights.h5")
        for name, data in extra.items():
            archive.writestr(name, data)
    return path


SMALL = {"class_name": "Sequential", "config": {"layers": [{"class_name": "LSTM", "config": {**SIGMOID, "units": U, **INPUT}}]}}
SMALL_WEIGHTS = {f"layers/lstm/cell/vars/{k}": each for k, each in enumerate(lstm_weights())}


def test_the_zip_file_written_here_is_read(tmp_path: Path) -> None:
    weights = list(SMALL_WEIGHTS.values())
    same(ours(keras_zip(tmp_path / "m.keras", SMALL, SMALL_WEIGHTS), X), lstm(X, weights)[:, -1])


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a\\..\\evil"])
def test_entries_that_point_elsewhere(tmp_path: Path, name: str) -> None:
    assert "leading out of the archive" in unsafe(keras_zip(tmp_path / "m.keras", SMALL, SMALL_WEIGHTS, **{name: b"x"}))


def test_an_entry_given_twice(tmp_path: Path) -> None:
    path = keras_zip(tmp_path / "m.keras", SMALL, SMALL_WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of what is meant here
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("config.json", "{}")
    assert "two entries named" in unsafe(path)


def test_a_zip_bomb(tmp_path: Path) -> None:
    path = tmp_path / "m.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", b"[" * 2**20)
        with archive.open("model.weights.h5", "w") as stream:
            for _ in range(300):
                stream.write(bytes(2**20))
    assert "exhaust the memory" in unsafe(path)


def test_what_else_stands_in_a_zip_is_not_passed_over(tmp_path: Path) -> None:
    assert "assets/vocabulary.txt" in refused(keras_zip(tmp_path / "m.keras", SMALL, SMALL_WEIGHTS, **{"assets/vocabulary.txt": b"a"}))
    with zipfile.ZipFile(tmp_path / "n.keras", "w") as archive:
        archive.writestr("readme", "no model")
    assert "no Keras model" in refused(tmp_path / "n.keras")


# --- whatever bytes --------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=6), end=st.floats(0.3, 1))
def test_damaged_files_load_or_raise_our_errors(tmp_path: Path, changes: list[tuple[float, int]], end: float) -> None:
    path = model_file(tmp_path)
    data = bytearray(path.read_bytes())
    for at, value in changes:
        data[int(at * len(data))] = value
    path.write_bytes(data[: int(end * len(data))] if end < 0.5 else data)
    with contextlib.suppress(Rnn2binError):
        load(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats() | st.sampled_from(["", "LSTM", "linear", "rnn", "x", "Lambda", "同"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["class_name", "config", "layers", "items", "value"]), inner)
    ),
    max_leaves=8,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value within."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, each in inner for place in places(each, (*at, key)))]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_configs_with_any_value_in_any_place_raise_our_errors(tmp_path: Path, data: st.DataObject) -> None:
    """The config is changed behind the reading of HDF5, which takes a process each time."""
    layers = [
        ("InputLayer", {"name": "x", "batch_input_shape": [None, None, I]}, []),
        (
            "Conv1D",
            {"name": "conv", "kernel_size": [3], "padding": "same", "strides": [1], "activation": "relu"},
            [numbers(3, I, 6), numbers(6)],
        ),
        ("LSTM", {"name": "rnn", **SIGMOID, "units": U, "return_sequences": True}, lstm_weights(6)),
        ("Flatten", {"name": "flat"}, []),
    ]
    reads = {"conv": ["x"], "rnn": ["conv"], "flat": ["rnn"]}
    if not (tmp_path / "m.h5").exists():
        functional(tmp_path / "m.h5", layers, reads)
        READ["file"] = keras_container.read(tmp_path / "m.h5")
    file = READ["file"]
    config = json.loads(json.dumps(file.config))
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from([place for place in places(config) if place]))
        target = config
        for key in way:
            target = target[key]
        target[last] = data.draw(VALUES)
    file = dataclasses.replace(file, config=config)
    with contextlib.suppress(Rnn2binError):
        keras_file._network(file, keras_file._described(file, []), Source())


READ: dict[str, Any] = {}
