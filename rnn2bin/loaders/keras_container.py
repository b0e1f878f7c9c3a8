"""The containers of Keras models -> config and arrays: HDF5 of Keras 1 and 2, a zip file of JSON and HDF5 of Keras 3."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnn2bin.errors import UnsafeError, UnsupportedError
from rnn2bin.files import json_object
from rnn2bin.loaders import hdf5
from rnn2bin.loaders.archive import Archive
from rnn2bin.loaders.keras_weights import ROOTS

if TYPE_CHECKING:
    from numpy import ndarray

JSON_BYTES = 64 * 2**20
ZIP_PARTS = {"config.json", "metadata.json", "model.weights.h5"}


@dataclass(frozen=True)
class KerasFile:
    """What a file holds. `groups`: paths of arrays by layer, in Keras's order; `ordered`: the layers are saved by name (Keras 1 and 2)."""

    config: Mapping[str, Any] | None
    tensors: Mapping[str, ndarray]
    groups: dict[str, list[str]]
    ordered: bool
    root: str = "layers"
    version: str = ""
    backend: str = ""

    @property
    def generation(self) -> int:
        """1, 2 or 3. Keras 1 wrote no version; Keras 3's own layout is told from that of Keras 2.12 and later by its root."""
        found = re.match(r"(\d{1,3})", self.version)
        return int(found[1]) if found else 1 if self.ordered else 3 if self.root == ROOTS[0] else 2

    @property
    def zeroes_masked(self) -> bool:
        """Whether Bidirectional makes masked steps zero: in tf.keras and from 2.4 on, not in Keras 2.3 and before."""
        found = re.match(r"(\d{1,3})\.(\d{1,3})", self.version)
        numbers = (int(found[1]), int(found[2])) if found else (self.generation, 0)
        return numbers >= (2, 4) or self.version.endswith("-tf") or (not found and self.generation >= 2)


def read(path: Path) -> KerasFile:
    """Raises UnsupportedError (damaged, or no Keras model), UnsafeError (links, bombs, false sizes) and UsageError (h5py is missing)."""
    with path.open("rb") as stream:
        zipped = stream.read(2) == b"PK"
    return _zipped(path) if zipped else _plain(path)


def _plain(path: Path) -> KerasFile:
    with path.open("rb") as stream:
        return file_of(hdf5.read(stream, path.stat().st_size, where=str(path)), str(path))


def file_of(contents: hdf5.Contents, where: str) -> KerasFile:
    """Of an HDF5 file that holds config and weights, or weights alone."""
    top = contents.attributes.get("", {})
    config = _json(str(top["model_config"]).encode(), f"{where}: model_config") if "model_config" in top else None
    return _file(contents, config, str(top.get("keras_version", "")))


def _zipped(path: Path) -> KerasFile:
    """`.keras`: config.json, metadata.json, model.weights.h5."""
    archive = Archive(path)
    names = set(archive.members)
    extra = sorted(names - ZIP_PARTS - {"assets/"})
    if "config.json" not in names or "model.weights.h5" not in names:
        raise UnsupportedError(f"{path}: a zip archive, but no Keras model: no config.json and model.weights.h5")
    if extra:
        raise UnsupportedError(f"{path}: holds {', '.join(extra[:5])}, which rnn2bin does not read")
    parts = {name: bytes(archive.read(name)) for name in names & ZIP_PARTS}
    metadata = _json(parts.get("metadata.json", b"{}"), f"{path}: metadata.json")
    weights = parts["model.weights.h5"]
    contents = hdf5.read(io.BytesIO(weights), len(weights), where=f"{path}: model.weights.h5")
    return _file(contents, _json(parts["config.json"], f"{path}: config.json"), str(metadata.get("keras_version", "")))


def _json(data: bytes, where: str) -> dict[str, Any]:
    if len(data) > JSON_BYTES:
        raise UnsafeError(f"{where}: {len(data)} bytes of JSON")
    return json_object(data, where=where)


def _file(contents: hdf5.Contents, config: Mapping[str, Any] | None, version: str) -> KerasFile:
    """Keras 1 and 2 name their layers in an attribute; Keras 3 saves them along the paths of the model."""
    prefix = "model_weights/" if "layer_names" in contents.attributes.get("model_weights", {}) else ""
    top = contents.attributes.get(prefix.rstrip("/"), {})
    version = version or str(top.get("keras_version", ""))
    if "layer_names" in top:
        names = [f"{prefix}{name}" for name in top["layer_names"]]
        written = {name: contents.attributes.get(name, {}).get("weight_names", []) for name in names}
        groups = {name.removeprefix(prefix): [f"{name}/{each}" for each in found] for name, found in written.items()}
        return KerasFile(config, contents.tensors, groups, True, version=version, backend=str(top.get("backend", "")))
    root = next((root for root in ROOTS if any(path.startswith(f"{root}/") for path in contents.tensors)), ROOTS[0])
    found: dict[str, list[str]] = {}
    for path in sorted(contents.tensors, key=_by_direction):
        at = path.split("/")
        found.setdefault(at[1] if at[0] == root and len(at) > 1 else at[0], []).append(path)
    return KerasFile(config, contents.tensors, found, False, root=root, version=version)


def _by_direction(path: str) -> tuple[bool, list[tuple[int, str]]]:
    """Forward before backward, and numbers by their size."""
    return "/backward_layer/" in path, [(int(part), "") if part.isdecimal() else (0, part) for part in path.split("/")]
