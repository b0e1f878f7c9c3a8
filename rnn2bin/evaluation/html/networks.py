"""The table of networks: what each scored, and how much worse than the teacher it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rnn2bin.evaluation.html.words import NONE, Report, Scale, finite, fixed, get, is_share, significant, whole, words

# key in the report, or in its controls -> name and what it is
NETWORKS = {
    "teacher": ("teacher", "the float network as it was given"),
    "threshold_only": ("threshold only", "the teacher with every gate rounded to 0 or 1, not trained further"),
    "soft_student": ("soft student", "the trained network before its gates are rounded"),
    "binary": ("binary", "every decision exactly 0 or 1: what ships"),
    "native": ("binary, in C", "the same weights, run by the C kernel"),
    "sharpened_sigmoid": ("sharpened sigmoid", "control: the teacher with steeper gates, not trained further"),
    "random_gates": ("random gates", "control: the same open rates, decided by chance"),
    "float_same_compute": ("float, same training", "control: the teacher fine-tuned with the same data and steps"),
}


@dataclass(frozen=True)
class Row:
    key: str
    name: str
    about: str
    metric: str
    loss: str
    lost: str
    interval: str
    relative: str
    extra: tuple[str, ...]
    n: str


def networks_of(report: Report) -> dict[str, Report]:
    """Every network that was measured, the four of the contract first, then native, then the other controls."""
    controls = dict(get(report, "controls") or {})
    found = {"teacher": report.get("teacher"), "threshold_only": controls.pop("threshold_only", None)}
    found |= {key: report.get(key) for key in ("soft_student", "binary", "native")} | controls
    return {key: value for key, value in found.items() if isinstance(value, dict)}


def extra_names(networks: dict[str, Report]) -> list[str]:
    """Names of the further metrics, in order of appearance."""
    return list(dict.fromkeys(name for network in networks.values() for name in network.get("extra") or {}))


def _extra(name: str, value: Any) -> str:
    if not finite(value):
        return NONE if value is None else str(value)
    return f"{fixed(100 * value, 1)}%" if is_share(name) else significant(value)


def lost_by(report: Report, network: Report) -> float | None:
    """The plain difference from the teacher, positive where the network is worse."""
    here, teacher = network.get("metric"), get(report, "teacher", "metric")
    if not (finite(here) and finite(teacher)) or here is None:
        return None
    return float(teacher - here if get(report, "metric", "higher_is_better") else here - teacher)


def measured(report: Report) -> str | None:
    """Which network the report's drop is about: its own backend's choice may be the C kernel or torch."""
    networks = networks_of(report)
    losses = {key: lost_by(report, networks[key]) for key in ("binary", "native") if key in networks}
    value = get(report, "drop", "value")
    known = {key: abs(loss - value) for key, loss in losses.items() if loss is not None and finite(value)}
    return min(known, key=lambda key: known[key]) if known else None


def rows(report: Report) -> list[Row]:
    scale, networks = Scale.of(report), networks_of(report)
    extras, about_drop = extra_names(networks), measured(report)
    found = []
    for key, network in networks.items():
        drop = get(report, "drop") if key == about_drop else None
        ends, relative, lost = get(drop, "ci95"), get(drop, "relative"), lost_by(report, network)
        name, about = NETWORKS.get(key, (words(key), "control"))
        found.append(
            Row(
                key=key,
                name=name,
                about=about,
                metric=scale.value(network.get("metric")),
                loss=significant(network["loss"]) if finite(network.get("loss")) else NONE,
                lost=NONE if key == "teacher" else scale.number(lost),
                interval=f"{scale.number(ends[0])} to {scale.number(ends[1])}" if ends else "",
                relative=f"{significant(100 * relative, 2)}% of the teacher’s" if finite(relative) else "",
                extra=tuple(_extra(extra, (network.get("extra") or {}).get(extra)) for extra in extras),
                n=whole(network.get("n")),
            )
        )
    return found
