"""Pickles read as data: state dicts, modules, checkpoints with foreign objects, plain pickles, TorchScript; held against torch itself."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import pathlib
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rnn2bin.errors import UnsafeError, UnsupportedError
from rnn2bin.loaders import inspect, load, pytorch
from rnn2bin.recipe import Source

torch.set_num_threads(1)


class Net(nn.Module):
    """A class that a reader without this file could not import."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 3)
        self.rnn = nn.LSTM(3, 5, 2, bidirectional=True, batch_first=True)
        self.out = nn.Linear(10, 4)
        self.act = torch.tanh
        self.other = nn.functional.relu
        self.register_buffer("passing", torch.ones(2), persistent=False)


class Script(nn.Module):
    """Two cells, a buffer, tensors that are neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.state = torch.zeros(7)
        self.first, self.second = nn.LSTMCell(4, 4), nn.LSTMCell(4, 4)
        self.out = nn.Sequential(nn.ReLU(), nn.Linear(4, 2))
        self.register_buffer("window", torch.rand(6))
        self.sizes = [1, 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, _ = self.first(x)
        return self.out(self.second(h)[0]) + self.sizes[0] + self.state.sum() + self.window.sum() + torch.tensor([1.0, 2.0])


class Config:
    """An ordinary object."""

    def __init__(self) -> None:
        self.width, self.paths = 3, [pathlib.PurePosixPath("/data"), {"at": datetime.datetime(2026, 1, 2)}]


class Mode(enum.Enum):
    TRAIN = "train"


Point = collections.namedtuple("Point", "x y")


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in wanted.items())


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


# -- torch.save --


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("what", ["module", "state", "checkpoint"])
def test_what_torch_saves(tmp_path: Path, net: Net, what: str, new: bool, protocol: int) -> None:
    content = {"module": net, "state": net.state_dict(), "checkpoint": {"epoch": 3, "net": net, "args": argparse.Namespace(lr=0.1)}}[what]
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    same(pytorch.read(tmp_path / "m.pt"), net.state_dict())


def test_a_whole_module_loads_as_its_state_dict_does(tmp_path: Path, net: Net) -> None:
    torch.save(nn.DataParallel(net), tmp_path / "module.pt")
    torch.save(net.state_dict(), tmp_path / "state.pt")
    whole, state = load(tmp_path / "module.pt"), load(tmp_path / "state.pt")
    assert whole.spec == state.spec
    assert all(torch.equal(tensor, state.weights[name]) for name, tensor in whole.weights.items())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int64", "uint8", "bool", "complex64", "int16", "uint16"])
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    tensors = {"a": torch.arange(6).reshape(2, 3).to(getattr(torch, dtype)), "f": torch.ones(1)}
    for new in (True, False) if dtype != "uint16" else (True,):
        torch.save(tensors, tmp_path / "m.pt", _use_new_zipfile_serialization=new)
        same(pytorch.read(tmp_path / "m.pt"), tensors)


def test_views_share_their_storage_and_keep_their_strides(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    tensors = {"a": base, "t": base.t(), "row": base[2], "part": base[1::2, 1:3], "none": base[:0], "scalar": base[0, 0]}
    for new in (True, False):
        torch.save(tensors, tmp_path / "m.pt", _use_new_zipfile_serialization=new)
        same(pytorch.read(tmp_path / "m.pt"), tensors)


def test_big_endian_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"w": torch.randn(3, 2), "h": torch.randn(4).half(), "n": torch.arange(3)}
    swapped = {name: torch.from_numpy(tensor.numpy().byteswap()) for name, tensor in wanted.items()}
    monkeypatch.setattr(sys, "byteorder", "big")
    torch.save(swapped, tmp_path / "m.pt")
    monkeypatch.undo()
    same(pytorch.read(tmp_path / "m.pt"), wanted)


def test_a_quantized_tensor_is_refused_by_name(tmp_path: Path) -> None:
    for kind, tensor in {"sparse": torch.eye(2).to_sparse(), "without data": torch.empty(2, device="meta")}.items():
        torch.save({"w": tensor, "x": torch.ones(2)}, tmp_path / "m.pt")
        with pytest.raises(UnsupportedError, match=f"tensor 'w' is {kind}"):
            load(tmp_path / "m.pt")


# -- checkpoints with objects in them --


def test_a_checkpoint_with_foreign_objects(tmp_path: Path, net: Net) -> None:
    """As a training framework writes them: configuration objects, callbacks' scores, optimizer and random states."""
    optimizer = torch.optim.Adam(net.parameters())
    net.rnn(torch.randn(2, 3, 3))[0].sum().backward()
    optimizer.step()
    content = {
        "state_dict": net.state_dict(),
        "hyper_parameters": {"config": Config(), "args": argparse.Namespace(a=1), "point": Point(1, 2), "kind": Config, "set": {1, 2}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "best_k_models": {"/x": torch.tensor(0.5)}}},
        "optimizer_states": [optimizer.state_dict()],
        "score": np.float64(0.25),
        "numpy": np.random.default_rng(0).bit_generator.state,
        "default": collections.defaultdict(list, {"a": [1]}),
        "version": "2.0",
    }
    for new in (True, False):
        torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=new)
        same(pytorch.read(tmp_path / "m.ckpt"), net.state_dict())
        assert inspect(tmp_path / "m.ckpt").reasons == []


