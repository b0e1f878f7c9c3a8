"""Files that attack: each refused by a typed error before it runs code, fills the memory or shows two contents (docs/security.md)."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import re
import resource
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

from rnn2bin import cli, pack, runtime
from rnn2bin.errors import DataError, Rnn2binError, UnsafeError, UnsupportedError, UsageError
from rnn2bin.loaders import archive, inert, inspect, load, npz, pytorch, safetensors_file
from rnn2bin.loaders.tensors import CALLS
from rnn2bin.spec import EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec

torch.set_num_threads(1)

NET = nn.LSTM(3, 5)
STATE = dict(NET.state_dict())
MEGABYTE = 2**20


def refused(path: Path, match: str | None, kind: type[Rnn2binError] = UnsafeError) -> None:
    """By load and by inspect, in little time and memory."""
    for read in (load, inspect):
        tracemalloc.start()
        begun = time.perf_counter()
        try:
            with pytest.raises(kind, match=match):
                read(path)
            assert time.perf_counter() - begun < 30
            size = path.stat().st_size if path.is_file() else 0
            assert tracemalloc.get_traced_memory()[1] < 3 * size + 256 * MEGABYTE
        finally:
            tracemalloc.stop()


def rewrite(path: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """The zip file with each member's bytes changed, or left out."""
    with zipfile.ZipFile(path) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members.items():
            if (changed := change(name, data)) is not None:
                new.writestr(name, changed)
    return path


def saved(path: Path, content: Any = None) -> Path:
    torch.save(STATE if content is None else content, path)
    return path


# -- code --


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


# Each runs a command with the real unpickler, or is a step of a known way around torch's weights_only; {} is the command.
PAYLOADS: dict[str, Callable[[str], bytes]] = {
    "os.system": lambda command: name("os", "system") + b"(" + text(command) + b"tR",
    "posix.system": lambda command: name("posix", "system") + b"(" + text(command) + b"tR",
    "builtins.eval": lambda command: name("builtins", "eval") + b"(" + text(f"__import__('os').system({command!r})") + b"tR",
    "builtins.exec": lambda command: name("__builtin__", "exec") + b"(" + text(f"__import__('os').system({command!r})") + b"tR",
    "subprocess.Popen": lambda command: name("subprocess", "Popen") + b"((" + text("sh") + text("-c") + text(command) + b"ltR",
    "subprocess.Popen by INST": lambda command: b"((" + text("sh") + text("-c") + text(command) + b"lisubprocess\nPopen\n",
    "os.system by OBJ": lambda command: b"(" + name("os", "system") + text(command) + b"o",
    "os.system by NEWOBJ": lambda command: name("os", "system") + b"(" + text(command) + b"t\x81",
    "os.system by STACK_GLOBAL": lambda command: text("os") + text("system") + b"\x93(" + text(command) + b"tR",
    "builtins.getattr": lambda command: (
        name("builtins", "getattr")
        + b"("
        + name("builtins", "__import__")
        + b"("
        + text("os")
        + b"tR"
        + text("system")
        + b"tR("
        + text(command)
        + b"tR"
    ),
    "a call of what getattr gives": lambda command: (
        name("builtins", "getattr")
        + b"("
        + name("torch._C", "_VariableFunctionsClass")
        + text("from_file")
        + b"tR("
        + text(command)
        + b"tR"
    ),
    "functools.partial": lambda command: name("functools", "partial") + b"(" + name("os", "system") + text(command) + b"tR)R",
    "a rebuilder that calls": lambda command: (
        name("torch._tensor", "_rebuild_from_type_v2") + b"(" + name("os", "system") + b"N(" + text(command) + b"tNtR"
    ),
    "torch.hub.load": lambda command: name("torch.hub", "load") + b"(" + text(command) + text("x") + b"tR",
    "numpy's test runner": lambda command: (
        name("numpy.testing._private.utils", "runstring") + b"(" + text(f"import os;os.system({command!r})") + b"}tR"
    ),
    "setstate of another": lambda command: (
        name("torch.jit", "load") + b")\x81" + text(command) + b"b" + name("pty", "spawn") + b"(" + text(command) + b"tR"
    ),
    "copyreg": lambda command: name("copyreg", "__newobj__") + b"(" + name("subprocess", "Popen") + text(command) + b"tR",
    "an extension code": lambda command: b"\x82\x01(" + text(command) + b"tR",
}


