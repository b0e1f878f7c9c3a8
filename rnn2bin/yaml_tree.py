"""YAML text as a tree of values that know their places: one document, no aliases, anchors or tags, nothing larger than a recipe.

`problems` of a Composer holds everything that was wrong, each with its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 20  # an honest recipe nests 6 deep; more is an attack on the stack
MAX_NODES = 10_000

KnobPath = tuple[str | int, ...]  # keys and list indices from the recipe's root to a value

_TAG = "tag:yaml.org,2002:"
_CORE = {  # YAML 1.2 core schema; pyyaml's own is 1.1, where `on` is a boolean and `1e-4` a string
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    "float": r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
_RESOLVERS = {None: [(_TAG + kind, re.compile(rf"(?:{pattern})\Z")) for kind, pattern in _CORE.items()]}


class Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS


class Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        return True  # the reader refuses them


def _quoted(dumper: Dumper, value: str) -> yaml.ScalarNode:
    """In double quotes where YAML takes a character for a line break that would not come back."""
    style = '"' if any(c in value for c in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)  # type: ignore[no-any-return]


Dumper.add_representer(str, _quoted)


class Place(NamedTuple):
    """Where something was written; `base` is the knob that the label already names (`--set a.b=v`)."""

    label: str
    order: tuple[int, int, int]
    base: KnobPath = ()


class Problem(NamedTuple):
    place: Place
    path: KnobPath
    message: str

    def __str__(self) -> str:
        knob = "" if self.path == self.place.base else dotted(self.path) + ": "
        return f"{self.place.label}: {knob}{self.message}"


@dataclass
class Node:
    """A value and its place. `key` is the place of the key that names it; `given` the text as written."""

    value: Any  # scalar, dict[str, Node] or list[Node]
    place: Place
    given: str = ""
    key: Place | None = None
    refused: bool = False  # a problem is already recorded: what validation says of it would only confuse

    @property
    def children(self) -> dict[str, Node] | list[Node] | None:
        return self.value if isinstance(self.value, dict | list) else None

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value


def dotted(path: KnobPath) -> str:
    return ".".join(show(str(part)) for part in path)


def show(text: str) -> str:
    """On one line, printable (no terminal escapes from a stranger's file), and short."""
    text = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    return text if len(text) <= 60 else text[:57] + "…"


# ---- text -> tree ----


class TooMuchError(yaml.MarkedYAMLError):
    """The text is YAML, but larger or deeper than any recipe."""


class Composer:
    """Composes one document; `problems` holds what was wrong, `broken` says that the text ended early for it."""

    def __init__(self, text: str, place: Callable[[int, int], Place]) -> None:
        self._place = place
        self._nodes = 0
        self._loader: Any = None  # pyyaml is typed in part only
        self.problems: list[Problem] = []
        self.broken = False
        self.root = self._guarded(text)

    def _guarded(self, text: str) -> Node | None:
        """The document, or None with the problem recorded."""
        if len(text) > MAX_BYTES:
            self._break(self._place(0, 0), f"larger than {MAX_BYTES >> 20} MiB: this is no recipe")
        try:
            self._loader = Loader(text)
            return self._document()
        except yaml.reader.ReaderError as error:
            before = text[: error.position]
            place = self._place(before.count("\n"), len(before) - before.rfind("\n") - 1)
            self._break(place, f"the character U+{ord(text[error.position]):04X} is not allowed in YAML")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self._break(self._at(mark), _syntax_message(error))
        except (ValueError, OverflowError):  # pyyaml leaves `"\UFFFFFFFF"` and `%YAML 1.<5000 digits>` to Python
            mark = self._loader.get_mark() if self._loader else None
            self._break(self._at(mark), "not valid YAML: a number or an escaped character is out of range")
        return None

    def _break(self, place: Place, message: str) -> None:
        self.broken = True
        self._refuse(place, (), message)

    def _refuse(self, place: Place, path: KnobPath, message: str) -> None:
        self.problems.append(Problem(place, path or place.base, message))

    def _at(self, mark: Any) -> Place:
        return self._place(mark.line, mark.column) if mark else self._place(0, 0)

    def _next(self) -> yaml.Event:
        event: yaml.Event = self._loader.get_event()
        return event

    def _document(self) -> Node | None:
        self._next()  # stream start
        if isinstance(self._next(), yaml.StreamEndEvent):
            return None
        root = self._node(self._next(), (), None)
        self._next()  # document end
        following = self._next()
        if not isinstance(following, yaml.StreamEndEvent):
            self._refuse(self._at(following.start_mark), (), "a second document starts here; a recipe is one document")
        return root

    def _node(self, event: yaml.Event, path: KnobPath, key: Place | None) -> Node:
        self._limits(event, path)
        place = self._at(event.start_mark)
        base = place.base + path
        if isinstance(event, yaml.AliasEvent):
            self._refuse(place, base, f"aliases (*{show(str(event.anchor))}) are not read; write the value out")
            return Node(None, place, key=key, refused=True)
        refused = self._refuse_extras(event, place, base)
        if isinstance(event, yaml.MappingStartEvent):
            return Node(self._mapping(path), place, "a map", key, refused)
        if isinstance(event, yaml.SequenceStartEvent):
            return Node(self._sequence(path), place, "a list", key, refused)
        return self._scalar(event, place, key, refused)

    def _limits(self, event: Any, path: KnobPath) -> None:
        self._nodes += 1
        if len(path) > MAX_DEPTH:
            raise TooMuchError(problem=f"nested more than {MAX_DEPTH} deep: this is no recipe", problem_mark=event.start_mark)
        if self._nodes > MAX_NODES:
            raise TooMuchError(problem=f"more than {MAX_NODES} values: this is no recipe", problem_mark=event.start_mark)

    def _refuse_extras(self, event: Any, place: Place, path: KnobPath) -> bool:
        """Record anchors and tags. A tag changes what the value is, so the value is not judged further."""
        if event.anchor is not None:
            self._refuse(place, path, f"anchors (&{show(event.anchor)}) are not read; write the value out where it is needed")
        if event.tag is not None:
            self._refuse(place, path, f"tags ({show(event.tag.replace(_TAG, '!!'))}) are not read; write the plain value")
        return event.tag is not None

    def _scalar(self, event: Any, place: Place, key: Place | None, refused: bool) -> Node:
        plain = event.style is None
        tag = _resolve(self._loader, event.value) if plain else "str"
        given = event.value if plain else f'"{event.value}"'
        return Node(_construct(event.value, tag), place, given, key, refused)

    def _sequence(self, path: KnobPath) -> list[Node]:
        items: list[Node] = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            items.append(self._node(event, (*path, len(items)), None))
        return items

    def _mapping(self, path: KnobPath) -> dict[str, Node]:
        found: dict[str, Node] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            key = self._key(event, path)
            place = self._at(event.start_mark)
            node = self._node(self._next(), (*path, key or "?"), place)
            if key in found:
                first = found[key].key
                self._refuse(place, (*place.base, *path, key), f"given twice, first at {first.label if first else 'the start'}")
            elif key is not None:
                found[key] = node
        return found

    def _key(self, event: yaml.Event, path: KnobPath) -> str | None:
        """The key's text as written (`1`, `on` and `null` are words here); None where it is no plain word."""
        node = self._node(event, path, None)
        if isinstance(event, yaml.ScalarEvent):
            return str(event.value)
        if not node.refused:
            self._refuse(node.place, (*node.place.base, *path), f"a key must be a plain word; given {node.given}")
        return None


_SYNTAX_HINTS = {
    "'\\t'": "indent with spaces",
    "'@'": "put quotes around the text",
    "mapping values": 'put quotes around a text with ": " in it',
}


def _syntax_message(error: yaml.MarkedYAMLError) -> str:
    """pyyaml's problem in one line, with what to do for the three that people meet most."""
    problem = " ".join(str(error.problem or error.context).split())
    if isinstance(error, TooMuchError):
        return problem
    hint = next((f"; {hint}" for part, hint in _SYNTAX_HINTS.items() if part in problem), "")
    return f"not valid YAML: {show(problem)}{hint}"


def _resolve(loader: Any, text: str) -> str:
    """The kind that YAML 1.2's core schema sees in a plain scalar."""
    tag: str = loader.resolve(yaml.ScalarNode, text, (True, False))
    return tag.removeprefix(_TAG)


def _construct(text: str, kind: str) -> Any:
    """The scalar's value. `1e4` and `64.0` are whole numbers, so that they may stand for a count."""
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int" and len(text) < 300:  # longer ones overflow a float and Python's own limit
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if kind in ("int", "float"):
        number = _float(text)
        return int(number) if number.is_integer() and abs(number) < 2**53 else number
    return text


def _float(text: str) -> float:
    try:
        return float(re.sub(r"\.(?=[inIN])", "", text))  # .inf and .nan lose their dot
    except ValueError:  # a 0x… of 300 digits
        return float("inf")
