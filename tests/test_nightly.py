"""Real networks. That of scripts/demo.sh, in minutes instead of ten: run that script first, it fetches the network and the words. Those of
public packages, as they ship them, against their own runtimes or equations."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tolerances import assert_close

from rnn2bin import cli, loaders, pipeline, recipe_yaml
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
    ort = pytest.importorskip("onnxruntime")
    path = _public(f"silero_vad/data/{name}.onnx")
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
    """A file of a public package, unpacked into demo/."""
    path = next(iter(sorted(DEMO.glob(f"*/{name}"))), None)
    if path is None:
        pytest.skip(f"no {name} below {DEMO}: run scripts/public_packages.sh")
    return path


def _module(monkeypatch: pytest.MonkeyPatch, name: str, file: Path) -> ModuleType:
    """The package's own code, from where it is unpacked."""
    monkeypatch.syspath_prepend(str(file.parents[name.count(".")]))
    return importlib.import_module(name)


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


@pytest.mark.nightly
def test_silero_vads_torchscript_with_its_graph_in_a_recipe():
    """Against torch.jit, a frame a call."""
    path = _public("silero_vad/data/silero_vad.jit")
    loaded = load(path, source=recipe_yaml.read("silero_vad").source)
    model, state, outputs = torch.jit.load(str(path))._model, torch.zeros(2, 2, 128), []
    x = 0.3 * torch.randn(7, 2, 576, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for x_t in x:
            y, state = model(x_t, state)
            outputs.append(y)
    assert_close(teacher_network(loaded.spec, loaded.weights)(x).y, torch.stack(outputs))
    assert (loaded.spec.main.activation, loaded.spec.main.windowed) == ("sigmoid", True)


@pytest.mark.nightly
def test_diacritics_attention_in_a_recipe(monkeypatch):
    """Against the package's own module, a sentence at a time; a padded batch gives the same. In float64: logits of 20 round in float32."""
    path = _public("diacritize/assets/bilstm_best.pt")
    theirs = _module(monkeypatch, "diacritize.baseline.model", _public("diacritize/baseline/model.py")).BiLSTMDiacritizer(54)
    theirs.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    with torch.no_grad():  # the two biases of a gate are one number here, added in float32
        for layer in range(3):
            for tail in ("", "_reverse"):
                ih, hh = (getattr(theirs.lstm, f"bias_{side}_l{layer}{tail}") for side in ("ih", "hh"))
                ih.copy_(ih + hh)
                hh.zero_()
    theirs.double().set_to_inference_mode()
    loaded = load(path, source=recipe_yaml.read("diacritics").source)
    x = torch.randint(1, 54, (37, 4), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([37, 20, 5, 1])
    ours = teacher_network(loaded.spec, loaded.weights).double()(x, lengths=lengths).y
    with torch.no_grad():
        for k, n in enumerate(lengths.tolist()):
            assert_close(ours[:n, k], theirs(x[:n, k][None])[0], name=f"{n} letters")
    assert loaded.spec.main.graph.padded


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # the package leaves files open
def test_g2pm_from_a_pickle_of_arrays(monkeypatch):
    """Against the package's own NumPy, whose last layer's outputs are kept."""
    path = _public("g2pM/np_ckpt.pkl")
    theirs = _module(monkeypatch, "g2pM.g2pM", _public("g2pM/g2pM.py")).G2pM()
    kept, layer = [], theirs.fc_layer
    theirs.fc_layer = lambda hidden: kept.append(layer(hidden)) or kept[-1]
    loaded = load(path, source=recipe_yaml.read("g2pm").source)
    tokens = np.random.default_rng(0).integers(1, 5398, (1, 23))
    theirs.predict(tokens, list(range(23)))
    ours = teacher_network(loaded.spec, loaded.weights)(torch.from_numpy(tokens).t()).y[:, 0]
    assert_close(ours, torch.from_numpy(kept[0]).float())


@pytest.mark.nightly
def test_resemblyzers_voice_encoder():
    """Against torch's own layers in the order of the package's forward: last h, linear, ReLU, length 1."""
    path = _public("resemblyzer/pretrained.pt")
    tensors = torch.load(path, weights_only=True, map_location="cpu")["model_state"]
    lstm, linear = torch.nn.LSTM(40, 256, 3), torch.nn.Linear(256, 256)
    for name, module in (("lstm.", lstm), ("linear.", linear)):
        module.load_state_dict({key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)})
    x = torch.rand(160, 3, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = torch.relu(linear(lstm(x)[1][0][-1]))
    loaded = load(path, source=recipe_yaml.read("resemblyzer").source)
    assert_close(teacher_network(loaded.spec, loaded.weights)(x).y, raw / raw.norm(dim=1, keepdim=True))


@pytest.mark.nightly
def test_g2p_ens_arrays():
    """Against torch's own GRUs, the decoder fed with given phonemes."""
    path = _public("g2p_en/checkpoint20.npz")
    with np.load(path) as file:
        w = {name: torch.from_numpy(file[name]).float() for name in file.files}
    states = []
    x, fed = (torch.randint(1, n, (9, 3), generator=torch.Generator().manual_seed(n)) for n in (29, 74))
    for side, tokens in (("enc", x), ("dec", fed)):
        gru = torch.nn.GRU(256, 256)
        gru.load_state_dict({f"{kind}_{part}_l0": w[f"{side}_{kind[0]}_{part}"] for kind in ("weight", "bias") for part in ("ih", "hh")})
        with torch.no_grad():
            states.append(gru(w[f"{side}_emb"][tokens], *(states[-1][1:] if states else ())))
    loaded = load(path, source=recipe_yaml.read("g2p").source)
    ours = teacher_network(loaded.spec, loaded.weights)(x, decoder_input=fed).y
    assert_close(ours, states[1][0] @ w["fc_w"].t() + w["fc_b"])


# --- every public file through the command line, as it is shipped ------------------------------------------------------------------


class Case(NamedTuple):
    """A file, and the knobs of docs/public-networks.md that it needs."""

    file: str
    knobs: str = ""
    steps: int = 24  # of the sequences made up for it; networks of fixed length say theirs


CASES = {
    "g2p": Case("g2p_en/checkpoint20.npz", "--recipe g2p.yaml"),
    "vad-jit": Case("silero_vad/data/silero_vad.jit", "--recipe silero_vad.yaml"),
    "vad-onnx": Case("silero_vad/data/silero_vad.onnx", "--set source.inputs.sr=16000 --set source.input_shape=[576]"),
    "vad-op15": Case("silero_vad/data/silero_vad_16k_op15.onnx", "--set source.input_shape=[576]"),
    "vad-sequence": Case("silero_vad/data/silero_vad_16k_sequence.onnx"),
    "dga": Case("dgaintel/domain_classifier_model.h5"),
    "text": Case("textgenrnn/textgenrnn_weights.hdf5", "--recipe textgenrnn.yaml"),
    "voice": Case("resemblyzer/pretrained.pt", "--recipe resemblyzer.yaml"),
    **{
        f"words-{size}": Case(
            f"chars2vec/trained_models/eng_{size}/weights.h5",
            "--recipe chars2vec.yaml"
            + (f" --set source.keras.1.name=lstm_{first} --set source.keras.2.name=lstm_{first + 1}" if size != 150 else ""),
        )
        for size, first in ((50, 1), (100, 3), (150, 5), (200, 1), (300, 1))
    },
    "polyphone": Case("g2pM/np_ckpt.pkl", "--recipe g2pm.yaml"),
    "diacritics": Case("diacritize/assets/bilstm_best.pt", "--recipe diacritics.yaml"),
}
SHORT = "train.steps=6 train.max_steps=6 train.evaluate_every=3 train.batch_size=4 gates.copies=1 data.valid=0.25 data.test=0.25"


def _call(*args: Any) -> str:
    result = CliRunner().invoke(cli.main, [str(a) for a in args])
    assert result.exit_code == 0, result.output
    return result.stdout


def _random_data(path: Path, shown: dict[str, Any], case: Case) -> None:
    """Inputs of the shape that `inspect` shows, and targets where a network without them would have nothing to learn from."""
    random, decode = np.random.default_rng(0), shown["decode"]
    entry = shown["sections"]["encoder" if decode else "main"]
    steps = (entry["graph"] or {}).get("steps") or case.steps
    if entry["embedding"]:
        inputs = random.integers(0, entry["embedding"]["num_embeddings"], (16, steps))
    else:
        shape = entry["graph"]["input_shape"] if entry["graph"] else [entry["layers"][0]["input_size"]]
        inputs = random.normal(size=(16, steps, *shape)).astype(np.float32)
    arrays = {"inputs": inputs}
    if decode:
        arrays["targets"] = np.concatenate([random.integers(4, 74, (16, 6)), np.full((16, 1), decode["end"])], 1)
    elif "textgenrnn" in case.knobs:
        arrays["targets"] = random.integers(1, 465, 16)
    elif "g2pm" in case.knobs:
        arrays["targets"] = random.integers(0, 876, inputs.shape)
    np.savez(path, **arrays)


@pytest.mark.nightly
@pytest.mark.parametrize("name", CASES)
def test_converts_as_shipped(tmp_path, name):
    case = CASES[name]
    path, knobs, data = _public(case.file), case.knobs.split(), tmp_path / "data.npz"
    shown = json.loads(_call("inspect", path, *knobs, "--json"))
    assert shown["reasons"] == []
    _random_data(data, shown["recognised"], case)
    short = [part for knob in SHORT.split() for part in ("--set", knob)]
    assert "layer" in _call("convert", path, *knobs, *short, "--data", data, "--plan")
    report = json.loads(_call("convert", path, *knobs, *short, "--data", data, "--out", tmp_path / "OUT", "--json"))
    assert report["teacher"]["n"] == report["binary"]["n"] > 0
    assert np.isfinite([report["teacher"]["metric"], report["binary"]["metric"], report["drop"]["value"]]).all()
    assert all(gate["binary"] for gate in report["gates"])
    assert 0 < report["density"]["weights_touched"] <= 1
    assert (tmp_path / "OUT" / "model.safetensors").exists()


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["silero_vad.jit", "silero_vad.onnx", "silero_vad_16k_op15.onnx"])
def test_what_inspect_prints_can_be_pasted(tmp_path, name):
    """TorchScript: the LSTM alone, whose features would be the data; ONNX: the whole network."""
    path = _public(f"silero_vad/data/{name}")
    (tmp_path / "recipe.yaml").write_text(json.loads(_call("inspect", path, "--json"))["source"])
    assert json.loads(_call("inspect", path, "--recipe", tmp_path / "recipe.yaml", "--json"))["reasons"] == []


def test_the_page_of_public_networks_has_every_command():
    page = (Path(__file__).parent.parent / "docs" / "public-networks.md").read_text(encoding="utf-8")
    for name, case in CASES.items():
        assert case.file.rsplit("/", 1)[1] in page, name
        assert case.knobs in page, name
