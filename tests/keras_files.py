"""Keras files without Keras: a small writer of the layouts of Keras 1 and 2, and the equations of its cells in NumPy, step by step."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Layers = Sequence[tuple[str, dict[str, Any], list[np.ndarray]]]

RANDOM = np.random.default_rng(7)


def numbers(*shape: int) -> np.ndarray:
    """Weights, biases among them, none of them zero."""
    return (RANDOM.normal(size=shape) * 0.5).astype(np.float32)


def named(layers: Layers) -> list[tuple[str, str, dict[str, Any], list[np.ndarray]]]:
    return [(kind, config.get("name", f"{kind.lower()}_{k}"), config, arrays) for k, (kind, config, arrays) in enumerate(layers)]


def legacy(
    path: Path, layers: Layers, *, version: str | None = "2.2.4-tf", backend: str = "tensorflow", config: bool = True, listed: bool = False
) -> Path:
    """A Sequential model as Keras 1 and 2 save it; `config=False`: its weights only; `listed`: the config is a bare list (Keras 2.2.2)."""
    entries = [{"class_name": kind, "config": {**options, "name": name}} for kind, name, options, _ in named(layers)]
    with h5py.File(path, "w") as file:
        group = file.create_group("model_weights") if config else file
        if config:
            body: Any = entries if listed else {"name": "sequential", "layers": entries}
            file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": body})
        write_weights(group, layers)
        for target in {file, group}:
            target.attrs["backend"] = backend
            if version:
                target.attrs["keras_version"] = version
    return path


def functional(path: Path, layers: Layers, reads: dict[str, list[str]], *, version: str = "2.4.0") -> Path:
    """A functional model of Keras 2: the first layer is the input, the last the output."""
    entries = [
        {
            "class_name": kind,
            "config": options,
            "name": name,
            "inbound_nodes": [[[r, 0, 0, {}] for r in reads[name]]] if name in reads else [],
        }
        for kind, name, options, _ in named(layers)
    ]
    names = [entry["name"] for entry in entries]
    config = {"name": "model", "layers": entries, "input_layers": [[names[0], 0, 0]], "output_layers": [[names[-1], 0, 0]]}
    with h5py.File(path, "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Functional", "config": config})
        file.attrs["keras_version"] = version
        write_weights(file.create_group("model_weights"), layers)
    return path


def write_weights(group: h5py.Group, layers: Layers) -> None:
    group.attrs["layer_names"] = [name.encode() for _, name, _, _ in named(layers)]
    for _, name, _, arrays in named(layers):
        own = group.create_group(name)
        own.attrs["weight_names"] = [f"{name}/w{k}:0".encode() for k in range(len(arrays))]
        for k, array in enumerate(arrays):
            own.create_dataset(f"{name}/w{k}:0", data=array)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def hard(x: np.ndarray) -> np.ndarray:
    """Keras 1 and 2."""
    return np.clip(0.2 * x + 0.5, 0, 1)


def hard_3(x: np.ndarray) -> np.ndarray:
    return np.clip(x / 6 + 0.5, 0, 1)


Gate = Callable[[np.ndarray], np.ndarray]


def lstm(
    x: np.ndarray, weights: Sequence[np.ndarray], *, gate: Gate = sigmoid, phi: Gate = np.tanh, mask: np.ndarray | None = None
) -> np.ndarray:
    """x (B,T,I) -> every h (B,T,U); a masked step repeats the one before. Gates i,f,c,o."""
    w, u, b = (each.astype(np.float64) for each in weights)
    h = c = np.zeros((len(x), len(u)))
    out = []
    for t in range(x.shape[1]):
        i, f, g, o = np.split(x[:, t] @ w + h @ u + b, 4, -1)
        new_c = gate(f) * c + gate(i) * phi(g)
        new_h = gate(o) * phi(new_c)
        keep = np.ones((len(x), 1), bool) if mask is None else mask[:, t, None]
        h, c = np.where(keep, new_h, h), np.where(keep, new_c, c)
        out.append(h)
    return np.stack(out, 1)


def gru(x: np.ndarray, weights: Sequence[np.ndarray], *, gate: Gate = sigmoid, reset_after: bool = False) -> np.ndarray:
    """x (B,T,I) -> every h (B,T,U). Gates z,r,h; bias (3U,), or (2,3U) where the reset gate multiplies behind the product."""
    w, u, b = (each.astype(np.float64) for each in weights)
    ours, theirs = (b[0], b[1]) if reset_after else (b, np.zeros(b.shape))
    h, n, out = np.zeros((len(x), len(u))), len(u), []
    for t in range(x.shape[1]):
        a, r_part = x[:, t] @ w + ours, h @ u + theirs
        z, r = gate((a + r_part)[:, :n]), gate((a + r_part)[:, n : 2 * n])
        last = r * r_part[:, 2 * n :] if reset_after else (r * h) @ u[:, 2 * n :]
        h = z * h + (1 - z) * np.tanh(a[:, 2 * n :] + last)
        out.append(h)
    return np.stack(out, 1)


def to_cudnn(kernel: np.ndarray, recurrent: np.ndarray, gates: int) -> tuple[np.ndarray, np.ndarray]:
    """The same weights as CuDNN lays them out (Keras's `_convert_rnn_weights`, from_cudnn=False)."""
    kernels = [part.T.reshape(part.shape, order="C") for part in np.split(kernel, gates, 1)]
    return np.hstack(kernels), np.hstack([part.T for part in np.split(recurrent, gates, 1)])
