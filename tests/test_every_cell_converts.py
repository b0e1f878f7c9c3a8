"""Every row of `kinds.CELLS` from a float network trained from scratch to a packed directory that both backends run; and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_every_cell import gated
from test_runtime_native import built
from tolerances import assert_close

import rnn2bin
from rnn2bin.cells import FloatNetwork
from rnn2bin.cells.network import teacher_network
from rnn2bin.distill.window import run_cell
from rnn2bin.errors import RecipeError, UnsupportedError
from rnn2bin.kinds import CELLS
from rnn2bin.loaders import load
from rnn2bin.recipe import Source

I, H, O = 6, 6, 3  # noqa: E741
every = pytest.mark.parametrize("name", CELLS)
QUICK = ["train.steps=6", "train.max_steps=8", "train.batch_size=8", "report.controls=false"]


def network_of(name: str, **options: Any) -> FloatNetwork:
    torch.manual_seed(0)
    network = FloatNetwork(name, I, hidden_size=H, layers=2, depth=2 if CELLS[name].deep else 1, outputs=O, **options)
    with torch.no_grad():  # so that no bias is zero
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network


def output_of(loaded: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return teacher_network(loaded.spec, loaded.weights)(x).y


@every
def test_a_float_network_trains_saves_and_loads(name, tmp_path):
    network = network_of(name)
    x, target = torch.randn(5, 8, I), torch.randn(5, 8, O)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = (network(x, walk=run_cell)[0] - target).square().mean()
        loss.backward()
        assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in network.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    network.save(tmp_path / "net.safetensors")
    with torch.no_grad():
        y, _ = network(x)
    assert torch.equal(FloatNetwork.load(tmp_path / "net.safetensors")(x)[0], y)
    loaded = load(tmp_path / "net.safetensors")
    assert loaded.spec == network.spec
    assert torch.equal(output_of(loaded, x), y)


def bare(network: FloatNetwork, path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The same tensors under other names, without a header that says what they are."""
    network.save(path)
    tensors = {name.replace("main.layers.", "rnn.").replace(".fwd.", "."): t for name, t in load_file(path).items()}
    save_file(tensors, path)
    return path, tensors


@every
def test_a_bare_file_loads_by_its_cell_and_prefixes(name, tmp_path):
    network = network_of(name)
    path, _ = bare(network, tmp_path / "bare.safetensors")
    depth = 2 if CELLS[name].deep else 1
    head = [{"weight": "main.head.0.weight", "bias": "main.head.0.bias"}]
    layers = [{"prefix": f"rnn.{k}.", "depth": depth} for k in range(2)]
    loaded = load(path, source=Source.model_validate({"main": {"cell": name, "layers": layers, "head": head}}))
    x = torch.randn(5, 2, I)
    with torch.no_grad():
        assert torch.equal(output_of(loaded, x), network(x)[0])


@pytest.mark.parametrize("name", [name for name, kind in CELLS.items() if not kind.deep])
def test_rows_in_pytorchs_manner(name, tmp_path):
    """Gates in order, the candidate before o or at the end; two vectors of biases, which a reset-after GRU alone must keep apart."""
    network, kind = network_of(name), CELLS[name]
    _, tensors = bare(network, tmp_path / "x.safetensors")
    order = list(kind.gate_names)
    order.insert(order.index("o") if "o" in order else len(order), "candidate")
    file, layers = {k: t for k, t in tensors.items() if "head" in k}, []
    for k in range(2):
        own = {n.removeprefix(f"rnn.{k}."): t for n, t in tensors.items() if n.startswith(f"rnn.{k}.")}
        block = lambda leaf, gate, own=own: (
            own[f"candidate.{leaf}"] if gate == "candidate" else own[f"gates.{leaf}"].split(H)[kind.gate_names.index(gate)]
        )
        file[f"{k}.ih"] = torch.cat([block("weight_ih", gate) for gate in order])
        if kind.recurrent:
            file[f"{k}.hh"] = torch.cat([block("weight_hh", gate) for gate in order])
        whole = torch.cat([block("bias", gate) for gate in order])
        hidden = torch.randn_like(whole)
        if kind.candidate_bias_hh:
            apart = slice(order.index("candidate") * H, (order.index("candidate") + 1) * H)
            wanted = whole[apart].clone()
            hidden[apart] = own["candidate.bias_hh"]
            whole -= hidden
            whole[apart] = wanted
        else:
            whole = whole - hidden
        file |= {f"{k}.b1": whole, f"{k}.b2": hidden}
        layer = {"weight_ih": f"{k}.ih", "bias_ih": f"{k}.b1", "bias_hh": f"{k}.b2"} | ({"weight_hh": f"{k}.hh"} if kind.recurrent else {})
        if kind.peepholes:
            eyes = own["gates.peephole"].split(H)
            file |= {f"{k}.p{g}": eye.clone() for g, eye in enumerate(eyes)}
            layer["peephole"] = [f"{k}.p{g}" for g in range(len(eyes))]
        layers.append(layer)
    save_file({n: t.contiguous() for n, t in file.items()}, tmp_path / "rows.safetensors")
    head = [{"weight": "main.head.0.weight", "bias": "main.head.0.bias"}]
    loaded = load(tmp_path / "rows.safetensors", source=Source.model_validate({"main": {"cell": name, "layers": layers, "head": head}}))
    x = torch.randn(5, 2, I)
    with torch.no_grad():
        assert_close(output_of(loaded, x), network(x)[0])


