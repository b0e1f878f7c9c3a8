"""Exported files against the packed network: onnxruntime takes the same decisions, nn.LSTM and nn.GRU give the same outputs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tolerances import assert_close
from torch import nn

from rnn2bin import loaders, pack, runtime
from rnn2bin.cells.network import Network, teacher_network
from rnn2bin.cli import main
from rnn2bin.errors import UnsupportedError, UsageError
from rnn2bin.export import export
from rnn2bin.spec import DecodeSpec, EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

B, T, WIDTH, HIDDEN, OUT = 3, 9, 5, 7, 4
MARGIN = 1e-4  # of a pre-activation: where decisions may differ


def section(
    cell: str = "lstm", *, layers: int = 2, embedding: Any = None, readout: str = "all", head: str = "none", **options: Any
) -> RnnSpec:
    width = embedding.embedding_dim if embedding else WIDTH
    stack: list[LayerSpec] = []
    for _ in range(layers):
        stack.append(LayerSpec(cell, stack[-1].output_size if stack else width, HIDDEN, **options))
    return RnnSpec({"main": SectionSpec(tuple(stack), embedding, (LinearSpec(stack[-1].output_size, OUT, True, head),), readout)})


def student(spec: RnnSpec, *, levels: str = "learned", soft: str = "", seed: int = 0, open_only: str = "") -> Network:
    """Random weights, every number one that fp16 holds; `soft`: a gate left as it was; `open_only`: the gate that alone learns a level."""
    torch.manual_seed(seed)
    binary = {name: tuple(g != soft for g in layer.kind.gate_names) for name, layer in spec.cell_names()}
    network = Network(spec, binary, levels=levels).requires_grad_(False)
    for name, p in network.named_parameters():
        side = name.rpartition(".")[2]
        p.copy_(
            {"lo": torch.rand(p.shape) * 0.4, "hi": 0.6 + torch.rand(p.shape) * 0.4}[side]
            if "levels" in name
            else torch.randn(p.shape) * 0.5
        )
    for cell in network.cells().values():
        if cell.layer.shared > 1:
            row = cell.tensor("gates.row")
            row.copy_(torch.randint(cell.layer.gate_rows(cell.layer.shared), row.shape))
        if open_only and levels == "learned":
            for k, gate in enumerate(cell.layer.kind.gate_names):
                cell.levels.lo[k] = 0
                cell.levels.hi[k] = cell.levels.hi[k] if gate == open_only else 1
    network.project_levels()
    for p in network.parameters():
        p.copy_(p.half())
    return network.eval()


def packed(network: Network, folder: Path) -> Path:
    folder.mkdir(parents=True)
    pack.write_model(network, folder, provenance={}, task={})
    return folder


def floats(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def session(proto: Any) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(
        proto.SerializeToString() if hasattr(proto, "graph") else str(proto), options, providers=["CPUExecutionProvider"]
    )


def run(path: Path, **feeds: Any) -> dict[str, torch.Tensor]:
    one = session(path)
    made = one.run(None, {k: np.asarray(v) for k, v in feeds.items()})
    return {out.name: torch.from_numpy(np.array(y)) for out, y in zip(one.get_outputs(), made, strict=True)}


TOKENS, ONE_HOT = EmbeddingSpec(11, WIDTH), EmbeddingSpec(11, 11, one_hot=True)
NETWORKS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"cell": "lstm"}, {}),
    ({"cell": "lstm", "copies": 3}, {}),
    ({"cell": "lstm", "copies": 2, "proj_size": 4, "directions": 2}, {}),
    ({"cell": "lstm", "embedding": TOKENS, "head": "softmax"}, {"levels": "strict"}),
    ({"cell": "lstm", "embedding": ONE_HOT, "head": "log_softmax"}, {"soft": "o"}),
    ({"cell": "lstm", "activation": "relu", "hard_sigmoid": 0.4}, {"soft": "f"}),
    ({"cell": "gru", "directions": 2, "readout": "last", "head": "relu_l2"}, {}),
    ({"cell": "gru", "copies": 3, "readout": "mean", "head": "tanh"}, {}),
    ({"cell": "gru", "readout": "final", "directions": 2, "head": "sigmoid"}, {"soft": "z"}),
    ({"cell": "gru_reset_before", "copies": 2, "readout": "max"}, {}),
    ({"cell": "gru_reset_before", "directions": 2}, {"levels": "strict"}),
    ({"cell": "gru_reset_before", "activation": "softsign", "readout": "final"}, {}),
    ({"cell": "lstm_peephole"}, {}),
    ({"cell": "lstm_peephole", "copies": 3, "clip": 0.7, "cell_clip": 0.5}, {"soft": "f"}),
    ({"cell": "lstm_peephole_full"}, {}),
    ({"cell": "lstm_peephole_full", "copies": 3, "clip": 0.7}, {"soft": "f"}),
    ({"cell": "lstm_peephole", "copies": 2, "proj_size": 4, "directions": 2, "proj_clip": 0.3}, {}),
    ({"cell": "lstm_coupled", "copies": 3, "directions": 2}, {}),
    ({"cell": "lstm_coupled", "embedding": TOKENS, "clip": 0.7}, {"levels": "strict", "soft": "i"}),
    ({"cell": "lstm_coupled_peephole", "copies": 2, "activation": "softsign", "hard_sigmoid": 0.4}, {"soft": "o"}),
    ({"cell": "lstm", "clip": 0.7, "cell_clip": 0.5}, {"soft": "o"}),
    ({"cell": "gru", "clip": 0.7, "copies": 2}, {"soft": "z"}),
    ({"cell": "gru_reset_before", "clip": 0.7}, {"soft": "r"}),
    ({"cell": "gru_output", "clip": 0.7, "copies": 3, "directions": 2}, {"soft": "r"}),
    ({"cell": "gru_output", "embedding": TOKENS, "head": "softmax"}, {"levels": "strict"}),
    ({"cell": "lstm", "copies": 2, "shared": 4, "shared_inputs": 4, "directions": 2}, {}),
    ({"cell": "gru_output", "copies": 3, "shared": 3}, {}),
]


def sample(spec: RnnSpec, steps: int = T, batch: int = B) -> torch.Tensor:
    if spec.main.embedding:
        return torch.randint(spec.main.embedding.num_embeddings, (steps, batch), generator=torch.Generator().manual_seed(1))
    return floats(steps, batch, *spec.main.input_shape)


@pytest.mark.parametrize(("options", "how"), NETWORKS, ids=lambda v: "-".join(map(str, v.values())))
def test_onnxruntime_gives_the_packed_networks_outputs(options, how, tmp_path):
    model = runtime.load(packed(student(section(**options), **how), tmp_path / "out"), backend="torch")
    export(tmp_path / "out", to="onnx", out=tmp_path / "m.onnx")
    for steps, batch in ((T, B), (1, 1), (4, 2)):
        x = sample(model.spec, steps, batch)
        assert_close(run(tmp_path / "m.onnx", x=x)["y"], model(x)[0])
    x, lengths = sample(model.spec), torch.tensor([9, 2, 5])
    assert_close(run(tmp_path / "m.onnx", x=x, lengths=lengths)["y"], model(x, lengths=lengths)[0])


@pytest.mark.parametrize("cell", ["lstm", "gru", "lstm_coupled_peephole"])
def test_a_sequence_may_be_cut(cell, tmp_path):
    model = runtime.load(packed(student(section(cell, copies=2)), tmp_path / "out"), backend="torch")
    export(tmp_path / "out", to="onnx", out=tmp_path / "m.onnx")
    x = sample(model.spec)
    first = run(tmp_path / "m.onnx", x=x[:4])
    states = {name.removesuffix(".out"): value for name, value in first.items() if name.endswith(".out")}
    assert len(states) == 2 * len(model.spec.main.layers[0].kind.states)
    second = run(tmp_path / "m.onnx", x=x[4:], **states)
    assert_close(torch.cat([first["y"], second["y"]]), model(x)[0])


def with_bits(path: Path) -> Any:
    """The exported model with every gate's bits (T,B,n·H) among its outputs: `CELL.bits.K`."""
    proto = onnx.load(path)
    for node in [n for n in proto.graph.node if n.op_type == "Scan"]:
        body = node.attribute[0].g if node.attribute[0].name == "body" else node.attribute[1].g
        for k, gate in enumerate([n for n in body.node if n.op_type == "Greater"]):
            body.output.append(onnx.helper.make_tensor_value_info(gate.output[0], onnx.TensorProto.BOOL, ["B", "H"]))
            node.output.append(f"{body.name}.bits.{k}")
            proto.graph.output.append(onnx.helper.make_tensor_value_info(node.output[-1], onnx.TensorProto.BOOL, ["T", "B", "H"]))
    return proto


