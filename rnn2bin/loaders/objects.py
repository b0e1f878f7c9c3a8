"""From the values of a pickle to tensors by name: dicts of tensors, and the objects of nn.Module and TorchScript, which are never built."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rnn2bin.errors import UnsafeError
from rnn2bin.loaders.inert import Record, Symbol
from rnn2bin.loaders.tensors import ArrayRef, Held, TensorRef, UnreadTensor

MOST_VISITS = 100_000  # of dicts, modules and tensors: parts that contain each other would be walked forever
MOST_DEPTH = 64
CHECKPOINT_DEPTH = 4
SCRIPT = "__torch__"

Names = Callable[[Symbol], set[str] | None]  # the parameters and buffers of a TorchScript class, None where its code does not say


class Walk:
    """Walks one file's values. `names`: see above; none for what is no TorchScript archive."""

    def __init__(self, path: Path, *, names: Names | None = None) -> None:
        self.path, self.names = path, names
        self.visits = 0
        # A vocabulary of hundreds of thousands of words stands in many a checkpoint; no file holds more entries than bytes.
        self.entries_left = MOST_VISITS + path.stat().st_size

    def tensors(self, content: Any, group: str = "", depth: int = 0) -> Iterator[tuple[str, str, Held]]:
        """(path of the dict or module, name, tensor) for all under text keys; an optimizer's state stands under numbers and is left out."""
        if self._is_module(content):
            yield from ((group, name, tensor) for name, tensor in self._state(content, "", 0))
            return
        pairs = content.pairs if isinstance(content, Record) else content
        self._count(entries=len(pairs) if isinstance(pairs, Mapping) else 0)
        if not isinstance(pairs, Mapping) or depth > CHECKPOINT_DEPTH:
            return
        for key, value in pairs.items():
            if not isinstance(key, str):
                continue
            if _is_tensor(value):
                self._count()
                yield group, key, value
            elif isinstance(value, Mapping | Record):
                yield from self.tensors(value, f"{group}.{key}" if group else key, depth + 1)

    def _is_module(self, value: Any) -> bool:
        if not isinstance(value, Record) or not isinstance(value.made_by, Symbol):
            return False
        if value.made_by.module.split(".")[0] == SCRIPT:
            return self.names is not None
        attributes = value.attributes()
        return all(isinstance(attributes.get(part), dict) for part in ("_parameters", "_buffers", "_modules"))

    def _state(self, module: Record, prefix: str, depth: int) -> Iterator[tuple[str, Held]]:
        """What `state_dict()` would give, by its names: parameters, persistent buffers, then the submodules'."""
        self._count()
        if depth > MOST_DEPTH:
            raise UnsafeError(f"{self.path}: modules nested more than {MOST_DEPTH} deep; refused")
        own, children = self._script_parts(module) if self.names else _module_parts(module)
        for name, value in own.items():
            if isinstance(name, str) and _is_tensor(value):
                self._count()
                yield prefix + name, value
        for name, child in children.items():
            if isinstance(name, str) and self._is_module(child):
                yield from self._state(child, f"{prefix}{name}.", depth + 1)

    def _script_parts(self, module: Record) -> tuple[dict[Any, Any], dict[Any, Any]]:
        attributes = module.attributes()
        assert self.names is not None
        names = self.names(module.made_by)
        return {name: value for name, value in attributes.items() if names is None or name in names}, attributes

    def _count(self, *, entries: int = 0) -> None:
        self.visits += 1
        self.entries_left -= entries
        if self.visits > MOST_VISITS or self.entries_left < 0:
            raise UnsafeError(f"{self.path}: more than {MOST_VISITS} parts, or parts that contain each other; refused")


def _is_tensor(value: Any) -> bool:
    return isinstance(value, TensorRef | UnreadTensor) or (isinstance(value, ArrayRef) and value.numbers)


def _module_parts(module: Record) -> tuple[dict[Any, Any], dict[Any, Any]]:
    attributes = module.attributes()
    passing = attributes.get("_non_persistent_buffers_set")
    passing = {name for name in passing if isinstance(name, str)} if isinstance(passing, list) else set()
    buffers = {name: value for name, value in attributes["_buffers"].items() if name not in passing}
    return {**attributes["_parameters"], **buffers}, attributes["_modules"]


def script_names(code: Callable[[str], str | None]) -> Names:
    """Reads `__parameters__` and `__buffers__` of a class from the text of its module, which `code` gives by file name. Nothing is run."""
    texts: dict[str, str | None] = {}

    def names(symbol: Symbol) -> set[str] | None:
        file = f"code/{symbol.module.replace('.', '/')}.py"
        if file not in texts:
            texts[file] = code(file)
        begins = re.search(rf"^class {re.escape(symbol.name)}\(Module\):$", texts[file] or "", re.MULTILINE)
        if not begins:
            return None
        body = (texts[file] or "")[begins.end() :].split("\nclass ", 1)[0]
        lists = re.findall(r"^  __(?:parameters|buffers)__ = \[(.*)\]$", body, re.MULTILINE)
        return {name for found in lists for name in re.findall(r'"([^"]*)"', found)}

    return names
