"""Readers, canonical layout and refusals: every shape of nn.LSTM and nn.GRU through every format."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tolerances import assert_close
from torch import nn

from rnn2bin.cells.network import teacher_network
from rnn2bin.errors import Rnn2binError, UnsafeError, UnsupportedError, UsageError
from rnn2bin.loaders import Loaded, inspect, load
from rnn2bin.recipe import Source
from rnn2bin.spec import DIRECTIONS

torch.set_num_threads(1)

IN, H, R = 3, 5, 2  # odd and different, so that a transposed or swapped block cannot pass
Tensors = dict[str, torch.Tensor]

SHAPES = [
    (cell, layers, both, bias, proj)
    for cell in ("lstm", "gru")
    for layers in (1, 2)
    for both in (False, True)
    for bias in (True, False)
    for proj in ((0, R) if cell == "lstm" else (0,))
]


def module(cell: str, layers: int = 1, both: bool = False, bias: bool = True, proj: int = 0) -> nn.RNNBase:
    torch.manual_seed(layers + 10 * both + 100 * bias + 1000 * proj)
    if cell == "lstm":
        made: nn.RNNBase = nn.LSTM(IN, H, layers, bias=bias, bidirectional=both, proj_size=proj)
    else:
        made = nn.GRU(IN, H, layers, bias=bias, bidirectional=both)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def state(net: nn.Module) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def rows(values: torch.Tensor, blocks: list[int]) -> torch.Tensor:
    """Row by row: unit j of block k stands at k*H + j."""
    return torch.stack([values[k * H + j] for k in blocks for j in range(H)])


def expected(tensors: Tensors, cell: str, layers: int, both: bool) -> Tensors:
    """The canonical layout, written a second time and by hand."""
    gates, candidate = {"lstm": [0, 1, 3], "gru": [0, 1]}[cell], [2]
    out = {}
    for layer in range(layers):
        for at in range(1 + both):
            end = f"_l{layer}" + ("_reverse" if at else "")
            to = f"main.layers.{layer}.{DIRECTIONS[at]}"
            zeros = torch.zeros(tensors["weight_hh" + end].shape[0])
            b_ih, b_hh = (tensors.get(name + end, zeros) for name in ("bias_ih", "bias_hh"))
            for name in ("weight_ih", "weight_hh"):
                out[f"{to}.gates.{name}"] = rows(tensors[name + end], gates)
                out[f"{to}.candidate.{name}"] = rows(tensors[name + end], candidate)
            out[f"{to}.gates.bias"] = rows(b_ih + b_hh, gates)
            out[f"{to}.candidate.bias"] = rows(b_ih if cell == "gru" else b_ih + b_hh, candidate)
            if cell == "gru":
                out[f"{to}.candidate.bias_hh"] = rows(b_hh, candidate)
            if "weight_hr" + end in tensors:
                out[f"{to}.projection.weight"] = tensors["weight_hr" + end]
    return out


def write(path: Path, tensors: Tensors) -> Path:
    """Save by the path's name: a suffix, or a directory `hf`, `hf-bin`, `hf-shards`."""
    if path.name.startswith("hf"):
        path.mkdir()
        (path / "config.json").write_text('{"model_type": "mine"}')
        if path.name == "hf":
            save_file(tensors, path / "model.safetensors")
        elif path.name == "hf-bin":
            torch.save(tensors, path / "pytorch_model.bin")
        else:
            names = sorted(tensors)
            parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
            for file, some in parts.items():
                save_file({name: tensors[name] for name in some}, path / file)
            weight_map = {name: file for file, some in parts.items() for name in some}
            (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    elif path.suffix == ".safetensors":
        save_file(tensors, path)
    elif path.suffix == ".npz":
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        np.savez(path, **arrays)
    else:
        torch.save(tensors, path)
    return path


def same(loaded: Loaded, wanted: Tensors) -> None:
    assert loaded.weights.keys() == wanted.keys() == loaded.spec.tensors().keys()
    for name, tensor in loaded.weights.items():
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert tuple(tensor.shape) == loaded.spec.tensors()[name]
        assert torch.equal(tensor, wanted[name]), name


def source(**values: Any) -> Source:
    return Source.model_validate(values)


# -- layout --


@pytest.mark.parametrize(("cell", "layers", "both", "bias", "proj"), SHAPES)
def test_canonical_layout(tmp_path: Path, cell: str, layers: int, both: bool, bias: bool, proj: int) -> None:
    net = module(cell, layers, both, bias, proj)
    loaded = load(write(tmp_path / "m.pt", state(net)))
    same(loaded, expected(state(net), cell, layers, both))
    assert [layer.proj_size for layer in loaded.spec.main.layers] == [proj] * layers
    assert loaded.readout_stated is False


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("cell", "layers", "both", "bias", "proj"), SHAPES)
def test_outputs_are_torchs(tmp_path: Path, cell: str, layers: int, both: bool, bias: bool, proj: int) -> None:
    network = pytest.importorskip("rnn2bin.cells.network")
    net = module(cell, layers, both, bias, proj)
    loaded = load(write(tmp_path / "m.pt", state(net)))
    x = torch.randn(7, 2, IN)
    with torch.no_grad():
        wanted, got = net(x)[0], network.teacher_network(loaded.spec, loaded.weights)(x).y
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.bin", "m.ckpt", "m.safetensors", "m.npz", "hf", "hf-bin", "hf-shards"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_every_format(tmp_path: Path, name: str, cell: str) -> None:
    net = module(cell, 2, True)
    loaded = load(write(tmp_path / name, state(net)))
    same(loaded, expected(state(net), cell, 2, True))
    provenance = loaded.provenance
    assert provenance["file"] == name
    assert len(provenance["sha256"]) == 64
    assert provenance["bytes"] == sum(entry["bytes"] for entry in provenance["files"]) > 0
    assert json.loads(json.dumps(inspect(tmp_path / name).to_dict()))["reasons"] == []


