"""The King James Bible's characters (Debian's bible-kjv): parallel streams for training, a held-out end."""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path

import torch
from common import ROOT
from torch import Tensor

sys.path.insert(0, str(ROOT / "scripts"))
import results as public

HELD_OUT = 0.05


@functools.cache
def characters(train: int, held_out: int) -> tuple[Tensor, Tensor, int]:
    """(the first `train` characters, the first `held_out` of the last 5%, size of the alphabet), numbered in sorted order."""
    folder = Path(tempfile.gettempdir()) / "study-text"
    if not (folder / "kjv.txt").exists():
        public.make_text(folder)
    whole = (folder / "kjv.txt").read_text(encoding="utf-8")
    number = {c: n for n, c in enumerate(sorted(set(whole)))}
    cut = int(len(whole) * (1 - HELD_OUT))
    tokens = lambda text: torch.tensor([number[c] for c in text])
    return tokens(whole[: min(train, cut)]), tokens(whole[cut : cut + held_out]), len(number)


def streams(tokens: Tensor, rows: int) -> Tensor:
    """(N,) -> (T,rows): so many texts side by side."""
    return tokens[: len(tokens) // rows * rows].view(rows, -1).t().contiguous()