def poisoned(data: bytes, payload: bytes) -> bytes:
    """The pickle with the payload's value thrown away first."""
    return data[:2] + payload + b"0" + data[2:]


def container(how: str, folder: Path, payload: bytes) -> Path:
    state = {name: tensor.numpy() for name, tensor in STATE.items()}
    if how == "zip":
        return rewrite(saved(folder / "m.pt"), lambda name, data: poisoned(data, payload) if name.endswith("data.pkl") else data)
    if how == "torchscript":
        with pytest.warns() if sys.version_info >= (3, 14) else _quiet():
            made: Any = torch.jit.script(nn.Linear(2, 2))
        made.save(folder / "m.jit")
        return rewrite(folder / "m.jit", lambda name, data: poisoned(data, payload) if name.endswith("data.pkl") else data)
    if how == "legacy":
        torch.save(STATE, folder / "m.pt", _use_new_zipfile_serialization=False)
        data = (folder / "m.pt").read_bytes()
        at = data.index(b".", data.index(b"little_endian")) + 1
        (folder / "m.pt").write_bytes(data[:at] + poisoned(data[at:], payload))
        return folder / "m.pt"
    if how == "pickle":
        (folder / "m.pkl").write_bytes(poisoned(pickle.dumps(state, 2), payload))
        return folder / "m.pkl"
    if how == "inside":  # a tensor written by pickle.dump holds a torch.save file as bytes
        inner = io.BytesIO()
        torch.save(torch.zeros(3).untyped_storage(), inner, _use_new_zipfile_serialization=False)
        data = inner.getvalue()
        at = data.index(b".", data.index(b"little_endian")) + 1
        data = data[:at] + poisoned(data[at:], payload)
        outer = name("torch.storage", "_load_from_bytes") + b"(B" + struct.pack("<I", len(data)) + data + b"tR"
        (folder / "m.pkl").write_bytes(poisoned(pickle.dumps(state, 2), outer))
        return folder / "m.pkl"
    bundle = folder / "bundle"
    bundle.mkdir()
    (bundle / "config.json").write_text("{}")
    shard = "pytorch_model.bin" if how == "directory" else "pytorch_model-1.bin"
    rewrite(saved(bundle / shard), lambda name, data: poisoned(data, payload) if name.endswith("data.pkl") else data)
    if how == "shards":
        (bundle / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(STATE, shard)}))
    return bundle


def _quiet() -> Any:
    import warnings

    return warnings.catch_warnings(action="ignore")


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle", "inside", "torchscript", "directory", "shards"])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path: Path, how: str, payload: str) -> None:
    path = container(how, tmp_path, PAYLOADS[payload](f"touch {tmp_path / 'ran'}"))
    for read in (load, inspect):
        with pytest.raises(UnsafeError if payload != "an extension code" else UnsupportedError) as caught:
            read(path)
        assert caught.value.exit_code == (4 if payload != "an extension code" else 3)
    assert not (tmp_path / "ran").exists()


def test_the_payloads_are_real(tmp_path: Path) -> None:
    """They run under Python's own unpickler: the tests above can fail."""
    ran = []
    for payload in ("os.system", "builtins.eval", "subprocess.Popen by INST", "os.system by OBJ", "functools.partial", "builtins.getattr"):
        mark = tmp_path / f"{len(ran)}"
        made = pickle.loads(b"\x80\x02" + PAYLOADS[payload](f"touch {mark}") + b".")
        if isinstance(made, subprocess.Popen):
            made.wait()
        ran.append(mark.exists())
    assert all(ran)


def test_nothing_here_unpickles() -> None:
    """No call of an unpickler, or of what compiles or imports a file's text, anywhere in the package."""
    calls = re.compile(
        r"\b(torch\.load|torch\.jit\.load|np\.load|numpy\.load|pickle\.\w+|shelve\.\w+|joblib\.\w+|yaml\.(?!safe_)\w*load\w*)\("
    )
    sources = Path(inert.__file__).parent.parent.rglob("*.py")
    found = {match.group(1) for source in sources for line in source.read_text().splitlines() for match in calls.finditer(line)}
    assert found == {"torch.load"}  # once, in the three lines that a refusal prints
    assert "weights_only=False" in Path(inert.__file__).read_text()


