"""The training kernels in C (`csrc/`), bound by address: a window of an LSTM or GRU, forward and backward, in float32 or bfloat16.

They compute what `distill/windows/` compute in torch. In bfloat16 the operands of matrix products are rounded (8 bits of mantissa, as in
mixed precision training, Kalamkar et al. 2019, arXiv 1905.12322); sums, states and everything elementwise stay float32. Without a
compiled extension, on other devices and dtypes, and for cells and estimators not listed here, the torch kernels run.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rnn2bin.cells.network import Trace
from rnn2bin.cells.weights import Cell
from rnn2bin.gates.estimators import Discretize

PRECISIONS = {"float32": 0, "bfloat16": 1}
_CELLS = {"lstm": 0, "gru": 1, "gru_output": 2}
_GATES = {"lstm": 3, "gru": 2, "gru_output": 3}
_EQUAL = {"pseudo_123": "lstm"}  # all differences between them make it one
_ESTIMATORS = {"float", "binary", "gumbel", "gumbel-hard", "sigmoid", "straight-through"}
_SOFT, _BIT = 0, 1
_BY = {"sigmoid": 0, "hard-sigmoid": 1, "identity": 2}
_POINTERS = (
    *("weight", "row", "row_scale", "gates_bias", "bias", "bias_hh", "lo", "hi", "x_pre", "h0", "c0", "h", "c", "products", "row_products"),
    *("candidate", "inner", "h_before", "grad_h", "grad_c", "grad_gates", "grad_x", "grad_rows", "grad_inner", "grad_h0", "grad_c0"),
    *("grad_gates_bias", "grad_bias", "grad_bias_hh", "grad_row_scale", "grad_lo", "grad_hi"),
)


class _Mode(ctypes.Structure):
    _fields_ = (
        ("sample", ctypes.c_int32),
        ("by", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("sharpness", ctypes.c_float),
        ("slope", ctypes.c_float),
        ("noisy", ctypes.c_int32),
    )


class _Product(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "out")),
        *((name, ctypes.c_size_t) for name in ("a_row", "a_k", "b_k", "b_n", "out_row")),
        *((name, ctypes.c_int32) for name in ("m", "n", "k", "precision", "add", "threads")),
    )


class _Window(ctypes.Structure):
    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("share", ctypes.c_float),
        ("noisy", ctypes.c_int32),
        *((name, ctypes.c_int32) for name in ("cell", "precision", "threads", "steps", "batch", "hidden", "copies", "rows", "x_rows")),
        ("modes", _Mode * 3),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


class _Count(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("products", "closed", "open", "best", "count", "grad", "grad_products", "grad_closed", "grad_open")
        ),
        ("least", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("closed_gate", "open_gate", "rows", "gates", "hidden", "copies", "threads")),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, with one warning, where the package was installed without a C compiler."""
    found = importlib.util.find_spec("rnn2bin.distill._window")
    if found is None or not found.origin:
        warnings.warn("rnn2bin was installed without its C kernels: training runs in torch, several times slower", stacklevel=2)
        return None
    kernels = ctypes.CDLL(found.origin)
    kernels.r2b_isa.restype = ctypes.c_char_p
    return kernels


def isa() -> str | None:
    """The instruction set the kernels use here, None where there are none."""
    kernels = library()
    return kernels.r2b_isa().decode() if kernels else None


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 natively: elsewhere it would only cost accuracy."""
    kernels = library()
    return bool(kernels and kernels.r2b_has_bfloat16())


def equal_to(kind: str) -> str:
    """The cell under whose name the kernels know this one's equations."""
    return _EQUAL.get(kind, kind)


