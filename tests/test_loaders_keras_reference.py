"""What Keras itself computes: models built, saved and run by Keras 3 on torch, in both of its formats. Skipped where Keras is missing."""

from __future__ import annotations

import importlib.util
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from tolerances import assert_close

from rnn2bin.cells.network import teacher_network
from rnn2bin.loaders import hdf5, hdf5_child, load

if importlib.util.find_spec("keras") is None:
    pytest.skip("needs keras", allow_module_level=True)
os.environ["KERAS_BACKEND"] = "torch"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import h5py
    import keras
    from keras import layers as L

# The first: of Keras's own.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("read_here")]

B, T, I, V = 3, 7, 5, 11  # noqa: E741
RANDOM = np.random.default_rng(5)
X = RANDOM.normal(size=(B, T, I)).astype(np.float32)
WITH_MARKS = X.copy()
WITH_MARKS[0, 4:] = WITH_MARKS[1, :2] = -1.5
BEFORE, BEHIND = RANDOM.integers(1, V, (2, B, T))
BEFORE[0, :3] = BEFORE[1, :1] = 0
BEHIND[0, 4:] = BEHIND[1, 6:] = BEHIND[2, 2] = 0


@pytest.fixture
def read_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same reader without a process of its own, which takes as long as the rest of a test: it is what test_loaders_keras.py is for."""

    def read(stream: IO[bytes], size: int, *, where: str) -> hdf5.Contents:
        out = io.BytesIO()
        hdf5_child.answer(h5py, np, stream.read(), hdf5.EXPANSION * size + hdf5.FREE_BYTES, out)
        return hdf5.parsed(out.getvalue(), where)

    if request.node.originalname != "test_tokens_at_every_step":  # one of each format that goes the whole way
        monkeypatch.setattr(hdf5, "read", read)


def filled(model: Any) -> Any:
    """Every weight random, no bias zero."""
    random = np.random.default_rng(6)
    for variable in model.weights:
        values = random.normal(size=variable.shape) * 0.4
        variable.assign(np.abs(values) + 0.5 if "variance" in variable.path else values)
    return model


def check(model: Any, x: np.ndarray, path: Path) -> Any:
    """The loaded network gives what Keras gives; its section is returned."""
    wanted = torch.tensor(keras.ops.convert_to_numpy(filled(model)(x, training=False)))
    model.save(path)
    loaded = load(path)
    y = teacher_network(loaded.spec, loaded.weights)(torch.tensor(x).transpose(0, 1)).y
    y = y.transpose(0, 1) if loaded.spec.main.per_step else y
    assert float(wanted.abs().max()) > 1e-3
    assert_close(y, wanted.reshape(y.shape))
    return loaded.spec.main


def chain(*layers: Any, shape: tuple[int | None, ...] = (None, I)) -> Any:
    return keras.Sequential([L.Input(shape), *layers])


def tokens(*layers: Any, mask: bool = False) -> Any:
    return chain(L.Embedding(V, I, mask_zero=mask), *layers, shape=(None,))


def joined(function: Callable[[Any], Any], shape: tuple[int | None, ...] = (None, I)) -> Any:
    entry = L.Input(shape)
    return keras.Model(entry, function(entry))


FORMATS = pytest.mark.parametrize("suffix", [".keras", ".h5"])

CELLS = {
    "lstm": (L.LSTM, {}),
    "gru": (L.GRU, {}),
    "gru reset before": (L.GRU, {"reset_after": False}),
    "lstm without bias": (L.LSTM, {"use_bias": False}),
    "gru without bias": (L.GRU, {"use_bias": False}),
    "lstm hard relu": (L.LSTM, {"recurrent_activation": "hard_sigmoid", "activation": "relu"}),
    "gru hard softsign": (L.GRU, {"recurrent_activation": "hard_sigmoid", "activation": "softsign"}),
    "lstm elu": (L.LSTM, {"activation": "elu"}),
    "gru linear": (L.GRU, {"activation": "linear"}),
}


@FORMATS
@pytest.mark.parametrize("cell", CELLS)
def test_two_layers_of_every_cell_are_a_plain_chain(tmp_path: Path, cell: str, suffix: str) -> None:
    kind, options = CELLS[cell]
    model = chain(kind(4, return_sequences=True, **options), kind(6, **options), L.Dense(3, activation="softmax"))
    assert check(model, X, tmp_path / f"m{suffix}").graph is None


@FORMATS
def test_tokens_at_every_step(tmp_path: Path, suffix: str) -> None:
    section = check(tokens(L.LSTM(4, return_sequences=True), L.Dense(3)), BEFORE, tmp_path / f"m{suffix}")
    assert (section.graph, section.readout, section.windowed) == (None, "all", True)


@pytest.mark.parametrize("sequences", [True, False])
@pytest.mark.parametrize("merge", ["concat", "sum", "mul", "ave"])
def test_both_directions_with_every_merge(tmp_path: Path, merge: str, sequences: bool) -> None:
    for kind, name in ((L.GRU, "a.keras"), (L.LSTM, "b.h5"), (L.SimpleRNN, "c.keras")):
        both = L.Bidirectional(kind(4, return_sequences=sequences), merge_mode=merge)
        check(chain(both, *([L.GRU(3)] if sequences else [L.RepeatVector(2), L.GRU(3)])), X, tmp_path / name)
    for x in (BEFORE, BEHIND):
        both = L.Bidirectional(L.LSTM(4, return_sequences=sequences), merge_mode=merge)
        check(tokens(both, L.Dense(3), mask=True), x, tmp_path / "d.keras")


@pytest.mark.parametrize("x", [BEFORE, BEHIND], ids=["before", "behind"])
@pytest.mark.parametrize("options", [{}, {"go_backwards": True}, {"zero_output_for_mask": True}], ids=str)
@pytest.mark.parametrize("sequences", [True, False])
@pytest.mark.parametrize("kind", [L.LSTM, L.GRU, L.SimpleRNN])
def test_masked_steps(tmp_path: Path, kind: Any, sequences: bool, options: dict[str, Any], x: np.ndarray) -> None:
    after = [L.GRU(3)] if sequences else [L.RepeatVector(3), L.GRU(3)]
    check(tokens(kind(4, return_sequences=sequences, **options), *after, mask=True), x, tmp_path / "m.keras")


@FORMATS
@pytest.mark.parametrize("x", [BEFORE, BEHIND], ids=["before", "behind"])
def test_masks_through_functional_models(tmp_path: Path, x: np.ndarray, suffix: str) -> None:
    def network(entry: Any) -> Any:
        e = L.Embedding(V, I, mask_zero=True)(entry)
        a = L.Bidirectional(L.LSTM(I, return_sequences=True), merge_mode="sum")(e)
        b = L.TimeDistributed(L.Dense(4))(L.Dropout(0.3)(L.Add()([e, a])))
        c = L.Concatenate()([b, L.GRU(3, return_sequences=True)(L.BatchNormalization()(b))])
        return L.Concatenate()([L.GlobalAveragePooling1D()(c), L.LSTM(3)(c)])

    check(joined(network, (None,)), x, tmp_path / f"m{suffix}")


@FORMATS
def test_a_masking_layer(tmp_path: Path, suffix: str) -> None:
    check(chain(L.Masking(-1.5), L.LSTM(4, return_sequences=True), L.GlobalMaxPooling1D()), WITH_MARKS, tmp_path / f"m{suffix}")
    check(joined(lambda x: L.GRU(2)(L.LSTM(5, return_sequences=True)(L.Masking(-1.5)(x)))), WITH_MARKS, tmp_path / f"f{suffix}")


def adapted() -> Any:
    layer = L.Normalization()
    layer.adapt(X * 3 + 1)
    return layer


PLAIN = {
    "backwards": lambda: chain(L.LSTM(4, return_sequences=True, go_backwards=True), L.GRU(3, go_backwards=True)),
    **{
        f"conv {padding} {options}": lambda padding=padding, options=options: chain(L.Conv1D(6, 3, padding=padding, **options), L.LSTM(4))
        for padding in ("valid", "same", "causal")
        for options in ({"dilation_rate": 2, "activation": "elu"}, {"strides": 2, "activation": "selu"}, {"use_bias": False})
    },
    "groups": lambda: chain(L.Conv1D(6, 3), L.BatchNormalization(), L.Conv1D(6, 3, groups=3), L.LeakyReLU(), L.LSTM(4)),
    "max pooling same": lambda: chain(L.MaxPooling1D(3, strides=2, padding="same"), L.LSTM(4)),
    "max pooling": lambda: chain(L.MaxPooling1D(2), L.LSTM(4)),
    "average pooling": lambda: chain(L.AveragePooling1D(3, strides=2), L.LSTM(4)),
    "average pooling same": lambda: chain(L.AveragePooling1D(3, strides=1, padding="same"), L.LSTM(4)),
    "global": lambda: joined(
        lambda x: L.Concatenate()([L.GlobalMaxPooling1D()(h := L.LSTM(4, return_sequences=True)(x)), L.GlobalAveragePooling1D()(h)])
    ),
    "norms": lambda: chain(
        *(L.LSTM(4, return_sequences=True), L.LayerNormalization(), L.PReLU(shared_axes=[1]), L.BatchNormalization(scale=False)),
        *(L.ReLU(max_value=1.0), L.ELU(0.5), L.GRU(3)),
    ),
    "padded and cropped": lambda: chain(
        *(L.ZeroPadding1D((2, 1)), L.Cropping1D((1, 0)), L.LSTM(4, return_sequences=True), L.UpSampling1D(3), L.GRU(3))
    ),
    "scaled": lambda: chain(
        *(L.Rescaling(0.5, 0.1), L.LSTM(4, return_sequences=True), L.UnitNormalization(), L.GRU(3)),
    ),
    "normalised as stated": lambda: chain(L.Normalization(mean=[0.1] * I, variance=[2.0] * I), L.LSTM(4)),
    "normalised as adapted": lambda: chain(adapted(), L.LSTM(4)),
    "images padded": lambda: chain(
        *(
            L.Reshape((T, I, 1)),
            L.ZeroPadding2D(((1, 0), 2)),
            L.Conv2D(2, 3),
            L.Cropping2D(((0, 1), (1, 0))),
            L.Reshape((T - 2, -1)),
            L.GRU(3),
        ),
        shape=(T, I),
    ),
    "shapes": lambda: chain(
        *(L.LSTM(4, return_sequences=True), L.Flatten(), L.Dense(6, activation="tanh"), L.Reshape((3, -1)), L.Permute((2, 1)), L.GRU(3)),
        shape=(T, I),
    ),
    "every step": lambda: chain(
        *(
            L.LSTM(6, return_sequences=True),
            L.Reshape((T, 3, 2)),
            L.TimeDistributed(L.Conv1D(3, 2)),
            L.TimeDistributed(L.Flatten()),
            L.GRU(3),
        ),
        shape=(T, I),
    ),
    "cells": lambda: chain(L.RNN([L.LSTMCell(4), L.LSTMCell(3)], return_sequences=True), L.RNN(L.GRUCell(3))),
    "cells both ways": lambda: chain(L.Bidirectional(L.RNN([L.LSTMCell(4), L.LSTMCell(3)], return_sequences=True)), L.Dense(3)),
    "a backward layer of its own": lambda: chain(
        L.Bidirectional(L.LSTM(4), backward_layer=L.LSTM(4, activation="relu", go_backwards=True))
    ),
    **{
        name: lambda name=name: joined(
            lambda x: L.Dense(2)(getattr(L, name)()([L.LSTM(4, return_sequences=True)(x), L.GRU(4, return_sequences=True)(x)]))
        )
        for name in ("Add", "Multiply", "Average", "Subtract", "Maximum", "Minimum", "Concatenate")
    },
    "operators": lambda: joined(lambda x: L.GRU(2)((L.LSTM(I, return_sequences=True)(x) + x) * x)),
    "states": lambda: joined(
        lambda x: L.LSTM(4)((y := L.LSTM(4, return_sequences=True, return_state=True)(x))[0], initial_state=list(y[1:]))
    ),
    "states both ways": lambda: joined(
        lambda x: L.Bidirectional(L.LSTM(4))(
            (y := L.Bidirectional(L.LSTM(4, return_sequences=True, return_state=True))(x))[0], initial_state=list(y[1:])
        )
    ),
    **{
        f"dot {axes} {normalize}": lambda axes=axes, normalize=normalize: joined(
            lambda x: L.Dense(2)(
                L.Dot(axes, normalize=normalize)(
                    [L.LSTM(T if axes == (2, 1) else 4, return_sequences=True)(x), L.GRU(4, return_sequences=True)(x)]
                )
            ),
            (T, I),
        )
        for axes in ((2, 2), (1, 1), (2, 1))
        for normalize in (False, True)
    },
    "dot of vectors": lambda: joined(lambda x: L.Dot(1)([L.LSTM(4)(x), L.GRU(4)(x)])),
    "dot of a sequence": lambda: joined(lambda x: L.Dot((2, 1))([L.LSTM(4, return_sequences=True)(x), L.GRU(4)(x)]), (T, I)),
    "stateful options": lambda: chain(L.LSTM(4, dropout=0.3, recurrent_dropout=0.2, unroll=True), shape=(T, I)),
}


@FORMATS
@pytest.mark.parametrize("name", PLAIN)
def test_layers(tmp_path: Path, name: str, suffix: str) -> None:
    check(PLAIN[name](), X, tmp_path / f"m{suffix}")


@FORMATS
def test_a_nested_model_used_twice(tmp_path: Path, suffix: str) -> None:
    inner = chain(L.LSTM(4, return_sequences=True), L.BatchNormalization(), L.Dense(I))
    check(joined(lambda x: L.GRU(3)(inner(inner(x)))), X, tmp_path / f"m{suffix}")


@FORMATS
def test_images_in_time(tmp_path: Path, suffix: str) -> None:
    x = RANDOM.normal(size=(B, T, 6, 2)).astype(np.float32)
    conv = L.Conv2D(3, (3, 2), padding="same", strides=(1, 2), activation="softplus")
    check(joined(lambda e: L.LSTM(4, return_sequences=True)(L.Reshape((T, 9))(conv(e))), (T, 6, 2)), x, tmp_path / f"m{suffix}")


def test_a_series_of_numbers(tmp_path: Path) -> None:
    section = check(joined(lambda x: L.LSTM(3)(L.Reshape((T, 1))(x)), (T,)), X[:, :, 0], tmp_path / "m.keras")
    assert section.input_shape == ()


def test_two_tables_of_one_input(tmp_path: Path) -> None:
    model = joined(lambda x: L.Concatenate()([L.LSTM(4)(L.Embedding(V, 5)(x)), L.LSTM(4)(L.Embedding(V, 3, mask_zero=True)(x))]), (None,))
    check(model, BEHIND, tmp_path / "m.keras")


ACTIVATIONS = "tanh relu sigmoid hard_sigmoid softsign elu selu softplus linear swish silu gelu exponential softmax mish relu6 log_softmax"


@pytest.mark.parametrize("name", ACTIVATIONS.split())
def test_activations(tmp_path: Path, name: str) -> None:
    model = chain(L.LSTM(4, return_sequences=True), L.Dense(6, activation=name), L.Activation(name), L.Dense(2))
    check(model, X, tmp_path / "m.keras")


@FORMATS
def test_another_output_is_left_out(tmp_path: Path, suffix: str) -> None:
    from rnn2bin.recipe import Source

    entry = L.Input((None, I))
    h = L.LSTM(4)(entry)
    model = filled(keras.Model(entry, [L.Dense(2, name="kept")(h), L.Dense(3, name="spare")(h)]))
    wanted = torch.tensor(np.asarray(model.predict(X, verbose=0)[0]))
    model.save(tmp_path / f"m{suffix}")
    loaded = load(tmp_path / f"m{suffix}", source=Source(output="kept", ignore=["spare"]))
    assert_close(teacher_network(loaded.spec, loaded.weights)(torch.tensor(X).transpose(0, 1)).y, wanted)


def test_weights_alone_of_keras_3(tmp_path: Path) -> None:
    from rnn2bin.recipe import Source

    model = filled(chain(L.Bidirectional(L.GRU(4, return_sequences=True)), L.LSTM(3), L.Dense(2)))
    model.save_weights(tmp_path / "m.weights.h5")
    layers = [
        {"name": "bidirectional", "kind": "GRU", "bidirectional": "concat", "return_sequences": True, "reset_after": True},
        {"name": "lstm", "kind": "LSTM"},
    ]
    given = [{**layer, "recurrent_activation": "sigmoid"} for layer in layers] + [{"name": "dense", "kind": "Dense"}]
    loaded = load(tmp_path / "m.weights.h5", source=Source.model_validate({"keras": given}))
    y = teacher_network(loaded.spec, loaded.weights)(torch.tensor(X).transpose(0, 1)).y
    assert_close(y, torch.tensor(np.asarray(model.predict(X, verbose=0))))