def test_objects_in_numpy_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", a=np.array([{}], dtype=object))
    refused(tmp_path / "m.npz", "pickled Python objects")


# -- archives --


def test_a_name_twice(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt")
    with zipfile.ZipFile(path, "a") as more, pytest.warns(UserWarning, match="Duplicate"):
        more.writestr("m/data.pkl", b"\x80\x02}.")
    refused(path, "two entries named 'm/data.pkl'")


def test_two_pickles_in_one_archive(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt")
    with zipfile.ZipFile(path, "a") as more:
        more.writestr("other/data.pkl", b"\x80\x02}.")
    refused(path, "several data.pkl")


@pytest.mark.parametrize("bad", ["/etc/data.pkl", "m/../../x", "..", "C:\\x", "a\\b"])
@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_names_that_lead_out(tmp_path: Path, bad: str, suffix: str) -> None:
    path = saved(tmp_path / f"m{suffix}")
    with zipfile.ZipFile(path, "a") as more:
        more.writestr(zipfile.ZipInfo(bad), b"x")
    refused(path, "absolute, or leading out")


@pytest.mark.parametrize("field", ["name", "size", "method", "checksum"])
def test_two_headers_that_disagree(tmp_path: Path, field: str) -> None:
    """The directory at the end says one thing, the header before the entry another."""
    path = tmp_path / "m.npz"
    np.savez(path, abc=np.zeros(3))
    data = bytearray(path.read_bytes())
    at = {"name": 30, "size": 18, "method": 8, "checksum": 14}[field]
    data[at] ^= 8
    path.write_bytes(data)
    refused(path, "disagree")


def test_a_checksum_that_does_not_fit(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt")
    data = path.read_bytes()
    at = data.index(STATE["weight_hh_l0"].numpy().tobytes())
    path.write_bytes(data[:at] + b"\0" + data[at + 1 :])
    refused(path, "corrupt", UnsupportedError)


def test_an_archive_inside_an_archive_is_not_opened(tmp_path: Path) -> None:
    inner = io.BytesIO()
    torch.save(STATE, inner)
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as outer:
        outer.writestr("m/inner.zip", inner.getvalue())
    refused(tmp_path / "m.pt", "no data.pkl", UnsupportedError)


ZEROS = 512 * MEGABYTE


@functools.cache
def zeros() -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return b"".join([*(packer.compress(bytes(MEGABYTE)) for _ in range(512)), packer.flush()])


@pytest.mark.parametrize("member", ["m/data.pkl", "m/data/0", "x.npy"])
def test_a_bomb_that_unpacks_to_gigabytes(tmp_path: Path, member: str) -> None:
    """Half a GB of zeros in half a MB: as the pickle, as a storage, as an array."""
    suffix = ".npz" if member.endswith("npy") else ".pt"
    write_zip(tmp_path / f"m{suffix}", [(member, zeros(), ZEROS, 8)])
    refused(tmp_path / f"m{suffix}", "unpack to")


def test_a_bomb_that_lies_about_its_size(tmp_path: Path) -> None:
    write_zip(tmp_path / "m.pt", [("m/data.pkl", zeros(), 1000, 8)])
    refused(tmp_path / "m.pt", "corrupt", UnsupportedError)


def test_a_bomb_of_overlapping_entries(tmp_path: Path) -> None:
    """One kernel, many entries that all point at it."""
    path = tmp_path / "m.npz"
    write_zip(path, [("a.npy", bytes(1000), 1000, 0)], again=50)
    refused(path, "overlap|disagree")


def test_a_directory_of_a_million_entries(tmp_path: Path) -> None:
    directory = struct.pack("<4s6H3L5H2L", b"PK\1\2", *[0] * 16) * 500_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(directory), 0, 0)
    (tmp_path / "m.pt").write_bytes(directory + end)
    (tmp_path / "n.pt").write_bytes(b"PK" + bytes(28) + directory + end)
    for name in ("m.pt", "n.pt"):
        refused(tmp_path / name, "corrupt", UnsupportedError)


def write_zip(path: Path, members: list[tuple[str, bytes, int, int]], *, again: int = 0) -> None:
    """By hand: (name, packed bytes, claimed size, method) each; `again`: that many further entries for the first one's bytes."""
    body, directory = b"", b""
    for name, packed, size, method in members:
        head = (0, method, 0, 33, 0, len(packed), size, len(name))
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, *head, 0, 0, 0, 0, 0, len(body)) + name.encode()
        body += struct.pack("<4s5H3L2H", b"PK\3\4", 20, *head, 0) + name.encode() + packed
    for index in range(again):
        name, packed, size, method = members[0]
        name = f"{index}{name}"
        head = (0, method, 0, 33, 0, len(packed), size, len(name))
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, *head, 0, 0, 0, 0, 0, 0) + name.encode()
    count = len(members) + again
    path.write_bytes(body + directory + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(directory), len(body), 0))