def test_reset_before_adds_both_biases(tmp_path: Path) -> None:
    tensors = state(module("gru"))
    loaded = load(write(tmp_path / "m.pt", tensors), source=source(cell="gru_reset_before"))
    assert loaded.spec.main.layers[0].cell == "gru_reset_before"
    wanted = tensors["bias_ih_l0"][2 * H :] + tensors["bias_hh_l0"][2 * H :]
    assert torch.equal(loaded.weights[f"main.layers.0.{DIRECTIONS[0]}.candidate.bias"], wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in state(module("gru")).items()}
    loaded = load(write(tmp_path / "m.safetensors", tensors))
    same(loaded, expected({name: tensor.float() for name, tensor in tensors.items()}, "gru", 1, False))


def test_old_torch_format_and_wrapper_prefixes(tmp_path: Path) -> None:
    tensors = state(module("lstm"))
    torch.save({f"module._orig_mod.{k}": v for k, v in tensors.items()}, tmp_path / "m.pt", _use_new_zipfile_serialization=False)
    same(load(tmp_path / "m.pt"), expected(tensors, "lstm", 1, False))


def test_weights_share_no_memory(tmp_path: Path) -> None:
    tensors = state(module("gru")) | {"emb.weight": torch.randn(9, IN), "out.weight": torch.randn(9, H)}
    loaded = load(write(tmp_path / "m.pt", tensors))
    pointers = [tensor.data_ptr() for tensor in loaded.weights.values()]
    assert len(set(pointers)) == len(pointers)


# -- checkpoints --


def test_checkpoint_with_optimizer(tmp_path: Path) -> None:
    net = module("lstm", 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(2, 1, IN))[0].sum().backward()
    optimizer.step()
    torch.save({"step": 7, "model_state": net.state_dict(), "optimizer_state": optimizer.state_dict()}, tmp_path / "m.pt")
    same(load(tmp_path / "m.pt"), expected(state(net), "lstm", 2, False))


def test_two_copies_are_refused_by_name_until_one_is_ignored(tmp_path: Path) -> None:
    one, two = state(module("gru")), state(module("gru"))
    torch.save({"model": one, "ema": {"shadow": {k: v + 1 for k, v in two.items()}}}, tmp_path / "m.pt")
    with pytest.raises(UnsupportedError, match=r"'model', 'ema\.shadow'"):
        load(tmp_path / "m.pt")
    same(load(tmp_path / "m.pt", source=source(ignore=["ema.*"])), expected(one, "gru", 1, False))


