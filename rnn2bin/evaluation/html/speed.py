"""Time a step against other runtimes, where `rnn2bin bench --save` measured it."""

from __future__ import annotations

from typing import Any

from rnn2bin.evaluation.html.words import Report, finite, get, percent, significant

BUSY = 1.5  # load average from which times are not those of a core at rest
CALLS = {"sequence": "A sequence at once", "stream": "One step a call"}


def rival(name: str) -> str:
    """ "ort int8" -> "onnxruntime int8"."""
    runtime, _, kind = name.partition(" ")
    return f"{ {'ort': 'onnxruntime', 'torch': 'PyTorch', 'openvino': 'OpenVINO'}.get(runtime, runtime) } {kind}".strip()


def timed(report: Report) -> list[Report]:
    """The rows of `speed` in the arithmetic that is the default: the fastest by chance would flatter."""
    rows = [row for row in get(report, "speed", "rows") or [] if finite(row.get("us_per_step")) and row["us_per_step"] > 0]
    return [row for row in rows if row.get("compute") == "auto"] or rows


def fastest(report: Report) -> Report | None:
    return min(timed(report), key=lambda row: row["us_per_step"], default=None)


def speed(report: Report) -> list[dict[str, Any]]:
    """One panel for each way to call: bars of µs a step, ours and the rivals', the fastest first."""
    return [_panel(row) for row in timed(report)]


def _panel(row: Report) -> dict[str, Any]:
    rivals = {name: one for name, one in (row.get("rivals") or {}).items() if finite(one.get("us_per_step"))}
    most = max([row["us_per_step"], *(one["us_per_step"] for one in rivals.values())])
    bars = [_bar("rnn2bin", row["us_per_step"], most, "", ours=True)]
    bars += [_bar(rival(name), one["us_per_step"], most, _ratio(one), ours=False) for name, one in rivals.items()]
    steps = row.get("steps_per_call")
    title = CALLS.get(str(row.get("call")), str(row.get("call")))
    about = [f"{steps} steps a call" if finite(steps) and steps > 1 else "", f"batch {row.get('batch')}"]
    about += [f"{row.get('compute')} arithmetic", f"{percent(row.get('density'))} of the weights asked for"]
    return {"title": title, "about": ", ".join(part for part in about if part), "bars": sorted(bars, key=lambda bar: bar["value"])}


def _bar(name: str, value: float, most: float, ratio: str, *, ours: bool) -> dict[str, Any]:
    return {
        "name": name,
        "value": value,
        "width": round(100 * value / most, 2),
        "text": f"{significant(value, 3)} µs",
        "ratio": ratio,
        "ours": ours,
    }


def _ratio(one: Report) -> str:
    """ "1.8 × (1.7 to 1.9)": the rival's time in ours, with its interval."""
    if not finite(one.get("ratio")):
        return ""
    ends = list(one.get("ci95") or ())
    interval = f" ({significant(ends[0], 3)} to {significant(ends[1], 3)})" if len(ends) == 2 and all(map(finite, ends)) else ""
    return f"{significant(one['ratio'], 3)} ×{interval}"


def machine(report: Report) -> str:
    found = get(report, "speed", "machine") or {}
    versions = found.get("versions") if isinstance(found.get("versions"), dict) else {}
    parts = [str(found.get("cpu") or ""), str(found.get("isa") or ""), *(f"{name} {number}" for name, number in (versions or {}).items())]
    load = found.get("load_average")
    busy = "; other programs ran beside it" if finite(load) and load > BUSY else ""
    return ", ".join([*(part for part in parts if part), *([f"load average {load:.1f}{busy}"] if finite(load) else [])])