def flips(model: Any, path: Path, x: torch.Tensor) -> tuple[int, int]:
    """Step by step from the oracle's states: how many decisions differ, of how many; one outside the margin fails."""
    one = session(with_bits(path))
    names, count, total, state = [out.name for out in one.get_outputs()], 0, 0, None
    section = model.spec.main
    for t in range(len(x)):
        feeds: dict[str, np.ndarray] = {"x": x[t : t + 1].numpy()}
        for k, layer in enumerate(state or []):
            kind = section.layers[k].kind
            feeds |= {f"layers.{k}.fwd.{name}": s.numpy() for name, s in zip(kind.states, layer[0], strict=True)}
        made = dict(zip(names, one.run(None, feeds), strict=True))
        out = model.network(x[t : t + 1], state)
        for k, pre in enumerate(out.pre):
            for gate in range(pre.shape[2]):
                differ = torch.from_numpy(made[f"layers.{k}.fwd.bits.{gate}"]) != (pre[:, :, gate] > 0)
                assert not bool((pre[:, :, gate].abs()[differ] > MARGIN).any())
                count, total = count + int(differ.sum()), total + differ.numel()
        assert_close(torch.from_numpy(made["y"]), out.y)
        state = out.state
    return count, total


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_output", "gru_reset_before", "lstm_peephole", "lstm_coupled_peephole"])
def test_every_decision_is_the_oracles(cell, tmp_path):
    model = runtime.load(packed(student(section(cell, copies=2)), tmp_path / "out"), backend="torch")
    export(tmp_path / "out", to="onnx", out=tmp_path / "m.onnx")
    count, total = flips(model, tmp_path / "m.onnx", sample(model.spec, 40))
    assert total == 40 * B * 2 * HIDDEN * 2 * len(model.spec.main.layers[0].kind.gates)
    assert count == 0