def test_a_vocabulary_of_any_size_beside_the_weights(tmp_path: Path, net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of text networks hold hundreds of thousands of words; only parts are counted, not the words in one."""
    monkeypatch.setattr("rnn2bin.loaders.objects.MOST_VISITS", 100)
    words = {f"word {k}": k for k in range(500)}
    torch.save({"model": net.state_dict(), "vocabulary": words, "names": {f"{k}": "x" for k in range(500)}}, tmp_path / "m.pt")
    same(pytorch.read(tmp_path / "m.pt"), net.state_dict())


@pytest.mark.parametrize("name", ["weights", "m.model", "m.v2"])
@pytest.mark.parametrize("new", [True, False])
def test_a_file_whose_name_does_not_tell_what_it_is(tmp_path: Path, net: Net, name: str, new: bool) -> None:
    torch.save(net.state_dict(), tmp_path / name, _use_new_zipfile_serialization=new)
    found = inspect(tmp_path / name)
    assert found.format == "pytorch"
    assert {tensor for tensor, _, _ in found.tensors} == set(net.state_dict())


def test_objects_that_hold_no_recognisable_weights_are_named_with_the_way_out(tmp_path: Path) -> None:
    torch.save(Config(), tmp_path / "m.pt")
    with pytest.raises(UnsafeError, match=r"test_loaders_pickle\.Config") as caught:
        load(tmp_path / "m.pt")
    assert caught.value.exit_code == 4
    assert [line.strip().split(" ")[0] for line in caught.value.reasons[2:5]] == ["import", "model", "torch.save(model.state_dict(),"]
    assert "numpy.savez" in caught.value.reasons[5]


def test_a_call_that_is_no_constructor_of_data_is_refused(tmp_path: Path, net: Net) -> None:
    torch.save({"state_dict": net.state_dict(), "mode": Mode.TRAIN}, tmp_path / "m.pt")
    with pytest.raises(UnsafeError, match=r"it calls .*Mode"):
        load(tmp_path / "m.pt")


# -- plain pickles --


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_arrays_and_of_tensors(tmp_path: Path, net: Net, protocol: int) -> None:
    arrays = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    arrays |= {
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big": np.arange(4, dtype=">f4"),
        "none": np.zeros((0, 3), np.float32),
    }
    path = tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps({**arrays, "names": ["a", 1, 2.5, None, True, -7, 2**70, b"x", {1}, (1, 2)]}, protocol=protocol))
    found = pytorch.read(path)
    assert list(found) == list(arrays)
    assert all(np.array_equal(found[name].numpy(), array) for name, array in arrays.items())
    path.write_bytes(pickle.dumps(net.state_dict(), protocol=protocol))
    same(pytorch.read(path), net.state_dict())


def test_a_pickle_of_python_2(tmp_path: Path) -> None:
    """Byte strings where Python 3 has text and bytes; numpy's dtype and array as its 1.x wrote them."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\ntcnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
        b"I00\nS'\\x00\\x00\\x80?\\x00\\x00\\x00@'\ntb"
    )
    (tmp_path / "m.pkl").write_bytes(b"(dp0\nS'w'\n" + array + b"s.")
    assert pytorch.read(tmp_path / "m.pkl")["w"].tolist() == [1, 2]


# -- TorchScript --


@pytest.fixture
def script(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    made: Any = torch.jit.script(Script())
    made.save(tmp_path / "m.jit")
    return tmp_path / "m.jit"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_has_the_names_and_values_of_its_state_dict(script: Path) -> None:
    wanted: Any = torch.jit.load(script)
    found = pytorch.read(script)
    assert {*found} == {*wanted.state_dict()} >= {"window", "first.weight_hh", "out.1.bias"}
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.state_dict().items())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_program_of_two_networks_gives_a_source_to_start_from(script: Path) -> None:
    import yaml

    found = inspect(script)
    assert found.recognised is None
    assert "join in 2 different orders" in found.reasons[0]
    given = Source.model_validate(yaml.safe_load(found.source)["source"])
    assert given.ignore == ["window", "second.*", "out.*"]
    weights = load(script, source=given).weights
    assert torch.equal(weights["main.layers.0.fwd.candidate.weight_ih"], pytorch.read(script)["first.weight_ih"][8:12])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_of_a_frozen_program_are_its_constants(tmp_path: Path) -> None:
    made: Any = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval())
    torch.jit.freeze(made).save(tmp_path / "m.ts")
    assert sorted(tuple(t.shape) for t in pytorch.read(tmp_path / "m.ts").values()) == [(4,), (4, 3)]
    assert all(name.startswith("constants.c") for name in pytorch.read(tmp_path / "m.ts"))
