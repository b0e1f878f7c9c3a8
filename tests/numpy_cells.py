"""Cells as loops in NumPy, written from the papers' equations and not from the oracle: one sequence, one copy, float64.

A reference is made of a direction's weights by name and the hidden size; it is called with x (I,), the states and what a gate makes of a
pre-activation, and gives the new states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Reference = Callable[[Array, list[Array], Callable[[Array], Array]], list[Array]]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _blocks(w: dict[str, Array], name: str, hidden: int) -> list[Array]:
    return [w[name][k : k + hidden] for k in range(0, len(w[name]), hidden)]


def peephole_full(w: dict[str, Array], hidden: int) -> Reference:
    (wi, wf, wo), (ui, uf, uo), (bi, bf, bo), (pi, pf, po) = (
        _blocks(w, f"gates.{n}", hidden) for n in ("weight_ih", "weight_hh", "bias", "peephole")
    )

    def step(x: Array, state: list[Array], gate: Callable[[Array], Array]) -> list[Array]:
        h, c = state
        i = gate(wi @ x + ui @ h + pi @ c + bi)
        f = gate(wf @ x + uf @ h + pf @ c + bf)
        c = f * c + i * np.tanh(w["candidate.weight_ih"] @ x + w["candidate.weight_hh"] @ h + w["candidate.bias"])
        o = gate(wo @ x + uo @ h + po @ c + bo)
        return [o * np.tanh(c), c]

    return step


def one_gate(kind: str) -> Callable[[dict[str, Array], int], Reference]:
    def of(w: dict[str, Array], hidden: int) -> Reference:
        def step(x: Array, state: list[Array], gate: Callable[[Array], Array]) -> list[Array]:
            (h,) = state
            new = np.tanh(w["candidate.weight_ih"] @ x + w["candidate.weight_hh"] @ h + w["candidate.bias"])
            if kind == "vanilla":
                return [new]
            f = gate(w["gates.weight_ih"] @ x + w["gates.weight_hh"] @ h + w["gates.bias"])
            return [f * h + (1 - f) * new] if kind == "minimal" else [h + f * new]

        return step

    return of


def memory(kind: str) -> Callable[[dict[str, Array], int], Reference]:
    """Each cell as it is told in "Written Memories", not as switches: which vector each part reads is written out."""

    def of(w: dict[str, Array], hidden: int) -> Reference:
        (wi, wf, wo), (ui, uf, uo), (bi, bf, bo) = (_blocks(w, f"gates.{n}", hidden) for n in ("weight_ih", "weight_hh", "bias"))
        phi = np.tanh

        def step(x: Array, state: list[Array], gate: Callable[[Array], Array]) -> list[Array]:
            candidate = lambda read: phi(w["candidate.weight_ih"] @ x + w["candidate.weight_hh"] @ read + w["candidate.bias"])
            input_of, forget_of, output_of = (
                lambda v, w_=w_, u_=u_, b_=b_: gate(w_ @ x + u_ @ v + b_) for w_, u_, b_ in ((wi, ui, bi), (wf, uf, bf), (wo, uo, bo))
            )
            if kind.startswith("prototype"):
                (s,) = state
                i, f, o = input_of(s), forget_of(s), output_of(s)
                s = f * s + i * candidate(o * s)
                return [s / np.sqrt(((s - s.mean()) ** 2).mean() + 1)] if kind == "prototype_normalized" else [s]
            differences = kind.partition("_")[2]
            s = state[1]
            if "1" in differences:
                shadow = state[0] if "3" in differences else state[2]
                looked = shadow if "2" in differences else phi(s)
                i, f, o = input_of(looked), forget_of(looked), output_of(looked)
                s = f * s + i * candidate(shadow)
            else:
                o = output_of(phi(s))
                looked = o * phi(s) if "2" in differences else phi(s)
                i, f = input_of(looked), forget_of(looked)
                s = f * s + i * candidate(o * phi(s))
            out = o * phi(s) if "3" in differences else phi(s)
            return [out, s, o * phi(s)] if differences in ("1", "12") else [out, s]

        return step

    return of


def highway(w: dict[str, Array], hidden: int) -> Reference:
    def step(x: Array, state: list[Array], gate: Callable[[Array], Array]) -> list[Array]:
        t = gate(w["gates.weight_ih"] @ x + w["gates.bias"])
        return [t * np.tanh(w["candidate.weight_ih"] @ x + w["candidate.bias"]) + (1 - t) * x]

    return step


def recurrent_highway(w: dict[str, Array], hidden: int) -> Reference:
    gates, candidates = (
        list(zip(_blocks(w, f"{p}.weight_hh", hidden), _blocks(w, f"{p}.bias", hidden), strict=True)) for p in ("gates", "candidate")
    )

    def step(x: Array, state: list[Array], gate: Callable[[Array], Array]) -> list[Array]:
        (s,) = state
        for layer, ((rt, bt), (rh, bh)) in enumerate(zip(gates, candidates, strict=True)):
            first = layer == 0
            t = gate((w["gates.weight_ih"] @ x if first else 0) + rt @ s + bt)
            s = t * np.tanh((w["candidate.weight_ih"] @ x if first else 0) + rh @ s + bh) + (1 - t) * s
        return [s]

    return step


def gated_feedback(unit: str) -> Callable[[dict[str, Array], int], Reference]:
    """Chung et al. 2015: eq. 4-6, with a bias in the global gates."""

    def of(w: dict[str, Array], hidden: int) -> Reference:
        layers = len(w["candidate.bias"]) // hidden

        def row(part: str, j: int, rows: int) -> Array:
            return w[f"{part}.weight_ih"] if j == 0 else w[f"{part}.weight_below"][(j - 1) * rows : j * rows]

        def step(x: Array, state: list[Array], gate: Callable[[Array], Array]) -> list[Array]:
            old = np.split(state[0], layers)
            star = np.concatenate(old)
            c_old = np.split(state[1], layers) if unit == "lstm" else []
            below, new, c_new = x, [], []
            for j in range(layers):
                fed = np.zeros(hidden)
                for i in range(layers):
                    number = j * layers + i
                    pre = row("global", j, layers)[i] @ below + w["global.weight_hh"][number] @ star + w["global.bias"][number]
                    matrix = w["candidate.weight_hh"][j * hidden : (j + 1) * hidden, i * hidden : (i + 1) * hidden]
                    fed = fed + gate(np.array([pre]))[0] * (matrix @ old[i])
                entered = row("candidate", j, hidden) @ below + w["candidate.bias"][j * hidden : (j + 1) * hidden]
                if unit == "tanh":
                    h = np.tanh(entered + fed)
                else:
                    count = {"gru": 2, "lstm": 3}[unit] * hidden
                    pre = row("gates", j, count) @ below + (w["gates.weight_hh"] @ old[j] + w["gates.bias"])[j * count : (j + 1) * count]
                    gates = [gate(p) for p in np.split(pre, count // hidden)]
                    if unit == "gru":
                        r, z = gates
                        h = z * old[j] + (1 - z) * np.tanh(entered + r * fed)
                    else:
                        i_, f, o = gates
                        c = f * c_old[j] + i_ * np.tanh(entered + fed)
                        c_new.append(c)
                        h = o * np.tanh(c)
                new.append(h)
                below = h
            return [np.concatenate(new), *([np.concatenate(c_new)] if c_new else [])]

        return step

    return of


MEMORIES = ("prototype", "prototype_normalized", "pseudo", *(f"pseudo_{d}" for d in ("1", "2", "3", "12", "13", "23", "123")))

REFERENCES: dict[str, Callable[[dict[str, Array], int], Reference]] = {
    "lstm_peephole_full": peephole_full,
    "rnn": one_gate("vanilla"),
    "rnn_minimal": one_gate("minimal"),
    "rnn_residual": one_gate("residual"),
    **{name: memory(name) for name in MEMORIES},
    **{f"gf_{unit}": gated_feedback(unit) for unit in ("tanh", "gru", "lstm")},
    "highway": highway,
    "recurrent_highway": recurrent_highway,
}
