"""YAML -> Recipe, and back. All problems are raised at once, each as `file:line:column: knob: what is wrong and what is allowed`.

Three steps: compose the text to nodes that know their place; set the `--set` values into that tree; validate its plain data and
put pydantic's findings back onto the nodes. The recipe's own rules stand in `rnn2bin.recipe`; only reading and wording live here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from rnn2bin.errors import RecipeError
from rnn2bin.recipe import Recipe
from rnn2bin.yaml_tree import MAX_BYTES, Composer, Dumper, KnobPath, Node, Place, Problem, dotted, show

MOST_OPTIONS = 20  # of a knob, listed where one of them was wanted; of more the nearest is named


# ---- overrides ----


def _apply(root: Node, override: str, order: int) -> list[Problem]:
    """Set one `a.b=v` into the tree; the problems found."""
    name, equals, text = override.partition("=")
    path: KnobPath = tuple(name.strip().split("."))
    place = Place(f"--set {show(name)}{equals}{show(text)}", (order, 0, 0), path)
    if not equals or not name.strip():
        return [Problem(place, path, "write it as name=value, e.g. train.steps=2000")]
    composer = Composer(text, lambda _line, _column: place)
    if composer.broken:
        return composer.problems
    node = composer.root or Node(None, place)
    node.key = place
    problem = _set(root, path, node, place)
    return composer.problems + ([problem] if problem else [])


def _set(root: Node, path: KnobPath, value: Node, place: Place) -> Problem | None:
    """Put `value` at `path`, making the maps on the way from the recipe's defaults."""
    parent = root
    for depth, part in enumerate(path):
        siblings, key = parent.children, part
        if isinstance(siblings, list):
            if not str(part).isdecimal() or len(str(part)) > 6 or int(part) >= len(siblings):
                whole = f"{dotted(path[:depth])} is a list of {len(siblings)}"
                return Problem(place, path, f"{whole} and has no position {show(str(part))}")
            key = int(part)
        elif siblings is None:
            message = f"{dotted(path[:depth])} is one value and has no key {show(str(part))}"
            return None if parent.refused else Problem(place, path, message)
        if depth == len(path) - 1:
            siblings[key] = value  # type: ignore[index]
            return None
        parent = _descend(siblings, key, path[: depth + 1], place)
    return None


def _descend(siblings: Any, key: str | int, path: KnobPath, place: Place) -> Node:
    """The child at `key`; an absent or null one is made from the knob's default, so that one half of a schedule can be set."""
    absent = isinstance(siblings, dict) and (key not in siblings or (siblings[key].value is None and not siblings[key].refused))
    if absent:
        siblings[key] = _from_plain(_default(path), place)
    child: Node = siblings[key]
    return child


def _default(path: KnobPath) -> Any:
    """What the recipe has at `path` when it is not given; an empty map where that is nothing or unknown."""
    field = _field(path)
    value = field.get_default(call_default_factory=True, validated_data={}) if field else None
    if isinstance(value, BaseModel):
        return value.model_dump()
    if field is None or value is PydanticUndefined or (value is None and _model(field.annotation)):
        return {}
    return value


def _from_plain(value: Any, place: Place) -> Node:
    if isinstance(value, dict):
        return Node({key: _from_plain(item, place) for key, item in value.items()}, place, "a map", place)
    if isinstance(value, list):
        return Node([_from_plain(item, place) for item in value], place, "a list", place)
    return Node(value, place, str(value), place)


# ---- what the recipe's models say of a path ----


def _bare(annotation: Any) -> Any:
    """Without Annotated and `| None`."""
    while (origin := get_origin(annotation)) in (Annotated, Union, UnionType):
        options = [option for option in get_args(annotation) if option is not type(None)]
        if origin is not Annotated and len(options) != 1:
            break
        annotation = options[0]
    return annotation


def _model(annotation: Any) -> type[BaseModel] | None:
    bare = _bare(annotation)
    return bare if isinstance(bare, type) and issubclass(bare, BaseModel) else None


