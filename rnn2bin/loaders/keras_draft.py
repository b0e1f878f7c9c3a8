"""A file of Keras weights without a config -> the `source: {keras: …}` to start from: what names and shapes tell, else `unknown`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy import ndarray

UNKNOWN = "unknown"
# What a layer without weights most likely is, by its name; never acted upon.
BY_NAME = (
    ("input", "Input"),
    ("spatial_dropout", "Dropout"),
    ("dropout", "Dropout"),
    ("concat", "Concatenate"),
    ("merge", "Concatenate"),
    ("flatten", "Flatten"),
    ("global_max_pool", "GlobalMaxPooling1D"),
    ("global_average_pool", "GlobalAveragePooling1D"),
    ("max_pool", "MaxPooling1D"),
    ("average_pool", "AveragePooling1D"),
    ("leaky_re_lu", "LeakyReLU"),
    ("activation", "Activation"),
    ("masking", "Masking"),
    ("repeat_vector", "RepeatVector"),
    ("reshape", "Reshape"),
    ("permute", "Permute"),
)


def draft(groups: Mapping[str, Sequence[str]], tensors: Mapping[str, ndarray]) -> tuple[list[dict[str, Any]], list[str]]:
    """One entry for each layer in the file's order, and what is open."""
    entries = []
    for name, paths in groups.items():
        shapes = [tensors[path].shape for path in paths if path in tensors]
        entry = {"name": name, **(_with_weights(name, shapes) if shapes else {"kind": _by_name(name)})}
        entries.append(entry | ({"inputs": UNKNOWN} if entry["kind"] == "Concatenate" else {}))
    recurrent = [entry for entry in entries if "recurrent_activation" in entry or str(entry["kind"]).startswith("CuDNN")]
    for entry in recurrent[:-1]:
        entry["return_sequences"] = True
    for entry in recurrent[-1:]:
        entry["return_sequences"] = UNKNOWN
    reasons = [
        "holds weights only: it does not say what its layers compute or how they join; "
        "give the recipe `source: {keras: […]}`, the layers in order in Keras's own words (`rnn2bin inspect` prints one to start from)"
    ]
    reasons += [f"{entry['name']}: {option} is not in the file" for entry in entries for option, value in entry.items() if value == UNKNOWN]
    return entries, reasons


def _by_name(name: str) -> str:
    return next((kind for part, kind in BY_NAME if part in name.lower()), UNKNOWN)


def _with_weights(name: str, shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """What the shapes of a layer's arrays tell."""
    half = len(shapes) // 2
    if len(shapes) in (4, 6) and len(shapes[0]) == 2 and shapes[0] == shapes[half]:
        inner = _with_weights(name, shapes[:half])
        if "return_sequences" in inner or "recurrent_activation" in inner or inner["kind"] == "SimpleRNN":
            return {**inner, "bidirectional": UNKNOWN}
    kernel, *rest = shapes
    if len(kernel) == 2 and rest and len(rest[0]) == 2:
        return _recurrent(rest[0], rest[1] if len(rest) > 1 else None)
    if len(shapes) == 1 and len(kernel) == 2:
        return {"kind": UNKNOWN} if kernel[1] == 1 else {"kind": "Embedding", "mask_zero": False}
    if len(kernel) == 2 and [len(shape) for shape in rest] == [1]:
        return {"kind": "Dense", "activation": UNKNOWN}
    if len(kernel) == 3 and len(rest) < 2:
        return {"kind": "Conv1D", "activation": UNKNOWN, "padding": UNKNOWN, "strides": 1}
    if len(kernel) == 1 and len(shapes) == 4:
        return {"kind": "BatchNormalization"}
    if len(kernel) == 1 and len(shapes) == 2:
        return {"kind": "LayerNormalization"}
    return {"kind": UNKNOWN}


def _recurrent(recurrent: tuple[int, ...], bias: tuple[int, ...] | None) -> dict[str, Any]:
    units, rows = recurrent
    gates = {"activation": "tanh", "recurrent_activation": UNKNOWN}
    if rows == units:
        return {"kind": "SimpleRNN", "activation": "tanh"}
    if rows == 4 * units:
        return {"kind": "CuDNNLSTM"} if bias == (8 * units,) else {"kind": "LSTM", **gates}
    if rows == 3 * units:
        return {"kind": "CuDNNGRU"} if bias == (6 * units,) else {"kind": "GRU", **gates, "reset_after": bias == (2, 3 * units)}
    return {"kind": UNKNOWN}
