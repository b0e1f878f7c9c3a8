"""Which arrays of a Keras file are whose: by layer and order (Keras 1 and 2), or by the path of each layer (Keras 3).

Source: keras-team/keras, `hdf5_format.py` of Keras 2 and `saving_lib.py` of Keras 3.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rnn2bin.loaders.keras_config import Layer, container_names

if TYPE_CHECKING:
    from numpy import ndarray

CELLS = {
    "LSTM": "lstm",
    "LSTMCell": "lstm",
    "CuDNNLSTM": "lstm",
    "GRU": "gru",
    "GRUCell": "gru",
    "CuDNNGRU": "gru",
    "SimpleRNN": "plain",
    "SimpleRNNCell": "plain",
}
KERNELS = ("Dense", "Conv1D", "Conv2D")
ROOTS = ("layers", "_layer_checkpoint_dependencies")  # of Keras 3, and of the same format written by Keras 2.12 and later
# Keras 1 kept the gates apart, in this order; Keras 2's order of the same.
OLD_GATES = {"lstm": (("i", "c", "f", "o"), ("i", "f", "c", "o")), "gru": (("z", "r", "h"), ("z", "r", "h"))}


def variables(layer: Layer) -> tuple[list[str], list[str]]:
    """Names of a layer's own weights in Keras's order: those that training changes, those that it only tracks."""
    bias = ["bias"] if layer.flag("use_bias", True) else []
    if layer.kind in CELLS:
        return ["kernel", "recurrent_kernel", *bias], []
    if layer.kind in KERNELS:
        return ["kernel", *bias], []
    if layer.kind == "Embedding":
        return ["embeddings"], []
    if layer.kind in ("BatchNormalization", "LayerNormalization"):
        own = [name for name, option in (("gamma", "scale"), ("beta", "center")) if layer.flag(option, True)]
        return own, ["moving_mean", "moving_variance"] if layer.kind == "BatchNormalization" else []
    if layer.kind == "Normalization" and layer.get("mean") is None:
        return [], ["mean", "variance", "count"]
    if layer.kind == "PReLU":
        return ["alpha"], []
    if layer.kind == "WeightedAverage":
        return ["kernel"], []
    return [], []


@dataclass
class Weights:
    """The file's arrays; `groups`: paths by layer name, in order. What was given to a layer is noted in `used`."""

    tensors: Mapping[str, ndarray]
    groups: Mapping[str, Sequence[str]] | None
    root: str = ""
    used: set[str] = field(default_factory=set)

    def give(self, layers: Sequence[Layer], wanted: Collection[str]) -> list[str]:
        """The `wanted` of all layers their weights; a reason for each array missing or too many. What the others have counts as used."""
        reasons = []
        for path, layer in self._paths(layers, ""):
            if layer.name in wanted:
                reasons += self._from_path(layer, path) if self.groups is None else self._from_group(layer)
            elif self.groups is None:
                self.used |= {name for name in self.tensors if name.startswith(f"{path}/")}
            else:
                self.used |= set(self.groups.get(layer.name, ()))
        return reasons

    def leftovers(self) -> list[str]:
        """Arrays that no layer took. What dropout draws its random numbers from belongs to training."""
        return [path for path in self.tensors if path not in self.used and "/seed_generator/" not in f"/{path}"]

    def _paths(self, layers: Sequence[Layer], base: str) -> list[tuple[str, Layer]]:
        return [(f"{base}{self.root}/{name}", layer) for name, layer in zip(container_names(layers), layers, strict=True)]

    def _from_path(self, layer: Layer, path: str) -> list[str]:
        if layer.model is not None:
            inner = list(layer.model.layers.values())
            return [reason for at, part in self._paths(inner, f"{path}/") for reason in self._from_path(part, at)]
        reasons = [reason for at, part in layer.parts.items() for reason in self._from_path(part, f"{path}/{at}")]
        within = f"{path}/cell/vars/" if layer.kind in CELLS and not layer.kind.endswith("Cell") else f"{path}/vars/"
        found = [name for name in self.tensors if name.startswith(within) and name[len(within) :].isdecimal()]
        found.sort(key=lambda name: int(name[len(within) :]))
        return reasons + self._take(layer, found, [name for part in variables(layer) for name in part])

    def _from_group(self, layer: Layer) -> list[str]:
        assert self.groups is not None
        paths = list(self.groups.get(layer.name, ()))
        leaves = _leaves(layer)
        if len(leaves) == 1 and len(paths) in (9, 12) and CELLS.get(leaves[0].kind) in OLD_GATES:
            return self._take_gates(leaves[0], paths)
        # Of a nested model Keras writes first what training changes of every layer, then what it only tracks.
        wanted = [[(leaf, name) for leaf in leaves for name in _sorted(leaf)[k]] for k in (0, 1)]
        slots = wanted[0] + wanted[1]
        if len(paths) != len(slots):
            return [self._count(layer, len(paths), [name for _, name in slots])]
        reasons = []
        for leaf in leaves:
            mine = [(path, name) for path, (owner, name) in zip(paths, slots, strict=True) if owner is leaf]
            reasons += self._take(leaf, [path for path, _ in mine], [name for _, name in mine])
        return reasons

    def _take(self, layer: Layer, paths: Sequence[str], names: Sequence[str]) -> list[str]:
        if len(paths) != len(names):
            return [self._count(layer, len(paths), names)]
        missing = [path for path in paths if path not in self.tensors]
        if missing:
            return [f"{layer}: {path} is not in the file" for path in missing]
        layer.weights = {name: self.tensors[path] for path, name in zip(paths, names, strict=True)}
        self.used |= set(paths)
        return []

    def _take_gates(self, layer: Layer, paths: Sequence[str]) -> list[str]:
        """Keras 1: W, U and b of one gate after the other."""
        import numpy as np

        theirs, ours = OLD_GATES[CELLS[layer.kind]]
        if len(paths) != 3 * len(theirs) or any(path not in self.tensors for path in paths):
            return [self._count(layer, len(paths), [f"{w}_{gate}" for gate in theirs for w in "WUb"])]
        at = [3 * theirs.index(gate) for gate in ours]
        for offset, name in enumerate(("kernel", "recurrent_kernel", "bias")):
            parts = [self.tensors[paths[k + offset]] for k in at]
            if len({part.shape for part in parts}) > 1 or parts[0].ndim not in (1, 2):
                return [f"{layer}: its gates' weights have different shapes"]
            layer.weights[name] = np.concatenate(parts, -1)
        self.used |= set(paths)
        return []

    @staticmethod
    def _count(layer: Layer, found: int, names: Sequence[str]) -> str:
        return f"{layer}: the file holds {found} arrays for it; wanted {len(names)} ({', '.join(names) or 'none'})"


def _leaves(layer: Layer) -> list[Layer]:
    """The layers that own weights, outermost order."""
    inner = list(layer.model.layers.values()) if layer.model is not None else list(layer.parts.values())
    return [leaf for part in inner for leaf in _leaves(part)] if inner else [layer]


def _sorted(layer: Layer) -> tuple[list[str], list[str]]:
    changed, tracked = variables(layer)
    return (changed, tracked) if layer.flag("trainable", True) else ([], changed + tracked)
