"""Reader of a Hugging Face directory: config.json with model.safetensors (whole or sharded) or pytorch_model.bin."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnn2bin.errors import UnsafeError, UnsupportedError
from rnn2bin.loaders import pytorch, safetensors_file
from rnn2bin.loaders.common import READ_NOW, regular_file

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
JSON_BYTES = 64 * 2**20


def files(path: Path) -> list[Path]:
    """The weight files of the directory. Raises UnsupportedError (nothing readable, already packed) and UnsafeError (a shard elsewhere)."""
    config = path / "config.json"
    if config.exists() and _json(config).get("model_type") == "rnn2bin":
        raise UnsupportedError(f"{path}: already packed by rnn2bin; run it with `rnn2bin run`, or give the float model it came from")
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    if (path / INDEX).exists():
        return [path / shard for shard in _shards(path)]
    if (path / "pytorch_model.bin").exists():
        return [path / "pytorch_model.bin"]
    raise UnsupportedError(f"{path}: a directory without model.safetensors, {INDEX} or pytorch_model.bin; {READ_NOW}")


def read(path: Path, *, ignore: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """Name -> tensor as stored. Raises UnsupportedError and UnsafeError like `files` and the readers of the files themselves."""
    tensors: dict[str, torch.Tensor] = {}
    for file in files(path):
        regular_file(file)
        reader = pytorch if file.suffix == ".bin" else safetensors_file
        found = reader.read(file, ignore=ignore)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise UnsupportedError(f"{file}: tensor {twice[0]!r} stands in another shard too")
        tensors.update(found)
    if (path / INDEX).exists() and not (path / "model.safetensors").exists():
        missing = sorted(_json(path / INDEX)["weight_map"].keys() - tensors.keys())
        if missing:
            raise UnsupportedError(f"{path / INDEX}: lists tensors that no shard holds: {', '.join(missing[:5])}")
    return tensors


def _shards(path: Path) -> list[str]:
    shards = _json(path / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise UnsupportedError(f"{path / INDEX}: no weight_map from tensor names to files")
    names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UnsafeError(f"{path / INDEX}: names the file {name!r}; shards are .safetensors files in the same directory")
    return names


def _json(path: Path) -> dict[str, Any]:
    regular_file(path)
    if path.stat().st_size > JSON_BYTES:
        raise UnsafeError(f"{path}: {path.stat().st_size} bytes is no {path.name}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnsupportedError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise UnsupportedError(f"{path}: not a JSON object")
    return data
