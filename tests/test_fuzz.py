"""Every reader against 10,000 mutated inputs, slow ones against fewer (scripts/fuzz.py), and against what honest writers can write."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import signal
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rnn2bin.errors import Rnn2binError
from rnn2bin.loaders import inert, npz, pytorch, safetensors_file
from rnn2bin.loaders.archive import Archive
from rnn2bin.loaders.tensors import CALLS, ArrayRef

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import fuzz
import fuzz_mutate
import fuzz_readers

RUNS = 10_000
quietly = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("reader", fuzz.TARGETS)
def test_only_typed_errors_and_little_memory(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in {"onnx": ["onnx"], "keras": ["h5py"]}.get(reader.split("-")[0], []):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    runs = int(RUNS * fuzz.TARGETS[reader].share)
    read = fuzz.by_mutation(reader, runs=runs, seed=0)
    assert 0 < read < runs  # neither refusing everything nor reading everything would test a reader


@pytest.mark.parametrize("wrong", [ValueError, MemoryError, SystemExit])
@pytest.mark.parametrize("crashes", [False, True])
def test_the_driver_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: type[BaseException], crashes: bool) -> None:
    """What escapes stops the run and leaves its input; so does memory beyond the limit."""
    monkeypatch.chdir(tmp_path)

    def read(data: bytes, folder: Path) -> None:
        if b"bug" in data:
            raise wrong
        if b"big" in data:
            bytearray(fuzz.MEMORY + 2**26)

    monkeypatch.setitem(fuzz.TARGETS, "none", fuzz_readers.Target(lambda: [b"a"], read, crashes=crashes))
    assert fuzz.by_mutation("none", runs=10) == 10
    monkeypatch.setattr(fuzz, "mutate", lambda *_: b"big" if wrong is MemoryError else b"bug")
    with pytest.raises(RuntimeError if crashes else wrong):
        fuzz.by_mutation("none", runs=1)
    assert len((tmp_path / "fuzz-none.bin").read_bytes()) == 3


def test_a_crash_and_a_loop_end_in_their_own_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And every other input is still read."""

    def read(data: bytes, folder: Path) -> None:
        if data == b"crash":
            os.kill(os.getpid(), signal.SIGKILL)
        while data == b"loop":
            pass

    inputs = [b"a", b"crash", b"b", b"loop", b"c", b"d"]
    made = iter(inputs)
    monkeypatch.setattr(fuzz, "BATCH", 2)
    monkeypatch.setitem(fuzz.TARGETS, "none", fuzz_readers.Target(lambda: [b"a"], read, crashes=True))
    monkeypatch.setattr(fuzz, "mutate", lambda *_: next(made))
    assert fuzz.by_mutation("none", runs=6) == 4
    assert "2 executions crashed or did not end" in capsys.readouterr().out


def test_mutations_of_structures() -> None:
    """What they give is JSON or protobuf again, and seldom what it was."""
    dice = random.Random(0)
    seed = b'{"a": [1, {"b": null}], "c": "x"}'
    changed = [fuzz_mutate.of_json(seed, [seed], dice) for _ in range(300)]
    for data in changed:
        json.loads(data)
    assert len(set(changed)) > 100
    message = fuzz_mutate.field(1, (fuzz_mutate.field(1, 300, 0), fuzz_mutate.field(2, b"name"), fuzz_mutate.field(4, b"\0\0\x80?", 5)))
    found = fuzz_mutate.message(message.raw)
    assert found == (message,)
    changed = [fuzz_mutate.of_protobuf(message.raw, [message.raw], dice) for _ in range(300)]
    assert all(fuzz_mutate.message(data) is not None for data in changed)
    assert len(set(changed)) > 100


# -- what honest writers write is read as the writer's own library reads it --

NUMBERS = st.one_of(
    arrays.floating_dtypes(sizes=(16, 32, 64), endianness="?"), arrays.integer_dtypes(endianness="?"), arrays.boolean_dtypes()
)
ARRAYS = arrays.arrays(NUMBERS, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
NAMES = st.text(st.characters(exclude_categories=["C"], exclude_characters="/\\:"), min_size=1, max_size=8).filter(
    lambda name: name != ".."
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(-9, 9), inner),
    max_leaves=30,
)


