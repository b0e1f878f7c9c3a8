"""Reader of a Hugging Face directory: config.json with model.safetensors or pytorch_model.bin, each whole or in shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rnn2bin.errors import UnsafeError, UnsupportedError
from rnn2bin.files import READ_NOW, json_file, regular_file
from rnn2bin.loaders import pytorch, safetensors_file

if TYPE_CHECKING:
    import torch

WHOLE = ("model.safetensors", "pytorch_model.bin")
INDEX = {name: f"{name}.index.json" for name in WHOLE}


def files(path: Path) -> list[Path]:
    """The weight files of the directory. Raises UnsupportedError (nothing readable, already packed) and UnsafeError (a file elsewhere)."""
    config = path / "config.json"
    if config.exists() and json_file(inside(path, config)).get("model_type") == "rnn2bin":
        raise UnsupportedError(f"{path}: already packed by rnn2bin; run it with `rnn2bin run`, or give the float model it came from")
    for name in WHOLE:
        if (path / name).exists():
            return [inside(path, path / name)]
        if (path / INDEX[name]).exists():
            shards = set(_weight_map(path, name).values())
            return [inside(path, path / shard) for shard in sorted(shards)]
    raise UnsupportedError(f"{path}: a directory without {', '.join((*WHOLE, *INDEX.values()))}; {READ_NOW}")


def inside(path: Path, file: Path) -> Path:
    """`file`, unless it is a link that leads out of the directory `path` (UnsafeError).

    The Hugging Face cache keeps a snapshot's files beside it: snapshots/REVISION/FILE links to blobs/HASH, and that is accepted.
    """
    home, real = path.resolve(), file.resolve()
    blobs = [home.parent.parent / "blobs"] if home.parent.name == "snapshots" else []
    if real.parent not in (home, *blobs):
        raise UnsafeError(f"{file}: a link to {real}, out of the directory; refused; copy the file itself there")
    return file


def read(path: Path, *, ignore: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Name -> tensor as stored. Raises UnsupportedError and UnsafeError like `files` and the readers of the files themselves."""
    tensors: dict[str, torch.Tensor] = {}
    found = files(path)
    for file in found:
        regular_file(file)
        reader = pytorch if file.suffix == ".bin" else safetensors_file
        shard = reader.read(file, ignore=ignore)
        twice = sorted(shard.keys() & tensors.keys())
        if twice:
            raise UnsupportedError(f"{file}: tensor {twice[0]!r} stands in another shard too")
        tensors.update(shard)
    kind = next((name for name in WHOLE if found == [path / name]), None)
    if kind is None:
        kind = WHOLE[found[0].suffix == ".bin"]
        missing = sorted(_weight_map(path, kind).keys() - tensors.keys())
        if missing:
            raise UnsupportedError(f"{path / INDEX[kind]}: lists tensors that no shard holds: {', '.join(missing[:5])}")
    return tensors if found[0].suffix == ".bin" else dict(sorted(tensors.items()))  # the order of shards says nothing


def _weight_map(path: Path, name: str) -> Mapping[str, str]:
    """Tensor -> shard, of the index of `name`; shards are files of the same kind in the same directory."""
    index = inside(path, path / INDEX[name])
    shards = json_file(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise UnsupportedError(f"{index}: no weight_map from tensor names to files")
    suffix = Path(name).suffix
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard or not shard.endswith(suffix) or "\0" in shard:
            raise UnsafeError(f"{index}: names the file {shard!r}; shards are {suffix} files in the same directory")
    return shards