def test_overlap_is_found_when_the_headers_agree(tmp_path: Path) -> None:
    """Quoting (Fifield 2019): the first entry's data is the second entry's header and data."""
    inner_name, data = b"b.npy", bytes(100)
    inner = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 33, zlib.crc32(data), 100, 100, 5, 0) + inner_name + data
    outer = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 0, 0, 33, zlib.crc32(inner), len(inner), len(inner), 5, 0) + b"a.npy" + inner
    entries = [(b"a.npy", inner, 0), (inner_name, data, len(outer) - len(inner))]
    directory = b"".join(
        struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 33, zlib.crc32(d), len(d), len(d), 5, 0, 0, 0, 0, 0, at) + n
        for n, d, at in entries
    )
    (tmp_path / "m.npz").write_bytes(outer + directory + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2, 2, len(directory), len(outer), 0))
    refused(tmp_path / "m.npz", "overlap")


# -- sizes --


def tensor_pickle(*, numel: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...], key: str = "0") -> bytes:
    """A state dict of one tensor that claims this, as torch.save writes it."""

    class Claim:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Marker(), offset, size, stride, False, None)

    class Marker:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, key, "cpu", numel) if isinstance(value, Marker) else None

    stream = io.BytesIO()
    Pickler(stream, 2).dump({"weight_hh_l0": Claim()})
    return stream.getvalue()


HUGE = 2**40
CLAIMS: dict[str, dict[str, Any]] = {
    "more elements than the storage": {"numel": 25, "offset": 0, "size": (HUGE,), "stride": (1,)},
    "a larger storage than the file": {"numel": HUGE, "offset": 0, "size": (HUGE,), "stride": (1,)},
    "an offset beyond the end": {"numel": 25, "offset": HUGE, "size": (1,), "stride": (1,)},
    "a stride beyond the end": {"numel": 25, "offset": 0, "size": (2, 2), "stride": (HUGE, 1)},
    "expanded": {"numel": 25, "offset": 0, "size": (HUGE, HUGE), "stride": (0, 0)},
    "sizes whose product overflows": {"numel": 25, "offset": 0, "size": (2**62, 2**62, 4), "stride": (0, 0, 0)},
    "empty, with sizes whose product overflows": {"numel": 25, "offset": 0, "size": (0, 2**62, 2**62), "stride": (1, 1, 1)},
    "a storage that is not there": {"numel": 25, "offset": 0, "size": (5, 5), "stride": (5, 1), "key": "99"},
}


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("old", [False, True])
def test_tensors_that_claim_more_than_there_is(tmp_path: Path, claim: str, old: bool) -> None:
    made = tensor_pickle(**CLAIMS[claim])
    content = {"weight_hh_l0": torch.zeros(5, 5)}
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=not old)
    if old:
        data = (tmp_path / "m.pt").read_bytes()
        at = data.index(b".", data.index(b"little_endian")) + 1
        tail = pickle.dumps(["0"], 2) + struct.pack("<q", 25) + bytes(100)
        (tmp_path / "m.pt").write_bytes(data[:at] + made + tail)
    else:
        rewrite(tmp_path / "m.pt", lambda name, data: made if name.endswith("data.pkl") else data)
    with pytest.raises((UnsafeError, UnsupportedError)) as caught:
        load(tmp_path / "m.pt")
    assert old or isinstance(caught.value, UnsafeError)


