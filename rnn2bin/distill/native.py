"""The training kernels in C (`csrc/`), bound by address: a window of an LSTM or GRU, forward and backward, in float32 or bfloat16.

They compute what `distill/window.py` computes in torch. In bfloat16 the operands of matrix products are rounded (8 bits of mantissa, as in
mixed precision training, Kalamkar et al. 2019, arXiv 1905.12322); sums, states and everything elementwise stay float32. Without a
compiled extension, on other devices and dtypes, and for cells and estimators not listed here, the torch kernels run.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rnn2bin.cells.weights import Cell, fold
from rnn2bin.gates.estimators import Discretize

PRECISIONS = {"float32": 0, "bfloat16": 1}
_CELLS = {"lstm": 0, "gru": 1}
_SOFT, _BIT = 0, 1
_BY = {"sigmoid": 0, "hard-sigmoid": 1, "identity": 2}
_POINTERS = (
    *("weight", "gates_bias", "bias", "lo", "hi", "x_pre", "noise", "h0", "c0", "h", "c", "products", "candidate", "inner", "h_before"),
    *("grad_h", "grad_c", "grad_gates", "grad_x", "grad_product", "grad_h0", "grad_c0", "grad_bias", "grad_lo", "grad_hi"),
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


class _Window(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("cell", "precision", "threads", "steps", "batch", "hidden", "copies")),
        ("modes", _Mode * 3),
        *((name, ctypes.c_void_p) for name in _POINTERS),
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


def takes(cell: Cell, x: Tensor, modes: tuple[Discretize, ...]) -> bool:
    """Whether these kernels run this cell on tensors like `x` with these modes."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and cell.layer.cell in _CELLS
        and not (cell.layer.proj_size or cell.layer.clip or cell.layer.cell_clip)
        and cell.layer.activation == "tanh"
        and all(m.estimator not in ("hard-sigmoid", "stochastic") for m in modes)
        and library() is not None
    )


def _mode(m: Discretize) -> _Mode:
    """Scale and sharpness of a sample σ((s·pre + L)/τ) or 1[s·pre + L > 0], and what its derivative is."""
    match m.estimator:
        case "float":
            return _Mode(_SOFT, 0, 1.0, 1.0, 1.0, 0)
        case "sigmoid" | "gumbel":
            return _Mode(_SOFT, 0, m.slope, 1 / m.temperature, m.slope, 0)
        case "gumbel-hard":
            # Without noise the surrogate is σ(s·pre/τ) too.
            return _Mode(_BIT, 0, m.slope, 1 / m.temperature, m.slope / m.temperature, 1)
        case _:
            return _Mode(_BIT, _BY[m.backward], 1.0, 1.0, m.slope, 0)


def _address(t: Tensor | None) -> int | None:
    assert t is None or t.is_contiguous()
    return None if t is None else t.data_ptr()


def _window(kind: str, precision: str, modes: tuple[Discretize, ...], x_pre: Tensor, tensors: dict[str, Tensor | None]) -> _Window:
    steps, batch, _, hidden = x_pre.shape
    lo = tensors["lo"]
    assert lo is not None
    head = (_CELLS[kind], PRECISIONS[precision], torch.get_num_threads(), steps, batch, hidden, lo.shape[1] // hidden)
    return _Window(*head, (_Mode * 3)(*map(_mode, modes)), *(_address(tensors.get(name)) for name in _POINTERS))


def _call(function: Any, window: _Window) -> None:
    if function(ctypes.byref(window)):
        raise MemoryError("the training kernels ran out of memory; lower train.batch_size or train.window")


def _check_shapes(x_pre: Tensor, weight: Tensor, gates_bias: Tensor, bias: Tensor | None, *states: Tensor | None, kind: str) -> None:
    """C trusts what it is told: every size and dtype is checked here. Raises ValueError."""
    (steps, batch, blocks, hidden), (gates, width) = x_pre.shape, gates_bias.shape
    h0, c0, lo, hi, noise = states
    wanted: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("weight", weight, (blocks * hidden, hidden)),
        ("bias", bias, (hidden,)),
        ("h0", h0, (batch, hidden if kind == "lstm" else width)),
        ("c0", c0, (batch, width)),
        ("lo", lo, (gates, width)),
        ("hi", hi, (gates, width)),
        ("noise", noise, (steps, batch, gates, width)),
    ]
    if blocks != gates + 1 or width % hidden or (kind == "lstm") != (c0 is not None) or (kind == "gru") != (bias is not None):
        raise ValueError(f"{kind}: x_pre {tuple(x_pre.shape)} and gates_bias {tuple(gates_bias.shape)} do not belong together")
    for name, tensor, shape in wanted:
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != torch.float32):
            raise ValueError(f"{kind}: {name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; wanted {shape}, float32")


