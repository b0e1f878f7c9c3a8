"""Reading recipes: every kind of error with its exact place, all at once; dump and read are inverse; nothing but RecipeError escapes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rnn2bin import recipe_yaml
from rnn2bin.errors import RecipeError
from rnn2bin.recipe import Recipe
from rnn2bin.recipe_yaml import bundled, dump, find, read, schema, validate_text

NAMES = {
    *("anneal", "gumbel", "slope", "smoke", "sparse", "strict"),
    *("chars2vec", "diacritics", "g2p", "g2pm", "resemblyzer", "silero_vad", "textgenrnn"),
}


def reasons(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        validate_text(text, name="r.yaml")
    return list(caught.value.reasons)


def override_reasons(*overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read("anneal", overrides=overrides)
    return list(caught.value.reasons)


# ---- the bundled recipes ----


def test_bundled_are_the_promised_ones() -> None:
    assert {path.stem for path in bundled()} == NAMES


@pytest.mark.parametrize("path", bundled(), ids=lambda path: path.stem)
def test_bundled_round_trips(path: Path) -> None:
    recipe = read(path)
    assert read(path.stem) == read(path.name) == recipe
    assert validate_text(dump(recipe), name="dumped") == recipe
    assert dump(validate_text(dump(recipe), name="dumped")) == dump(recipe)


@pytest.mark.parametrize("path", bundled(), ids=lambda path: path.stem)
def test_bundled_opens_with_its_command(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(rf"# rnn2bin convert \S+ --recipe {re.escape(path.name)} --data \S+ --out OUT", first)


@pytest.mark.parametrize("path", bundled(), ids=lambda path: path.stem)
def test_bundled_explains_every_knob(path: Path) -> None:
    text = re.sub(r"^source:\n(?:[ ].*\n)+", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)  # names of tensors are no knobs
    knobs = [line for line in text.splitlines() if re.match(r"\s*\w+: *[^#\s]", line) and line != "version: 1"]
    assert knobs
    assert [line for line in knobs if not re.search(r"  # \w.{10,}", line)] == []
    assert max(map(len, text.splitlines())) <= 140


def test_anneal_is_the_default_and_names_every_common_knob() -> None:
    assert read("anneal") == Recipe()
    text = find("anneal").read_text(encoding="utf-8")
    shown = {*re.findall(r"^  (\w+):", text, flags=re.MULTILINE)}
    wanted = {*Recipe().gates.model_dump(), *Recipe().loss.model_dump(), *Recipe().train.model_dump()}
    wanted -= {"max_steps", "reinforce"}  # the latter is one estimator's own
    assert wanted <= shown


def test_the_others_differ_where_they_say() -> None:
    assert read("gumbel").gates.slope.schedule == "constant"
    assert read("slope").gates.estimator == "hard-sigmoid"
    assert read("slope").gates.noise == 0
    assert read("strict").gates.levels == "strict"
    assert read("sparse").budget.density == 0.25
    g2p = read("g2p")
    assert g2p.task == "transduce"
    assert g2p.source is not None
    assert g2p.source.decode is not None
    assert (g2p.source.decode.start, g2p.source.decode.end, g2p.source.decode.max_length) == (2, 3, 20)


# ---- finding and opening ----


def test_a_file_goes_before_a_bundled_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "anneal").write_text("train: {steps: 7}")
    monkeypatch.chdir(tmp_path)
    assert read("anneal").train.steps == 7
    assert read(tmp_path / "anneal").train.steps == 7


@pytest.mark.parametrize("name", ["aneal", "aneal.yaml"])
def test_an_unknown_name_gets_a_suggestion(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"^{re.escape(name)}: no such file or bundled recipe; did you mean anneal\?$"):
        find(name)


@pytest.mark.parametrize("name", ["", "zzzzzz", "../recipes/zzzzzz", "x" * 5000, "a\0b", "/", "recipes", "\x1b[31m"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(name)
    assert str(caught.value).isprintable()


def test_a_large_file_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big.yaml"
    with path.open("wb") as file:
        os.truncate(file.fileno(), (1 << 20) + 1)
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("opened"))
    with pytest.raises(RecipeError, match=r"big\.yaml: larger than 1 MiB"):
        read(path)


def test_a_file_that_is_not_utf8_says_where(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"version: 1\ntask: \xff\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:2:7: not UTF-8"):
        read(path)


def test_a_byte_order_mark_and_windows_lines_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfversion: 1\r\ntrain:\r\n  steps: 5\r\n")
    assert read(path).train.steps == 5


def test_reasons_name_the_file_as_given(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("gates:\n  temprature: 1\n")
    with pytest.raises(RecipeError) as caught:
        read(path)
    assert list(caught.value.reasons) == [f"{path}:2:3: gates.temprature: unknown key; did you mean temperature?"]


# ---- each kind of error, with its place ----


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("gates:\n  temprature: 1\n", "2:3: gates.temprature: unknown key; did you mean temperature?"),
        ("loss:\n  zzz: 1\n", "2:3: loss.zzz: unknown key; keys here: task, teacher, temperature, hidden, gate"),
        ("train:\n  steps: 5\n  steps: 6\n", "3:3: train.steps: given twice, first at r.yaml:2:3"),
        ("train: {steps: many}", "1:16: train.steps: must be a whole number; given many"),
        ("train: {steps: 1.5}", "1:16: train.steps: must be a whole number; given 1.5"),
        ('train: {steps: "64"}', '1:16: train.steps: must be a whole number; given "64"'),
        ("train: {steps: 0}", "1:16: train.steps: must be at least 1; given 0"),
        ("train: {clip: true}", "1:15: train.clip: must be a number; given true"),
        ("train: {clip: .inf}", "1:15: train.clip: must be a finite number; given .inf"),
        ("train: {clip: -1e-4}", "1:15: train.clip: must be more than 0; given -1e-4"),
        ("data: {valid: 1.5}", "1:15: data.valid: must be at most 1; given 1.5"),
        ("data: {path: 12}", '1:14: data.path: must be text; given 12; put quotes around it: "12"'),
        ("data: {path: true}", '1:14: data.path: must be text; given true; put quotes around it: "true"'),
        ("report: {controls: yes}", "1:20: report.controls: must be true or false; given yes"),
        ("gates: {levels: on}", "1:17: gates.levels: must be one of learned, strict; given on"),
        ("version: 2", "1:10: version: must be one of 1; given 2"),
        ("version: true", "1:10: version: must be the number 1"),
        ("gates: {soft: o}", "1:15: gates.soft: must be a list, such as [a, b]; given o"),
        ("gates: {soft: [o, q]}", "1:19: gates.soft.1: no cell has a gate q; gates: i, f, o, r, z, t, g"),
        ("budget: {open: {i: 0.1, q: 0.1}}", "1:25: budget.open.q: no cell has a gate q; gates: i, f, o, r, z, t, g"),
        ("budget:\n  open: [i]\n", "2:3: budget.open: must be a map of keys to values; given a list"),
        ("gates: 3", "1:8: gates: must be a map of keys to values; given 3"),
        ("loss:\n\ngates: {}\n", "1:1: loss: must be a map of keys to values; given nothing"),
        ("gates:\n  slope:\n    start: 1\n", "2:3: gates.slope.end: missing (value from progress `until` on): it has no default"),
        (
            "source: {encoder: {cell: gru, layers: [{weight_ih: a, weight_hh: b}]}}",
            "1:1: source: give either `main`, or `encoder`, `decoder` and `decode`",
        ),
        (
            "source: {main: {cell: gru, layers: []}}",
            "1:28: source.main.layers: must have at least 1 entry; given an empty list",
        ),
        ("data: &a {valid: 0.1}", "1:7: data: anchors (&a) are not read; write the value out where it is needed"),
        ("data: *a", "1:7: data: aliases (*a) are not read; write the value out"),
        ("train:\n  steps: !!int 5\n", "2:10: train.steps: tags (!!int) are not read; write the plain value"),
        ("!!python/object:os.system {}", "1:1: tags (!!python/object:os.system) are not read; write the plain value"),
        ("? [a]\n: 1\n", "1:3: a key must be a plain word; given a list"),
        ("version: 1\n---\nversion: 1\n", "2:1: a second document starts here; a recipe is one document"),
        ("", "1:1: empty; `version: 1` is the shortest recipe"),
        ("# only this\n", "1:1: empty; `version: 1` is the shortest recipe"),
        ("[1]", "1:1: must be a map of keys to values"),
        ("task: a: b", '1:8: not valid YAML: mapping values are not allowed here; put quotes around a text with ": " in it'),
        ("gates:\n\tnoise: 1\n", "2:1: not valid YAML: found character '\\t' that cannot start any token; indent with spaces"),
        ('task: "\\UFFFFFFFF"', "1:10: not valid YAML: a number or an escaped character is out of range"),
        ("task: a\x07", "1:8: the character U+0007 is not allowed in YAML"),
        ("x: " + "[" * 5000, "1:24: nested more than 20 deep: this is no recipe"),
    ],
)
def test_error(text: str, reason: str) -> None:
    assert reasons(text) == ["r.yaml:" + reason]


def test_a_flood_is_cut_short() -> None:
    assert "more than 10000 values" in reasons("x: [" + "1," * 20_000 + "]")[0]
    assert "larger than 1 MiB" in reasons("#" * (1 << 20) + "#")[0]


def test_an_alias_bomb_is_refused_without_being_built() -> None:
    levels = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 30))
    assert "aliases (*l0)" in "\n".join(reasons(f"l0: &l0 [x]\n{levels}"))


def test_all_errors_at_once_in_the_order_of_the_file() -> None:
    text = "train:\n  steps: 0\n  stesp: 1\n  steps: 2\ngates:\n  soft: [q]\n  noise: 2\ndata: *x\nbudget: {open: {q: 2}}\n"
    assert reasons(text) == [
        "r.yaml:2:10: train.steps: must be at least 1; given 0",
        "r.yaml:3:3: train.stesp: unknown key; did you mean steps?",
        "r.yaml:4:3: train.steps: given twice, first at r.yaml:2:3",
        "r.yaml:6:10: gates.soft.0: no cell has a gate q; gates: i, f, o, r, z, t, g",
        "r.yaml:7:10: gates.noise: must be at most 1; given 2",
        "r.yaml:8:7: data: aliases (*x) are not read; write the value out",
        "r.yaml:9:17: budget.open.q: no cell has a gate q; gates: i, f, o, r, z, t, g",
        "r.yaml:9:20: budget.open.q: must be at most 1; given 2",
    ]


def test_reasons_are_printable_lines() -> None:
    found = reasons('"\\e[31m\\n": 1\ntask: "a\\nb"\ngates: {"' + "x" * 500 + '": 1}\n')
    assert len(found) == 3
    assert all(reason.isprintable() and len(reason) < 300 for reason in found)


# ---- scalars ----


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1E-4", 1e-4), ("1e4", 1e4), (".5", 0.5), ("5.", 5.0), ("+1", 1.0), ("0x10", 16.0)]
)
def test_numbers(text: str, value: float) -> None:
    assert validate_text(f"train: {{clip: {text}}}", name="r").train.clip == value


@pytest.mark.parametrize(("text", "value"), [("1e4", 10_000), ("64.0", 64), ("010", 10)])
def test_whole_numbers(text: str, value: int) -> None:
    assert validate_text(f"train: {{steps: {text}}}", name="r").train.steps == value


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "y", "1_000", "12:30", "2001-01-01"])
def test_words_of_yaml_1_1_stay_text(word: str) -> None:
    assert validate_text(f"data: {{path: {word}}}", name="r").data.path == word


def test_paths_stay_as_written(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("data: {path: ../x/./data.npz}")
    assert read(tmp_path / "r.yaml").data.path == "../x/./data.npz"


# ---- overrides ----


def test_overrides_are_set_in_order() -> None:
    recipe = read(
        "sparse",
        overrides=["train.steps=5", "train.steps=1e3", "budget.open.i=0.5", "budget.density=0.3", "gates.soft=[o, r]", "data.path=a=b"],
    )
    assert recipe.train.steps == 1000
    assert recipe.budget.open == {"i": 0.5}
    assert recipe.budget.density == 0.3
    assert recipe.gates.soft == ["o", "r"]
    assert recipe.data.path == "a=b"


def test_of_a_source_only_what_it_says_of_the_file_is_taken() -> None:
    both = recipe_yaml.resolve("sparse", ["source.readout=last"], source="g2pm")
    sparse, g2pm = recipe_yaml.read("sparse"), recipe_yaml.read("g2pm")
    assert (both.train, both.budget, both.gates, both.loss) == (sparse.train, sparse.budget, sparse.gates, sparse.loss)
    assert both.train != g2pm.train
    assert both.task == g2pm.task == "tag"
    assert both.source is not None
    assert g2pm.source is not None
    assert both.source == g2pm.source.model_copy(update={"readout": "last"})  # what is set goes before both
    assert recipe_yaml.resolve("g2p", source="sparse").source is None  # the recipe's own gives way, be it to nothing
    assert recipe_yaml.resolve("g2p", source="sparse").task == "auto"


def test_errors_of_recipe_and_source_come_together(tmp_path: Path) -> None:
    about, recipe = tmp_path / "about.yaml", tmp_path / "recipe.yaml"
    about.write_text("version: 1\ntask: nonsense\ntrain: {steps: wrong}\n")
    recipe.write_text("version: 1\ntrain: {steps: -1}\n")
    with pytest.raises(RecipeError) as caught:
        recipe_yaml.resolve(recipe, source=about)
    first, second = caught.value.reasons  # what is not taken is not judged
    assert first.startswith(f"{about}:2:7: task: ")
    assert second.startswith(f"{recipe}:2:")


def test_half_a_schedule_keeps_the_other_half() -> None:
    slope = read("smoke", overrides=["gates.slope.end=7"]).gates.slope
    assert (slope.schedule, slope.start, slope.end) == ("linear", 2.0, 7.0)
    assert read("smoke", overrides=["gates.slope={start: 1, end: 3}"]).gates.slope.end == 3


def test_overrides_reach_into_lists() -> None:
    source = read("g2p", overrides=["source.encoder.layers.0.bias_ih=null"]).source
    assert source is not None
    assert source.encoder is not None
    assert source.encoder.layers[0].bias_ih is None


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("gates.temprature=0.5", "--set gates.temprature=0.5: unknown key; did you mean temperature?"),
        ("gaets.noise=1", "--set gaets.noise=1: gaets: unknown key; did you mean gates?"),
        ("train.steps=-1", "--set train.steps=-1: must be at least 1; given -1"),
        ("train.steps.x=1", "--set train.steps.x=1: train.steps is one value and has no key x"),
        ("train.max_steps.x=1", "--set train.max_steps.x=1: train.max_steps is one value and has no key x"),
        ("gates.soft.0=o", "--set gates.soft.0=o: gates.soft is a list of 0 and has no position 0"),
        (
            "gates.slope={start: 1, edn: 2, end: 2}",
            "--set gates.slope={start: 1, edn: 2, end: 2}: gates.slope.edn: unknown key; did you mean end?",
        ),
        ("data.path=[1", "--set data.path=[1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("data=*x", "--set data=*x: aliases (*x) are not read; write the value out"),
        ("steps", "--set steps: write it as name=value, e.g. train.steps=2000"),
        ("=1", "--set =1: write it as name=value, e.g. train.steps=2000"),
        ("source.main.layers.0.weight_ih=a", None),
    ],
)
def test_override_error(override: str, reason: str | None) -> None:
    found = override_reasons(override)
    assert all(each.startswith(f"--set {override}: ") for each in found)
    assert reason is None or found == [reason]


def test_errors_of_file_and_overrides_come_together(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("gates:\n  noise: 2\n")
    with pytest.raises(RecipeError) as caught:
        read(path, overrides=["train.stesp=1", "train.clip=x"])
    assert list(caught.value.reasons) == [
        f"{path}:2:10: gates.noise: must be at most 1; given 2",
        "--set train.stesp=1: unknown key; did you mean steps?",
        "--set train.clip=x: must be a number; given x",
    ]


def test_overrides_are_checked_beside_broken_syntax(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("gates: {")
    with pytest.raises(RecipeError) as caught:
        read(path, overrides=["train.stesp=1", "source.decode.start=1"])
    assert len(caught.value.reasons) == 2
    assert caught.value.reasons[1] == "--set train.stesp=1: unknown key; did you mean steps?"


# ---- properties ----

any_text = st.text(st.characters(exclude_categories=["Cs"]))
counts = st.integers(1, 2**40)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
shares = st.floats(0, 1)
NUMERIC = {
    "train.steps": counts,
    "train.batch_size": counts,
    "seed": st.integers(0, 2**63),
    "train.learning_rate": positive,
    "train.clip": positive,
    "gates.slope.end": positive,
    "gates.noise": shares,
    "budget.open.i": shares,
    "report.max_drop": positive,
}


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries({}, optional=NUMERIC))
def test_numbers_survive_override_and_dump(values: dict[str, float]) -> None:
    recipe = read("smoke", overrides=[f"{name}={value!r}" for name, value in values.items()])
    again = validate_text(dump(recipe), name="dumped")
    assert again == recipe
    for name, value in values.items():
        found: object = again
        for part in name.split("."):
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        assert found == value


@settings(max_examples=100, deadline=None)
@given(any_text | st.sampled_from(["1e4", "on", "null", "~", "0o7", "0x1", "", " a", "- a", "*a", "1_0", "true", "\x85", "a\u2028 b"]))
def test_text_survives_dump(path: str) -> None:
    recipe = Recipe.model_validate({"data": {"path": path}})
    assert validate_text(dump(recipe), name="dumped") == recipe


def never_more_than_a_recipe_error(text: str, *overrides: str) -> None:
    found: list[str] = ["none"]
    try:
        recipe_yaml._resolve_recipe(text, "r.yaml", overrides)
    except RecipeError as error:
        found = list(error.reasons)
    assert found
    assert all(reason.isprintable() for reason in found)


PIECES = [*"{}[]:,-?&*!|>'\"%@`#~<=. \n\tab01\\xuU", "gates", "train", "steps", "open", ": ", "\n  ", "null"]
SEGMENTS = ["source", "main", "layers", "0", "gates", "soft", "budget", "open", "slope", "end", "x", ""]
yaml_like = st.lists(st.sampled_from(PIECES), max_size=60).map("".join)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200) | yaml_like, st.lists(st.text(max_size=30) | yaml_like, max_size=2))
def test_arbitrary_text_raises_only_recipe_errors(text: str, overrides: list[str]) -> None:
    never_more_than_a_recipe_error(text, *overrides)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(bundled()), st.data())
def test_a_damaged_recipe_raises_only_recipe_errors(path: Path, data: st.DataObject) -> None:
    text = path.read_text(encoding="utf-8")
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(len(text), start + 40)))
    never_more_than_a_recipe_error(text[:start] + data.draw(yaml_like) + text[end:])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(SEGMENTS), max_size=7), yaml_like)
def test_arbitrary_overrides_raise_only_recipe_errors(path: list[str], value: str) -> None:
    never_more_than_a_recipe_error("version: 1", f"{'.'.join(path)}={value}")


def test_schema_is_json_and_closed() -> None:
    found = json.loads(json.dumps(schema()))
    assert found["additionalProperties"] is False
    assert set(found["properties"]) == set(Recipe.model_fields)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.learning_rate=atuo", "must be a number or auto; given atuo"),
        ("train.learning_rate=-1", "must be more than 0 or auto; given -1"),
        ("gates.copies=atuo", "must be a whole number or auto; given atuo"),
        ("gates.output=7", "must be true or false or auto; given 7"),
        ("budget.density=x", "must be a number; given x"),
    ],
)
def test_a_knob_that_is_a_number_or_a_word_gives_one_reason(override: str, reason: str) -> None:
    assert override_reasons(override) == [f"--set {override}: {reason}"]
    assert read("anneal", overrides=[f"{override.partition('=')[0]}=auto"] if "auto" in reason else []) is not None
