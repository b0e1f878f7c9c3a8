"""The benchmark's arithmetic and its JSON, on a tiny network and few steps; times are not looked at."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from click.testing import CliRunner
from test_runtime_native import network_of, packed

from rnn2bin import bench, cli
from rnn2bin.errors import UsageError
from rnn2bin.runtime import library, native_backend

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


@built
def test_a_sequence_begins_from_the_zero_state(tmp_path):
    """Sequences were once one long one: the state of one went into the next, and other weights were read than where networks are used."""
    network = network_of("lstm", head=False)
    path = packed(network, tmp_path / "OUT")
    lengths, values = [3, 1, 5], np.random.default_rng(0).normal(size=(3, 5, 5)).astype(np.float32)
    np.savez(tmp_path / "data.npz", inputs=values, lengths=np.array(lengths))
    data = bench.Inputs.read(tmp_path / "data.npz", network.spec, None)
    assert (data.lengths, data.values.shape) == ((3, 1, 5), (9, 5))
    model = native_backend.load(path)
    wanted = [model(row[:n, None])[0] for row, n in zip(values, lengths, strict=True)]
    for most, firsts in ((2, [1, 0, 1, 1, 0, 0]), (1, [1, 0, 0, 1, 1, 0, 0, 0, 0]), (100, [1, 1, 1])):
        calls = bench.calls_of(data, network.spec, most=most)
        assert [call.first for call in calls] == firsts
        ours, outputs = bench.Ours(model, calls), []
        for _ in range(2):  # again from the first
            for call in calls:
                assert ours.run() == len(call.x)
                outputs.append(ours.y[: len(call.x)].copy())
        assert np.array_equal(np.concatenate(outputs), np.concatenate(wanted * 2))


def test_a_sequence_that_must_be_seen_whole_is_one_call():
    spec = network_of("lstm").spec
    many = bench.Inputs(np.zeros((9, 5)), (3, 6))
    assert [(len(call.x), call.first) for call in bench.calls_of(many, spec, most=2, whole=True)] == [(3, True), (6, True)]
    one = bench.Inputs(np.zeros((9, 5)))
    assert [(len(call.x), call.first) for call in bench.calls_of(one, spec, most=4, whole=True)] == [(4, True), (4, True)]
    assert [call.x.shape for call in bench.calls_of(one, spec, most=4, batch=2)] == [(4, 2, 5)]
    for data, batch in ((many, 2), (bench.Inputs(np.zeros((0, 5)), ()), 1), (one, 10)):
        with pytest.raises(UsageError, match="bench: "):
            bench.calls_of(data, spec, most=4, batch=batch)


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
    monkeypatch.setattr(bench.Settings, "__init__", lambda self, against: vars(self).update(against=against, blocks=2, steps=4, seed=0))
    np.savez(tmp_path / "data.npz", inputs=np.ones((2, 110, 5), np.float32))
    done = CliRunner().invoke(cli.main, ["bench", str(path), "--data", str(tmp_path / "data.npz"), "--against", "", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert set(document["machine"]) >= {"cpu", "isa", "versions", "read_gb_per_s"}
    assert [row["compute"] for row in document["rows"]] == ["auto", "auto", "fp16", "fp16", "int8", "int8"]
    refused = CliRunner().invoke(cli.main, ["bench", str(path), "--against", "abacus"])
    assert refused.exit_code == 2
    assert "abacus" in refused.output