class NativeWindow(torch.autograd.Function):
    """x_pre (T,B,G+1,H), the gates' without their bias -> h (LSTM: (T,B,H), GRU: (T,B,n·H)), c (T,B,n·H) of the LSTM (the GRU: nothing),
    the gates' products (T,B,G,H): pre-activations but for `gates_bias`, input included.

    `weight` ((G+1)·H,H); `gates_bias`, levels (G,n·H); `bias` (H) of the GRU's recurrent candidate; states as wide as their traces;
    logistic noise (T,B,G,n·H) or None.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x_pre: Tensor,
        weight: Tensor,
        gates_bias: Tensor,
        bias: Tensor | None,
        h0: Tensor,
        c0: Tensor | None,
        lo: Tensor,
        hi: Tensor,
        noise: Tensor | None,
        kind: str,
        modes: tuple[Discretize, ...],
        precision: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        steps, batch, blocks, hidden = x_pre.shape
        width = gates_bias.shape[1]
        _check_shapes(x_pre, weight, gates_bias, bias, h0, c0, lo, hi, noise, kind=kind)
        learning = any(ctx.needs_input_grad)
        new = lambda *shape, like=x_pre: like.new_empty(*shape)
        t: dict[str, Tensor | None] = {
            "weight": weight.contiguous(),
            "gates_bias": gates_bias.contiguous(),
            "bias": bias,
            "lo": lo.contiguous(),
            "hi": hi.contiguous(),
            "x_pre": x_pre.contiguous(),
            "noise": noise,
            "h0": h0.contiguous(),
            "c0": None if c0 is None else c0.contiguous(),
            "h": new(steps, batch, h0.shape[1]),
            "c": new(steps, batch, width) if kind == "lstm" else None,
            "products": new(steps, batch, blocks - 1, hidden),
            "candidate": new(steps, batch, hidden if kind == "lstm" else width) if learning else None,
            "inner": new(steps, batch, hidden) if learning and kind == "gru" else None,
            "h_before": torch.empty(steps, batch, hidden, dtype=torch.bfloat16) if learning and precision == "bfloat16" else None,
        }
        kernels = library()
        assert kernels is not None
        _call(kernels.r2b_forward, _window(kind, precision, modes, x_pre, t))
        if learning:
            names = [name for name, tensor in t.items() if tensor is not None and name != "x_pre"]
            ctx.save_for_backward(*(t[name] for name in names))
            ctx.names, ctx.kind, ctx.modes, ctx.precision = names, kind, modes, precision
            ctx.set_materialize_grads(False)
        h, c, products = t["h"], t["c"], t["products"]
        assert h is not None
        assert products is not None
        return h, (h.new_empty(0) if c is None else c), products

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None, grad_gates: Tensor | None) -> tuple[Tensor | None, ...]:
        t: dict[str, Tensor | None] = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        h, h0, c0, lo, weight = (t.get(name) for name in ("h", "h0", "c0", "lo", "weight"))
        assert h is not None
        assert h0 is not None
        assert lo is not None
        assert weight is not None
        steps, batch, hidden = *h.shape[:2], weight.shape[1]
        blocks = lo.shape[0] + 1
        low = ctx.precision == "bfloat16"
        learns_levels = ctx.needs_input_grad[6] or ctx.needs_input_grad[7]
        grad_x = h.new_empty(steps, batch, blocks, hidden)
        # The LSTM's recurrent product has the gradient of x_pre.
        grad_product = torch.empty_like(grad_x, dtype=torch.bfloat16) if low else torch.empty_like(grad_x) if ctx.kind == "gru" else grad_x
        t |= {
            "grad_h": None if grad_h is None else grad_h.contiguous(),
            "grad_c": None if grad_c is None or ctx.kind == "gru" else grad_c.contiguous(),
            "grad_gates": None if grad_gates is None else grad_gates.contiguous(),
            "grad_x": grad_x,
            "grad_product": None if grad_product is grad_x else grad_product,
            "grad_h0": torch.empty_like(h0),
            "grad_c0": None if c0 is None else torch.empty_like(c0),
            "grad_bias": torch.zeros_like(lo),
            "grad_lo": torch.zeros_like(lo) if learns_levels else None,
            "grad_hi": torch.zeros_like(lo) if learns_levels else None,
        }
        kernels = library()
        assert kernels is not None
        _call(kernels.r2b_backward, _window(ctx.kind, ctx.precision, ctx.modes, grad_x, t))
        before = t["h_before"] if low else fold(torch.cat([h0[None], h[:-1]]), h.shape[2] // hidden)
        assert before is not None
        d_weight = (grad_product.flatten(2).flatten(0, 1).t() @ before.flatten(0, 1)).to(weight.dtype)
        d_bias = None
        if t.get("bias") is not None:
            d_bias = grad_product[:, :, 2].sum((0, 1), dtype=torch.float32)
        return grad_x, d_weight, t["grad_bias"], d_bias, t["grad_h0"], t["grad_c0"], t["grad_lo"], t["grad_hi"], None, None, None, None


class LowProduct(torch.autograd.Function):
    """x (N,K) · weight (M,K)ᵀ + bias (M) -> (N,M) float32, operands rounded to bfloat16, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        kernels = library()
        assert kernels is not None
        x, weight = x.contiguous(), weight.contiguous()
        y = x.new_empty(x.shape[0], weight.shape[0])
        sizes = (ctypes.c_int32(n) for n in (x.shape[0], x.shape[1], weight.shape[0], torch.get_num_threads()))
        if kernels.r2b_linear(*(ctypes.c_void_p(a.data_ptr()) for a in (x, weight, bias.contiguous(), y)), *sizes):
            raise MemoryError("the training kernels ran out of memory; lower train.batch_size or train.window")
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        low = grad.to(torch.bfloat16)
        d_x = (low @ weight.to(torch.bfloat16)).to(x.dtype) if ctx.needs_input_grad[0] else None
        return d_x, (low.t() @ x.to(torch.bfloat16)).to(x.dtype), grad.sum(0)
