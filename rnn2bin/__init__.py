"""rnn2bin: pretrained recurrent networks with binary gates.

>>> import rnn2bin
>>> result = rnn2bin.convert("model.pt", recipe="anneal.yaml", data="data.npz", out="OUT")   # doctest: +SKIP
>>> model = rnn2bin.load("OUT")                                                              # doctest: +SKIP
>>> y, state = model(x)                                                                      # doctest: +SKIP

Importing the package imports neither torch nor transformers; they come with the first call that needs them. No module bears the name of
a function here: importing it would replace the function.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from rnn2bin import hub

if TYPE_CHECKING:
    import torch

    from rnn2bin.loaders import Inspection
    from rnn2bin.pipeline import Result
    from rnn2bin.recipe import Recipe
    from rnn2bin.runtime import graph_backend, native_backend, torch_backend

    Model = native_backend.Model | graph_backend.Model | torch_backend.Model

__version__ = "0.1.0"
__all__ = ["Recipe", "binarize", "convert", "evaluate", "inspect", "load"]

hub.install()  # AutoConfig and AutoModel know a packed directory from here on


def __getattr__(name: str) -> Any:
    """`rnn2bin.Recipe`, imported when asked for: pydantic takes a while."""
    if name == "Recipe":
        from rnn2bin.recipe import Recipe

        return Recipe
    raise AttributeError(f"module 'rnn2bin' has no attribute {name!r}")


def convert(source: str | Path | torch.nn.Module, **options: Any) -> Result:
    """Convert a pretrained network; see `rnn2bin.pipeline.convert` for the options and errors."""
    from rnn2bin import pipeline

    return pipeline.convert(source, **options)


@overload
def load(path: str | Path, *, backend: str | None = None, device: str = "cpu", module: None = None, **options: Any) -> Model: ...
@overload
def load(
    path: str | Path, *, backend: str | None = None, device: str = "cpu", module: torch.nn.Module, **options: Any
) -> torch.nn.Module: ...
def load(
    path: str | Path, *, backend: str | None = None, device: str = "cpu", module: torch.nn.Module | None = None, **options: Any
) -> Any:
    """A packed directory as a model: `y, state = model(x)`; see `rnn2bin.runtime.load` for backends and their options.

    What `convert` made of an nn.Module is loaded with `module`, the float module (its code is not packed), and is such a module again.
    Raises UsageError where one is given and the other packed.
    """
    from rnn2bin import runtime

    if module is not None:
        from rnn2bin import modules

        return modules.load_module(path, module).to(device)
    return runtime.load(path, backend=backend, device=device, **options)


def evaluate(source: str | Path, packed: str | Path, *, data: Any = None) -> dict[str, Any]:
    """What binarization cost: the measured fields of report.json; see `rnn2bin.pipeline.evaluate_files`."""
    from rnn2bin import pipeline

    return pipeline.evaluate_files(source, packed, data=data)


def inspect(path: str | Path, *, source: Any = None) -> Inspection:
    """What is in a file; runs no code from it. See `rnn2bin.loaders.inspect`."""
    from importlib import import_module

    return import_module("rnn2bin.loaders").inspect(path, source=source)


def binarize(module: torch.nn.Module, *, recipe: str | Path | Recipe = "anneal.yaml") -> torch.nn.Module:
    """A copy of `module` with every LSTM and GRU layer replaced by a binary-gated one; see `rnn2bin.modules.binarize`."""
    from rnn2bin import modules

    return modules.binarize(module, recipe=recipe)