@pytest.mark.parametrize(
    ("size", "stride"), [((-1, 5), (5, 1)), ((5, 5), (-5, 1)), ((5,), (5, 1)), ((1,) * 100, (1,) * 100), (("5",), (1,))]
)
def test_shapes_that_are_none(tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
    made = tensor_pickle(numel=25, offset=0, size=size, stride=stride)
    rewrite(saved(tmp_path / "m.pt"), lambda name, data: made if name.endswith("data.pkl") else data)
    refused(tmp_path / "m.pt", "corrupt", UnsupportedError)


def test_the_same_bytes_under_a_thousand_names(tmp_path: Path) -> None:
    one = torch.zeros(1_000_000)
    refused(saved(tmp_path / "m.pt", {f"w{k}": one for k in range(1000)}), "again and again")


@pytest.mark.parametrize("shape", ["(1099511627776,)", "(0, 4611686018427387904, 4611686018427387904)", "(-1,)", "(2,)", "1", "(" * 3000])
def test_array_headers_that_lie(tmp_path: Path, shape: str) -> None:
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "m.npz", "w") as out:
        out.writestr("w.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + bytes(12))
    refused(tmp_path / "m.npz", "claims shape|not a NumPy array", UnsupportedError)


# -- pickles that cost more than they weigh --

MANY = 200_000
HEAP: dict[str, bytes] = {
    "lists": b"]" * MANY,
    "dicts": b"}" * MANY,
    "marks": b"(" * MANY,
    "sets": b"\x8f" * MANY,
    "memo": b"N" + b"\x94" * MANY,
    "records": name("a", "b") + b"q\0" + b"h\0)\x81" * MANY,
    "tuples in tuples": b")" + b"\x85" * MANY,
    "lists in lists": b"]q\0]h\0a" * MANY,
    "long lines": b"c" + b"a" * MANY,
    "copies of a list": b"]q\0(" + b"N" * 10_000 + b"e" + (name("builtins", "dict") + b"q\1h\0\x85R") + b"h\1h\0\x85R" * 10_000,
    "copies of a text": text("x" * 100_000) + b"q\0" + name("_codecs", "encode") + b"q\1" + b"h\1h\0\x85R" * 100_000,
}


@pytest.mark.parametrize("what", HEAP)
def test_pickles_that_fill_the_memory(tmp_path: Path, what: str) -> None:
    """What reading costs is counted, and the count is no less than the truth: here to 8 MB, in files to FREE_BYTES and twice their size."""
    data = memoryview(b"\x80\x04" + HEAP[what] + b".")
    account = inert.Found(tmp_path, 8 * MEGABYTE)
    tracemalloc.start()
    try:
        with pytest.raises((UnsafeError, inert.DamagedError)):
            inert.read(data, calls=CALLS, account=account)
        assert tracemalloc.get_traced_memory()[1] < 9 * MEGABYTE
    finally:
        tracemalloc.stop()


def test_a_pickle_of_too_many_parts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.pkl").write_bytes(b"\x80\x04" + b"]0" * 800_000 + b"}.")
    with pytest.raises(UnsafeError, match="far more memory"):
        load(tmp_path / "m.pkl")


def test_keys_that_take_forever_to_hash(tmp_path: Path) -> None:
    """Each tuple holds the one before twice: 2^200 elements in 600 bytes; and integers whose hashes are equal."""
    doubled = b")q\0" + b"h\0h\0\x86q\0" * 200
    equal = b"".join(b"\x8a\x10" + (k * (2**61 - 1)).to_bytes(16, "little") + b"N" for k in range(50_000))
    for data in (doubled + b"}h\0Ns", b"}(" + equal + b"u"):
        (tmp_path / "m.pkl").write_bytes(b"\x80\x04" + data + b".")
        refused(tmp_path / "m.pkl", "no tensors", UnsupportedError)