def takes(cell: Cell, x: Tensor, modes: tuple[Discretize, ...]) -> bool:
    """Whether these kernels run this cell on tensors like `x` with these modes."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and equal_to(cell.layer.cell) in _CELLS
        and not (cell.layer.proj_size or cell.layer.clip or cell.layer.cell_clip)
        and cell.layer.activation == "tanh"
        and (cell.layer.shared == 1 or cell.layer.gate_rows(cell.layer.shared) < cell.layer.hidden_size)
        and all(m.estimator in _ESTIMATORS for m in modes)
        and library() is not None
    )


def _mode(m: Discretize) -> _Mode:
    """Scale and sharpness of a sample σ((s·pre + L)/τ) or 1[s·pre + L > 0], and what its derivative is."""
    match m.estimator:
        case "float":
            return _Mode(_SOFT, 0, 1.0, 1.0, 1.0, 0)
        case "sigmoid" | "gumbel":
            return _Mode(_SOFT, 0, m.slope, 1 / m.temperature, m.slope, m.estimator == "gumbel")
        case "gumbel-hard":
            # Without noise the surrogate is σ(s·pre/τ) too.
            return _Mode(_BIT, 0, m.slope, 1 / m.temperature, m.slope / m.temperature, 1)
        case _:
            return _Mode(_BIT, _BY[m.backward], 1.0, 1.0, m.slope, 0)


def _address(t: Tensor | None) -> int | None:
    assert t is None or t.is_contiguous()
    return None if t is None else t.data_ptr()


@dataclass(frozen=True)
class Noise:
    """Logistic noise by its seed: what is drawn depends on the seed and the place in the window, so nothing need be kept for the backward
    pass. `share` of the entries get noise, the others none."""

    seed: int
    share: float

    @classmethod
    def of(cls, mode: Discretize) -> Noise:
        """Under a seed from the mode's generator, or torch's: what makes a run's randomness resume makes this resume."""
        return cls(int(torch.randint(2**63 - 1, (), generator=mode.generator)), mode.noise)

    def fill(self, *shape: int) -> Tensor:
        """The noise (T,B,G,W) of a window."""
        steps, rows, gates, width = shape
        noise = torch.empty(shape)
        sizes = (ctypes.c_int32(n) for n in (steps * rows, gates, width, torch.get_num_threads()))
        _call(_kernels().r2b_noise, ctypes.c_uint64(self.seed), ctypes.c_float(self.share), ctypes.c_void_p(noise.data_ptr()), *sizes)
        return noise


def _kernels() -> ctypes.CDLL:
    kernels = library()
    assert kernels is not None
    return kernels


def multiply(a: Tensor, b: Tensor, precision: str, *, out: Tensor | None = None) -> Tensor:
    """a (M,K) · b (K,N), float32 and of any strides -> (M,N); added to `out` where that is given. torch's own product in float32 runs at
    half this speed on processors its library was not tuned for."""
    (m, k), (inner, n) = a.shape, b.shape
    if inner != k or {a.dtype, b.dtype} != {torch.float32} or (out is not None and (out.shape != (m, n) or not out.is_contiguous())):
        raise ValueError(f"no product of {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}")
    add = out is not None
    if out is None:
        out = a.new_empty(m, n) if k else a.new_zeros(m, n)
    addresses, strides = (a.data_ptr(), b.data_ptr(), out.data_ptr()), (*a.stride(), *b.stride(), n)
    product = _Product(*addresses, *strides, m, n, k, PRECISIONS[precision], add, torch.get_num_threads())
    _call(_kernels().r2b_multiply, ctypes.byref(product))
    return out