def test_what_stands_around_layers_is_exported_too(tmp_path):
    import test_loaders_onnx as networks

    for k, kind in enumerate(networks.MODULES):
        torch.manual_seed(4)
        loaded = loaders.load(networks.exported(kind().eval(), tmp_path / f"{k}.onnx", dynamo=False))
        network = Network(loaded.spec, {name: (True,) * len(layer.kind.gates) for name, layer in loaded.spec.cell_names()}).requires_grad_(
            False
        )
        network.load_state_dict(loaded.weights, strict=False)
        model = runtime.load(packed(network, tmp_path / f"out{k}"), backend="torch")
        export(tmp_path / f"out{k}", to="onnx", out=tmp_path / f"out{k}.onnx")
        x = sample(model.spec)
        assert_close(run(tmp_path / f"out{k}.onnx", x=x)["y"], model(x)[0])


def test_the_file_is_about_as_large_as_what_was_packed(tmp_path):
    spec = RnnSpec({"main": SectionSpec((LayerSpec("lstm", 64, 128, copies=4),))})
    packed(student(spec), tmp_path / "out")
    written = export(tmp_path / "out", to="onnx", out=tmp_path / "m.onnx")
    assert written["bytes"] < 1.1 * (tmp_path / "out" / "model.safetensors").stat().st_size


STATE_DICTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"cell": "lstm", "readout": "last"}, {"levels": "strict"}),
    ({"cell": "lstm", "directions": 2, "readout": "final"}, {"open_only": "o"}),
    ({"cell": "lstm", "directions": 2, "proj_size": 4}, {"open_only": "o"}),
    ({"cell": "gru", "embedding": TOKENS}, {"open_only": "r"}),
    ({"cell": "gru", "directions": 2, "readout": "mean"}, {"levels": "strict", "soft": "z"}),
]


@pytest.mark.parametrize(("options", "how"), STATE_DICTS, ids=lambda v: "-".join(map(str, v.values())))
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_pytorchs_own_cells_give_the_same(options, how, suffix, tmp_path):
    model = runtime.load(packed(student(section(**options), **how), tmp_path / "out"), backend="torch")
    written = export(tmp_path / "out", to="torch", out=tmp_path / f"m{suffix}")
    if suffix == ".pt":
        tensors = torch.load(tmp_path / "m.pt", weights_only=True)
    else:
        from safetensors.torch import load_file

        tensors = load_file(tmp_path / "m.safetensors")
    layer = model.spec.main.layers[0]
    kind = nn.LSTM if layer.cell == "lstm" else nn.GRU
    more = {"proj_size": layer.proj_size} if layer.proj_size else {}
    rnn = kind(WIDTH, HIDDEN, 2, bidirectional=layer.directions == 2, **more).requires_grad_(False)
    rnn.load_state_dict({k.removeprefix("rnn."): v for k, v in tensors.items() if k.startswith("rnn.")})
    x = sample(model.spec, 20)
    y, states = rnn(nn.functional.embedding(x, tensors["embedding.weight"]) if model.spec.main.embedding else x)
    h = states[0] if kind is nn.LSTM else states
    read = {"all": y, "last": y[-1], "mean": y.mean(0), "final": torch.cat([h[-2], h[-1]], -1)}[options.get("readout", "all")]
    assert_close(read @ tensors["head.0.weight"].t() + tensors["head.0.bias"], model(x)[0])
    assert any(kind.__name__ in line for line in written["meaning"])