def _types(path: KnobPath) -> Iterator[Any]:
    """The annotations met on the way to `path`, the root's first; ends early at an unknown key."""
    annotation: Any = Recipe
    yield annotation
    for part in path:
        model = _model(annotation)
        if model is not None:
            field = model.model_fields.get(str(part))
            annotation = field.annotation if field else None
        else:
            annotation = next(reversed(get_args(_bare(annotation))), None)  # list[T], dict[str, T]
        if annotation is None:
            return
        yield annotation


def _model_at(path: KnobPath) -> type[BaseModel] | None:
    found = list(_types(path))
    return _model(found[-1]) if len(found) == len(path) + 1 else None


def _field(path: KnobPath) -> FieldInfo | None:
    model = _model_at(path[:-1])
    return model.model_fields.get(str(path[-1])) if model else None


# ---- validation, and its words ----


def _validate(root: Node) -> tuple[Recipe | None, list[tuple[str, Problem]]]:
    """The recipe, or pydantic's findings as (type, problem). Strict: a text is no number and `yes` no boolean."""
    try:
        return Recipe.model_validate(root.plain(), strict=True), []
    except ValidationError as error:
        details = _one_a_knob(error.errors(include_url=False, include_input=False))
        return None, [(each["type"], problem) for each in details if (problem := _problem(root, each))]


