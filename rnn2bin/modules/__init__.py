"""Surgery on any nn.Module: every recurrent layer replaced by a binary-gated drop-in; the rest is left alone.

How gates run is no state of a module: `gate_mode` sets it for the calls inside a with-block, and outside of one they are bits.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rnn2bin import pack, recipe_yaml
from rnn2bin import spec as specs
from rnn2bin import student as students
from rnn2bin.cells.network import CellState, Trace, Walk, reverse, state_after, valid_steps, walk, zero_state
from rnn2bin.cells.weights import Cell
from rnn2bin.distill.window import run_cell
from rnn2bin.errors import DivergedError, RecipeError, UnsupportedError, UsageError
from rnn2bin.gates.estimators import BINARY, SCORE, Discretize
from rnn2bin.loaders.assemble import split_direction
from rnn2bin.packed import read_config
from rnn2bin.recipe import Recipe
from rnn2bin.spec import DIRECTIONS, LayerSpec, RnnSpec

if TYPE_CHECKING:
    from rnn2bin.modules.conversion import ModuleResult

KIND = "module"
LAYERS: tuple[type[nn.Module], ...] = (nn.LSTM, nn.GRU)
CELLS: tuple[type[nn.Module], ...] = (nn.LSTMCell, nn.GRUCell)
PLAIN: tuple[type[nn.Module], ...] = (nn.RNN, nn.RNNCell)


# --- how gates run in a call ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One cell over one call: its input x (T,B,I) in its own direction's order, its trace, and the real steps of each sequence."""

    cell: Cell
    x: Tensor
    trace: Trace
    lengths: Tensor | None
    whole: bool  # from the first step on; a BinaryCell sees one step of many

    def mask(self) -> Tensor:
        """(T,B,1,1): 1 on real steps."""
        steps, rows = self.x.shape[:2]
        real = self.x.new_ones(steps, rows, 1) if self.lengths is None else valid_steps(self.lengths, steps).to(self.x.dtype)
        return real.unsqueeze(-1)


@dataclass(frozen=True)
class _Gates:
    mode: Discretize = BINARY
    walk: Walk | None = None
    seen: Callable[[Call], None] | None = None


_GATES: ContextVar[_Gates] = ContextVar("rnn2bin_gates", default=_Gates())  # noqa: B039 - frozen


@contextmanager
def gate_mode(mode: Discretize, *, walk: Walk | None = None, seen: Callable[[Call], None] | None = None) -> Iterator[None]:
    """Binary gates run in `mode` in every call inside; without it they are bits (BINARY).

    `walk`: how cells walk over time; by default the training kernels where a gradient is wanted and the oracle elsewhere. `seen` is shown
    every cell's call. The setting is of this thread and task alone.
    """
    token = _GATES.set(_Gates(mode, walk, seen))
    try:
        yield
    finally:
        _GATES.reset(token)


def _run(cell: Cell, x: Tensor, state: CellState, lengths: Tensor | None = None, *, whole: bool = True) -> Trace:
    """x (T,B,I), in the direction's own order."""
    gates = _GATES.get()
    learning = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *state, *cell.parameters()))
    trace = (gates.walk or (run_cell if learning else walk))(cell, x, state, gates.mode)
    if gates.seen:
        gates.seen(Call(cell, x, trace, lengths, whole))
    return trace


# --- the drop-ins --------------------------------------------------------------------------------------------------------

Binary = Mapping[str, tuple[bool, ...]]  # cell's prefix -> which of its gates are decisions