def test_the_state_dict_is_read_back_as_the_same_network(tmp_path, monkeypatch):
    monkeypatch.setattr(loaders, "HALF", math.inf)  # gates that are nearly steps have weights that fp16 does not hold
    model = runtime.load(packed(student(section("lstm"), open_only="o"), tmp_path / "out"), backend="torch")
    export(tmp_path / "out", to="torch", out=tmp_path / "m.pt")
    loaded = loaders.load(tmp_path / "m.pt")
    x = sample(model.spec, 20)
    assert_close(teacher_network(loaded.spec, loaded.weights)(x).y, model(x)[0])


@pytest.mark.parametrize(
    ("spec", "how", "match"),
    [
        (section("lstm"), {}, "learned levels i.hi, f.lo, f.hi have no place"),
        (section("lstm", copies=2), {}, "2 decisions a unit"),
        (section("gru_reset_before"), {}, "nn.GRU cannot"),
        (section("gru_output"), {"levels": "strict"}, "has an output gate"),
        (section("lstm", activation="relu"), {}, "other activations"),
        (section("gru"), {}, "learned levels z.lo"),
        (section("lstm_peephole"), {"levels": "strict"}, "peepholes, or one decision"),
        (section("lstm_coupled"), {"levels": "strict"}, "peepholes, or one decision"),
        (section("rnn_minimal"), {"levels": "strict"}, "has no rnn_minimal"),
        (section("lstm", cell_clip=1.0), {"levels": "strict"}, "clip nothing"),
    ],
)
def test_what_pytorchs_cells_cannot_hold_is_said(spec, how, match, tmp_path):
    packed(student(spec, **how), tmp_path / "out")
    with pytest.raises(UnsupportedError, match=match):
        export(tmp_path / "out", to="torch", out=tmp_path / "m.pt")
    assert not list(tmp_path.glob("m.pt*"))


def test_an_encoder_decoder_is_refused(tmp_path):
    part = SectionSpec((LayerSpec("gru", 11, HIDDEN),), ONE_HOT, (LinearSpec(HIDDEN, 11),))
    spec = RnnSpec({"encoder": SectionSpec(part.layers, ONE_HOT), "decoder": part}, DecodeSpec(1, 2, 5))
    packed(student(spec), tmp_path / "out")
    for to in ("onnx", "torch"):
        with pytest.raises(UnsupportedError, match="encoder–decoder"):
            export(tmp_path / "out", to=to, out=tmp_path / ("m.onnx" if to == "onnx" else "m.pt"))


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packed(student(section("lstm"), levels="strict"), tmp_path / "out")
    result = CliRunner().invoke(main, ["export", "out", "--to", "onnx"])
    assert result.exit_code == 0, result.output
    assert "y (T,B,O)" in result.output
    assert (tmp_path / "out.onnx").is_file()
    result = CliRunner().invoke(main, ["export", "out", "--to", "torch", "--json"])
    assert json.loads(result.output)["file"] == "out.pt"
    again = CliRunner().invoke(main, ["export", "out", "--to", "onnx"])
    assert (again.exit_code, "give a new file" in again.output) == (2, True)
    assert CliRunner().invoke(main, ["export", "nothing", "--to", "onnx"]).exit_code == 2
    with pytest.raises(UsageError, match=r"ending in \.onnx"):
        export(tmp_path / "out", to="onnx", out=tmp_path / "m.pt")


def test_cells_of_other_families_are_not_exported_to_onnx(tmp_path):
    from rnn2bin.export import onnx_file

    with pytest.raises(UnsupportedError, match="rnn_residual: such cells are not exported"):
        onnx_file.write(student(section("rnn_residual")), suffix=".onnx")
