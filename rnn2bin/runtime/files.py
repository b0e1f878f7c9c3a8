"""`rnn2bin run`: a packed directory over a data file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rnn2bin import data, packed
from rnn2bin.errors import DataError, UsageError
from rnn2bin.runtime import graph_backend, native_backend, torch_backend

Model = native_backend.Model | graph_backend.Model | torch_backend.Model
BATCH = 256


def run_file(model: Model, path: Path, target: Path | None) -> dict[str, Any]:
    """Outputs of every sequence, in the file's order, padded to the longest: `outputs` (N,T,O), (N,O) or tokens (N,U), and `lengths` (N,).

    Raises DataError where the data do not fit, UsageError where `target` is no .npz or exists.
    """
    import numpy as np

    if target is not None and (target.suffix != ".npz" or target.exists()):
        raise UsageError(f"{target}: give a new file ending in .npz")
    if not path.is_file():
        raise DataError(f"{path}: no such data file")
    part = _text(model, path) if path.suffix.lower() in (".txt", ".text") else data.read_tensors(path)
    data.check_part(part, model.spec, where=str(path))
    pieces = []
    for start in range(0, len(part), BATCH):
        batch = data.collate(part.take(torch.arange(start, min(start + BATCH, len(part)))))
        y, _ = model(batch.inputs, lengths=batch.lengths)
        pieces.append(y.transpose(0, 1) if y.ndim == 3 or model.spec.decode else y)
    outputs = _joined(pieces, fill=model.spec.decode.end if model.spec.decode else 0)
    arrays: dict[str, Any] = {"outputs": outputs.numpy(), **({"lengths": part.lengths.numpy()} if part.lengths is not None else {})}
    if target is not None:
        with target.open("xb") as stream:
            np.savez(stream, **arrays)
    return {"sequences": len(part), "outputs": list(outputs.shape), "written": str(target) if target else None}


def _text(model: Model, path: Path) -> data.Part:
    return data.Part(data.encode_text(data.read_text(path), packed.vocabulary(model.config))[None])


def _joined(pieces: list[torch.Tensor], *, fill: int) -> torch.Tensor:
    """Batches of different lengths -> one tensor, padded with `fill`."""
    if pieces[0].ndim == 1 or len({p.shape[1:] for p in pieces}) == 1:
        return torch.cat(pieces)
    longest = max(p.shape[1] for p in pieces)
    padded = []
    for piece in pieces:
        whole = piece.new_full((piece.shape[0], longest, *piece.shape[2:]), fill)
        whole[:, : piece.shape[1]] = piece
        padded.append(whole)
    return torch.cat(padded)
