"""transformers registration: after `import rnn2bin`, `AutoConfig`, `AutoModel` and the AutoModelFor… of its tasks
read a packed directory, with no remote code.

Registering needs the Auto classes, and importing them takes seconds and torch, which `import rnn2bin` must not cost. So nothing is imported
here: where transformers' two Auto modules are loaded already they are registered with at once, and otherwise a finder on `sys.meta_path`
does it right after either is executed, whoever imports it. Two modules, because `configuration_auto` is loaded in the middle of
`modeling_utils`: the config can be registered there, the model (which needs `modeling_utils`) only with `modeling_auto`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from rnn2bin.hub.config import Rnn2binConfig

    AutoConfig.register(Rnn2binConfig.model_type, Rnn2binConfig, exist_ok=True)


def _register_model() -> None:
    from transformers.models.auto import modeling_auto

    from rnn2bin.hub.config import Rnn2binConfig
    from rnn2bin.hub.heads import HEADS
    from rnn2bin.hub.model import Rnn2binModel

    for name, model in {"AutoModel": Rnn2binModel, **HEADS}.items():
        getattr(modeling_auto, name).register(Rnn2binConfig, model, exist_ok=True)


AFTER: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
}


class AutoModules(MetaPathFinder):
    """Finds the modules of `AFTER` as the import system would, and runs their action after them."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        action = AFTER.get(fullname)
        spec = PathFinder.find_spec(fullname, path, target) if action else None
        if action is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def then_register(module: ModuleType) -> None:
            execute(module)
            action()

        spec.loader.exec_module = then_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register now what is loaded, and the rest when it is. Harmless when called again."""
    if not any(isinstance(finder, AutoModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, AutoModules())
    for name, action in AFTER.items():
        if name in sys.modules:
            action()


def __getattr__(name: str) -> Any:
    """`Rnn2binConfig` and the models, imported when asked for."""
    from importlib import import_module

    heads = dict.fromkeys(("Rnn2binForSequenceClassification", "Rnn2binForTokenClassification", "Rnn2binForCausalLM"), "heads")
    home = {"Rnn2binConfig": "config", "Rnn2binModel": "model", "Rnn2binOutput": "model", **heads}.get(name)
    if home is None:
        raise AttributeError(f"module 'rnn2bin.hub' has no attribute {name!r}")
    return getattr(import_module(f"rnn2bin.hub.{home}"), name)
