"""Schedules: temperature, slope and learning rate as pure functions of progress in [0, 1].

Closed-loop annealing is not another curve: it is progress itself that waits while the hard metric does not keep up (see `advance`).
"""

from __future__ import annotations

import math

from rnn2bin.recipe import Schedule


def value(schedule: Schedule, progress: float) -> float:
    """The scheduled value; `end` from progress `until` on."""
    at = min(max(progress / schedule.until, 0.0), 1.0)
    start, end = schedule.start, schedule.end
    match schedule.schedule:
        case "constant":
            return start
        case "linear":
            return start + (end - start) * at
        case "exponential":
            return start * (end / start) ** at
        case "cosine":
            return end + (start - end) * (1 + math.cos(math.pi * at)) / 2
        case "step":
            # `steps` equal jumps: the start value holds for the first 1/(steps+1), the end value for the last.
            jumps = min(int(at * (schedule.steps + 1)), schedule.steps)
            return start + (end - start) * jumps / schedule.steps


def advance(progress: float, step: float, *, closed_loop: bool, keeps_up: bool) -> float:
    """Progress after one training step of size `step`; with `closed_loop` it waits while the hard metric lags behind its best."""
    if closed_loop and not keeps_up:
        return progress
    return min(progress + step, 1.0)


def learning_rate_factor(done: float, *, warmup: float, final: float) -> float:
    """Share of the learning rate at `done` in [0, 1]: linear warm-up, then a cosine down to `final`."""
    if warmup > 0 and done < warmup:
        return max(done / warmup, 1e-3)
    at = min((done - warmup) / max(1 - warmup, 1e-9), 1.0)
    return final + (1 - final) * (1 + math.cos(math.pi * at)) / 2