def _one_a_knob(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Of a knob that is a number or a word pydantic finds fault with both, each under a name of its own: one finding, about the number."""
    found: list[ErrorDetails] = []
    for each in details:
        knob = tuple(part for part in each["loc"] if part != "[key]")[:-1]
        field = _field(knob) if knob else None
        if field is not None and get_origin(_bare(field.annotation)) in (Union, UnionType):
            word = each["type"] == "literal_error"
            if word and found and found[-1]["loc"] == knob:
                context = found[-1].get("ctx", {}) | {"words": each["ctx"]["expected"]}
                found[-1] = {**found[-1], "ctx": context}
                continue
            each = {**each, "loc": knob}
        found.append(each)
    return found


def _problem(root: Node, error: ErrorDetails) -> Problem | None:
    path: KnobPath = tuple(part for part in error["loc"] if part != "[key]")
    kind = error["type"]
    node = _nearest(root, path[:-1] if kind == "missing" else path)
    if node.refused:
        return None
    about_key = kind in ("extra_forbidden", "gate_name", "missing") or node.children is not None or node.given == ""
    place = node.key if about_key and node.key else node.place
    return Problem(place, path, _message(error, path, node))


def _nearest(root: Node, path: KnobPath) -> Node:
    """The node at `path`, or the last one on the way that exists."""
    node = root
    for part in path:
        try:
            node = node.value[part]
        except (KeyError, IndexError, TypeError):
            break
    return node


_WANTED = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "list_type": "must be a list, such as [a, b]",
    "dict_type": "must be a map of keys to values",
    "model_type": "must be a map of keys to values",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "too_short": "must have at least {min_length} entry",
}


def _message(error: ErrorDetails, path: KnobPath, node: Node) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return "unknown key" + _suggest(str(path[-1]), _known_keys(path[:-1]), label="keys here")
    if kind == "missing":
        field = _field(path)
        return "missing" + (f" ({field.description})" if field and field.description else "") + ": it has no default"
    if kind == "literal_error":
        options = [a or b for a, b in re.findall(r"'([^']*)'|(\d+)", context["expected"])]
        close = difflib.get_close_matches(_given(node)[:100], options, n=1) if len(options) > MOST_OPTIONS else []
        if close:
            return f"{_given(node)} is unknown here; did you mean {close[0]}?"
        return f"must be one of {', '.join(options)}; given {_given(node)}"
    if kind == "string_type":
        quotes = "" if node.children is not None or not node.given else f'; put quotes around it: "{show(node.given)}"'
        return f"must be text; given {_given(node)}{quotes}"
    if kind in _WANTED:
        words = "".join(f" or {word}" for word in re.findall(r"'([^']*)'", context.get("words", "")))
        return f"{_WANTED[kind].format(**context)}{words}; given {_given(node)}"
    return _show_message(error)


def _show_message(error: ErrorDetails) -> str:
    """The words of the recipe's own validators, and of pydantic where nothing better is known."""
    return " ".join(error["msg"].removeprefix("Value error, ").split())


def _given(node: Node) -> str:
    if isinstance(node.value, list | dict):
        return node.given if node.value else f"an empty {node.given.removeprefix('a ')}"
    return show(node.given) or "nothing"


def _known_keys(path: KnobPath) -> list[str]:
    model = _model_at(path)
    return list(model.model_fields) if model else []


def _suggest(word: str, known: Sequence[str], *, label: str) -> str:
    close = difflib.get_close_matches(word[:100], known, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; {label}: {', '.join(known)}" if known else ""


# ---- the public functions ----


def read(path_or_name: str | Path, *, overrides: Sequence[str] = (), source: str | Path | None = None) -> Recipe:
    """The recipe in a file, or the bundled one of that name, with `a.b=v` overrides set in order.

    `source`: another recipe, of which only what it says of the network's file and the data is taken: `task`, `metric` and `source`.
    Raises RecipeError with every reason found, in the file and in the overrides: no such recipe, larger than 1 MiB,
    not UTF-8, not YAML, or values that do not fit.
    """
    text, name = _named(path_or_name)
    return _resolve_recipe(text, name, overrides, about=None if source is None else _named(source))


def _named(path_or_name: str | Path) -> tuple[str, str]:
    """A recipe's text, and what to call it in reasons: a bundled one needs no directory to be recognized."""
    path = find(path_or_name)
    return _text(path), str(path) if path == Path(path_or_name) else path.name


def resolve(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    *,
    source: str | Path | None = None,
    seed: int | None = None,
    max_drop: float | None = None,
    max_density: float | None = None,
) -> Recipe:
    """The recipe of a command: a file, a bundled name or a Recipe, with its overrides, then what has an option of its own.

    `source`: as in `read`; a Recipe has its own.
    """
    named = {"seed": seed, "report.max_drop": max_drop, "report.max_density": max_density}
    extra = [*overrides, *(f"{name}={value}" for name, value in named.items() if value is not None)]
    return override(recipe, extra).settled() if isinstance(recipe, Recipe) else read(recipe, overrides=extra, source=source)


def plain(path: str | Path) -> dict[str, Any]:
    """A YAML file that is a map, as plain data, read as strictly as a recipe; RecipeError with every reason."""
    composer = Composer(_text(Path(path)), lambda line, column: Place(f"{path}:{line + 1}:{column + 1}", (0, line, column)))
    root, problems = composer.root, composer.problems
    if not problems and (root is None or not isinstance(root.value, dict)):
        problems = [Problem(Place(f"{path}:1:1", (0, 0, 0)), (), "must be a map of keys to values")]
    if problems or root is None:
        raise RecipeError(*dict.fromkeys(map(str, problems)))
    found: dict[str, Any] = root.plain()
    return found


def validate_text(text: str, *, name: str) -> Recipe:
    """The recipe in `text`; `name` stands for the file in the reasons. Raises RecipeError with every reason found."""
    return _resolve_recipe(text, name, ())


ABOUT_THE_FILE = ("task", "metric", "source")  # what a recipe says of a network's file and its data; the rest is how to train


def _resolve_recipe(text: str, name: str, overrides: Sequence[str], *, about: tuple[str, str] | None = None) -> Recipe:
    root, whole, problems = _composed(text, name, document=0)
    if about is not None:
        other, other_whole, more = _composed(*about, document=-1)
        kept = {knob: node for knob, node in other.value.items() if knob in ABOUT_THE_FILE}
        own = {knob: node for knob, node in root.value.items() if knob not in ABOUT_THE_FILE}
        root.value, whole, problems = own | kept, whole and other_whole, problems + more
    for order, override in enumerate(overrides, 1):
        problems += _apply(root, override, order)
    recipe, findings = _validate(root)
    # Without the file's own values, "missing" may be untrue.
    problems += [problem for kind, problem in findings if whole or kind not in ("missing", "value_error")]
    if problems or recipe is None:
        ordered = sorted(problems, key=lambda problem: problem.place.order)
        raise RecipeError(*dict.fromkeys(map(str, ordered)))
    return recipe.settled()


def _composed(text: str, name: str, *, document: int) -> tuple[Node, bool, list[Problem]]:
    """A recipe's map, whether it is whole, and what is wrong with its text; `document` orders the reasons of two files."""
    composer = Composer(text, lambda line, column: Place(f"{name}:{line + 1}:{column + 1}", (document, line, column)))
    root, whole = _root(composer, Place(f"{name}:1:1", (document, 0, 0)))
    return root, whole, composer.problems


def _root(composer: Composer, start: Place) -> tuple[Node, bool]:
    """The document's map and True; an empty one and False where it has none, so that the overrides are still checked."""
    root = composer.root
    if root is not None and isinstance(root.value, dict):
        return root, True
    if not composer.problems:
        empty = root is None or root.given == ""
        message = "empty; `version: 1` is the shortest recipe" if empty else "must be a map of keys to values"
        composer.problems.append(Problem(start, (), message))
    return Node({}, start, "a map"), False


def _text(path: Path) -> str:
    """The file's text; RecipeError where it is too large, unreadable or not UTF-8."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path}: larger than {MAX_BYTES >> 20} MiB: this is no recipe")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)  # one more than the limit: it may grow between stat and read
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, len(before) - before.rfind(b"\n")
        raise RecipeError(f"{path}:{line}:{column}: not UTF-8 text: this is no recipe") from None


def _bundled_directory() -> Path:
    package = Path(__file__).resolve().parent
    inside = package / "recipes"  # in a wheel
    return inside if inside.is_dir() else package.parent / "recipes"


def bundled() -> list[Path]:
    """The recipes that come with rnn2bin, by name."""
    return sorted(_bundled_directory().glob("*.yaml"))


def find(name: str | Path) -> Path:
    """A file of that path, else the bundled recipe of that name (`anneal` or `anneal.yaml`); RecipeError if there is neither."""
    try:
        if Path(name).is_file():
            return Path(name)
    except OSError as error:
        raise RecipeError(f"{show(str(name))}: cannot be read: {error.strerror}") from None
    names = {path.stem: path for path in bundled()}
    wanted = str(name).removesuffix(".yaml")
    if wanted in names:
        return names[wanted]
    raise RecipeError(f"{show(str(name))}: no such file or bundled recipe{_suggest(wanted, sorted(names), label='bundled')}")


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every knob, in the order of `rnn2bin.recipe`. Reading it gives the same recipe."""
    text: str = yaml.dump(recipe.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))
    return text


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def override(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """`recipe` with `a.b=v` overrides set in order; RecipeError with every reason."""
    return _resolve_recipe(dump(recipe), "recipe", overrides) if overrides else recipe


def summary(path: Path) -> str:
    """The first comment line of a recipe that is not its command: what it is for."""
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        text = line.lstrip("# ").strip()
        if not line.startswith("#"):
            break
        if text:
            return text
    return ""


def copy(name: str, target: Path, *, force: bool = False) -> Path:
    """Copy a recipe with its comments to a file or directory; RecipeError where something is there already and `force` is not given."""
    source = find(name)
    path = target / source.name if target.is_dir() else target
    if path.exists() and not force:
        raise RecipeError(f"{path}: exists already; --force replaces it")
    try:
        path.write_bytes(source.read_bytes())
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written: {error.strerror}") from None
    return path
