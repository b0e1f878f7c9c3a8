"""config.json of a packed directory. No torch here: the native runtime reads it too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rnn2bin import spec as specs
from rnn2bin.errors import UnsupportedError, UsageError
from rnn2bin.files import json_file

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a packed directory; UsageError where there is none, UnsupportedError where it is not ours or too new."""
    file = path / CONFIG
    if not file.is_file():
        raise UsageError(f"{path}: not a packed directory (no {CONFIG}); make one with: rnn2bin convert MODEL --out {path}")
    config = json_file(file)
    if config.get("model_type") != "rnn2bin":
        raise UnsupportedError(f"{file}: not an rnn2bin model")
    version = config.get("format_version")
    if type(version) is not int or not 1 <= version <= specs.FORMAT_VERSION:
        raise UnsupportedError(f"{file}: format version {version!r}; this rnn2bin reads up to {specs.FORMAT_VERSION}: update it")
    return config


def vocabulary(config: dict[str, Any]) -> list[str] | None:
    """What the network's tokens stand for, in order; None where that is not recorded. UnsupportedError where it is no list of words."""
    return _words(config, "vocabulary")


def labels(config: dict[str, Any]) -> list[str] | None:
    """What the classes it gives stand for, in order; None where that is not recorded. UnsupportedError where it is no list of words."""
    return _words(config, "labels")


def _words(config: dict[str, Any], name: str) -> list[str] | None:
    task = config.get("task") or {}
    found = task.get(name) if isinstance(task, dict) else False
    if found is not None and not (isinstance(found, list) and all(isinstance(word, str) for word in found)):
        raise UnsupportedError(f"{CONFIG}: task.{name} must be a list of words")
    return found
