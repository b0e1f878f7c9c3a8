"""rnn2bin: pretrained recurrent networks with binary gates.

>>> import rnn2bin
>>> result = rnn2bin.convert("model.pt", recipe="anneal.yaml", data="data.npz", out="OUT")   # doctest: +SKIP
>>> model = rnn2bin.load("OUT")                                                              # doctest: +SKIP
>>> y, state = model(x)                                                                      # doctest: +SKIP

Importing the package imports neither torch nor transformers; they come with the first call that needs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

# The subpackage of this name comes first: its import would otherwise replace the public function below.
import rnn2bin.load

from rnn2bin.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from rnn2bin.convert import Result
    from rnn2bin.load import Inspection
    from rnn2bin.runtime.torch_backend import Model

__version__ = "0.1.0"
__all__ = ["Recipe", "binarize", "convert", "evaluate", "inspect", "load"]


def convert(source: str | Path | torch.nn.Module, **options: Any) -> Result:
    """Convert a pretrained network; see `rnn2bin.convert.convert` for the options and errors."""
    from importlib import import_module

    return import_module("rnn2bin.convert").convert(source, **options)


def load(path: str | Path, *, backend: str = "torch", device: str = "cpu") -> Model:  # type: ignore[no-redef]
    """A packed directory as a model: `y, state = model(x)`; see `rnn2bin.runtime.load`."""
    from rnn2bin import runtime

    return runtime.load(path, backend=backend, device=device)


def evaluate(source: str | Path, packed: str | Path, *, data: Any = None) -> dict[str, Any]:
    """What binarization cost: the measured fields of report.json; see `rnn2bin.convert.evaluate_files`."""
    from importlib import import_module

    return import_module("rnn2bin.convert").evaluate_files(source, packed, data=data)


def inspect(path: str | Path, *, source: Any = None) -> Inspection:
    """What is in a file; runs no code from it. See `rnn2bin.load.inspect`."""
    from importlib import import_module

    return import_module("rnn2bin.load").inspect(path, source=source)


def binarize(module: torch.nn.Module, *, recipe: str | Path | Recipe = "anneal.yaml") -> torch.nn.Module:
    """A copy of `module` with every LSTM and GRU layer replaced by a binary-gated one; see `rnn2bin.modules.binarize`."""
    from rnn2bin import modules

    return modules.binarize(module, recipe=recipe)