def test_parts_that_contain_each_other(tmp_path: Path) -> None:
    """A dict in itself; dicts that hold the next one a thousand times; a module that is its own child."""
    wide = b"}q\0" + b"".join(b"}q\1(" + b"".join(text(f"{k}") + b"h\0" for k in range(1000)) + b"u" + b"q\0" for _ in range(6))
    loop = (
        name("x", "Y")
        + b")\x81q\0}("
        + text("_parameters")
        + b"}"
        + text("_buffers")
        + b"}"
        + text("_modules")
        + b"}"
        + text("m")
        + b"h\0sub"
    )
    for data, match in ((b"}q\0" + text("a") + b"h\0s", "no tensors"), (wide, "contain each other"), (loop, "nested more")):
        (tmp_path / "m.pkl").write_bytes(b"\x80\x04" + data + b".")
        refused(tmp_path / "m.pkl", match, Rnn2binError)


# -- safetensors --


def write_safetensors(path: Path, header: bytes, data: bytes = b"", *, length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def described(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


SAFETENSORS: dict[str, tuple[Any, str]] = {
    "overlap": ({"a": described(shape=(2,), offsets=(0, 8)), "b": described(shape=(2,), offsets=(4, 12))}, "overlaps another"),
    "beyond the end": ({"a": described(shape=(100,), offsets=(0, 400))}, "truncated or corrupt"),
    "a hole": ({"a": described(offsets=(8, 12))}, "belong to no tensor"),
    "overflow": ({"a": described(shape=(2**62, 4), offsets=(0, 0))}, "claims"),
    "empty overflow": ({"a": described(shape=(0, 2**62, 2**62), offsets=(0, 0))}, "claims"),
    "shape against offsets": ({"a": described(shape=(2,), offsets=(0, 12))}, "claims"),
    "reversed": ({"a": described(shape=(0,), offsets=(12, 0))}, "claims"),
    "negative": ({"a": described(shape=(-3,), offsets=(0, 12))}, "not described"),
    "unknown dtype": ({"a": described("F99", shape=(3,), offsets=(0, 12))}, "not described"),
    "no object": ({"a": [1]}, "not described"),
    "more than asked": ({"a": {**described(), "code": "x"}}, "not described"),
    "a list": ([1, 2], "not a JSON object"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_safetensors_headers(tmp_path: Path, case: str) -> None:
    header, match = SAFETENSORS[case]
    refused(write_safetensors(tmp_path / "m.safetensors", json.dumps(header).encode(), bytes(12)), match, Rnn2binError)


def test_a_safetensors_name_twice(tmp_path: Path) -> None:
    one = json.dumps(described())
    refused(write_safetensors(tmp_path / "m.safetensors", f'{{"a":{one},"a":{one}}}'.encode(), bytes(4)), "given twice")


def test_safetensors_header_sizes(tmp_path: Path) -> None:
    refused(write_safetensors(tmp_path / "a.safetensors", b"{}", length=2**63), "header of", UnsupportedError)
    refused(write_safetensors(tmp_path / "b.safetensors", b"{}".ljust(9 * MEGABYTE)), "no network has that many")
    refused(write_safetensors(tmp_path / "c.safetensors", b"[" * 100_000), "not readable JSON", UnsupportedError)
    many = b'{"x":[' + b"{}," * (MEGABYTE // 4) + b"{}]}"
    refused(write_safetensors(tmp_path / "d.safetensors", many), "not described", UnsupportedError)


# -- directories --


def bundle(folder: Path, **shards: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mine"}')
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    weight_map = {key: f"{name}.safetensors" for name, tensors in shards.items() for key in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/secret.safetensors", "sub/x.safetensors", "x.bin", "..", ""])
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_shards_that_lead_out(tmp_path: Path, shard: str, kind: str) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    shard = shard if kind.endswith("safetensors") else shard.replace("safetensors", "bin") if "bin" not in shard else "x.safetensors"
    (folder / f"{kind}.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    refused(folder, "in the same directory")


@pytest.mark.parametrize("link", ["a.safetensors", "config.json", "model.safetensors.index.json"])
def test_links_that_lead_out(tmp_path: Path, link: str) -> None:
    folder = bundle(tmp_path / "hf", a=STATE)
    (folder / link).rename(tmp_path / "elsewhere")
    (folder / link).symlink_to(tmp_path / "elsewhere")
    refused(folder, "out of the directory")


def test_the_hugging_face_cache_links_to_its_blobs(tmp_path: Path) -> None:
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "blobs").mkdir()
    folder = bundle(tmp_path / "snapshots" / "abc", a=STATE)
    for index, file in enumerate(sorted(folder.iterdir())):
        file.rename(tmp_path / "blobs" / f"{index}")
        file.symlink_to(f"../../blobs/{index}")
    assert load(folder).spec.main.layers[0].hidden_size == 5


def test_shards_of_both_kinds(tmp_path: Path) -> None:
    names = list(STATE)
    halves = [{key: STATE[key] for key in names[:2]}, {key: STATE[key] for key in names[2:]}]
    assert load(bundle(tmp_path / "a", one=halves[0], two=halves[1])).spec == load(saved(tmp_path / "m.pt")).spec
    folder = tmp_path / "b"
    folder.mkdir()
    for index, half in enumerate(halves):
        torch.save(half, folder / f"pytorch_model-{index}.bin")
    weight_map = {key: f"pytorch_model-{index}.bin" for index, half in enumerate(halves) for key in half}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    loaded = load(folder)
    assert torch.equal(loaded.weights["main.layers.0.fwd.candidate.weight_ih"], STATE["weight_ih_l0"][10:15])
    assert len(loaded.provenance["files"]) == 2
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map | {"more": "pytorch_model-0.bin"}}))
    refused(folder, "lists tensors that no shard holds: more", UnsupportedError)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    "content", [b"[" * 200_000, b'{"a":' * 200_000, b"1" * 10_000, b"\xff", b"{}"[:1], b'{"weight_map": 3}', b"[" + b"{}," * 10**5 + b"0]"]
)
def test_json_that_is_no_config(tmp_path: Path, file: str, content: bytes) -> None:
    folder = bundle(tmp_path / "hf", a=STATE)
    (folder / file).write_bytes(content)
    if (file, content) != ("config.json", b'{"weight_map": 3}'):
        refused(folder, "JSON|weight_map", UnsupportedError)


# -- packed directories --


def packed(folder: Path) -> Path:
    from rnn2bin.cells.network import Network

    spec = RnnSpec({"main": SectionSpec((LayerSpec("lstm", 3, 5),), EmbeddingSpec(6, 3), (LinearSpec(5, 6),))})
    network = Network(spec, {name: (True, True, True) for name, _ in spec.cell_names()}, levels="learned").requires_grad_(False)
    with pack.staging(folder) as partial:
        pack.write_model(network, partial, provenance={}, task={})
    return folder


BIG = 2**31 - 1
SPECS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a huge table": (lambda main: main["embedding"].update(num_embeddings=BIG), "has shape"),
    "huge layers": (
        lambda main: (main["layers"][0].update(hidden_size=BIG), main["head"][0].update(in_features=BIG)),
        "has shape|no network has",
    ),
    "many copies": (lambda main: main["layers"][0].update(copies=BIG), "has shape|no network has"),
    "many layers": (
        lambda main: main.update(layers=[{**main["layers"][0], "input_size": 5 if k else 3} for k in range(4_000)]),
        "gates of|missing",
    ),
    "a wrong kind": (lambda main: main["layers"][0].update(hidden_size="5"), "hidden_size is a str"),
    "a fraction": (lambda main: main["layers"][0].update(hidden_size=5.0), "hidden_size is a float"),
    "beyond": (lambda main: main["layers"][0].update(hidden_size=2**70), "out of range"),
    "negative": (lambda main: main["layers"][0].update(hidden_size=-5), "out of range"),
    "directions": (lambda main: (main["layers"][0].update(directions=3), main["head"][0].update(in_features=15)), "3 directions"),
    "no layers": (lambda main: main.update(layers=[]), "missing"),
    "one-hot": (lambda main: main["embedding"].update(one_hot=True, num_embeddings=BIG), "one-hot"),
}


@pytest.mark.parametrize("case", SPECS)
def test_a_packed_directory_that_claims_sizes(tmp_path: Path, case: str) -> None:
    folder = packed(tmp_path / "out")
    change, match = SPECS[case]
    config = json.loads((folder / "config.json").read_text())
    change(config["spec"]["sections"]["main"])
    (folder / "config.json").write_text(json.dumps(config))
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with pytest.raises(UnsupportedError, match=match):
            runtime.load(folder, backend="torch")
        assert tracemalloc.get_traced_memory()[1] < 256 * MEGABYTE
    finally:
        tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 1024  # kB: torch's own memory too


def test_packed_configs_that_are_no_json(tmp_path: Path) -> None:
    folder = packed(tmp_path / "out")
    for content in (b"[" * 200_000, b'{"model_type":"rnn2bin","model_type":"rnn2bin"}', b" " * (9 * MEGABYTE)):
        (folder / "config.json").write_bytes(content)
        with pytest.raises((UnsupportedError, UnsafeError)):
            runtime.load(folder)


@pytest.mark.parametrize("task", [["x"], {"vocabulary": "abc"}, {"vocabulary": [1, 2, 3]}, {"vocabulary": {"a": 0}}])
def test_a_vocabulary_that_is_no_list_of_words(task: Any, tmp_path: Path) -> None:
    folder = packed(tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "task": task}))
    (tmp_path / "x.txt").write_text("ab")
    for command in ("run", "bench"):
        result = CliRunner().invoke(cli.main, [command, str(folder), "--data", str(tmp_path / "x.txt")])
        assert (result.exit_code, "must be a list of words" in result.stderr) == (3, True)


