"""Recipes as the page needs them: every knob with its meaning and bounds, from the models of rnn2bin.recipe; and what none may say."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rnn2bin import recipe_yaml
from rnn2bin.errors import RecipeError
from rnn2bin.recipe import DATA_FILES, Closed, Recipe

# What a recipe says of files lies on somebody's disk; here all of them are uploads.
HIDDEN = {"version", "source", *(f"data.{name}" for name in DATA_FILES)}
Overrides = Mapping[str, Any]


def resolve(recipe: str, *, text: str | None, source: str | None, overrides: Overrides) -> Recipe:
    """The recipe of a request: a bundled name, or YAML of its own; RecipeError with every reason."""
    lines = [f"{knob}={_yaml(value)}" for knob, value in overrides.items()]
    name = None if text is not None else _bundled(recipe)
    about = None if source is None else _bundled(source)
    if text is None:
        found = recipe_yaml.resolve(name or recipe, lines, source=about)
    else:
        found = recipe_yaml.override(recipe_yaml.validate_text(text, name="recipe"), lines).settled()
    if given := [f"data.{name}" for name in found.data.files()]:
        raise RecipeError(f"{', '.join(given)}: files of the service's machine are not read; upload them, each as a part of the data")
    return found


def _bundled(name: str) -> str:
    """Only bundled recipes have names here: a path would be a file of the service's machine."""
    names = {path.stem for path in recipe_yaml.bundled()}
    if name.removesuffix(".yaml") not in names:
        raise RecipeError(f"{name[:60]!r}: no bundled recipe; bundled: {', '.join(sorted(names))}")
    return str(next(path for path in recipe_yaml.bundled() if path.stem == name.removesuffix(".yaml")))


def _yaml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True)  # JSON is YAML


def reasons(recipe: str, *, text: str | None, source: str | None, overrides: Overrides) -> dict[str, Any]:
    """{valid, reasons, knobs: {knob: reason}}: a knob's own reason where it fails alone, so that it can stand beside it."""
    try:
        resolve(recipe, text=text, source=source, overrides=overrides)
        return {"valid": True, "reasons": [], "knobs": {}}
    except RecipeError as error:
        found, knobs = [clean(line) for line in error.reasons], {}
    for knob, value in overrides.items():
        try:
            resolve(recipe, text=text, source=source, overrides={knob: value})
        except RecipeError as error:
            knobs[knob] = alone(error.reasons[0])
    return {"valid": False, "reasons": found, "knobs": knobs}


def clean(reason: str) -> str:
    """A reason without the place of a bundled file."""
    return re.sub(r"^\S*/(?=[\w.-]+\.yaml)", "", reason)


def alone(reason: str) -> str:
    """A reason that stands beside its knob."""
    text = re.sub(r"^--set .*?: ", "", clean(reason), count=1)
    return text[:1].upper() + text[1:]


@cache
def bundled() -> tuple[dict[str, Any], ...]:
    about = lambda path: recipe_yaml.read(path).source is not None
    return tuple({"name": path.stem, "summary": recipe_yaml.summary(path), "one_network": about(path)} for path in recipe_yaml.bundled())


def shown(name: str) -> dict[str, Any]:
    """A bundled recipe: its text, and the value of every knob."""
    path = _bundled(name)
    recipe = recipe_yaml.read(path)
    with open(path, encoding="utf-8") as stream:
        text = stream.read()
    return {"name": name.removesuffix(".yaml"), "text": text, "values": {k["knob"]: value_of(recipe, k["knob"]) for k in knobs()}}


def value_of(recipe: Recipe, knob: str) -> Any:
    value: Any = recipe
    for part in knob.split("."):
        value = getattr(value, part)
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


# -- the knobs


@cache
def knobs() -> tuple[dict[str, Any], ...]:
    """Every knob of a conversion: {knob, section, kind, choices, low, high, optional, default, help}."""
    return tuple(_walk(Recipe, Recipe(), ""))


def _walk(model: type[BaseModel], defaults: BaseModel, prefix: str) -> Iterator[dict[str, Any]]:
    for name, field in model.model_fields.items():
        knob = f"{prefix}{name}"
        if knob in HIDDEN:
            continue
        value = getattr(defaults, name)
        if isinstance(value, Closed):
            yield from _walk(type(value), value, f"{knob}.")
        else:
            yield {"knob": knob, "section": knob.rpartition(".")[0].partition(".")[0] or "general", **_kind(field), "default": value,
                   "help": field.description or ""}  # fmt: skip


def _kind(field: FieldInfo) -> dict[str, Any]:
    options = list(_options(field.annotation))
    choices = [choice for one in options if get_origin(one) is Literal for choice in get_args(one)]
    types_ = {_plain(one) for one in options} - {type(None)}
    kind = next(
        (name for of, name in ((bool, "switch"), (float, "number"), (int, "count"), (list, "list"), (dict, "map")) if of in types_), None
    )
    bounds: dict[str, Any] = {}
    for one in [field, *options]:
        for rule in getattr(one, "metadata", None) or getattr(one, "__metadata__", None) or ():
            for inner in [rule, *getattr(rule, "metadata", ())]:
                _bound(inner, bounds)
    return {
        "kind": kind or ("choice" if choices else "text"),
        "choices": choices,
        "optional": type(None) in options or field.default is None,
        **{name: bounds.get(name) for name in ("low", "above", "high", "below")},
    }


def _options(annotation: Any) -> Iterator[Any]:
    """The types of a union, one by one; others as they are."""
    if get_origin(annotation) in (Union, types.UnionType):
        for one in get_args(annotation):
            yield from _options(one)
    else:
        yield annotation


def _plain(annotation: Any) -> Any:
    inner = get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation
    return get_origin(inner) or inner


def _bound(rule: Any, into: dict[str, Any]) -> None:
    for name, ours in (("ge", "low"), ("gt", "above"), ("le", "high"), ("lt", "below")):
        if (value := getattr(rule, name, None)) is not None and value is not PydanticUndefined:
            into[ours] = value
