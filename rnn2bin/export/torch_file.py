"""A binary-gated network as a state dict for nn.LSTM or nn.GRU, where PyTorch's cells can hold it exactly.

A gate there is σ(pre). With a binary gate's rows and bias times 2^60 (a power of two: no number is rounded) float32 makes it exactly 1
for pre > 0 and exactly 0 for pre < 0, unless |pre| is below 1e-16. Levels fold only where a linear operation stands behind them:
a GRU's `hi` of r into the rows of U_n, an LSTM's `hi` of o into the columns of whatever reads h. All others must be 0 and 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rnn2bin.cells.network import Network, Section
from rnn2bin.cells.weights import Cell
from rnn2bin.errors import UnsupportedError
from rnn2bin.spec import DIRECTIONS, SectionSpec

if TYPE_CHECKING:
    from torch import Tensor

SHARP = 2.0**60
STRICT = "convert with --set gates.levels=strict --set gates.copies=1, or export --to onnx, which holds everything"


def write(network: Network, *, suffix: str) -> tuple[bytes, list[str]]:
    """The file's bytes, and lines that say how to use it. Raises UnsupportedError with every reason why PyTorch's cells do not fit."""
    if network.spec.decode is not None:
        raise UnsupportedError("an encoder–decoder is no nn.LSTM or nn.GRU; export --to onnx does not take it either")
    section = network.get_submodule("main")
    assert isinstance(section, Section)
    reasons = _reasons(section)
    if reasons:
        raise UnsupportedError(*reasons)
    tensors = {name: values.detach().float().contiguous() for name, values in _tensors(section).items()}
    return _bytes(tensors, suffix), _meaning(section.spec)


def _reasons(section: Section) -> list[str]:
    spec = section.spec
    first = spec.layers[0]
    reasons = ["parts around its layers are no plain chain of layers and linear layers; export --to onnx"] if spec.graph else []
    alike = {(one.cell, one.hidden_size, one.directions, one.proj_size) for one in spec.layers}
    if len(alike) > 1:
        reasons.append("its layers differ in kind or size, and nn.LSTM stacks equal ones; export --to onnx")
    if first.cell == "gru_reset_before":
        reasons.append("its reset gate multiplies h before U_n, which nn.GRU cannot; export --to onnx")
    if first.cell == "gru_output":
        reasons.append("its GRU has an output gate, which nn.GRU has not; export --to onnx, or convert with gates.output=false")
    if any(one.activation != "tanh" or one.hard_sigmoid for one in spec.layers):
        reasons.append("its cells have other activations than nn.LSTM and nn.GRU; export --to onnx")
    if others := sorted({one.cell for one in spec.layers if one.kind.family not in ("lstm", "gru")}):
        reasons.append(f"PyTorch has no {', '.join(others)}; such cells run on both backends of this package")
    if any(one.cell.startswith("lstm_") for one in spec.layers):
        reasons.append("its LSTM has peepholes, or one decision for its input and forget gate, which nn.LSTM has not; export --to onnx")
    if any(one.clip or one.cell_clip or one.proj_clip for one in spec.layers):
        reasons.append("its cells are clipped, and nn.LSTM and nn.GRU clip nothing; export --to onnx")
    if any(one.copies > 1 for one in spec.layers):
        reasons.append(f"its gates take {first.copies} decisions a unit, and PyTorch's take one; {STRICT}")
        return reasons
    for name, cell in _cells(section):
        left = [f"{gate}.{side}" for gate, side in _unfolded(cell, section)]
        if left:
            reasons.append(f"{name}: learned levels {', '.join(left)} have no place in PyTorch's cells; {STRICT}")
    return reasons


def _cells(section: Section) -> list[tuple[str, Cell]]:
    return [
        (f"layers.{k}.{way}", section.cell(k, way)) for k, layer in enumerate(section.spec.layers) for way in DIRECTIONS[: layer.directions]
    ]


def _unfolded(cell: Cell, section: Section) -> list[tuple[str, str]]:
    """Levels that are neither strict nor folded."""
    lo, hi = cell.level_values()
    folds = "r" if cell.layer.cell == "gru" else "o" if cell.layer.proj_size or section.spec.head else ""
    found = []
    for k, gate in enumerate(cell.layer.kind.gate_names):
        if cell.binary[k]:
            found += [(gate, "lo")] if bool(lo[k].any()) else []
            found += [(gate, "hi")] if gate != folds and bool((hi[k] != 1).any()) else []
    return found


def _tensors(section: Section) -> dict[str, Tensor]:
    import torch

    spec, tensors = section.spec, {}
    if spec.embedding and not spec.embedding.one_hot:
        tensors["embedding.weight"] = section.embedding.weight
    scale: Tensor | None = None  # of what the layer before hands on
    for index, layer in enumerate(spec.layers):
        scales = []
        for way in DIRECTIONS[: layer.directions]:
            cell = section.cell(index, way)
            parts, after = _direction(cell, scale)
            scales.append(after)
            tensors |= {f"rnn.{name}_l{index}{'_reverse' if way == 'bwd' else ''}": values for name, values in parts.items()}
        scale = torch.cat(scales)
    for index, linear in enumerate(section.head):
        assert isinstance(linear, torch.nn.Linear)
        tensors[f"head.{index}.weight"] = linear.weight * scale if index == 0 and scale is not None else linear.weight
        if linear.bias is not None:
            tensors[f"head.{index}.bias"] = linear.bias
    return tensors


def _direction(cell: Cell, before: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    """PyTorch's tensors of one direction, and what its outputs are still to be multiplied by. `before`: the same of the layer's input."""
    import torch

    layer, w = cell.layer, cell.weights()
    _, hi = cell.level_values()
    lstm, hidden = layer.cell == "lstm", layer.hidden_size
    after = hi[2] if lstm and cell.binary[2] else torch.ones(hidden)
    own = torch.ones(layer.recurrent_size) if layer.proj_size else after
    reset = hi[0] if not lstm and cell.binary[0] else torch.ones(hidden)
    sharp = torch.tensor([SHARP if binary else 1.0 for binary in cell.binary]).repeat_interleave(hidden)
    gates = [(t * sharp.view(-1, *[1] * (t.ndim - 1))).split(hidden) for t in (w.gates_ih, w.gates_hh * own, w.gates_bias)]
    candidate = [w.candidate_ih, w.candidate_hh * own * reset[:, None], w.candidate_bias]
    order = (lambda g, n: torch.cat([g[0], g[1], n, g[2]])) if lstm else (lambda g, n: torch.cat([g[0], g[1], n]))
    ih, hh, bias = (order(g, n) for g, n in zip(gates, candidate, strict=True))
    zeros = torch.zeros_like(bias)
    if w.candidate_bias_hh is not None:
        zeros[2 * hidden :] = w.candidate_bias_hh * reset
    parts = {"weight_ih": ih if before is None else ih * before, "weight_hh": hh, "bias_ih": bias, "bias_hh": zeros}
    if w.projection is not None:
        parts["weight_hr"] = w.projection * after
    return parts, own


def _bytes(tensors: dict[str, Tensor], suffix: str) -> bytes:
    if suffix == ".safetensors":
        from safetensors.torch import save

        return bytes(save(tensors))
    import io

    import torch

    stream = io.BytesIO()
    torch.save(tensors, stream)
    return stream.getvalue()


def _meaning(spec: SectionSpec) -> list[str]:
    layer = spec.layers[0]
    kind = "LSTM" if layer.cell == "lstm" else "GRU"
    options = [f"num_layers={len(spec.layers)}"] if len(spec.layers) > 1 else []
    options += ["bidirectional=True"] if layer.directions == 2 else []
    options += [f"proj_size={layer.proj_size}"] if layer.proj_size else []
    lines = [f"rnn: nn.{kind}({', '.join(map(str, (layer.input_size, layer.hidden_size, *options)))}), float32 only"]
    if spec.embedding:
        table = (spec.embedding.num_embeddings, spec.embedding.embedding_dim)
        lines.insert(0, f"tokens as one-hot vectors of {table[0]}" if spec.embedding.one_hot else f"embedding: nn.Embedding{table}")
    lines += [f"head.{k}: nn.Linear({one.in_features}, {one.out_features}), then {one.activation}" for k, one in enumerate(spec.head)]
    lines.append(f"the head reads: {spec.readout}")
    return lines