def test_a_header_is_not_trusted(tmp_path):
    network = network_of("gf_lstm")
    path = tmp_path / "net.safetensors"
    network.save(path)
    tensors, spec = load_file(path), json.loads(json.dumps(rnn2bin.spec.to_dict(network.spec)))
    spec["sections"]["main"]["layers"][0]["hidden_size"] = 7
    for header, why in (
        (json.dumps(spec), "is wanted for the spec|receives"),
        ("{", "not readable|JSON"),
        ("[]", "JSON|object"),
        (json.dumps({**spec, "sections": {}}), "spec is not one"),
    ):
        save_file(tensors, path, metadata={"rnn2bin": header})
        with pytest.raises(UnsupportedError, match=why):
            load(path)
    network.save(path)
    save_file({**load_file(path), "more": torch.ones(1)}, path, metadata={"rnn2bin": json.dumps(rnn2bin.spec.to_dict(network.spec))})
    with pytest.raises(UnsupportedError, match="more"):
        load(path)


def test_a_plain_rnn_beside_an_lstm_is_carried_through(tmp_path):
    """nn.RNN between gated layers: its activation is what the file cannot say, the rest is recognised."""
    torch.manual_seed(0)
    plain, lstm, head = torch.nn.RNN(4, 5, nonlinearity="relu"), torch.nn.LSTM(5, 6), torch.nn.Linear(6, 2)
    state = {f"{n}.{k}": t for n, m in (("rnn", plain), ("lstm", lstm), ("head", head)) for k, t in m.state_dict().items()}
    torch.save(state, tmp_path / "net.pt")
    found = rnn2bin.inspect(tmp_path / "net.pt")
    assert any("tanh or relu" in reason for reason in found.reasons)
    assert "cell: rnn" in found.source
    rnn, gates = ({f"{k}_{s}": f"{n}.{k}_{s}_l0" for k in ("weight", "bias") for s in ("ih", "hh")} for n in ("rnn", "lstm"))
    layers = [{**rnn, "cell": "rnn", "activation": "relu"}, gates]
    source = Source.model_validate({"main": {"cell": "lstm", "layers": layers, "head": [{"weight": "head.weight", "bias": "head.bias"}]}})
    x = torch.randn(7, 3, 4)
    with torch.no_grad():
        wanted = head(lstm(plain(x)[0])[0])
    assert_close(output_of(load(tmp_path / "net.pt", source=source), x), wanted)


def test_a_network_without_gates_says_so(tmp_path):
    network_of("rnn").save(tmp_path / "net.safetensors")
    np.savez(tmp_path / "data.npz", inputs=np.zeros((20, 5, I), np.float32))
    with pytest.raises(RecipeError, match="no gates"):
        rnn2bin.convert(tmp_path / "net.safetensors", data=tmp_path / "data.npz", out=tmp_path / "out")


@built
@gated
def test_every_cell_converts_and_runs_on_both_backends(name, depth, tmp_path):
    """The default recipe, cut short: learned levels, four copies where a unit has gates."""
    torch.manual_seed(1)
    network = FloatNetwork(name, I, hidden_size=H, depth=depth, vocabulary=5, outputs=5)
    network.save(tmp_path / "net.safetensors")
    tokens = np.random.default_rng(0).integers(0, 5, (48, 7))
    np.savez(tmp_path / "data.npz", inputs=tokens)
    result = rnn2bin.convert(tmp_path / "net.safetensors", data=tmp_path / "data.npz", out=tmp_path / "out", overrides=QUICK, seed=0)
    report = result.report
    assert report["parity"]["flips_outside"] == 0
    assert report["parity"]["max_abs"] < 1e-5
    assert report["native"]["metric"] == pytest.approx(report["binary"]["metric"], rel=1e-4)
    assert 0 < report["density"]["weights_touched"] <= 1
    letters = {gate["gate"] for gate in report["gates"]}
    assert letters == set(network.spec.main.layers[0].kind.gate_names)
    x = torch.from_numpy(tokens[:3].T.copy())
    (y, _), (mine, _) = (rnn2bin.load(tmp_path / "out", backend=backend)(x) for backend in ("torch", "native"))
    assert_close(mine, y)
