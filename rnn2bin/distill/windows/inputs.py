"""What a window does with its input before the first step: one product for all of it, or for each token of a table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rnn2bin.cells.network import Lookup
from rnn2bin.distill import native

ONE_HOT_LIMIT = 512  # tokens: beyond, adding rows one by one beats the product with one-hot rows


class Rows(torch.autograd.Function):
    """table (V,M), index (N,) -> table[index] (N,M). torch adds up the gradient's rows slowly: the native kernels do it instead, or, for
    small tables, one product with one-hot rows."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(index)
        ctx.size = table.shape[0]
        return table.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        if is_native(grad):
            return native.add_rows(grad, index.long(), ctx.size), None
        if ctx.size > ONE_HOT_LIMIT:
            return grad.new_zeros(ctx.size, grad.shape[1]).index_add_(0, index, grad), None
        one_hot = torch.zeros(ctx.size, len(index), dtype=grad.dtype, device=grad.device).scatter_(0, index[None].long(), 1)
        return one_hot @ grad, None


def is_native(x: Tensor) -> bool:
    """Whether the native kernels take tensors like this one."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and native.library() is not None


def input_product(x: Tensor | Lookup, weight: Tensor, *, bias: Tensor | None = None, precision: str = "float32") -> Tensor:
    """x (T,B,I) · weightᵀ + bias -> (T,B,M). For tokens of a small vocabulary the product is made once for each token, not
    for each step. No bias: it belongs to the native kernels, and so does the product, in their `precision`."""
    tokens = x if isinstance(x, Lookup) and x.size <= x.index.numel() else None
    rows = tokens.table if tokens else x.rows(weight.dtype) if isinstance(x, Lookup) else x
    if rows is None:
        product = weight.t() if bias is None else bias + weight.t()
    elif bias is None:
        product = native.Product.apply(rows.flatten(0, -2), weight, precision)
    else:
        product = torch.addmm(bias, rows.flatten(0, -2), weight.t())
    if tokens:
        return Rows.apply(product, tokens.index.flatten()).view(*tokens.index.shape, -1)
    steps, batch = x.index.shape if isinstance(x, Lookup) else x.shape[:2]
    return product.view(steps, batch, -1)
