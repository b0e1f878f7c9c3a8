"""The real network of scripts/demo.sh, in minutes instead of ten: run that script first, it fetches the network and the words."""

from pathlib import Path

import pytest

from rnn2bin import pipeline

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
