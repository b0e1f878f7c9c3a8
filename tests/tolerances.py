"""The project's one table of tolerances. What must agree exactly is compared with torch.equal instead."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {  # dtype -> (rtol, atol)
    torch.float64: (1e-9, 1e-10),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (1e-2, 1e-3),
}


def assert_close(ours: Tensor, wanted: Tensor, *, name: str = "") -> None:
    """Same shape and dtype, and values within the dtype's tolerance."""
    rtol, atol = TOLERANCES[wanted.dtype]
    torch.testing.assert_close(ours, wanted, rtol=rtol, atol=atol, msg=lambda m: f"{name}: {m}" if name else m)
