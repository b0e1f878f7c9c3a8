"""The benchmark's arithmetic and its JSON, on a tiny network and few steps; times are not looked at."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from click.testing import CliRunner
from test_runtime_native import network_of, packed

from rnn2bin import bench, cli
from rnn2bin.runtime import library

built = pytest.mark.skipif(library.library() is None, reason="the native runtime is not compiled here")


@built
def test_rows_have_what_the_contract_says(tmp_path):
    network = network_of("lstm", tokens="embedding", head=False)
    path, dense = packed(network, tmp_path), bench.dense_weights(network.spec)
    rows = bench.rows_of(path, "fp16", None, bench.Settings(against=("torch",), blocks=3, steps=8))
    assert {row["call"] for row in rows} == {"sequence", "stream"}
    for row in rows:
        assert 0 < row["density"] <= 1
        assert row["bytes_touched_per_step"] > 2 * row["density"] * dense
        assert set(row["rivals"]) == {"torch fp32", "torch bf16", "torch int8"}
        for rival in row["rivals"].values():
            assert rival["ci95"][0] <= rival["ratio"] <= rival["ci95"][1]


def test_ratios_are_paired():
    found = bench.against(np.array([1.0, 10.0, 100.0]), np.array([2.0, 20.0, 200.0]), 0)
    assert found["ratio"] == 2.0
    assert found["ci95"] == [2.0, 2.0]


@built
def test_the_clock_of_the_thread_counts_no_waiting():
    settings = bench.Settings(blocks=1, steps=1)
    waits = lambda: time.sleep(0.05) or 1
    found = {name: bench.interleaved({"waits": waits}, settings, clock=clock)["waits"][0] for name, clock in bench.CLOCKS.items()}
    assert found["wall"] > 50_000
    assert found["thread"] < 25_000


def test_the_command(tmp_path, monkeypatch):
    path = packed(network_of("gru"), tmp_path / "OUT")
    monkeypatch.setattr(bench, "BLOCKS", 2)
    monkeypatch.setattr(
        bench.Settings, "__init__", lambda self, against, sequence: vars(self).update(against=against, blocks=2, steps=4, seed=0)
    )
    np.savez(tmp_path / "data.npz", inputs=np.ones((2, 110, 5), np.float32))
    done = CliRunner().invoke(cli.main, ["bench", str(path), "--data", str(tmp_path / "data.npz"), "--against", "", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert set(document["machine"]) >= {"cpu", "isa", "versions", "read_gb_per_s"}
    assert [row["compute"] for row in document["rows"]] == ["auto", "auto", "fp16", "fp16", "int8", "int8"]
    refused = CliRunner().invoke(cli.main, ["bench", str(path), "--against", "abacus"])
    assert refused.exit_code == 2
    assert "abacus" in refused.output