def add_rows(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Σ of the rows (N,M) float32 that share an index (N,) int64 below `size` -> (size,M)."""
    if rows.dtype != torch.float32 or index.dtype != torch.int64 or index.shape != rows.shape[:1]:
        raise ValueError(f"no rows to add: {tuple(rows.shape)} {rows.dtype} at {tuple(index.shape)} {index.dtype}")
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise ValueError(f"an index is not within the table of {size} rows")
    rows, index, table = rows.contiguous(), index.contiguous(), rows.new_zeros(size, rows.shape[1])
    addresses = (ctypes.c_void_p(t.data_ptr()) for t in (rows, index, table))
    _call(_kernels().r2b_add_rows, *addresses, *(ctypes.c_int32(n) for n in (*rows.shape, torch.get_num_threads())))
    return table


def _window(
    kind: str, precision: str, modes: tuple[Discretize, ...], noise: Noise | None, x_pre: Tensor, tensors: dict[str, Tensor | None]
) -> _Window:
    steps, batch, wide = x_pre.shape
    lo, weight = tensors["lo"], tensors["weight"]
    assert lo is not None
    assert weight is not None
    gates, hidden = lo.shape[0], weight.shape[1]
    draw = (noise.seed, noise.share, 1) if noise else (0, 1.0, 0)
    rows = ((weight.shape[0] - hidden) // gates, (wide - hidden) // gates)
    head = (_CELLS[kind], PRECISIONS[precision], torch.get_num_threads(), steps, batch, hidden, lo.shape[1] // hidden, *rows)
    return _Window(*draw, *head, (_Mode * 3)(*map(_mode, modes)), *(_address(tensors.get(name)) for name in _POINTERS))


def _call(function: Any, *arguments: Any) -> None:
    if function(*arguments):
        raise MemoryError("the training kernels ran out of memory; lower train.batch_size or train.window")


def _check_shapes(kind: str, x_pre: Tensor, bias: Tensor, gates_bias: Tensor, tensors: dict[str, Tensor | None]) -> None:
    """C trusts what it is told: every size and dtype is checked here. Raises ValueError."""
    (steps, batch, wide), (hidden,), (gates, width) = x_pre.shape, bias.shape, gates_bias.shape
    weight, row = tensors["weight"], tensors["row"]
    rows = hidden if row is None or weight is None else (len(weight) - hidden) // gates
    wanted: dict[str, tuple[int, ...]] = {
        "x_pre": (steps, batch, gates * (rows if wide < (gates + 1) * hidden else hidden) + hidden),
        "weight": (gates * rows + hidden, hidden),
        "row_scale": (gates * hidden,),
        "gates_bias": (gates, width),
        "bias": (hidden,),
        "bias_hh": (hidden,),
        "h0": (batch, width if kind == "gru" else hidden),
        "c0": (batch, width),
        "lo": (gates, width),
        "hi": (gates, width),
    }
    split, lstm = kind != "gru", kind == "lstm"
    if gates != _GATES[kind] or width % hidden or split != (tensors["c0"] is not None) or lstm == (tensors["bias_hh"] is not None):
        raise ValueError(f"{kind}: x_pre {tuple(x_pre.shape)} and gates_bias {tuple(gates_bias.shape)} do not belong together")
    if (row is None) != (tensors["row_scale"] is None) or (row is not None and not _within(row, gates, rows=rows, hidden=hidden)):
        raise ValueError(f"{kind}: gates.row does not give each unit one of the {rows} rows of its gate, fewer than units")
    for name, shape in wanted.items():
        tensor = tensors[name]
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != torch.float32):
            raise ValueError(f"{kind}: {name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; wanted {shape}, float32")


def _within(row: Tensor, gates: int, *, rows: int, hidden: int) -> bool:
    """Whether every unit (G·H) reads one of its own gate's fewer rows."""
    fits = 0 < rows < hidden and row.shape == (gates * hidden,) and row.dtype == torch.int32
    return fits and 0 <= int(row.min()) <= int(row.max()) < rows


def _weight_grad(grad: Tensor, h0: Tensor, h: Tensor, precision: str, *, shifted: bool) -> Tensor:
    """Gradient (M,H) of recurrent weights from that of their products (T,B,M). `h` (T,B,H) is what each step read, or, `shifted`, left."""
    if not shifted:
        return multiply(grad.flatten(0, 1).t(), h.flatten(0, 1), precision)
    first = multiply(grad[0].t(), h0, precision)
    return multiply(grad[1:].flatten(0, 1).t(), h[:-1].flatten(0, 1), precision, out=first)


class NativeWindow(torch.autograd.Function):
    """x_pre (T,B,(G+1)·H), products without a bias -> h (T,B,H), (T,B,n·H) of a GRU without an output gate, c (T,B,n·H) (nothing of such
    a GRU), the gates' products (T,B,G,H): pre-activations but for `gates_bias`, input included.

    `weight` ((G+1)·H,H); `gates_bias`, levels (G,n·H); `bias` (H) of the candidate, `bias_hh` (H) of the GRU's recurrent candidate; states
    as wide as their traces. Where units share R rows of a gate, `weight` is (G·R+H,H), and x_pre may be (T,B,G·R+H): `row` (G·H) says which
    of all rows a unit reads, `row_scale` (G·H) what their product is multiplied by.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_pre: Tensor,
        weight: Tensor,
        gates_bias: Tensor,
        bias: Tensor,
        bias_hh: Tensor | None,
        row: Tensor | None,
        row_scale: Tensor | None,
        h0: Tensor,
        c0: Tensor | None,
        lo: Tensor,
        hi: Tensor,
        noise: Noise | None,
        kind: str,
        modes: tuple[Discretize, ...],
        precision: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        steps, batch, _ = x_pre.shape
        (gates, width), hidden = gates_bias.shape, bias.shape[0]
        if row is not None:  # each gate's own from 0, as C counts them
            rows = (len(weight) - hidden) // gates
            row = (row.view(gates, hidden) - rows * torch.arange(gates)[:, None]).flatten().int()
        given = {"x_pre": x_pre, "weight": weight, "row": row, "row_scale": row_scale, "gates_bias": gates_bias, "bias": bias}
        given |= {"bias_hh": bias_hh, "h0": h0, "c0": c0, "lo": lo, "hi": hi}
        _check_shapes(kind, x_pre, bias, gates_bias, given)
        lstm, split, learning = kind == "lstm", kind != "gru", any(ctx.needs_input_grad)
        new = lambda *shape: x_pre.new_empty(*shape)
        t: dict[str, Tensor | None] = {name: None if tensor is None else tensor.contiguous() for name, tensor in given.items()} | {
            "h": new(steps, batch, h0.shape[1]),
            "c": new(steps, batch, width) if split else None,
            "products": new(steps, batch, gates, hidden),
            "row_products": new(steps, batch, len(weight) - hidden) if learning and row is not None else None,
            "candidate": new(steps, batch, hidden if lstm else width) if learning else None,
            "inner": new(steps, batch, hidden) if learning and not lstm else None,
            "h_before": new(steps, batch, hidden) if learning and not split and width > hidden else None,
        }
        _call(_kernels().r2b_forward, ctypes.byref(_window(kind, precision, modes, noise, x_pre, t)))
        if learning:
            names = [name for name, tensor in t.items() if tensor is not None and name != "x_pre"]
            ctx.save_for_backward(*(t[name] for name in names))
            ctx.wide = x_pre.shape[2]
            ctx.names, ctx.kind, ctx.modes, ctx.noise, ctx.precision = names, kind, modes, noise, precision
            ctx.set_materialize_grads(False)
        h, c, products = t["h"], t["c"], t["products"]
        assert h is not None
        assert products is not None
        return h, (h.new_empty(0) if c is None else c), products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None, grad_gates: Tensor | None) -> tuple[Tensor | None, ...]:
        t: dict[str, Tensor | None] = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        saved = {name: tensor for name, tensor in t.items() if tensor is not None}
        h, h0, lo, weight = saved["h"], saved["h0"], saved["lo"], saved["weight"]
        lstm, split = ctx.kind == "lstm", ctx.kind != "gru"
        steps, batch, hidden = *h.shape[:2], weight.shape[1]
        learns_levels, few = ctx.needs_input_grad[9] or ctx.needs_input_grad[10], len(weight) - hidden
        zeros = lambda name: torch.zeros_like(saved[name]) if name in saved else None
        t |= {
            "grad_h": None if grad_h is None else grad_h.contiguous(),
            "grad_c": None if grad_c is None or not split else grad_c.contiguous(),
            "grad_gates": None if grad_gates is None else grad_gates.contiguous(),
            "grad_x": (grad_x := h.new_empty(steps, batch, ctx.wide)),
            "grad_rows": h.new_empty(steps, batch, few) if "row" in saved else None,
            "grad_row_scale": zeros("row_scale"),
            "grad_inner": None if lstm else h.new_empty(steps, batch, hidden),
            "grad_h0": torch.empty_like(h0),
            "grad_c0": torch.empty_like(saved["c0"]) if split else None,
            "grad_gates_bias": torch.zeros_like(lo),
            "grad_bias": zeros("bias"),
            "grad_bias_hh": zeros("bias_hh"),
            "grad_lo": torch.zeros_like(lo) if learns_levels else None,
            "grad_hi": torch.zeros_like(lo) if learns_levels else None,
        }
        _call(_kernels().r2b_backward, ctypes.byref(_window(ctx.kind, ctx.precision, ctx.modes, ctx.noise, grad_x, t)))
        parts = _recurrent_grads(t, hidden)
        d_weight = torch.cat(
            [_weight_grad(part, h0, saved.get("h_before", h), ctx.precision, shifted="h_before" not in saved) for part in parts]
        )
        names = ("grad_h0", "grad_c0", "grad_lo", "grad_hi")
        biases = (t["grad_gates_bias"], t["grad_bias"], t["grad_bias_hh"])
        return grad_x, d_weight, *biases, None, t["grad_row_scale"], *(t[name] for name in names), *(None,) * 4


def _recurrent_grads(t: dict[str, Tensor | None], hidden: int) -> list[Tensor]:
    """The gradients of recurrent products (T,B,·), in the order of the weights' rows; in as few pieces as lie side by side."""
    grad_x, rows, inner = t["grad_x"], t["grad_rows"], t["grad_inner"]
    assert grad_x is not None
    if rows is None and inner is None:
        return [grad_x]
    return [grad_x[:, :, :-hidden] if rows is None else rows, grad_x[:, :, -hidden:] if inner is None else inner]


class Product(torch.autograd.Function):
    """x (N,K) · weight (M,K)ᵀ -> (N,M), forward and backward in the precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, precision: str) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.precision = precision
        return multiply(x, weight.t(), precision)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        d_x = multiply(grad, weight, ctx.precision) if ctx.needs_input_grad[0] else None
        return d_x, multiply(grad.t(), x, ctx.precision), None


class _Units(torch.autograd.Function):
    """products (T,B,G,H), thresholds (n,H) of the gate that is to be closed and of the one to be open -> units (T,B) that do so in one
    copy. The gradient is that of σ(pre) for each bit, of the copy that does both most clearly."""

    @staticmethod
    def forward(ctx: Any, products: Tensor, closed: Tensor, opened: Tensor, gates: tuple[int, int]) -> Tensor:  # type: ignore[override]
        steps, batch, _, hidden = products.shape
        count, best = products.new_empty(steps, batch), products.new_empty(steps, batch, hidden, dtype=torch.int32)
        ctx.gates = gates
        ctx.given = {"products": products.contiguous(), "closed": closed.contiguous(), "open": opened.contiguous(), "best": best}
        _call(_kernels().r2b_count_units, ctypes.byref(_count(gates, **ctx.given, count=count)))
        return count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = {f"grad_{name}": torch.zeros_like(ctx.given[name]) for name in ("products", "closed", "open")}
        _call(_kernels().r2b_count_units, ctypes.byref(_count(ctx.gates, **ctx.given, grad=grad.contiguous(), **found)))
        return *found.values(), None


def _count(gates: tuple[int, int], **tensors: Tensor) -> _Count:
    """`gates`: the one to be closed and the one to be open."""
    steps, batch, every, hidden = tensors["products"].shape
    sizes = {"rows": steps * batch, "gates": every, "hidden": hidden, "copies": len(tensors["closed"]), "threads": torch.get_num_threads()}
    addresses = {name: _address(tensor) for name, tensor in tensors.items()}
    return _Count(**addresses, **sizes, least=torch.finfo(torch.float32).tiny, closed_gate=gates[0], open_gate=gates[1])


def closed_and_open(trace: Trace, copies: int, closed: int, opened: int) -> Tensor | None:
    """Units (T,B) of `cost.Read.closed_and_open` in C, with bits whose gradient is that of σ(pre); None where these kernels do not run."""
    products, biases = trace.products, trace.biases
    if biases is None or products.device.type != "cpu" or products.dtype != torch.float32 or library() is None:
        return None
    return _Units.apply(products, *(biases[gate].view(copies, -1) for gate in (closed, opened)), (closed, opened))