def test_text_that_is_none(tmp_path: Path) -> None:
    folder = packed(tmp_path / "out")
    (tmp_path / "x.txt").write_bytes(b"ab\xc3")
    for command in ("run", "bench"):
        result = CliRunner().invoke(cli.main, [command, str(folder), "--data", str(tmp_path / "x.txt")])
        assert (result.exit_code, "not UTF-8 text" in result.stderr) == (2, True)


# -- what is no file --


def test_pipes_devices_and_links(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "null.pt").symlink_to("/dev/zero")
    (tmp_path / "gone.pt").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    for file, match in {
        "pipe.pt": "not a regular",
        "null.pt": "not a regular",
        "gone.pt": "no such file",
        "loop.pt": "no such file|cannot be read",
    }.items():
        refused(tmp_path / file, match, UsageError)
    saved(tmp_path / "real.pt")
    (tmp_path / "link.pt").symlink_to("real.pt")
    assert load(tmp_path / "link.pt").spec.main.layers[0].hidden_size == 5  # a link the user names is the user's


def test_pipes_inside_a_directory(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "hf", a=STATE)
    (folder / "a.safetensors").unlink()
    os.mkfifo(folder / "a.safetensors")
    refused(folder, "not a regular file", UsageError)


def test_data_files_are_read_by_the_same_readers(tmp_path: Path) -> None:
    from rnn2bin import data

    with pytest.raises(UnsafeError, match=r"it calls os\.system"):
        data.read_tensors(container("zip", tmp_path, PAYLOADS["os.system"](f"touch {tmp_path / 'ran'}")))
    np.savez(tmp_path / "d.npz", inputs=np.array([{}], dtype=object))
    with pytest.raises(UnsafeError):
        data.read_tensors(tmp_path / "d.npz")
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises((DataError, UsageError)):
        data.load_parts(tmp_path / "pipe.npz", _recipe(), None)  # type: ignore[arg-type]


def _recipe() -> Any:
    from rnn2bin.recipe import Recipe

    return Recipe()


def test_readers_agree_with_the_libraries(tmp_path: Path) -> None:
    """The strict readers read what honest writers write."""
    save_file(STATE, tmp_path / "m.safetensors")
    assert {name: (tuple(t.shape)) for name, t in load_file(tmp_path / "m.safetensors").items()} == {
        name: shape for name, (_, shape) in safetensors_file.header(tmp_path / "m.safetensors").items()
    }
    np.savez_compressed(tmp_path / "m.npz", **{name: tensor.numpy() for name, tensor in STATE.items()})
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in npz.read(tmp_path / "m.npz").items())
    saved(tmp_path / "m.pt")
    assert archive.Archive(tmp_path / "m.pt").members.keys() == {i.filename for i in zipfile.ZipFile(tmp_path / "m.pt").infolist()}
    assert list(pytorch.read(tmp_path / "m.pt")) == list(STATE)