class BinaryRnn(nn.Module):
    """Drop-in for nn.LSTM and nn.GRU: the same attributes, call signature and returns; gates are bits unless `gate_mode` says otherwise.

    `binary`: for "layers.0.fwd", … which gates are decisions; None: none, a float layer.
    """

    def __init__(self, layer: nn.Module, binary: Binary | None = None, *, levels: str = "strict") -> None:
        super().__init__()
        rnn = cast(nn.LSTM, layer)
        self.mode = rnn.mode
        self.input_size, self.hidden_size, self.num_layers = rnn.input_size, rnn.hidden_size, rnn.num_layers
        self.bias, self.batch_first, self.dropout = rnn.bias, rnn.batch_first, float(rnn.dropout)
        self.bidirectional, self.proj_size = rnn.bidirectional, rnn.proj_size
        self.layers = nn.ModuleList()
        for index, spec in enumerate(_layer_specs(rnn)):
            cells = {}
            for direction in DIRECTIONS[: spec.directions]:
                suffix = f"_l{index}" + ("_reverse" if direction == "bwd" else "")
                gates = binary[f"layers.{index}.{direction}"] if binary else None
                cells[direction] = _cell(spec, gates, levels, {name: getattr(rnn, name + suffix, None) for name in _TENSORS})
            self.layers.append(nn.ModuleDict(cells))

    def flatten_parameters(self) -> None:
        """Nothing to do; modules written for cuDNN call it."""

    def extra_repr(self) -> str:
        return f"{self.mode}, {self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, bidirectional={self.bidirectional}"

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """As the layer it replaces: input (T,B,I), (B,T,I) with batch_first, (T,I) or a PackedSequence; hx as torch takes it, or None.

        Raises ValueError or RuntimeError where shapes do not fit, as torch does.
        """
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"{self.mode}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        alone = input.dim() == 2
        x = input.unsqueeze(1) if alone else input.transpose(0, 1) if self.batch_first else input
        state = self._given(hx, x, alone=alone)
        y, after = self._layers(x, state, None)
        if alone:
            return y.squeeze(1), _each(after, lambda s: s.squeeze(1))
        return y.transpose(0, 1) if self.batch_first else y, after

    def _packed(self, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        """Rows run in the packed (sorted) order; only states are brought there and back."""
        x, lengths = pad_packed_sequence(PackedSequence(packed.data, packed.batch_sizes))
        state = self._given(hx, x, alone=False)
        to, back = packed.sorted_indices, packed.unsorted_indices
        if state is not None and to is not None:
            state = tuple(s.index_select(1, to) for s in state)
        y, after = self._layers(x, state, lengths.to(x.device))
        data = pack_padded_sequence(y, lengths).data
        result = PackedSequence(data, packed.batch_sizes, to, back)
        return result, after if back is None else _each(after, lambda s: s.index_select(1, back))

    def _given(self, hx: Any, x: Tensor, *, alone: bool) -> tuple[Tensor, ...] | None:
        """hx as (h,) or (h, c), each (L·D,B,·), checked: a wrong shape would broadcast in silence."""
        if x.shape[-1] != self.input_size:
            raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[-1]}")
        if x.shape[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        if hx is None:
            return None
        given = tuple(hx) if self.mode == "LSTM" else (hx,)
        state = tuple(s.unsqueeze(1) for s in given) if alone else given
        rows = self.num_layers * (2 if self.bidirectional else 1)
        for s, size in zip(state, (self.proj_size or self.hidden_size, self.hidden_size), strict=False):
            if tuple(s.shape) != (rows, x.shape[1], size):
                raise RuntimeError(f"Expected hidden size {(rows, x.shape[1], size)}, got {list(s.shape)}")
        return state

    def _layers(self, x: Tensor, given: tuple[Tensor, ...] | None, lengths: Tensor | None) -> tuple[Tensor, Any]:
        """x (T,B,I) -> y (T,B,D·R) and the states (L·D,B,·): h, or (h, c)."""
        mask = None if lengths is None else valid_steps(lengths, x.shape[0])
        ends: list[CellState] = []
        for index, layer in enumerate(self.layers):
            if index and self.dropout:
                x = functional.dropout(x, self.dropout, self.training)
            outs = []
            for direction, cell in cast(nn.ModuleDict, layer).items():
                cell = cast(Cell, cell)
                start = zero_state(cell.layer, x.shape[1], x) if given is None else tuple(s[len(ends)] for s in given)
                backward = direction == "bwd"
                trace = _run(cell, reverse(x, lengths) if backward else x, start, lengths)
                outs.append(reverse(trace.states[0], lengths) if backward else trace.states[0])
                ends.append(state_after(trace, start, lengths))
            x = torch.cat(outs, -1) if len(outs) > 1 else outs[0]
            if mask is not None:
                x = torch.where(mask, x, x.new_zeros(()))
        states = tuple(torch.stack(s) for s in zip(*ends, strict=True))
        return x, states if self.mode == "LSTM" else states[0]


class BinaryCell(nn.Module):
    """Drop-in for nn.LSTMCell and nn.GRUCell."""

    def __init__(self, layer: nn.Module, binary: Binary | None = None, *, levels: str = "strict") -> None:
        super().__init__()
        rnn = cast(nn.LSTMCell, layer)
        self.input_size, self.hidden_size, self.bias = rnn.input_size, rnn.hidden_size, rnn.bias
        tensors = {name: getattr(rnn, name, None) for name in _TENSORS}
        self.cell = _cell(_layer_specs(rnn)[0], binary["cell"] if binary else None, levels, tensors)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """input (B,I) or (I,); hx h, or (h, c) for an LSTM, or None -> the same after one step. Raises as torch does."""
        if input.dim() not in (1, 2):
            raise ValueError(f"Expected input to be 1D or 2D, got {input.dim()}D instead")
        alone, lstm = input.dim() == 1, self.cell.layer.cell == "lstm"
        x = input.unsqueeze(0) if alone else input
        if x.shape[1] != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {x.shape[1]}, expected {self.input_size}")
        state = zero_state(self.cell.layer, x.shape[0], x) if hx is None else tuple(hx) if lstm else (hx,)
        if hx is not None and alone:
            state = tuple(s.unsqueeze(0) for s in state)
        for s in state:
            if tuple(s.shape) != (x.shape[0], self.hidden_size):
                raise RuntimeError(f"hidden has shape {list(s.shape)}, expected {[x.shape[0], self.hidden_size]}")
        trace = _run(self.cell, x.unsqueeze(0), state, whole=False)
        after = tuple(s[0, 0] if alone else s[0] for s in trace.states)
        return after if lstm else after[0]


_TENSORS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def _each(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return tuple(change(s) for s in state) if isinstance(state, tuple) else change(state)


def _layer_specs(rnn: nn.Module) -> list[LayerSpec]:
    """One LayerSpec for each layer of a torch recurrent module; a cell is one layer."""
    kind = "lstm" if isinstance(rnn, (nn.LSTM, nn.LSTMCell)) else "gru"
    rnn = cast(nn.LSTM, rnn)
    if isinstance(rnn, CELLS):
        return [LayerSpec(kind, rnn.input_size, rnn.hidden_size)]
    directions = 2 if rnn.bidirectional else 1
    first = LayerSpec(kind, rnn.input_size, rnn.hidden_size, directions, rnn.proj_size)
    later = LayerSpec(kind, first.output_size, rnn.hidden_size, directions, rnn.proj_size)
    return [first] + [later] * (rnn.num_layers - 1)


def _cell(layer: LayerSpec, binary: tuple[bool, ...] | None, levels: str, tensors: dict[str, Tensor | None]) -> Cell:
    """A Cell with the weights of one direction of a torch layer, on its device and in its dtype."""
    ih, hh = tensors["weight_ih"], tensors["weight_hh"]
    assert ih is not None
    assert hh is not None
    zeros = hh.new_zeros(hh.shape[0])
    biases = (zeros if (b := tensors[name]) is None else b for name in ("bias_ih", "bias_hh"))
    found = split_direction(layer.cell, ih, hh, *biases)
    if layer.proj_size:
        found["projection.weight"] = cast(Tensor, tensors["weight_hr"])
    cell = Cell(layer, binary, levels=levels).to(ih)
    with torch.no_grad():
        for name, values in found.items():
            cell.get_parameter(name).copy_(values)
    return cell


# --- surgery -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """A module's cells, under the same questions that Network and RnnSpec answer about theirs."""

    module: nn.Module
    weights = "fp16"

    def cells(self) -> dict[str, Cell]:
        """Prefix ("encoder.rnn.layers.0.fwd", "decoder.cell") -> cell."""
        return {name: part for name, part in self.module.named_modules() if isinstance(part, Cell)}

    def cell_names(self) -> list[tuple[str, LayerSpec]]:
        return [(name, cell.layer) for name, cell in self.cells().items()]


def binarize(module: nn.Module, *, recipe: str | Path | Recipe = "anneal.yaml") -> nn.Module:
    """A deep copy in which every LSTM, GRU, LSTMCell and GRUCell is a drop-in with binary gates; `recipe.gates` says which and how.

    The copy starts from the same weights with strict levels, so under `gate_mode(FLOAT)` it computes what `module` does. Plain RNN layers
    have no gates and stay. Raises UnsupportedError with every reason, RecipeError for a soft gate that is not there.
    """
    gates = recipe.gates if isinstance(recipe, Recipe) else recipe_yaml.read(recipe).gates
    if gates.copies not in (1, "auto"):
        raise RecipeError("gates.copies: the states a module passes on hold one value a unit; give 1, or convert the network from a file")
    if gates.share not in (1, "auto"):
        raise RecipeError("gates.share: a module's layers keep a row of weights for every unit; give 1, or convert the network from a file")
    if isinstance(recipe, Recipe) and recipe.budget.counts:
        raise RecipeError(
            "budget.density, budget.price: what a module's other parts read is not counted; give budget.open, or convert a file"
        )
    if gates.estimator in SCORE:
        raise RecipeError(
            f"gates.estimator {gates.estimator}: a module's loss is one number a batch, not one a sequence; give another, or convert a file"
        )
    if isinstance(recipe, Recipe) and recipe.pack.weights != "fp16":
        raise RecipeError("pack.weights: what is packed of a module has no native runtime, which alone gains from bytes; give fp16")
    return surgery(module, students.plan(cast(RnnSpec, Cells(surgery(module))), gates), levels=gates.levels)


def surgery(module: nn.Module, binary: Binary | None = None, *, levels: str = "strict") -> nn.Module:
    """The copy with the gates that `binary` names as decisions; None: a float twin, whose gates can be watched. Raises UnsupportedError."""
    reasons = _refusals(module)
    if reasons:
        raise UnsupportedError(*reasons)
    try:
        result = copy.deepcopy(module)
    except RuntimeError as error:
        raise UnsupportedError(f"{type(module).__name__}: cannot be copied ({error})") from None
    made: dict[int, nn.Module] = {}  # a layer that stands in two places stays one
    for path, layer in list(result.named_modules()):
        if isinstance(layer, LAYERS + CELLS):
            prefix = f"{path}." if path else ""
            own = {name.removeprefix(prefix): bits for name, bits in binary.items() if name.startswith(prefix)} if binary else None
            made[id(layer)] = (BinaryRnn if isinstance(layer, LAYERS) else BinaryCell)(layer, own, levels=levels).train(layer.training)
    if id(result) in made:
        return made[id(result)]
    for parent in list(result.modules()):
        # Not named_children: it lists a child that bears two names once.
        parent._modules.update({name: made[id(part)] for name, part in parent._modules.items() if id(part) in made})
    return result


def _refusals(module: nn.Module) -> list[str]:
    parts = dict(module.named_modules())
    gated = {name: part for name, part in parts.items() if isinstance(part, LAYERS + CELLS)}
    if not gated:
        plain = [f"{name or type(part).__name__} ({type(part).__name__})" for name, part in parts.items() if isinstance(part, PLAIN)]
        only = f"; {', '.join(plain)} has no gates to make binary" if plain else ""
        return [f"{type(module).__name__}: no LSTM or GRU layer in it{only}"]
    owners = Counter(id(p) for part in parts.values() for p in part.parameters(recurse=False))
    return [reason for name, part in gated.items() for reason in _misfits(name or type(part).__name__, part, owners)]


def _misfits(name: str, layer: nn.Module, owners: Counter[int]) -> list[str]:
    """What a replacement of this layer would lose in silence."""
    base = next(kind for kind in LAYERS + CELLS if isinstance(layer, kind))
    reasons = []
    if type(layer).forward is not base.forward:
        reasons.append(f"{name}: {type(layer).__name__} has a forward of its own, which a replacement of {base.__name__} would not run")
    if is_parametrized(layer):
        reasons.append(f"{name}: is parametrized; call torch.nn.utils.parametrize.remove_parametrizations on it first")
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks:
        reasons.append(f"{name}: has hooks (weight_norm is one), which would be lost; remove them first")
    if any(owners[id(p)] > 1 for p in layer.parameters(recurse=False)):
        reasons.append(f"{name}: shares weights with another layer; give it weights of its own first")
    if any(t.is_meta or t.is_quantized for t in layer.parameters(recurse=False)):
        reasons.append(f"{name}: its weights are quantized or not loaded")
    return reasons


# --- packed directory ----------------------------------------------------------------------------------------------------


def write(student: nn.Module, folder: Path, *, levels: str, provenance: dict[str, Any], task: dict[str, Any]) -> None:
    """config.json and model.safetensors. Parameters are rounded to fp16; buffers (statistics, counters) keep their type.

    Raises DivergedError where a weight is not finite in fp16, UnsupportedError where the state dict holds more than tensors.
    """
    state = student.state_dict()
    weights = {name for name, _ in student.named_parameters(remove_duplicate=False)}
    strange = [f"{name}: extra state that is no tensor cannot be packed" for name, t in state.items() if not isinstance(t, Tensor)]
    if strange:
        raise UnsupportedError(*strange)
    tensors = {n: _rounded(t) if n in weights else t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in state.items()}
    bad = [name for name in weights & set(tensors) if not bool(torch.isfinite(tensors[name]).all())]
    if bad:
        raise DivergedError(*(f"{name}: not finite in fp16; nothing was packed; lower train.learning_rate" for name in sorted(bad)))
    save_file(tensors, folder / pack.WEIGHTS, metadata={"format": "pt"})
    cells = Cells(student).cells()
    config = {
        "model_type": "rnn2bin",
        "kind": KIND,
        "format_version": specs.FORMAT_VERSION,
        "torch_dtype": "float16",
        "layers": {name: asdict(cell.layer) for name, cell in cells.items()},
        "gates": {
            name: {g: "binary" if b else "soft" for g, b in zip(cell.layer.kind.gate_names, cell.binary, strict=True)}
            for name, cell in cells.items()
        },
        "levels": levels,
        "task": task,
        "provenance": provenance,
    }
    (folder / pack.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _rounded(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float16, copy=True, memory_format=torch.contiguous_format)


def load_module(path: str | Path, module: nn.Module) -> nn.Module:
    """A packed module: a copy of the float `module` it was made from (its code is not packed) with the packed weights, in eval.

    Raises UsageError where `path` is not a packed module or `module` does not have its layers, UnsupportedError for damaged files.
    """
    folder = Path(path)
    config = read_config(folder)
    if config.get("kind") != KIND:
        raise UsageError(f"{folder}: holds a whole network, not a module's weights; load it without module=")
    here = {name: asdict(layer) for name, layer in Cells(surgery(module)).cell_names()}
    packed, gates = config.get("layers"), config.get("gates")
    if not isinstance(packed, dict) or not isinstance(gates, dict) or config.get("levels") not in ("learned", "strict"):
        raise UnsupportedError(f"{folder / pack.CONFIG}: layers, gates or levels are missing")
    everyone = here.keys() | packed.keys() | gates.keys()
    wrong = sorted(name for name in everyone if name not in gates or here.get(name) != packed.get(name))
    if wrong:
        raise UsageError(
            *(f"module: {name} is {here.get(name)}, but {packed.get(name)} was packed; give the converted module" for name in wrong)
        )
    binary = {name: tuple(value == "binary" for value in bits.values()) for name, bits in gates.items()}
    result = surgery(module, binary, levels=config["levels"])
    result.load_state_dict(_read(folder / pack.WEIGHTS, result.state_dict()))
    return result.eval().requires_grad_(False)


def _read(file: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors, checked by name and shape (UnsupportedError lists every misfit)."""
    try:
        with safe_open(file, framework="pt") as stored:
            names = set(stored.keys())
            reasons = [f"{file}: tensor {name} is missing" for name in sorted(wanted.keys() - names)]
            reasons += [f"{file}: unknown tensor {name}" for name in sorted(names - wanted.keys())]
            shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in names & wanted.keys()}
            reasons += [
                f"{file}: {name} has shape {shape}; wanted {tuple(wanted[name].shape)}"
                for name, shape in sorted(shapes.items())
                if shape != tuple(wanted[name].shape)
            ]
            if reasons:
                raise UnsupportedError(*reasons)
            return {name: stored.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise UnsupportedError(f"{file}: not readable ({error})") from None


def convert_module(
    module: nn.Module,
    *,
    recipe: Recipe,
    data: Any,
    out: str | Path | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    metric: Callable[..., float] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
    callbacks: Sequence[Any] = (),
) -> ModuleResult:
    """Distil `module` into its binary-gated copy and pack that; see `rnn2bin.modules.conversion.convert`."""
    from rnn2bin.modules import conversion  # transformers' Trainer comes with it: binarizing and loading do without

    options: dict[str, Any] = {"forward": forward} if forward else {}
    options |= {"resume": resume, "force": force, "progress": progress, "callbacks": callbacks}
    return conversion.convert(module, recipe=recipe, data=data, out=out, loss=loss, metric=metric, **options)
