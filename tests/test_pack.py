"""Packed directories: written whole or not at all, read back as they were, refused with every reason."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rnn2bin import pack, runtime, spec, storage
from rnn2bin.cells.network import Network
from rnn2bin.errors import DivergedError, ResourceError, UnsupportedError, UsageError
from rnn2bin.spec import EmbeddingSpec, LayerSpec, LinearSpec, RnnSpec, SectionSpec

SPEC = RnnSpec(
    {"main": SectionSpec((LayerSpec("lstm", 3, 5, 2, 4), LayerSpec("lstm", 8, 5, 2, 4)), EmbeddingSpec(6, 3), (LinearSpec(8, 6),))}
)


def student(*, levels: str = "learned", soft: bool = True) -> Network:
    plan = {name: (True, True, not (soft and "layers.1" in name)) for name, _ in SPEC.cell_names()}
    network = Network(SPEC, plan, levels=levels)
    with torch.no_grad():
        for seed, p in enumerate(network.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).half())
    return network.requires_grad_(False)


def write(folder: Path, network: Network | None = None) -> Path:
    with pack.staging(folder) as partial:
        pack.write_model(network or student(), partial, provenance={"seed": 0}, task={"name": "next-token"})
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("levels", ["learned", "strict"])
def test_round_trip(tmp_path, levels):
    network = student(levels=levels)
    model = runtime.load(write(tmp_path / "out", network), backend="torch")
    assert model.spec == SPEC
    assert model.network.levels == levels
    assert {n: c.binary for n, c in model.network.cells().items()} == {n: c.binary for n, c in network.cells().items()}
    again = model.network.state_dict()
    assert list(again) == list(network.state_dict())
    assert all(torch.equal(t, again[name]) for name, t in network.state_dict().items())
    x = torch.randint(6, (7, 2))
    assert torch.equal(model(x)[0], network(x).y)
    assert model.config["provenance"] == {"seed": 0}
    assert left(tmp_path) == ["out"]


def test_weights_are_rounded_to_fp16_once(tmp_path):
    network = student()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1e-4 * torch.randn(p.shape))
    again = runtime.load(write(tmp_path / "out", network), backend="torch").network.state_dict()
    assert all(torch.equal(t.half().float(), again[name]) for name, t in network.state_dict().items())
    assert any(not torch.equal(t, again[name]) for name, t in network.state_dict().items())


def test_the_same_student_packs_to_the_same_bytes(tmp_path):
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    assert left(a) == left(b) == [pack.CONFIG, pack.WEIGHTS]
    assert all(sha256(a / name) == sha256(b / name) for name in left(a))
    assert pack.packed_bytes(a) == sum(p.stat().st_size for p in a.iterdir())


def test_the_spec_survives_json():
    assert spec.from_dict(json.loads(json.dumps(spec.to_dict(SPEC)))) == SPEC


# ---------------------------------------------------------------------------------------------- old or new, never between


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, UnsupportedError])
def test_a_failure_leaves_the_old_directory(tmp_path, error):
    out = write(tmp_path / "out")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(error), pack.staging(out, force=True) as partial:  # noqa: PT012
        (partial / pack.CONFIG).write_text("half")
        raise error("stop")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert left(tmp_path) == ["out"]


def test_a_failure_without_an_old_directory_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), pack.staging(tmp_path / "out") as partial:  # noqa: PT012
        (partial / "x").write_text("half")
        raise RuntimeError
    assert left(tmp_path) == []


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_rename_that_fails_leaves_the_old_directory(tmp_path, monkeypatch, exchanges):
    out = write(tmp_path / "out")
    before = sha256(out / pack.WEIGHTS)
    plain = Path.rename

    def rename(self, target):
        if self.name.endswith(pack.PARTIAL):
            raise OSError(28, "No space left on device")
        return plain(self, target)

    def exchange(one, other):
        if exchanges:
            raise OSError(28, "No space left on device")
        return False

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(storage, "_exchange", exchange)
    with pytest.raises(ResourceError, match=r"No space left on device\); nothing was changed"), pack.staging(out, force=True) as partial:
        (partial / "x").write_text("new")
    assert sha256(out / pack.WEIGHTS) == before
    assert left(tmp_path) == ["out"]


def test_what_a_killed_run_left_is_not_mixed_in(tmp_path):
    (tmp_path / f"out{pack.PARTIAL}").mkdir()
    (tmp_path / f"out{pack.PARTIAL}" / "stale").write_text("x")
    assert left(write(tmp_path / "out")) == [pack.CONFIG, pack.WEIGHTS]


def test_force_replaces_packed_directories_and_nothing_else(tmp_path):
    out = write(tmp_path / "out")
    with pytest.raises(UsageError, match="exists already"), pack.staging(out):
        pass
    with pack.staging(out, force=True) as partial:
        (partial / pack.CONFIG).write_text("new")
    assert left(out) == [pack.CONFIG]
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="is not a packed directory"), pack.staging(home, force=True):
        pass
    assert left(home) == ["thesis.tex"]
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UsageError, match="is not a packed directory"), pack.staging(file, force=True):
        pass
    assert file.read_text() == "x"


def test_weights_beyond_fp16_are_refused(tmp_path):
    network = student()
    with torch.no_grad():
        network.main.head[0].bias[0] = 1e6
        network.main.layers[0]["fwd"].get_submodule("gates").bias[0] = float("nan")
    with pytest.raises(DivergedError) as caught:
        write(tmp_path / "out", network)
    assert [reason.split(":")[0] for reason in caught.value.reasons] == ["main.layers.0.fwd.gates.bias", "main.head.0.bias"]
    assert left(tmp_path) == []


# ---------------------------------------------------------------------------------------------- refusals


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / pack.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"format_version": spec.FORMAT_VERSION + 1}, "update it"),
        ({"format_version": "1"}, "format version '1'"),
        ({"format_version": 0}, "format version 0"),
        ({"model_type": "bert"}, "not an rnn2bin model"),
        ({"spec": None}, "spec is not one"),
        ({"spec": {"sections": {"main": {"layers": [{}]}}}}, "spec is not one"),
        ({"gates": {}}, "gates of main.layers.0.fwd missing"),
        ({"gates": [1]}, "must be a map"),
        ({"gates": {"main.layers.0.fwd": None}}, "gates of main.layers.0.fwd missing"),
        ({"levels": "loose"}, "levels must be"),
    ],
)
def test_refused_configs(tmp_path, changes, word):
    folder = write(tmp_path / "out")
    change_config(folder, **changes)
    with pytest.raises(UnsupportedError, match=word):
        runtime.load(folder, backend="torch")


@pytest.mark.parametrize("wrong", [{"i": "binary", "o": "binary", "f": "binary"}, {"i": "binary", "f": "sfot", "o": "binary"}])
def test_gates_out_of_order_or_of_another_kind(tmp_path, wrong):
    folder = write(tmp_path / "out")
    gates = json.loads((folder / pack.CONFIG).read_text())["gates"]
    change_config(folder, gates=gates | {"main.layers.1.bwd": wrong})
    with pytest.raises(UnsupportedError, match=r"gates of main\.layers\.1\.bwd"):
        runtime.load(folder, backend="torch")


def test_a_spec_whose_parts_do_not_join(tmp_path):
    folder = write(tmp_path / "out")
    found = spec.to_dict(SPEC)
    found["sections"]["main"]["head"][0]["in_features"] = 9
    change_config(folder, spec=found)
    with pytest.raises(UnsupportedError, match=r"main\.head\.0: reads 9 values but receives 8"):
        runtime.load(folder, backend="torch")


def test_every_misfit_of_the_weights_is_named(tmp_path):
    folder = write(tmp_path / "out")
    tensors = load_file(folder / pack.WEIGHTS)
    del tensors["main.layers.0.fwd.levels.lo"]
    tensors["extra"] = torch.zeros(1)
    tensors["main.head.0.bias"] = torch.zeros(7, dtype=torch.float16)
    tensors["main.embedding.weight"] = tensors["main.embedding.weight"].float()
    save_file(tensors, folder / pack.WEIGHTS)
    with pytest.raises(UnsupportedError) as caught:
        runtime.load(folder, backend="torch")
    words = [
        "levels.lo is missing",
        "unknown tensor extra",
        "main.embedding.weight has shape (6, 3) F32",
        "main.head.0.bias has shape (7,) F16; wanted (6,)",
    ]
    assert len(caught.value.reasons) == 4
    assert all(word in reason for word, reason in zip(words, caught.value.reasons, strict=True))


def test_directories_that_are_not_whole(tmp_path):
    with pytest.raises(UsageError, match="not a packed directory"):
        runtime.load(tmp_path, backend="torch")
    folder = write(tmp_path / "out")
    whole = (folder / pack.WEIGHTS).read_bytes()
    for damage in (whole[:-1], whole[:50], b""):
        (folder / pack.WEIGHTS).write_bytes(damage)
        with pytest.raises(UnsupportedError, match="not readable"):
            runtime.load(folder, backend="torch")
    (folder / pack.WEIGHTS).unlink()
    with pytest.raises(UnsupportedError, match="not readable"):
        runtime.load(folder, backend="torch")
    (folder / pack.CONFIG).write_text("{")
    with pytest.raises(UnsupportedError, match="not readable JSON"):
        runtime.load(folder, backend="torch")
