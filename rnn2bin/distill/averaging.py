"""An average of the weights of the last steps, which is measured, chosen from and shipped in place of the last step's.

Polyak & Juditsky 1992; as an exponential moving average Tarvainen & Valpola 2017 (arXiv 1703.01780). It is freed of its beginning as Adam's
means are (Kingma & Ba 2014, 1412.6980): after n steps the weights of step k count d^(n−k) (1−d) / (1−dⁿ), those before the first nothing.
Levels are weights like others: between bounds that are the same at each step, an average stays between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """Of a student's trained weights, with `decay` in [0, 1); 0: there is none, and the weights stand for themselves."""

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p for name, p in student.named_parameters() if p.requires_grad} if decay else {}
        self.means = {name: p.detach().clone(memory_format=torch.contiguous_format) for name, p in self.weights.items()}

    def update(self, step: int) -> None:
        """With the weights after this step, the first is 1."""
        if self.means:
            kept = self.decay * (1 - self.decay ** (step - 1)) / (1 - self.decay**step)
            get_ema_multi_avg_fn(kept)([*self.means.values()], [*self.weights.values()], None)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The student has the averages in here, and its own weights again, to the bit, afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, weight in self.weights.items():
            weight.data, self.means[name].data = self.means[name].data, weight.data

    def restore(self, means: Mapping[str, Tensor]) -> None:
        for name, mean in self.means.items():
            mean.copy_(means[name])
