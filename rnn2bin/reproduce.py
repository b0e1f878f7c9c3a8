"""`rnn2bin reproduce`: run a recorded conversion again and compare the sha256 of model.safetensors, or name what differs first."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rnn2bin import data, machine, pack, pipeline, storage
from rnn2bin.errors import NotReproducedError, UnsupportedError, UsageError
from rnn2bin.files import json_file
from rnn2bin.recipe import Recipe

MOST_THREADS = 4096
Fits = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _command(value: Any) -> bool:
    given = value.get("data") or [] if isinstance(value, dict) else None
    return isinstance(given, str | list) and all(map(_text, given)) and _text(value.get("model"))


def _machine(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("threads")) is int and 0 < value["threads"] <= MOST_THREADS


def _map(value: Any) -> bool:
    return isinstance(value, dict)


# What a report must hold to be run again.
NEEDED: dict[str, Fits] = {
    "command": _command,
    **dict.fromkeys(("model_sha256", "source_sha256", "data_sha256"), _text),
    "recipe": _map,
    "machine": _machine,
    "versions": _map,
}


def reproduce(
    report: Path, *, model: Path | None = None, given: Sequence[str] | None = None, progress: pipeline.Progress | None = None
) -> dict[str, Any]:
    """{reproduced: True, model_sha256, differences}: the weights are the same bits; `differences` of versions and machine did not matter.

    `report`: a report.json or a packed directory. `model`, `given`: where the source file and the data lie now; else where the report
    says. Runs in a temporary directory with the recorded number of threads.
    Raises UsageError where the report does not say enough, NotReproducedError with the first difference and all others, and what
    `pipeline.run` raises.
    """
    recorded = read(report)
    recipe = quiet_recipe(recorded)
    source = model if model is not None else Path(recorded["command"]["model"])
    spec = given if given is not None else recorded["command"].get("data") or None
    with _threads(recorded["machine"]["threads"]):
        job = pipeline.prepare(source, recipe, spec)
        _check("source file sha256", recorded["source_sha256"], job.loaded.provenance["sha256"])
        _check("data sha256", recorded["data_sha256"], data.digest(job.parts))
        around = surroundings(recorded, recipe)
        with tempfile.TemporaryDirectory(prefix="rnn2bin-reproduce-") as folder:
            out = Path(folder) / "OUT"
            pipeline.run(source, recipe, spec, out, progress=progress)
            found = storage.sha256(out / pack.WEIGHTS)
            if found != recorded["model_sha256"]:
                weights = tensors(report if report.is_dir() else report.parent, out, recorded["model_sha256"])
                raise NotReproducedError(*(f"not reproduced: {line}" for line in (*around, *weights)))
    return {"reproduced": True, "model_sha256": found, "differences": around}


def read(report: Path) -> dict[str, Any]:
    """The provenance of a report; UsageError where it is none, or says too little to run it again. UnsafeError as `files.json_file`."""
    file = report / "report.json" if report.is_dir() else report
    if not file.exists():
        raise UsageError(f"{file}: no such report; give the report.json of a packed directory, or the directory")
    try:
        recorded = json_file(file).get("provenance")
    except (UnsupportedError, OSError):
        recorded = None
    if not isinstance(recorded, dict):
        raise UsageError(f"{file}: not a report of rnn2bin")
    missing = [name for name in NEEDED if name not in recorded]
    if missing:
        raise UsageError(f"{file}: does not record {', '.join(missing)}: an older rnn2bin wrote it; convert again to have it recorded")
    if recorded["command"] is None:
        raise UsageError(f"{file}: records the conversion of an nn.Module, which only the code that made the module can run again")
    if wrong := [name for name, fits in NEEDED.items() if not fits(recorded[name])]:
        raise UsageError(f"{file}: {', '.join(wrong)}: not as rnn2bin writes a report")
    return recorded


def quiet_recipe(recorded: dict[str, Any]) -> Recipe:
    """The recorded recipe without what is only reported: that does not change the weights. Two limits do: they were searched by."""
    try:
        limits = {name: recorded["recipe"]["report"].get(name) for name in ("max_drop", "max_density")}
        kept = limits if None not in limits.values() else {}
        return Recipe.model_validate({**recorded["recipe"], "report": {"controls": False, **kept}})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UsageError(f"the report's recipe is not one of this version ({str(error).splitlines()[0]})") from None


def surroundings(recorded: dict[str, Any], recipe: Recipe) -> list[str]:
    """What differs in versions and machine: "torch: 2.13.0 then, 2.14.0 now", in the order in which it is likely to matter."""
    then = {**recorded["versions"], **recorded["machine"]}
    now = {**machine.versions(), **machine.computing(recipe.train.precision)}
    return [f"{name}: {_said(then[name])} then, {_said(now.get(name))} now" for name in then if then[name] != now.get(name)]


def _said(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def tensors(then: Path, now: Path, model_sha256: str) -> list[str]:
    """The first tensor that differs and by how much, where the recorded weights still lie beside the report."""
    old = then / pack.WEIGHTS
    if not old.is_file() or storage.sha256(old) != model_sha256:
        return ["the weights are others, and those of the report do not lie beside it to be compared"]
    before, after = load_file(old), load_file(now / pack.WEIGHTS)
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after or before[name].shape != after[name].shape:
            return [f"tensor {name} is not in both with the same shape"]
        if not torch.equal(before[name], after[name]):
            return [f"tensor {name} differs first, by up to {float((before[name].float() - after[name].float()).abs().max()):.3g}"]
    return ["the tensors are the same; the file's header is another"]


def _check(what: str, then: str, now: str) -> None:
    if then != now:
        raise NotReproducedError(f"not reproduced: {what} is {now[:12]}… and was {then[:12]}…; give the MODEL and --data of that time")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def render(found: dict[str, Any]) -> str:
    rows = [f"reproduced: model.safetensors has sha256 {found['model_sha256']} again"]
    return "\n".join([*rows, *(f"another {line}" for line in found["differences"])])