def plain(value: Any) -> Any:
    """Byte strings stay views of the file."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return bytes(value) if isinstance(value, memoryview) else value


@quietly
@given(value=VALUES, protocol=st.integers(0, 5))
def test_plain_values_of_every_protocol(value: Any, protocol: int) -> None:
    data = pickle.dumps(value, protocol)
    found, end = inert.read(memoryview(data), calls=CALLS, account=inert.found(Path("m"), len(data)))
    assert end == len(data)
    assert plain(found) == value


@quietly
@given(array=ARRAYS, protocol=st.integers(0, 5), fortran=st.booleans())
def test_arrays_of_every_protocol(array: np.ndarray, protocol: int, fortran: bool) -> None:
    array = np.asfortranarray(array) if fortran else array
    data = pickle.dumps(array, protocol)
    found, _ = inert.read(memoryview(data), calls=CALLS, account=inert.found(Path("m"), len(data)))
    assert isinstance(found, ArrayRef)
    assert found.fault() is None
    assert np.array_equal(found.tensor().numpy(), array, equal_nan=array.dtype.kind == "f")


@quietly
@given(made=st.dictionaries(NAMES, ARRAYS, max_size=4), packed=st.booleans())
def test_npz_files(tmp_path: Path, made: dict[str, np.ndarray], packed: bool) -> None:
    path = tmp_path / "m.npz"
    made = {name: array for name, array in made.items() if name != "file" and not name.endswith(".npy")}
    (np.savez_compressed if packed else np.savez)(path, **made)
    found = npz.read(path)
    assert list(found) == list(made)
    assert all(np.array_equal(found[name].numpy(), array, equal_nan=array.dtype.kind == "f") for name, array in made.items())


@quietly
@given(data=st.data(), new=st.booleans())
def test_views_of_a_storage(tmp_path: Path, data: st.DataObject, new: bool) -> None:
    size = tuple(data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3)))
    stride = tuple(data.draw(st.permutations((1, 3, 9))))[: len(size)]  # no element twice: that is refused
    view = torch.arange(30.0).as_strided(size, stride, data.draw(st.integers(0, 3)))
    torch.save({"w": view, "f": torch.ones(1)}, tmp_path / "m.pt", _use_new_zipfile_serialization=new)
    found = pytorch.read(tmp_path / "m.pt")
    assert torch.equal(found["w"], view)


@quietly
@given(members=st.dictionaries(NAMES, st.binary(max_size=300), max_size=6), packed=st.booleans())
def test_archives(tmp_path: Path, members: dict[str, bytes], packed: bool) -> None:
    path = tmp_path / "m.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as out:
        for name, content in members.items():
            out.writestr(name, content)
    found = Archive(path)
    assert {name: bytes(found.read(name)) for name in found.members} == members


@quietly
@given(made=st.dictionaries(NAMES, arrays.arrays(np.float32, arrays.array_shapes(min_dims=0, max_side=3, min_side=0)), max_size=4))
def test_safetensors_files(tmp_path: Path, made: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    save_file(made, tmp_path / "m.safetensors")
    assert safetensors_file.header(tmp_path / "m.safetensors") == {name: ("F32", made[name].shape) for name in sorted(made)}
    found = safetensors_file.read(tmp_path / "m.safetensors")
    assert all(np.array_equal(found[name].numpy(), array, equal_nan=True) for name, array in made.items())


@quietly
@given(code=st.binary(max_size=60))
def test_any_instructions(tmp_path: Path, code: bytes) -> None:
    """Instructions that no pickler would write in this order, and a torch file around them."""
    stream = io.BytesIO()
    torch.save({"w": torch.ones(2)}, stream)
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(tmp_path / "m.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"\x80\x02" + code + b"." if name.endswith("data.pkl") else old.read(name))
    with pytest.raises(Rnn2binError):
        pytorch.read(tmp_path / "m.pt")