def test_parts_side_by_side_are_all_kept(tmp_path: Path) -> None:
    head = nn.Linear(H, 4)
    torch.save({"rnn": state(module("gru")), "head": state(head), "epoch": 3}, tmp_path / "m.pt")
    loaded = load(tmp_path / "m.pt")
    assert torch.equal(loaded.weights["main.head.0.weight"], head.weight.detach())
    assert torch.equal(loaded.weights["main.head.0.bias"], head.bias.detach())


# -- refusals --


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("how", ["torch", "old torch", "pickle-2", "pickle-5", "hf-bin"])
def test_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path, how: str) -> None:
    mark = tmp_path / "ran"
    content = {"weight_hh_l0": Malicious(f"touch {mark}")}
    path = tmp_path / "m.pt"
    if how == "hf-bin":
        (tmp_path / "hf").mkdir()
        (tmp_path / "hf" / "config.json").write_text("{}")
        torch.save(content, tmp_path / "hf" / "pytorch_model.bin")
        path = tmp_path / "hf"
    elif how.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=int(how[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    for read in (load, inspect):
        with pytest.raises(UnsafeError, match=r"posix\.system|nt\.system") as caught:
            read(path)
        assert caught.value.exit_code == 4
        assert any("state_dict()" in line for line in caught.value.reasons)
    assert not mark.exists()


def test_npz_of_objects_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", a=np.array([{}], dtype=object))
    with pytest.raises(UnsafeError, match="pickled"):
        load(tmp_path / "m.npz")


def test_expanded_tensor_is_refused(tmp_path: Path) -> None:
    torch.save({"weight_hh_l0": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "m.pt")
    with pytest.raises(UnsafeError, match="more than the file holds"):
        load(tmp_path / "m.pt")


def test_decompression_bomb_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as stream:
        for _ in range(300):
            stream.write(bytes(2**20))
    with pytest.raises(UnsafeError, match="unpack"):
        load(tmp_path / "m.npz")


def test_shards_outside_the_directory_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "hf-shards", state(module("gru")))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../b.safetensors"}}))
    with pytest.raises(UnsafeError, match="same directory"):
        load(path)


def test_already_packed_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "hf", state(module("gru")))
    (path / "config.json").write_text('{"model_type": "rnn2bin"}')
    with pytest.raises(UnsupportedError, match="already packed"):
        load(path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("m.onnx", b"\x08\x07", "no opset"),
        ("m.h5", b"\x89HDF\r\n\x1a\n", "Keras"),
        ("m.pt", b"\x89HDF\r\n\x1a\nrest", "Keras"),
        ("m.xyz", b"abc", "unknown file type"),
        ("m", b"abc", "no suffix"),
        ("m.pt", b"", "empty"),
        ("m.pt", b"some text", "not a file that torch.save wrote"),
        ("m.npz", b"some text", "archive"),
        ("m.safetensors", b"some text", "not a readable safetensors"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnsupportedError, match=says) as caught:
        load(tmp_path / name)
    assert caught.value.exit_code == 3
    assert len(caught.value.reasons) == 1


def test_arrays_under_another_name_and_zip_files_of_something_else(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", **{name: tensor.numpy() for name, tensor in state(module("gru")).items()})
    (tmp_path / "m.npz").rename(tmp_path / "weights")
    assert inspect(tmp_path / "weights").format == "npz"
    with zipfile.ZipFile(tmp_path / "other", "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(UnsupportedError, match="no suffix"):
        load(tmp_path / "other")


def test_missing_file_and_bare_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load(tmp_path / "none.pt")
    with pytest.raises(UnsupportedError, match="formats read now"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["m.pt", "m.safetensors", "m.npz"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused_in_one_line(tmp_path: Path, name: str, share: float) -> None:
    path = write(tmp_path / name, state(module("lstm")))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UnsupportedError) as caught:
        load(path)
    assert len(caught.value.reasons) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    tensors = {name: tensor.double() for name, tensor in state(module("gru")).items()}
    tensors["bias_hh_l0"][4] = value
    with pytest.raises(UnsupportedError, match=r"bias_hh_l0: 1 values are not finite"):
        load(write(tmp_path / "m.pt", tensors))


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    tensors = state(module("gru"))
    tensors["weight_ih_l0"] = tensors["weight_ih_l0"].to(torch.int8)
    with pytest.raises(UnsupportedError, match="weight_ih_l0: int8"):
        load(write(tmp_path / "m.pt", tensors))


# -- a source written by hand --

LAYER = {"weight_ih": "weight_ih_l0", "weight_hh": "weight_hh_l0", "bias_ih": "bias_ih_l0", "bias_hh": "bias_hh_l0"}


def test_explicit_source(tmp_path: Path) -> None:
    tensors = state(module("lstm")) | {"W": torch.randn(4, H), "junk.a": torch.ones(2), "junk.b": torch.ones(2)}
    given = source(main={"cell": "lstm", "layers": [LAYER], "head": [{"weight": "W"}], "readout": "last"}, ignore=["junk.*"])
    loaded = load(write(tmp_path / "m.npz", tensors), source=given)
    same(loaded, expected(tensors, "lstm", 1, False) | {"main.head.0.weight": tensors["W"]})
    assert loaded.readout_stated
    assert loaded.spec.main.readout == "last"


def test_tied_table_and_output_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = state(nn.GRU(H, H)) | {"shared": torch.randn(9, H)}
    given = source(main={"cell": "gru", "layers": [LAYER], "embedding": "shared", "head": [{"weight": "shared"}]})
    loaded = load(write(tmp_path / "m.pt", tensors), source=given)
    assert torch.equal(loaded.weights["main.embedding.weight"], loaded.weights["main.head.0.weight"])
    assert loaded.readout_stated is False


def test_one_hot_tokens(tmp_path: Path) -> None:
    given = source(main={"cell": "gru", "layers": [LAYER], "one_hot": True})
    embedding = load(write(tmp_path / "m.pt", state(module("gru"))), source=given).spec.main.embedding
    assert embedding is not None
    assert (embedding.num_embeddings, embedding.one_hot) == (IN, True)


def test_every_reason_is_listed(tmp_path: Path) -> None:
    tensors = state(module("lstm")) | {"fc.weight": torch.randn(4, H + 1), "fc.bias": torch.randn(3), "attn.weight": torch.randn(2, 2)}
    tensors["bias_ih_l0"] = torch.randn(7)
    given = source(
        main={"cell": "lstm", "layers": [LAYER | {"weight_hh": "weight_hh_0"}], "head": [{"weight": "fc.weight", "bias": "fc.bias"}]}
    )
    with pytest.raises(UnsupportedError) as caught:
        load(write(tmp_path / "m.pt", tensors), source=given)
    told = "\n".join(caught.value.reasons)
    for part in (
        "did you mean weight_hh_l0",
        "fc.bias: shape (3,), but (4,)",
        "weight_hh_l0 (20, 5)",
        "attn.weight (2, 2): looks like attention",
    ):
        assert part in told


def test_what_to_do_with_tensors_that_are_left_over_is_said_once(tmp_path: Path) -> None:
    """A network with convolutions in front leaves dozens over."""
    tensors = state(module("gru")) | {f"conv.{k}.weight": torch.randn(2, 1, 3) for k in range(9)}
    found = inspect(write(tmp_path / "m.pt", tensors))
    left = [reason for reason in found.reasons if reason.startswith("conv.")]
    assert left == [f"conv.{k}.weight (2, 1, 3): looks like convolution; no part of what was recognised" for k in range(9)]
    said = [reason for reason in found.reasons if "docs/graphs.md" in reason]
    assert len(said) == 1
    assert "left over (9)" in said[0]
    assert "# open: conv" not in found.source
    assert all(f"conv.{k}.weight" in found.source for k in range(9))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bias_ih": "bias_hh_l0"}, "used more than once"),
        ({"weight_hr": "bias_ih_l0"}, "but (any, any) is wanted for the projection"),
        ({"bias_ih": "weight_ih_l0"}, "is wanted for a bias"),
        ({"reverse": LAYER}, "used more than once"),
        ({"peephole": ["bias_ih_l0"]}, "1 peepholes given; lstm has none"),
    ],
)
def test_wrong_sources(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        load(write(tmp_path / "m.pt", state(module("lstm"))), source=source(main={"cell": "lstm", "layers": [LAYER | change]}))
    assert says in str(caught.value)


def test_peepholes_and_coupled_gates_that_a_source_names(tmp_path: Path) -> None:
    """The equations once more, in PyTorch's order of blocks: i,g,o and a peephole for each gate."""
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))
    names = {"weight_ih": "W", "weight_hh": "U", "bias_ih": "b", "peephole": ["p_i", "p_o"]}
    tensors = {"W": draw(3 * H, IN), "U": draw(3 * H, H), "b": draw(3 * H), "p_i": draw(H), "p_o": -draw(H)}
    wanted_source = source(main={"cell": "lstm_coupled_peephole", "layers": [names]})
    loaded = load(write(tmp_path / "m.safetensors", tensors), source=wanted_source)
    x, h, c, wanted = draw(6, 1, IN), torch.zeros(1, H), torch.zeros(1, H), []
    for x_t in x:
        i, g, o = (x_t @ tensors["W"].t() + h @ tensors["U"].t() + tensors["b"]).chunk(3, 1)
        i = torch.sigmoid(i + tensors["p_i"] * c)
        c = (1 - i) * c + i * torch.tanh(g)
        h = torch.sigmoid(o + tensors["p_o"] * c) * torch.tanh(c)
        wanted.append(h)
    assert_close(teacher_network(loaded.spec, loaded.weights)(x).y, torch.stack(wanted))
    for wrong in (None, ["p_i"], ["p_i", "W"]):
        other = source(main={"cell": "lstm_coupled_peephole", "layers": [names | {"peephole": wrong}]}, ignore=["p_*"])
        with pytest.raises(
            UnsupportedError, match=r"peepholes given; lstm_coupled_peephole has a tensor for each of i, o|for the peephole of o"
        ):
            load(tmp_path / "m.safetensors", source=other)


def test_widths_that_do_not_join(tmp_path: Path) -> None:
    tensors = state(module("gru")) | {"fc": torch.randn(4, H + 1)}
    given = source(main={"cell": "gru", "layers": [LAYER], "head": [{"weight": "fc"}]})
    with pytest.raises(UnsupportedError, match=rf"main\.head\.0: reads {H + 1} values but receives {H}"):
        load(write(tmp_path / "m.pt", tensors), source=given)


@pytest.mark.parametrize(
    "values",
    [
        {"main": {"cell": "gru", "layers": [LAYER]}, "decode": {"start": 0, "end": 1, "max_length": 2}},
        {"encoder": {"cell": "gru", "layers": [LAYER]}},
        {"main": {"cell": "gru", "layers": [LAYER]}, "activations": ["relu"]},
        {"activations": ["unknown"]},
    ],
)
def test_sources_that_contradict_themselves(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give either|belongs to|Input should be"):
        source(**values)


# -- whatever bytes --

SUFFIXES = [".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".npz", ".onnx", ".h5", ".what", ""]
STARTS = [b"", b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80\x04", b"\x93NUMPY", b"\x10\x00\x00\x00\x00\x00\x00\x00{"]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(suffix=st.sampled_from(SUFFIXES), start=st.sampled_from(STARTS), rest=st.binary(max_size=200))
def test_random_bytes_raise_only_our_errors(tmp_path: Path, suffix: str, start: bytes, rest: bytes) -> None:
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(start + rest)
    for read in (load, inspect):
        with pytest.raises(Rnn2binError):
            read(path)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["m.pt", "m.safetensors", "m.npz", "old.pt"]), at=st.floats(0, 0.999), value=st.integers(0, 255))
def test_a_flipped_byte_loads_or_raises_our_errors(tmp_path: Path, name: str, at: float, value: int) -> None:
    path = tmp_path / name
    if name == "old.pt":
        torch.save(state(module("gru")), path, _use_new_zipfile_serialization=False)
    else:
        write(path, state(module("gru")))
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] = value
    path.write_bytes(data)
    with contextlib.suppress(Rnn2binError):
        load(path)


def test_importing_load_does_not_import_torch() -> None:
    code = "import sys, rnn2bin.loaders; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=False).returncode == 0
