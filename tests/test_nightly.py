"""Real networks: that of scripts/demo.sh, in minutes instead of ten (run that script first, it fetches the network and the words), and
those that a package brings (pip install --no-deps silero-vad==6.2.3)."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import assert_close

from rnn2bin import loaders, pipeline
from rnn2bin.cells.network import teacher_network
from rnn2bin.recipe import Source

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
